"""From the raw rows of one label file to a Sample: the frame of the boxes, and the rows that cannot be used.

Every reader collects LabelRows and passes them to `make_sample`, so one rule holds for all formats:

    not a number, zero size, turned inside out, outside the picture     the object is dropped
    equal to an earlier row in every value                              dropped as a duplicate
    more than one pixel past the edge of the picture                    kept, clipped to the picture, noted
    up to one pixel past the edge (rounding of the source)              kept unchanged

Where label files state the size of their pictures, read_frame drops single pictures that were resized after labelling,
and refuse_resized refuses a set with many. In every format refuse_misread finds boxes that cannot be meant as they are
read.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from datasets.folders import list_files
from datasets.images import SUFFIXES, UNREAD, read_header, turn_boxes
from datasets.index import Effect, Fault, Sample
from datasets.values import EDGE_TOLERANCE, are_corners, are_fractions, far_past, fit_as_corners
from errors import UserError, counted

SIZE_TOLERANCE = 0.05  # a picture that differs by less from its stated size keeps its boxes: they are nearly right
ONE_FACTOR = 0.1  # a larger share of pictures with the same wrong factor is no accident

Item = TypeVar("Item")


@dataclass(eq=False)
class LabelRows:
    """The objects of one picture.

    rows: (x1, y1, x2, y2, label, difficult, crowd, area, class_scores) of each: corners in pixels; area None stands for
        the area of the box; class_scores are K shares for every object, or None for every object.
    lines: in the label file.
    """

    rows: list[tuple] = field(default_factory=list)
    lines: list[int | None] = field(default_factory=list)

    def add(
        self,
        box: Sequence[float],
        label: int,
        *,
        difficult: bool = False,
        crowd: bool = False,
        area: float | None = None,
        line: int | None = None,
        class_scores: tuple[float, ...] | None = None,
    ) -> None:
        self.rows.append((*box, label, difficult, crowd, area, class_scores))
        self.lines.append(line)


@dataclass(frozen=True, slots=True)
class Frame:
    """Upright width and height of a picture. `orientation`: the EXIF turn that its label boxes still need (1: none)."""

    width: int
    height: int
    orientation: int = 1


class FaultLog:
    """The faults of one read, in their order, and how the stated sizes of pictures compare with the real ones.

    stated: number of pictures whose label file states a size.
    objects: number of boxes; past: of them, those that pass the edge of their picture by more than EDGE_TOLERANCE, in
        past_pictures pictures; fractions: those that would be fractions, if they were not read as pixels.
    far: boxes that are values.far_past; fitting: of these, those whose numbers are corners, where the format has a
        center and a size (key True) or a corner and a size (False).
    resized: for each of those that has another size, (the factors from the stated to the real width and height, a text
        with both sizes).
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.stated = self.objects = self.past = self.past_pictures = self.fractions = 0
        self.resized: list[tuple[tuple[float, float], str]] = []
        self.far, self.fitting = 0, {True: 0, False: 0}

    def add(
        self, path: str | Path, line: int | None, reason: str, kind: str, effect: Effect, picture: str = ""
    ) -> None:
        self.faults.append(Fault(str(path), line, reason, kind, effect, str(picture)))

    def add_error(self, path: Path, error: UserError, kind: str, effect: Effect, picture: str) -> None:
        """Add an error about a file as a fault, without the path that its message begins with."""
        self.add(path, None, str(error).removeprefix(f"{path}: "), kind, effect, picture)

    def once_each(
        self, listed: Sequence[Item], source: Path, noun: str = "picture", key: Callable[[Item], object] = lambda x: x
    ) -> list[Item]:
        """The listed items in their order, the first of those with equal keys. One fault counts the ones left out."""
        first: dict[object, Item] = {}
        for item in listed:
            first.setdefault(key(item), item)
        if len(first) < len(listed):
            reason = f"listed twice: {counted(len(listed) - len(first), noun)}"
            self.add(source, None, reason, "listed twice", "noted")
        return list(first.values())


def log_passed_over(folder: Path, samples: Sequence[Sample], log: FaultLog) -> None:
    """Log each picture, such as a.bmp beside a.jpg, that is not read because another with its label file is."""
    read = {sample.image_path.with_suffix(""): sample.image_path for sample in samples}
    for path in list_files(folder, SUFFIXES):
        other = read.get(path.with_suffix(""))
        if other is not None and path != other and not path.samefile(other):
            reason = f"{other.name} is read with the label file of both"
            log.add(path, None, reason, "one label file for two pictures", "left out", path.name)


def read_frame(
    image_path: Path, log: FaultLog, *, stated: tuple[float, float] | None = None, label_path: Path | None = None
) -> Frame | None:
    """The frame of a picture from its header, compared with the (width, height) stated in its label file.

    The header counts. If the stated size equals the stored pixels of a picture that EXIF turns by 90 degrees, the
    labels refer to those pixels and must be turned. None, and a fault, for a picture that does not open, and for one of
    the stated shape that is larger or smaller by more than SIZE_TOLERANCE: its boxes are in pixels of another one.
    """
    try:
        stored_width, stored_height, orientation = read_header(image_path)
    except UserError as error:
        log.add_error(image_path, error, "unreadable picture", "picture dropped", image_path.name)
        return None
    log.stated += stated is not None
    turned = orientation >= 5
    width, height = (stored_height, stored_width) if turned else (stored_width, stored_height)
    if orientation == 1 and stated in (None, (width, height)):
        return Frame(width, height)

    def note(reason: str, kind: str) -> None:
        log.add(label_path or image_path, None, reason, kind, "noted", image_path.name)

    if stated in (None, (width, height)):
        if stated is None or not turned or width == height:  # else the size shows that the labels are upright
            note(f"EXIF orientation {orientation}; labels taken as of the upright picture", "EXIF orientation")
        return Frame(width, height)
    found = f"states {stated[0]:g} x {stated[1]:g}, the picture is {width} x {height}"
    if stated == (stored_width, stored_height):
        note(f"{found} upright (EXIF orientation {orientation}); boxes turned with it", "boxes turned with EXIF")
        return Frame(width, height, orientation)
    is_rounded = max(abs(width - stated[0]), abs(height - stated[1])) <= EDGE_TOLERANCE
    if not is_rounded and stated != (height, width):  # some tools swap width and height
        factors = round(width / stated[0], 2), round(height / stated[1], 2)
        log.resized.append((factors, f"{label_path or image_path}: {image_path.name}: {found}"))
        rounding = max(sum(stated), width + height) / 2  # the smaller size may be off by half a pixel on each side
        is_of_shape = abs(stated[0] * height - stated[1] * width) <= rounding
        if is_of_shape and max(width / stated[0], stated[0] / width) > 1 + SIZE_TOLERANCE:
            reason = f"{found}: resized after labelling, so its boxes are those of another picture"
            log.add(label_path or image_path, None, reason, "resized picture", "picture dropped", image_path.name)
            return None
    note(f"{found}; the picture's own size is used", "wrong size stated")
    return Frame(width, height)


def refuse_resized(log: FaultLog, source: Path) -> None:
    """UserError where the pictures were resized after labelling: the boxes are then in pixels of other pictures.

    This is so if more than half of the pictures differ from their stated size, or if more than a tenth, at least three,
    differ by the same factor. Of fewer, read_frame drops those of the stated shape; the others are noted, and so are
    differences of a pixel.
    """
    if not log.resized:
        return
    count = len(log.resized)
    (factors, same), *_ = Counter(factors for factors, _ in log.resized).most_common(1)
    if count > log.stated / 2 or (same >= 3 and same > ONE_FACTOR * log.stated):
        by = f", {same} by the factor {factors[0]:g}" + (f" x {factors[1]:g}" if factors[0] != factors[1] else "")
        raise UserError(
            f"{source}: the pictures were resized after labelling: {count} of {log.stated} have another size than "
            f"their labels state{by if same > 1 else ''}; the first: {log.resized[0][1]}; expected the pictures that "
            "were labelled, or labels of these"
        )


def refuse_misread(log: FaultLog, source: Path, *, is_centered: bool | None = None) -> None:
    """UserError where boxes do not have the form of their format, or belong to other pictures.

    This is so if all of them are fractions where pixels are read; or if more than half of them, in three pictures or
    more, pass the edge. Then a size was read where a corner stands, or the pictures were made smaller. Fewer boxes are
    enough where the format has a size, if those that are far past the edge are corners (values.are_corners).
    is_centered: the format has a center (True) or a corner (False) and a size; None: two corners.
    """
    if log.objects and log.fractions == log.objects:
        raise UserError(f"{source}: every box of {log.objects} lies in 0..1, expected pixels")
    is_cut = log.past_pictures >= 3 and log.past > log.objects / 2
    is_corner = is_centered is not None and are_corners(log.far, log.fitting[is_centered], log.objects)
    if is_cut or is_corner:
        kinds = ("box past the edge", "box outside the picture")
        first = next((str(fault) for fault in log.faults if fault.kind in kinds), "")
        size = f"{'center' if is_centered else 'left, top'}, width and height: those far outside fit as corners"
        expected = size if is_corner else "the pictures that were labelled, and boxes in the form of the format"
        raise UserError(
            f"{source}: {log.past} of {log.objects} boxes pass the edge of their picture, the first: {first}; expected "
            f"{expected}"
        )


def log_unread(paths: list[Path], log: FaultLog) -> None:
    """Add a fault for each of these pictures, whose formats are not read."""
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
    """The Sample of the usable rows. The others go to the log.

    num_soft_classes: K if the rows have class_scores, else None.
    """
    boxes = np.array([row[:4] for row in rows.rows], dtype=np.float64).reshape(-1, 4)
    if log.fractions == log.objects and are_fractions(boxes):  # one box in pixels is enough
        log.fractions += len(boxes)
    log.objects += len(boxes)
    columns = zip(*(row[4:] for row in rows.rows)) if rows.rows else ((),) * 5
    label_column, difficult_column, crowd_column, area_column, scores_column = columns
    is_kept: np.ndarray | None = None  # all
    is_plain = frame.orientation == 1 and all(_is_inside(row, frame) for row in rows.rows)
    if not is_plain or len(set(rows.rows)) < len(rows.rows):  # few pictures of a set
        boxes, is_kept = _sort_out(boxes, rows, frame, log, image_path, label_path)

    labels = np.array(label_column, dtype=np.int64)
    crowd = np.array(crowd_column, dtype=bool)
    ignore = np.array(difficult_column, dtype=bool) | crowd
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if area_column.count(None) < len(area_column):
        area = np.array([b if a is None else a for a, b in zip(area_column, area)], dtype=np.float64)
    scores = None
    if num_soft_classes is not None:
        scores = np.array(scores_column, dtype=np.float64).reshape(-1, num_soft_classes)
    if is_kept is not None:
        boxes, labels, ignore = boxes[is_kept], labels[is_kept], ignore[is_kept]
        area, crowd, scores = area[is_kept], crowd[is_kept], None if scores is None else scores[is_kept]
    return Sample(image_path, image_id, frame.width, frame.height, boxes, labels, ignore, area, crowd, scores)


def _is_inside(row: tuple, frame: Frame) -> bool:
    """Whether a row needs no look at its box: finite, of some size, and inside the picture up to the tolerance."""
    x1, y1, x2, y2 = row[:4]
    right, bottom = frame.width + EDGE_TOLERANCE, frame.height + EDGE_TOLERANCE
    fits_x = -EDGE_TOLERANCE <= x1 < x2 <= right and x1 < frame.width and x2 > 0
    return fits_x and -EDGE_TOLERANCE <= y1 < y2 <= bottom and y1 < frame.height and y2 > 0


def _sort_out(
    boxes: np.ndarray, rows: LabelRows, frame: Frame, log: FaultLog, image_path: Path, label_path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(boxes (N, 4), turned with the picture and clipped where they pass the edge; is_kept (N,) bool).

    Every change but the turn is logged.
    """
    if frame.orientation != 1:
        stored = (frame.height, frame.width) if frame.orientation >= 5 else (frame.width, frame.height)
        boxes = turn_boxes(boxes, frame.orientation, *stored)
    limit = np.array([frame.width, frame.height], dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = boxes[:, :2], boxes[:, 2:]  # (N, 2) each
        tests = (
            ("not a number", ~np.isfinite(boxes).all(1)),
            ("box turned inside out", (high < low).any(1)),
            ("zero-size box", (high == low).any(1)),
            ("box outside the picture", ((high <= 0) | (low >= limit)).any(1)),
        )
        is_past = np.any((low < -EDGE_TOLERANCE) | (high > limit + EDGE_TOLERANCE), axis=1)
    log.past += int(is_past.sum())
    log.past_pictures += int(is_past.any())
    if frame.orientation == 1:
        is_far = far_past(boxes, limit)
        log.far += int(is_far.sum())
        for is_centered in log.fitting:
            log.fitting[is_centered] += int((is_far & fit_as_corners(boxes, limit, is_centered=is_centered)).sum())

    def log_row(row: int, kind: str, effect: Effect) -> None:
        corners = ", ".join(f"{value:g}" for value in boxes[row])
        reason = f"{kind}: ({corners}) in a picture of {limit[0]:g} x {limit[1]:g}"
        log.add(label_path, rows.lines[row], reason, kind, effect, image_path.name)

    is_kept = np.ones(len(boxes), dtype=bool)
    for kind, is_faulty in tests:
        for row in np.flatnonzero(is_faulty & is_kept).tolist():
            log_row(row, kind, "object dropped")
        is_kept &= ~is_faulty
    for row in np.flatnonzero(is_past & is_kept).tolist():
        log_row(row, "box past the edge", "noted")
    boxes = np.where(is_past[:, None], np.clip(boxes, 0, np.tile(limit, 2)), boxes)
    earlier: set[tuple] = set()
    for row, key in enumerate(rows.rows):
        if key in earlier and is_kept[row]:
            log_row(row, "duplicate box", "duplicate dropped")
            is_kept[row] = False
        earlier.add(key)
    return boxes, is_kept
