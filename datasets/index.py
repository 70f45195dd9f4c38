"""The one form every dataset is read into: a DatasetIndex of Samples, and the Faults met while reading.

An index holds paths, sizes and boxes, never pixels. Every array is numpy on the CPU.

The frame of the boxes, for every format: continuous pixels of the UPRIGHT picture (EXIF applied, as
images.read_image returns it); a box covers x1..x2 and its width is x2 - x1. What each reader does to get there:

    VOC      1-based inclusive corners become (xmin - 1, ymin - 1, xmax, ymax); undo with xmin = x1 + 1, xmax = x2
    COCO     x, y, width, height as they are become corners
    YOLO     normalised center and size, times the upright width and height
    KITTI    left, top, right, bottom as they are (0-based floats)

A VOC or COCO file states the size of its picture. Where that size is the one stored in the file and not the one of
the upright picture (EXIF orientation 5..8), the labels were drawn on the stored pixels, and the boxes turn with
them. In all other cases, where nothing can be told from the size, labels refer to the upright picture, as in
annotation tools that honour EXIF; YOLO and KITTI labels always do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

ANY_CLASS = -1  # the label of an ignore region that belongs to no class (KITTI DontCare); `ignore` is True there

Effect = Literal["picture dropped", "object dropped", "duplicate dropped", "left out", "noted"]
NO_LABEL_FILE = "no label file"  # the kind of fault of a picture that is taken for one without objects


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One picture and its N objects (N may be 0).

    width, height: of the upright picture, pixels.
    boxes_xyxy (N, 4) float64: continuous pixels of the upright picture.
    labels (N,) int64: 0..K-1, an index into DatasetIndex.names; ANY_CLASS only where `ignore` is True.
    ignore (N,) bool: neither learnt nor punished: VOC difficult, COCO crowd, KITTI DontCare.
    area (N,) float64: what the evaluator sorts objects by: COCO's own value (the mask's area), else of the box.
    crowd (N,) bool: the part of `ignore` that is a region of many objects and may absorb many detections (COCO
        crowd, KITTI DontCare); `ignore & ~crowd` are VOC's difficult objects. None: no crowd.
    class_scores (N, K) float64: the share of each class in an object, rows that sum to 1 (structures.Targets). None:
        all of it is `labels`. The samples of an index have it all, or none of them has.
    left_out: the class names of the objects that are not here because only some classes count (datasets.subset).
    """

    image_path: Path
    image_id: int | str
    width: int
    height: int
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    crowd: np.ndarray | None = None
    class_scores: np.ndarray | None = None
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.crowd is None:
            object.__setattr__(self, "crowd", np.zeros(len(self.labels), dtype=bool))
        count = len(self.labels)
        rows = {name: getattr(self, name).shape for name in ("labels", "ignore", "area", "crowd")}
        scores = self.class_scores
        if self.boxes_xyxy.shape != (count, 4) or set(rows.values()) != {(count,)}:
            raise ValueError(f"{self.image_path}: rows differ: boxes_xyxy {self.boxes_xyxy.shape}, {rows}")
        if scores is not None and (scores.ndim != 2 or len(scores) != count):
            raise ValueError(f"{self.image_path}: class_scores {scores.shape}, expected ({count}, K)")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in a dataset, and what was done about it.

    path, line: the label file (or picture) and the line in it, where there is one.
    reason: one line: what was found and what was expected.
    kind: a few words that faults of one sort share; the scan counts by it.
    effect: "noted" keeps everything (a box may have been clipped). "left out" does not count as bad: objects of classes
        that were not asked for, and labels without a picture, of which nothing wrong can be learnt.
    picture: the name of the picture it belongs to; empty for a fault of a whole file.
    """

    path: str
    line: int | None
    reason: str
    kind: str = "other"
    effect: Effect = "noted"
    picture: str = ""

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line is not None else self.path
        return f"{where}: {self.reason} ({self.effect})"


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """A split of a dataset.

    names: the K class names. samples: in the order of the split's list or of the sorted file names.
    category_ids: the K ids the classes have in a COCO file; None: 0..K-1.
    format: the name of the format it was read from.
    label_source: where the labels were looked for, in words.
    """

    names: tuple[str, ...]
    samples: tuple[Sample, ...]
    faults: tuple[Fault, ...] = ()
    category_ids: tuple[int | str, ...] | None = None
    format: str = ""
    label_source: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, rows: Sequence[int]) -> "DatasetIndex":
        """The chosen samples, in the given order, without the faults (they belong to the whole)."""
        samples = tuple(self.samples[row] for row in rows)
        return DatasetIndex(self.names, samples, (), self.category_ids, self.format, self.label_source)
