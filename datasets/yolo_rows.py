"""The rows of YOLO label files: a box, a polygon, or a box with keypoints; and the shares of soft labels.

    class center_x center_y width height              5 columns
    class x1 y1 x2 y2 x3 y3 ...                       7, 9, 11, ... columns: three or more points; read as the box
                                                      around them
    class center_x center_y width height keypoints    5 + n * d columns, where data.yaml has `kpt_shape: [n, d]`; d = 2
                                                      (x, y) or 3 (x, y, visibility). The keypoints are not read.

A row with keypoints, a polygon and a tracker's row (class, box, confidence, id: 7 columns) may have the same number of
columns. A box with keypoints, read as a polygon, would silently give a wrong box. Two signs reveal polygons: their
numbers of points differ, and their first four numbers, read as a box, leave the picture or leave out the other points.
LongRows counts both signs, and refuses a split where nearly all rows lack both.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from datasets.rows import Frame, LabelRows
from datasets.values import NORM_TOLERANCE, are_normalised
from errors import UserError, counted

SUM_TOLERANCE = 0.001  # a sum of shares this near to 1 comes from rounding; the shares are divided by it
EDGE_FRACTION = 0.02  # of a side of the picture, by which a box may leave it
CERTAIN = 0.2  # share of rows that cannot have keypoints: 0.25 to 0.9 for polygons, near 0 for keypoints
SAME = 0.9  # share of rows with one number of columns from which the few others are strays
JUDGED = 1000  # rows of a number of columns that are looked at
BOX_TOLERANCE = 0.25  # how far keypoints may leave their box, as a fraction of its sides


class LongRows:
    """Decides whether the rows of a split with more than five columns are polygons or boxes with keypoints.

    kpt_shape: (n, d) of data.yaml. is_polygons: data.yaml has `task: segment` or `task: obb`.
    """

    def __init__(self, kpt_shape: tuple[int, int] | None, is_polygons: bool) -> None:
        self.columns = None if kpt_shape is None else 5 + kpt_shape[0] * kpt_shape[1]
        self.is_declared = is_polygons or kpt_shape is not None
        self.counts: Counter[int] = Counter()  # by the number of columns, as the others
        self.doubtful: Counter[int] = Counter()  # among the first JUDGED rows
        self.first: dict[int, str] = {}

    def add(self, values: list[float], where: str) -> None:
        """Count a row that is read as points. values: those after the class."""
        if self.is_declared:
            return
        columns = len(values) + 1
        self.first.setdefault(columns, where)
        self.counts[columns] += 1
        if self.counts[columns] <= JUDGED:
            self.doubtful[columns] += _may_be_box_and_more(values)

    def decide(self) -> None:
        """UserError if the rows may be polygons, and as well boxes with keypoints or with a track."""
        if not self.counts:
            return
        ((columns, count),) = self.counts.most_common(1)
        if count < SAME * self.counts.total() or self.doubtful[columns] <= (1 - CERTAIN) * min(count, JUDGED):
            return
        other = "class, box, confidence and track id" if columns == 7 else "class, box and keypoints"
        of = f"each of {count}" if len(self.counts) == 1 else f"{count} of {self.counts.total()} long"
        raise UserError(
            f"{self.first[columns]}: {columns} columns in {of} rows: {other}, or a polygon of {columns // 2} points? "
            "Expected a class and a box (5 columns), or data.yaml with kpt_shape: [n, 2 or 3] "
            "for keypoints, or with task: segment for polygons"
        )


def _may_be_box_and_more(values: list[float]) -> bool:
    """Whether points may instead be a center and a size, followed by keypoints or by a confidence and an id."""
    x, y, width, height, *rest = values
    if not (width > 0 and height > 0):
        return False
    for center, size in ((x, width), (y, height)):
        if center - size / 2 < -EDGE_FRACTION or center + size / 2 > 1 + EDGE_FRACTION:
            return False
    if len(rest) == 2 and any(0 <= a <= 1 and b >= 0 and b.is_integer() for a, b in (rest, rest[::-1])):
        return True  # a confidence and an id, in either order
    if len(rest) == 4 and abs(x + rest[0] - width - rest[2]) + abs(y + rest[1] - height - rest[3]) < NORM_TOLERANCE:
        return False  # four corners of a rectangle, turned or not: a + c = b + d

    def is_inside(px: float, py: float) -> bool:
        reach_x, reach_y = (0.5 + BOX_TOLERANCE) * width, (0.5 + BOX_TOLERANCE) * height
        return px == py == 0 or (abs(px - x) <= reach_x and abs(py - y) <= reach_y)

    if all(map(is_inside, rest[0::2], rest[1::2])):
        return True
    if len(rest) % 3 or not all(0 <= third <= 1 or third == 2 for third in rest[2::3]):  # visibility or confidence
        return False
    return all(map(is_inside, rest[0::3], rest[1::3]))


def add_row(
    line: str,
    where: str,
    num_classes: int,
    frame: Frame,
    rows: LabelRows,
    class_scores: tuple[float, ...] | None,
    long_rows: LongRows,
    number: int,
) -> tuple[str, str] | None:
    """Add a row to those of its picture and return None, or return (reason, kind) of the fault."""
    columns = line.split()
    count = len(columns)
    is_points = long_rows.columns is None and count >= 7 and count % 2 == 1
    if count != 5 and not is_points and count != long_rows.columns:
        return _wrong_count(count, long_rows), "malformed row"
    if not re.fullmatch(r"\d{1,9}(\.0*)?", columns[0]):
        return f"class {columns[0]!r}, expected 0..{num_classes - 1}", "unknown class"
    label = int(float(columns[0]))
    if label >= num_classes:
        return f"class {label}, expected 0..{num_classes - 1}", "unknown class"
    try:
        values = [float(value) for value in columns[1 : None if is_points else 5]]
    except ValueError as error:
        return f"{error}, expected a number", "malformed row"
    if "_" in line:  # Python reads 1_0 as ten
        return f"{line!r}, expected numbers", "malformed row"
    if is_points and all(np.isfinite(values)):
        long_rows.add(values, where)
    if not are_normalised(values, frame.width, frame.height):
        kind = "not normalised" if all(np.isfinite(values)) else "not a number"
        return f"{kind}: {' '.join(columns[1:6])}, expected fractions of the picture, 0..1", kind
    if is_points:
        x1, y1, x2, y2 = min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])
    else:
        x, y, width, height = values
        x1, y1, x2, y2 = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    box = (x1 * frame.width, y1 * frame.height, x2 * frame.width, y2 * frame.height)
    rows.add(box, label, line=number, class_scores=class_scores)
    return None


def _wrong_count(count: int, long_rows: LongRows) -> str:
    found = counted(count, "value")
    if long_rows.columns is not None:
        return f"{found}, expected a class and a box (5), or those and the keypoints ({long_rows.columns})"
    expected = "expected a class and a box (5) or three or more points (7, 9, ...)"
    if count == 6:
        return f"{found}, {expected}; is the sixth a score?"
    return f"{found}, {expected}" + ("; of keypoints, data.yaml states kpt_shape" if count > 6 else "")


def read_kpt_shape(value: object, source: Path) -> tuple[int, int] | None:
    """(n, d) of data.yaml's `kpt_shape`, whose scalars are texts. UserError for anything but [n, 2] and [n, 3]."""
    if value in (None, "", "null", "~"):
        return None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) and v.isdecimal() for v in value):
        if 1 <= int(value[0]) <= 10_000 and value[1] in ("2", "3"):
            return int(value[0]), int(value[1])
    raise UserError(f"{source}: key 'kpt_shape': found {value!r}, expected [n, 2] or [n, 3]")


def read_shares(line: str, num_classes: int) -> tuple[float, ...] | str:
    """The shares of the K classes, or the reason why the row cannot be used."""
    columns = line.split()
    if len(columns) != num_classes:
        return f"{counted(len(columns), 'value')}, expected {num_classes}: a share for each class"
    try:
        shares = [float(column) for column in columns]
    except ValueError as error:
        return f"{error}, expected a number"
    if not all(np.isfinite(shares)) or min(shares) < 0:
        worst = next(column for column, share in zip(columns, shares) if not 0 <= share < np.inf)
        return f"a share of {worst}, expected 0 to 1"
    total = sum(shares)
    if abs(total - 1) > SUM_TOLERANCE:
        return f"shares with the sum {total:g}, expected 1"
    return tuple(share / total for share in shares)
