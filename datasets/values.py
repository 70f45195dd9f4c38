"""The values in annotation files: flags, numbers, ids and boxes, by one rule for every format.

The readers of datasets/ and of metrics/ use these functions, so training and evaluation agree on which object is
difficult, a crowd or unusable. Every function raises ValueError for a value without a meaning. Its message holds what
was found and what was expected; the caller adds the file and the line.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

NORM_TOLERANCE = 0.01  # fractions up to 1.01 come from rounding; larger ones are pixels or broken
EDGE_TOLERANCE = 1 + 1e-6  # pixels by which a box may pass the edge of its picture: one, and what few digits add
OVERSHOOT = 0.1  # of a side: no rounding and no sloppy hand takes a box this far past the edge
CORNERS = 0.01  # a larger share of boxes that are corners is no accident
YES = frozenset({"1", "true", "yes", "t", "y"})
NO = frozenset({"", "0", "false", "no", "f", "n", "unspecified", "none", "null"})


def read_flag(value: Any) -> bool:
    """Whether a flag (VOC difficult, COCO iscrowd or ignore) is set.

    Set: true, 1, 1.0, and the texts "1", "1.0", "true", "yes", "t", "y".
    Not set: a missing value (None), false, 0, 0.0, and the texts "", "0", "0.0", "false", "no", "f", "n", "none",
    "null", "Unspecified" (VOC's own word). Upper and lower case are equal. Any other value is a ValueError.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    word = value.strip().casefold() if isinstance(value, str) else None
    if word is not None and word in YES | NO:
        return word in YES
    try:
        as_number = read_number(value)
    except ValueError:
        as_number = math.nan
    if as_number not in (0.0, 1.0):
        raise ValueError(f"found {short(value)}, expected 0 or 1")
    return as_number == 1.0


def read_number(value: Any) -> float:
    """A finite number, given as a number or as text. ValueError for nan, inf, true, None, "1_000" and "1,5"."""
    if type(value) is float and math.isfinite(value):
        return value
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            pass
    elif isinstance(value, str) and "_" not in value:  # 1_000 is Python's spelling; no file format has it
        try:
            number = float(value)
        except ValueError:
            pass
    if not math.isfinite(number):
        raise ValueError(f"found {short(value)}, expected a finite number")
    return number


def read_area(value: Any) -> float | None:
    """The area of an object, in square pixels; None where it is missing or below 0, as exporters write for "unknown".

    COCO's evaluation would ignore an object of an area below 0 in every range of areas.
    """
    area = None if value is None else read_number(value)
    return None if area is None or area < 0 else area


def read_id(value: Any) -> int | str:
    """The id of an image or a category: a whole number (1.0 is 1) or a text, which stays a text."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"found {short(value)}, expected a whole number or a text")
    return value


def read_size(width: Any, height: Any) -> tuple[float, float] | None:
    """The stated (width, height) of a picture; None where one is missing, null, 0 or not a number."""
    try:
        size = read_number(width), read_number(height)
    except ValueError:
        return None
    return size if min(size) > 0 else None


def box_fault(x1: float, y1: float, x2: float, y2: float) -> tuple[str, str] | None:
    """(reason, kind) for corners of a file that are not a box; None for a box."""
    corners = f"{x1:g}, {y1:g}, {x2:g}, {y2:g}"
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return f"not a number: {corners}", "not a number"
    if x1 > x2 or y1 > y2:
        return f"box turned inside out: {corners}", "box turned inside out"
    if x1 == x2 or y1 == y2:
        return f"zero-size box: {corners}", "zero-size box"
    return None


def are_fractions(boxes: np.ndarray) -> bool:
    """Whether boxes (N, 4), read as pixels, are fractions of their pictures: all in 0..1, and not whole numbers."""
    return len(boxes) > 0 and bool((np.abs(boxes) <= 1 + NORM_TOLERANCE).all() and (boxes % 1 > 0).any())


def are_normalised(values: Iterable[float], width: float, height: float) -> bool:
    """Whether the numbers of a YOLO row (x and y alternate) are fractions of a picture, up to rounding.

    In a small picture NORM_TOLERANCE is less than a pixel: there a box may be longer by EDGE_TOLERANCE at each end.
    """
    more = (max(NORM_TOLERANCE, 2 * EDGE_TOLERANCE / side) for side in (width, height))
    return all(-most <= value <= 1 + most for value, most in zip(values, itertools.cycle(more)))


def far_past(boxes_xyxy: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """(N,) bool: boxes (N, 4) that leave their picture by more than OVERSHOOT of a side. sides (N, 2): its two."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    return np.any((low < -OVERSHOOT * sides) | (high > (1 + OVERSHOOT) * sides), axis=1)


def fit_as_corners(boxes_xyxy: np.ndarray, sides: np.ndarray, *, is_centered: bool) -> np.ndarray:
    """(N,) bool: boxes (N, 4) whose numbers, read as a point and a size, are corners inside their picture.

    is_centered: the point is the center, else the left top corner. sides: as in far_past.
    """
    low, size = boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    point = low + size / 2 if is_centered else low
    return np.all((point >= -1) & (point < size) & (size <= sides + 1), axis=1)


def are_corners(far: int, fitting: int, total: int) -> bool:
    """Whether a file has corners where a point and a size are read: its boxes that leave their pictures fit as these.

    far: number of boxes that are far_past; fitting: of these, the ones that fit_as_corners; total: of all boxes.
    """
    return fitting >= 3 and fitting > CORNERS * total and fitting >= 0.9 * far


def short(value: Any) -> str:
    """A value as an error message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
