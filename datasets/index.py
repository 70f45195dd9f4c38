"""The result of every dataset reader: a DatasetIndex of Samples, and the Faults that it found.

An index holds paths, sizes and boxes, never pixels. Every array is numpy on the CPU.

Boxes of every format are in continuous pixels of the UPRIGHT picture (EXIF applied, as images.read_image returns it): a
box covers x1..x2 and its width is x2 - x1. The readers convert:

    VOC      1-based inclusive corners become (xmin - 1, ymin - 1, xmax, ymax); undo with xmin = x1 + 1, xmax = x2
    COCO     x, y, width, height become corners
    YOLO     normalised center and size are multiplied by the upright width and height
    KITTI    left, top, right, bottom stay unchanged (0-based floats)

A VOC or COCO file states the size of its picture. If it is the size of the stored pixels and not that of the upright
picture (EXIF orientation 5..8), the labels were drawn on the stored pixels, and the boxes are turned. In all other
cases labels refer to the upright picture, as in annotation tools that honour EXIF. YOLO and KITTI labels always do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

ANY_CLASS = -1  # the label of an ignored region that belongs to no class (KITTI DontCare); `ignore` is True there
NO_CROWD = cast(np.ndarray, None)  # the default of Sample.crowd: __post_init__ replaces it by an array of False

Effect = Literal["picture dropped", "object dropped", "duplicate dropped", "left out", "noted"]
NO_LABEL_FILE = "no label file"  # the kind of fault for a picture that is read as one without objects


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One picture and its N objects (N may be 0).

    width, height: pixels of the upright picture.
    boxes_xyxy (N, 4) float64: continuous pixels of the upright picture.
    labels (N,) int64: 0..K-1, an index into DatasetIndex.names; ANY_CLASS only where `ignore` is True.
    ignore (N,) bool: neither learnt nor punished: VOC difficult, COCO crowd, KITTI DontCare.
    area (N,) float64: decides whether the evaluator counts an object as small, medium or large: COCO's own value (the
        mask's area), else the area of the box.
    crowd (N,) bool: the part of `ignore` that is a region of many objects and may absorb many detections (COCO
        crowd, KITTI DontCare); `ignore & ~crowd` are VOC's difficult objects. Default: no crowd.
    class_scores (N, K) float64: the share of each class in an object, rows that sum to 1 (structures.Targets). None:
        the whole object is of its label's class. All samples of an index have it, or none has.
    left_out: the class names of objects that were removed because only some classes count (datasets.subset).
    is_labelled: False for a picture of which only the pixels are known (datasets.unlabelled); it has no objects, or
        those that a teacher found.
    """

    image_path: Path
    image_id: int | str
    width: int
    height: int
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    crowd: np.ndarray = NO_CROWD
    class_scores: np.ndarray | None = None
    left_out: tuple[str, ...] = ()
    is_labelled: bool = True

    def __post_init__(self) -> None:
        if self.crowd is None:
            object.__setattr__(self, "crowd", np.zeros(len(self.labels), dtype=bool))
        count, scores = len(self.labels), self.class_scores
        rows = {name: getattr(self, name).shape for name in ("labels", "ignore", "area", "crowd")}
        if self.boxes_xyxy.shape != (count, 4) or any(shape != (count,) for shape in rows.values()):
            raise ValueError(f"{self.image_path}: rows differ: boxes_xyxy {self.boxes_xyxy.shape}, {rows}")
        if scores is not None and (scores.ndim != 2 or len(scores) != count):
            raise ValueError(f"{self.image_path}: class_scores {scores.shape}, expected ({count}, K)")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in a dataset, and its effect.

    path, line: the label file (or picture) and the line in it, where there is one.
    reason: one line: what was found and what was expected.
    kind: a few words shared by all faults of this kind; the scan counts by it.
    effect: "noted" keeps everything (a box may have been clipped). "left out" does not count as bad: objects of
        unused classes, and labels without a picture, which training never reads.
    picture: the name of its picture; empty for a fault of a whole file.
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
    category_ids: the K ids of the classes in a COCO file; None: 0..K-1.
    format: the name of its format.
    label_source: a text for messages: where the reader looked for labels.
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
