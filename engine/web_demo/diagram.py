"""Draws how a run was trained, as SVG: pictures, student, teachers, terms and their sum, from the run's config."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from config import STUDENT, Config, GradientShare, TermConfig

WIDTH, ROW, BOX = 1120, 84, 62  # pixels: of the drawing, from one row to the next, height of a box
COLUMNS = {"pictures": (12, 150), "models": (226, 220), "terms": (548, 372), "sum": (1000, 108)}  # left, width
FILLS = {  # fill and line, as in the README's overview
    "pictures": ("#eef3f8", "#4477aa"),
    "student": ("#fdf3e1", "#cc8a1b"),
    "teacher": ("#f1f1f1", "#777777"),
    "term": ("#e7f4ec", "#228833"),
    "plain": ("#ffffff", "#cc8a1b"),
    "sum": ("#ffffff", "#555555"),
}
STUDENT_LINE, TEACHER_LINE, OTHER_LINE = "#cc8a1b", "#777777", "#555555"


class Row(NamedTuple):
    """A box of the third column. kind: of FILLS. title and maps: its two lines."""

    teacher: str
    kind: str
    title: str
    maps: str


def draw_training(config: Config) -> str:
    """An SVG document. A run without terms has the student, its labels and the detection losses alone."""
    pseudo = config.pseudo_boxes
    rows = [Row(term.teacher, "term", describe_weight(term), describe_maps(term)) for term in config.terms]
    if pseudo is not None:
        rows.append(Row(pseudo.teacher, "plain", "pseudo boxes", "labels of the pictures that have none"))
    teacher_of_row = [row.teacher for row in rows]
    teachers = [teacher for teacher in config.teachers if teacher.name in teacher_of_row]
    count = max(len(rows), len(teachers))
    y_of_row = [ROW * number + 46 for number in range(count + 1)]  # centers; the last row is the student's
    y_student, parts = y_of_row[-1], []
    y_of_teacher = spread_teachers([teacher.name for teacher in teachers], teacher_of_row, y_of_row)
    y_pictures = (min([y_student, *y_of_teacher.values()]) + y_student) / 2
    for y in (*y_of_teacher.values(), y_student):
        parts.append(line(COLUMNS["pictures"], y_pictures, COLUMNS["models"], y, OTHER_LINE))
    for row, y in zip(rows, y_of_row):
        if row.teacher != STUDENT:  # it has a line to every term
            parts.append(line(COLUMNS["models"], y_of_teacher[row.teacher], COLUMNS["terms"], y, TEACHER_LINE))
    for y in (*y_of_row[: len(config.terms)], y_student):
        parts.append(line(COLUMNS["models"], y_student, COLUMNS["terms"], y, STUDENT_LINE))
        parts.append(line(COLUMNS["terms"], y, COLUMNS["sum"], y_student, OTHER_LINE))
    if pseudo is not None:  # down the right edge of the terms, into the detection losses
        x, top = COLUMNS["terms"][0] + COLUMNS["terms"][1] - 24, y_of_row[len(rows) - 1] + BOX / 2
        parts.append(path(f"M{x} {top} V{y_student - BOX / 2 - 4}", OTHER_LINE))
    parts.append(box(COLUMNS["pictures"], y_pictures, "pictures", ["pictures", config.data.format]))
    for teacher in teachers:
        lines = [f"teacher {teacher.name}", f"{teacher.arch}, weights fixed"]
        parts.append(box(COLUMNS["models"], y_of_teacher[teacher.name], "teacher", lines))
    parts.append(box(COLUMNS["models"], y_student, "student", ["student", f"{config.student.arch}, learns"]))
    for row, y in zip(rows, y_of_row):
        parts.append(box(COLUMNS["terms"], y, row.kind, [row.title, row.maps]))
    parts.append(box(COLUMNS["terms"], y_student, "plain", ["detection losses", "boxes and classes of the labels"]))
    parts.append(box(COLUMNS["sum"], y_student, "sum", ["sum", "gradient step"]))
    height = y_student + 46
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="15">'
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="#555"/></marker></defs><rect width="{WIDTH}" height="{height}" rx="8" '
        f'fill="#fff"/>{"".join(parts)}</svg>'
    )


def describe_weight(term: TermConfig) -> str:
    """`cwd, weight 2` or `cwd, 10 % of the gradient`"""
    share = f"{term.weight.share:.0%} of the gradient" if isinstance(term.weight, GradientShare) else ""
    return f"{term.loss}, {share or f'weight {term.weight:g}'}"


def describe_maps(term: TermConfig) -> str:
    """`p3, p4 against patches, adapter conv1x1`"""
    maps = ", ".join(term.student_maps)
    maps = maps or ("its own layers" if term.teacher == STUDENT else "boxes or whole outputs")
    against = f" against {', '.join(term.teacher_maps)}" if term.teacher_maps else ""
    return maps + against + (f", adapter {term.adapter}" if term.adapter != "none" else "")


def spread_teachers(names: Sequence[str], teacher_of_row: Sequence[str], y_of_row: Sequence[float]) -> dict[str, float]:
    """Centers of the teachers: each beside the middle of its rows, at least a row below the one before."""
    places: dict[str, float] = {}
    for name in sorted(names, key=teacher_of_row.index):
        own = [y for teacher, y in zip(teacher_of_row, y_of_row) if teacher == name]
        places[name] = max(sum(own) / len(own), max(places.values(), default=-ROW) + ROW)
    shift = max(0.0, max(places.values(), default=0.0) + ROW - y_of_row[-1])  # the student is below them
    return {name: y - shift for name, y in places.items()}


def box(column: tuple[int, int], y: float, kind: str, lines: Sequence[str]) -> str:
    """A rounded box around (center of the column, y) with a bold line and a smaller one."""
    left, width = column
    fill, stroke = FILLS[kind]
    texts = "".join(
        f'<text x="{left + width / 2:g}" y="{y + shift:g}" text-anchor="middle" fill="#222" {style}>'
        f"{html.escape(shorten(text, width, size))}</text>"
        for text, shift, size, style in zip(lines, (-5, 17), (15, 13), ('font-weight="bold"', 'font-size="13"'))
    )
    frame = f'<rect x="{left}" y="{y - BOX / 2:g}" width="{width}" height="{BOX}" rx="7" fill="{fill}" '
    return f'{frame}stroke="{stroke}" stroke-width="1.6"/>{texts}'


def shorten(text: str, width: int, size: int) -> str:
    """The text, cut where it would leave its box: a letter is about 0.55 of the font's size wide."""
    most = int((width - 12) / (0.55 * size))
    return text if len(text) <= most else text[: most - 3] + "..."


def line(start: tuple[int, int], y_start: float, end: tuple[int, int], y_end: float, color: str) -> str:
    """A curve from the right edge of one column to the left edge of the next."""
    x1, x2 = start[0] + start[1], end[0] - 3
    middle = (x1 + x2) / 2
    return path(f"M{x1} {y_start:g} C{middle:g} {y_start:g} {middle:g} {y_end:g} {x2} {y_end:g}", color)


def path(course: str, color: str) -> str:
    return f'<path d="{course}" fill="none" stroke="{color}" stroke-width="1.6" marker-end="url(#tip)"/>'
