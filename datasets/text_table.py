"""Tables of plain text, for reports that are printed."""

from collections.abc import Sequence

SHOWN_NAME = 24  # characters of a class name


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> list[str]:
    """Lines with columns of equal width. right: the columns to align right (default: all but the first)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = range(1, len(widths)) if right is None else right
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def short_name(name: str) -> str:
    """A class name, cut where it is long."""
    return name if len(name) <= SHOWN_NAME else name[: SHOWN_NAME - 1] + "…"
