"""The inputs of every metric: ground truth and detections of a whole dataset as flat arrays, one row a box.

Images may come in any order. Rows of one image are in the order of the annotations, which breaks ties.
Boxes are xyxy in float64, in continuous pixels of the original picture: width = x2 - x1. See
`inclusive_to_continuous` for boxes that hold the indices of their first and last pixel.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import numpy as np

ANY_CLASS = -1  # the label of an ignored region that has no class, as in datasets.index
DERIVED = cast(np.ndarray, None)  # the default of a column: __post_init__ replaces it, so readers get an array


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The N annotated objects of `num_images` images. An image may have none.

    image (N,) int64: row 0..num_images-1 of the image.
    boxes_xyxy (N, 4) float64.
    labels (N,) int64: 0..K-1, an index into `names`.
    num_images: all evaluated images, with or without objects.
    names: the K class names, all different.
    crowd (N,) bool: a region of many objects. It absorbs any number of detections, by intersection over detection area.
    difficult (N,) bool: Pascal VOC's flag. metrics.voc neither rewards nor punishes hits on these.
    area (N,) float64: decides whether COCO counts an object as small, medium or large: the area of the mask where there
        is one, else of the box.
    box_area (N,) float64: width times height, for IoU. Both areas default to corner_area; a reader of files with
        x, y, width, height gives width * height itself, which differs in the last bit.
    """

    image: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray
    num_images: int
    names: tuple[str, ...]
    crowd: np.ndarray = DERIVED
    difficult: np.ndarray = DERIVED
    area: np.ndarray = DERIVED
    box_area: np.ndarray = DERIVED

    def __post_init__(self) -> None:
        count = _set_boxes(self)
        for name in ("crowd", "difficult"):
            _set(self, name, bool, (count,), default=np.zeros(count, dtype=bool))
        _set(self, "area", np.float64, (count,), default=self.box_area)
        object.__setattr__(self, "names", tuple(map(str, self.names)))
        if len(set(self.names)) != len(self.names):
            raise ValueError("a class name is given twice")
        check_range("labels", self.labels, len(self.names))
        check_range("image", self.image, self.num_images)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """The M detections of a dataset. Of equal scores in one image, the earlier row comes first.

    image (M,) int64, boxes_xyxy (M, 4) float64, scores (M,) float64, labels (M,) int64, box_area (M,) float64: see
    GroundTruth.
    """

    image: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    box_area: np.ndarray = DERIVED

    def __post_init__(self) -> None:
        count = _set_boxes(self)
        _set(self, "scores", np.float64, (count,))
        if np.isnan(self.scores).any():
            raise ValueError(f"scores: row {int(np.isnan(self.scores).argmax())} is not a number")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> "DetectionTable":
        """The rows chosen by an index or a mask (M,)."""
        return DetectionTable(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def empty() -> "DetectionTable":
        return DetectionTable(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))

    @staticmethod
    def concatenate(tables: Sequence["DetectionTable"]) -> "DetectionTable":
        if not tables:
            return DetectionTable.empty()
        return DetectionTable(*(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(DetectionTable)))

    def check(self, ground_truth: GroundTruth) -> None:
        """ValueError for a detection of an image or a class that the ground truth does not have."""
        check_range("detections' labels", self.labels, len(ground_truth.names))
        check_range("detections' image", self.image, ground_truth.num_images)


Table = TypeVar("Table", GroundTruth, DetectionTable)


def inclusive_to_continuous(table: Table) -> Table:
    """Boxes that hold their first and last pixel (Pascal VOC files: width = xmax - xmin + 1) -> continuous corners.

    x1 and y1 move by -1, which is right for VOC's 1-based pixels. 0-based boxes of both tables end up shifted by a
    pixel, which changes no metric. `area` changes too where it was the box's.
    """
    boxes = table.boxes_xyxy - np.array([1.0, 1.0, 0.0, 0.0])
    box_area = corner_area(boxes)
    if isinstance(table, DetectionTable):
        return replace(table, boxes_xyxy=boxes, box_area=box_area)
    area = np.where(table.area == table.box_area, box_area, table.area)
    return replace(table, boxes_xyxy=boxes, box_area=box_area, area=area)


def corner_area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(N, 4) -> (N,): width times height."""
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def ground_truth_from_samples(samples: Iterable[Any], names: Sequence[str]) -> GroundTruth:
    """The GroundTruth of datasets.index Samples. `image` is the position among the samples.

    `crowd` objects of a sample are crowd here, its other ignored objects difficult. An ignored region of ANY_CLASS
    (KITTI DontCare) becomes one crowd row for each class.
    """
    samples = list(samples)
    counts = [len(sample.labels) for sample in samples]
    image = np.repeat(np.arange(len(samples)), counts)

    def column(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(shape, dtype), *(np.asarray(getattr(s, name), dtype) for s in samples)])

    boxes, labels = column("boxes_xyxy", (0, 4), np.float64), column("labels", (0,), np.int64)
    crowd, area = column("crowd", (0,), bool), column("area", (0,), np.float64)
    difficult = column("ignore", (0,), bool) & ~crowd
    copies = np.where(labels == ANY_CLASS, len(names), 1)
    row = np.repeat(np.arange(len(labels)), copies)
    nth_copy = np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
    is_any = labels[row] == ANY_CLASS
    return GroundTruth(
        image=image[row],
        boxes_xyxy=boxes[row],
        labels=np.where(is_any, nth_copy, labels[row]),
        num_images=len(samples),
        names=tuple(names),
        crowd=crowd[row] | is_any,
        difficult=difficult[row] & ~is_any,
        area=area[row],
    )


def check_range(what: str, values: np.ndarray, limit: int) -> None:
    if len(values) and not (values.min() >= 0 and values.max() < limit):
        bad = int(np.argmax((values < 0) | (values >= limit)))
        raise ValueError(f"{what}: row {bad} is {values[bad]}, expected 0..{limit - 1}")


def _set_boxes(table: GroundTruth | DetectionTable) -> int:
    """Convert the shared columns to their types, check them, and return the number of rows."""
    count = len(table.labels)
    _set(table, "labels", np.int64, (count,))
    _set(table, "image", np.int64, (count,))
    _set(table, "boxes_xyxy", np.float64, (count, 4))
    if not np.isfinite(table.boxes_xyxy).all():
        raise ValueError(f"boxes_xyxy: row {int((~np.isfinite(table.boxes_xyxy)).any(1).argmax())} is not finite")
    _set(table, "box_area", np.float64, (count,), default=corner_area(table.boxes_xyxy))
    return count


def _set(table: Any, name: str, dtype: type, shape: tuple[int, ...], default: np.ndarray | None = None) -> None:
    given = getattr(table, name)
    value = np.asarray(default if given is None else given)
    if value.size == 0:
        value = value.reshape(shape)
    if value.shape != shape:
        raise ValueError(f"{name}: shape {value.shape}, expected {shape}")
    if dtype is np.int64 and value.size and not np.issubdtype(value.dtype, np.integer):
        raise ValueError(f"{name}: {value.dtype}, expected whole numbers")
    object.__setattr__(table, name, value.astype(dtype, copy=False))
