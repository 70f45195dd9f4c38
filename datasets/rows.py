"""From the raw rows of one label file to a Sample: whose pixels the boxes mean, and which rows cannot be used.

Every reader collects LabelRows and hands them to `make_sample`, so that all formats drop and keep by one rule:

    not a number, zero size, turned inside out, outside the picture     the object is dropped
    equal in all to a row before it                                     dropped as a duplicate
    more than one pixel past the edge of the picture                    kept, clipped to the picture, noted
    up to one pixel past the edge (rounding of the source)              kept as it is

A label file that states the size of its picture tells whether the picture was resized after labelling: see
refuse_resized.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.images import UNREAD, read_header, turn_boxes
from datasets.index import Effect, Fault, Sample
from errors import UserError

EDGE_TOLERANCE = 1.0  # pixels
ONE_FACTOR = 0.1  # the share of the pictures that cannot have one wrong factor by accident


@dataclass(eq=False)
class LabelRows:
    """The objects of one picture as parallel lists. Boxes are corners in pixels; an area of None means the box's.

    class_scores: of all objects, a tuple of K shares each, or of none.
    """

    boxes: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    difficult: list = field(default_factory=list)
    crowd: list = field(default_factory=list)
    area: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    class_scores: list = field(default_factory=list)

    def add(self, box, label, *, difficult=False, crowd=False, area=None, line=None, class_scores=None) -> None:
        self.boxes.append(box)
        self.labels.append(label)
        self.difficult.append(difficult)
        self.crowd.append(crowd)
        self.area.append(area)
        self.lines.append(line)
        self.class_scores.append(class_scores)


@dataclass(frozen=True, slots=True)
class Frame:
    """Upright width and height of a picture; `orientation` is what its label boxes must still be turned by (1: not)."""

    width: int
    height: int
    orientation: int = 1


class FaultLog:
    """The faults of one read, in the order met, and what the label files said of the pictures' sizes.

    stated: pictures whose label file states a size. resized: for those that have another size, the factors from the
    stated to the real width and height, and what was found.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.stated = 0
        self.resized: list[tuple[tuple[float, float], str]] = []

    def add(self, path, line, reason: str, kind: str, effect: Effect, picture="") -> None:
        self.faults.append(Fault(str(path), line, reason, kind, effect, str(picture)))


def read_frame(
    image_path: Path, log: FaultLog, *, stated: tuple[float, float] | None = None, label_path: Path | None = None
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
    log.stated += stated is not None
    turned = orientation >= 5
    width, height = (stored_height, stored_width) if turned else (stored_width, stored_height)
    if orientation == 1 and stated in (None, (width, height)):
        return Frame(width, height)

    def note(reason: str, kind: str) -> None:
        log.add(label_path or image_path, None, reason, kind, "noted", image_path.name)

    if stated in (None, (width, height)):
        if stated is None or not turned or width == height:  # else the size tells whose frame it is
            note(f"EXIF orientation {orientation}; labels taken as of the upright picture", "EXIF orientation")
        return Frame(width, height)
    found = f"says {stated[0]:g} x {stated[1]:g}, the picture is {width} x {height}"
    if stated == (stored_width, stored_height):
        note(f"{found} upright (EXIF orientation {orientation}); boxes turned with it", "boxes turned with EXIF")
        return Frame(width, height, orientation)
    note(f"{found}; the picture is believed", "wrong size stated")
    is_rounded = max(abs(width - stated[0]), abs(height - stated[1])) <= EDGE_TOLERANCE
    if not is_rounded and stated != (height, width):  # sides by each other's names are a slip of the tool
        factors = round(width / stated[0], 2), round(height / stated[1], 2)
        log.resized.append((factors, f"{label_path or image_path}: {image_path.name}: {found}"))
    return Frame(width, height)


def refuse_resized(log: FaultLog, source: Path) -> None:
    """UserError where the pictures have other sizes than those that were labelled: the boxes then mean other pixels.

    That is so where more than half of the pictures differ from the size that is stated for them, or where more than a
    tenth, three at least, differ by one factor. A few single ones are only noted, and so are differences of a pixel.
    """
    if not log.resized:
        return
    count = len(log.resized)
    (factors, alike), *_ = Counter(factors for factors, _ in log.resized).most_common(1)
    if count > log.stated / 2 or (alike >= 3 and alike > ONE_FACTOR * log.stated):
        by = f", {alike} by the factor {factors[0]:g}" + (f" x {factors[1]:g}" if factors[0] != factors[1] else "")
        raise UserError(
            f"{source}: the pictures were resized after labelling: {count} of {log.stated} have another size than "
            f"their labels state{by if alike > 1 else ''}; the first: {log.resized[0][1]}; expected the pictures that "
            "were labelled, or labels of these"
        )


def log_unread(paths: list[Path], log: FaultLog) -> None:
    """A fault for each picture of a format that is not read."""
    for path in paths:
        reason = f"a picture in {UNREAD[path.suffix.lower()]} format, expected JPEG, PNG, BMP, WebP or TIFF"
        log.add(path, None, reason, "unreadable picture", "picture dropped", path.name)


def make_sample(
    rows: LabelRows,
    frame: Frame,
    log: FaultLog,
    *,
    image_path: Path,
    image_id: int | str,
    label_path: Path,
    num_soft_classes: int | None = None,
) -> Sample:
    """The Sample of the usable rows; what is unusable goes to the log.

    num_soft_classes: K, where the rows have class_scores.
    """
    boxes = np.array(rows.boxes, dtype=np.float64).reshape(-1, 4)
    labels = np.array(rows.labels, dtype=np.int64)
    difficult, crowd = np.array(rows.difficult, dtype=bool), np.array(rows.crowd, dtype=bool)
    if frame.orientation != 1:
        stored = (frame.height, frame.width) if frame.orientation >= 5 else (frame.width, frame.height)
        boxes = turn_boxes(boxes, frame.orientation, *stored)

    limit = np.array([frame.width, frame.height], dtype=np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]  # (N, 2) each
    is_good = (low < high) & (low >= -EDGE_TOLERANCE) & (high <= limit + EDGE_TOLERANCE) & (low < limit) & (high > 0)
    is_kept = np.ones(len(boxes), dtype=bool)
    if not is_good.all():  # a few pictures of a set
        boxes, is_kept = _sort_out(boxes, limit, rows, log, image_path, label_path)
    columns = map(tuple, rows.boxes), rows.labels, rows.difficult, rows.crowd, rows.area, rows.class_scores
    keys = list(zip(*columns))
    if len(set(keys)) < len(keys):
        seen = set()
        for row, key in enumerate(keys):
            if key in seen and is_kept[row]:
                _log_row(row, "duplicate box", "duplicate dropped", boxes, limit, rows, log, image_path, label_path)
                is_kept[row] = False
            seen.add(key)

    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if any(value is not None for value in rows.area):
        area = np.array([b if a is None else a for a, b in zip(rows.area, area)], dtype=np.float64)
    ignore, scores = difficult | crowd, None
    if num_soft_classes is not None:
        scores = np.array(rows.class_scores, dtype=np.float64).reshape(-1, num_soft_classes)[is_kept]
    if not is_kept.all():
        boxes, labels, ignore, area, crowd = (array[is_kept] for array in (boxes, labels, ignore, area, crowd))
    return Sample(image_path, image_id, frame.width, frame.height, boxes, labels, ignore, area, crowd, scores)


def _sort_out(boxes, limit, rows: LabelRows, log: FaultLog, image_path: Path, label_path: Path):
    """(boxes (N, 4) with those past the edge clipped, is_kept (N,) bool), every change logged."""
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = boxes[:, :2], boxes[:, 2:]  # (N, 2) each
        tests = (
            ("not a number", ~np.isfinite(boxes).all(1)),
            ("box turned inside out", (high < low).any(1)),
            ("zero-size box", (high == low).any(1)),
            ("box outside the picture", ((high <= 0) | (low >= limit)).any(1)),
        )
        is_past = ((low < -EDGE_TOLERANCE) | (high > limit + EDGE_TOLERANCE)).any(1)
    is_kept = np.ones(len(boxes), dtype=bool)
    for kind, is_faulty in tests:
        for row in np.flatnonzero(is_faulty & is_kept):
            _log_row(row, kind, "object dropped", boxes, limit, rows, log, image_path, label_path)
        is_kept &= ~is_faulty
    for row in np.flatnonzero(is_past & is_kept):
        _log_row(row, "box past the edge", "noted", boxes, limit, rows, log, image_path, label_path)
    return np.where(is_past[:, None], np.clip(boxes, 0, np.tile(limit, 2)), boxes), is_kept


def _log_row(row, kind: str, effect: Effect, boxes, limit, rows: LabelRows, log: FaultLog, image_path, label_path):
    corners = ", ".join(f"{value:g}" for value in boxes[row])
    reason = f"{kind}: ({corners}) in a picture of {limit[0]:g} x {limit[1]:g}"
    log.add(label_path, rows.lines[row], reason, kind, effect, image_path.name)
