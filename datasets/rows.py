"""From the raw rows of one label file to a Sample: whose pixels the boxes mean, and which rows cannot be used.

Every reader collects LabelRows and hands them to `make_sample`, so that all formats drop and keep by one rule:

    not a number, zero size, turned inside out, outside the picture     the object is dropped
    more than one pixel past the edge of the picture                    kept, clipped to the picture, noted
    up to one pixel past the edge (rounding of the source)              kept as it is
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.images import read_header, turn_boxes
from datasets.index import Effect, Fault, Sample
from errors import UserError

EDGE_TOLERANCE = 1.0  # pixels


@dataclass(eq=False)
class LabelRows:
    """The objects of one picture as parallel lists. Boxes are corners in pixels; an area of None means the box's."""

    boxes: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    difficult: list = field(default_factory=list)
    crowd: list = field(default_factory=list)
    area: list = field(default_factory=list)
    lines: list = field(default_factory=list)

    def add(self, box, label, *, difficult=False, crowd=False, area=None, line=None) -> None:
        self.boxes.append(box)
        self.labels.append(label)
        self.difficult.append(difficult)
        self.crowd.append(crowd)
        self.area.append(area)
        self.lines.append(line)


@dataclass(frozen=True, slots=True)
class Frame:
    """Upright width and height of a picture; `orientation` is what its label boxes must still be turned by (1: not)."""

    width: int
    height: int
    orientation: int = 1


class FaultLog:
    """The faults of one read, in the order met."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def add(self, path, line, reason: str, kind: str, effect: Effect, picture="") -> None:
        self.faults.append(Fault(str(path), line, reason, kind, effect, str(picture)))


def read_frame(
    image_path: Path, log: FaultLog, *, stated: tuple[int, int] | None = None, label_path: Path | None = None
) -> Frame | None:
    """The frame of a picture from its header, compared with the (width, height) its label file states.

    The header is believed. Where the stated size is that of the stored pixels of a picture that EXIF turns by 90
    degrees, the labels mean those pixels and are to be turned. None, and a fault, for a picture that does not open.
    """
    try:
        stored_width, stored_height, orientation = read_header(image_path)
    except UserError as error:
        reason = str(error).removeprefix(f"{image_path}: ")
        log.add(image_path, None, reason, "unreadable picture", "picture dropped", image_path.name)
        return None
    turned = orientation >= 5
    width, height = (stored_height, stored_width) if turned else (stored_width, stored_height)
    if stated is None or (stated == (width, height) and orientation == 1):
        return Frame(width, height)

    def note(reason: str, kind: str) -> None:
        log.add(label_path, None, reason, kind, "noted", image_path.name)

    if stated == (width, height):
        if not turned or width == height:
            note(f"EXIF orientation {orientation}; labels taken as of the upright picture", "EXIF orientation")
        return Frame(width, height)
    found = f"says {stated[0]} x {stated[1]}, the picture is {width} x {height}"
    if turned and stated == (stored_width, stored_height):
        note(f"{found} upright (EXIF orientation {orientation}); boxes turned with it", "boxes turned with EXIF")
        return Frame(width, height, orientation)
    note(f"{found}; the picture is believed", "wrong size stated")
    return Frame(width, height)


def make_sample(
    rows: LabelRows,
    frame: Frame,
    log: FaultLog,
    *,
    image_path: Path,
    image_id: int | str,
    label_path: Path,
    drop_duplicates: bool = False,
) -> Sample:
    """The Sample of the usable rows; what is unusable goes to the log. `drop_duplicates`: of rows equal in all."""
    boxes = np.array(rows.boxes, dtype=np.float64).reshape(-1, 4)
    labels = np.array(rows.labels, dtype=np.int64)
    difficult, crowd = np.array(rows.difficult, dtype=bool), np.array(rows.crowd, dtype=bool)
    if frame.orientation != 1:
        stored = (frame.height, frame.width) if frame.orientation >= 5 else (frame.width, frame.height)
        boxes = turn_boxes(boxes, frame.orientation, *stored)

    limit = np.array([frame.width, frame.height], dtype=np.float64)
    is_kept = np.ones(len(boxes), dtype=bool)
    with np.errstate(invalid="ignore", over="ignore"):
        size = boxes[:, 2:] - boxes[:, :2]  # (N, 2)
        tests = (
            ("not a number", ~np.isfinite(boxes).all(1)),
            ("box turned inside out", (size < 0).any(1)),
            ("zero-size box", (size == 0).any(1)),
            ("box outside the picture", ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= limit)).any(1)),
        )
        is_past = ((boxes[:, :2] < -EDGE_TOLERANCE) | (boxes[:, 2:] > limit + EDGE_TOLERANCE)).any(1)

    def log_row(row: int, kind: str, effect: Effect) -> None:
        corners = ", ".join(f"{value:g}" for value in boxes[row])
        reason = f"{kind}: ({corners}) in a picture of {frame.width} x {frame.height}"
        log.add(label_path, rows.lines[row], reason, kind, effect, image_path.name)

    for kind, is_faulty in tests:
        for row in np.flatnonzero(is_faulty & is_kept):
            log_row(row, kind, "object dropped")
        is_kept &= ~is_faulty
    if drop_duplicates and len(boxes) > 1:
        keys = np.column_stack((boxes, labels, difficult, crowd))
        first = np.unique(keys, axis=0, return_index=True)[1]
        is_repeated = is_kept.copy()
        is_repeated[first] = False
        for row in np.flatnonzero(is_repeated):
            log_row(row, "duplicate box", "duplicate dropped")
        is_kept &= ~is_repeated
    if (is_past & is_kept).any():
        for row in np.flatnonzero(is_past & is_kept):
            log_row(row, "box past the edge", "noted")
        clipped = np.clip(boxes, 0, np.tile(limit, 2))
        boxes = np.where(is_past[:, None], clipped, boxes)

    boxes = boxes[is_kept]
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    stated_area = [value for value, kept in zip(rows.area, is_kept) if kept]
    if any(value is not None for value in stated_area):
        area = np.array([b if a is None else a for a, b in zip(stated_area, area)], dtype=np.float64)
    ignore = (difficult | crowd)[is_kept]
    return Sample(image_path, image_id, frame.width, frame.height, boxes, labels[is_kept], ignore, area, crowd[is_kept])
