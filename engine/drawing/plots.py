"""The plots of a run, with matplotlib: results.png, confusion_matrix.png, pr_curve.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.drawing.style import (
    QUIET,
    SEQUENTIAL,
    STRONG,
    WIDTH,
    broken,
    count_epochs,
    figure_file,
    line_look,
    marker_for,
    plot_names,
)
from engine.runtime import run_folder
from metrics.report import DetectionReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND_CLASSES = 20  # with more classes, lines get one color and no legend
NUMBERED_CLASSES = 22  # with more classes, the cells of the confusion matrix are too small for numbers
CELL = 0.43  # inches: a cell with a number
SCORES = {"precision and recall": ("precision", "recall"), "mAP": ("mAP50-95", "mAP50")}  # that share a panel


def draw_results(metrics_csv: Path, path: Path) -> None:
    """Plot metrics.csv over the epochs: a panel for each loss, for precision and recall, both mAPs, AP and rate."""
    rows = run_folder.read_metrics(metrics_csv)
    if not rows:
        return
    lines = {
        name: [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
        for name in rows[0]
        if name not in ("epoch", "time", run_folder.PLUMBING)
    }
    lines = {name: points for name, points in lines.items() if points}
    panels = result_panels(lines)
    columns = min(4, len(panels))
    num_rows = -(-len(panels) // columns)
    with figure_file(path, max(3.6, WIDTH * columns / 4), 0.4 + 2.4 * num_rows) as figure:
        figure.suptitle(metrics_csv.resolve().parent.name)
        for number, (title, unit, names) in enumerate(panels):
            axis = figure.add_subplot(num_rows, columns, number + 1)
            if len(names) > 2:
                draw_levels(axis, [lines[name] for name in names])
            else:
                for place, name in enumerate(names):
                    label = name.removeprefix("metrics/")
                    draw_line(axis, lines[name], **line_look(place), label=label)
                if len(names) == 2:
                    axis.legend()
            axis.set_title(broken(title))
            axis.set_ylabel(unit)
            count_epochs(axis)


def result_panels(lines: Mapping[str, object]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(title, what the vertical axis has, columns) of each panel of results.png."""
    panels: list[tuple[str, str, tuple[str, ...]]] = [
        (name.removeprefix("train/"), "loss, mean of epoch", (name,)) for name in lines if name.startswith("train/")
    ]
    for title, columns in SCORES.items():
        if found := tuple(f"metrics/{column}" for column in columns if f"metrics/{column}" in lines):
            panels.append((title, "fraction, 0 to 1", found))
    if levels := tuple(name for name in run_folder.AP_COLUMNS if name in lines):
        panels.append(("AP at each IoU", "fraction, 0 to 1", levels))
    if "lr" in lines:
        panels.append(("learning rate", "no unit", ("lr",)))
    return panels


def draw_line(axis: "Axes", points: Sequence[tuple[int, float]], **look) -> None:
    axis.plot(*zip(*points), marker=marker_for(len(points)), **look)


def draw_levels(axis: "Axes", levels: Sequence[Sequence[tuple[int, float]]]) -> None:
    """AP at IoU 0.50 (dark) to 0.95 (pale), the first and the last named at their right ends."""
    from matplotlib import colormaps

    for number, points in enumerate(levels):
        draw_line(axis, points, color=colormaps[SEQUENTIAL](1 - 0.7 * number / len(levels)), markersize=3)
    for points, text, place in ((levels[0], "IoU 0.50", "bottom"), (levels[-1], "0.95", "bottom")):
        axis.annotate(text, points[-1], ha="right", va=place, xytext=(0, 3), textcoords="offset points")
    axis.margins(y=0.15)


def draw_confusion(report: DetectionReport, path: Path) -> None:
    """Draw the confusion matrix twice: objects as counts, and as fractions of their true class.

    A column is a true class; its rows are the classes it was found as, and last the missed objects. The last column of
    the counts are the detections where no object is: they have no total to be a fraction of.
    """
    counts = report.confusion  # (K + 1, K + 1)
    totals = counts.sum(axis=0, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    shares[:, -1] = np.nan
    names = plot_names(report.names)
    num_rows = len(names) + 1
    has_numbers = len(names) <= NUMBERED_CLASSES
    side = max(3.2, (CELL if has_numbers else 0.17) * num_rows)  # inches of one matrix
    margin = 0.6 + 0.085 * max(map(len, [*names, "no object"]))  # for the names
    is_wide = 2 * (side + margin) <= WIDTH
    size = (2 * (side + margin), side + margin + 0.7) if is_wide else (side + margin + 0.4, 2 * (side + margin + 0.5))
    with figure_file(path, *size) as figure:
        given = report.given.score_threshold
        figure.suptitle(f"Confusion at IoU {report.iou_threshold:g}, score {given:g} and above")
        left, right = figure.subplots(*((1, 2) if is_wide else (2, 1)))
        draw_matrix(left, counts, "number of objects", has_numbers=has_numbers)
        draw_matrix(right, shares, "fraction of the true class", has_numbers=has_numbers)
        left.set_xticks(range(num_rows), [*names, "no object"], rotation=90)
        right.set_xticks(range(len(names)), names, rotation=90)
        for axis in (left, right):
            axis.set_yticks(range(num_rows), [*names, "missed"])
            axis.set_xlabel("true class")
            axis.set_ylabel("predicted as")


def draw_matrix(axis: "Axes", values: np.ndarray, title: str, *, has_numbers: bool) -> None:
    """Cells as colors, and as numbers where they fit; a cell of 0 is left empty. Of counts, the color is the root."""
    from matplotlib.colors import PowerNorm

    is_count = np.issubdtype(values.dtype, np.integer)
    top = max(1, values.max()) if is_count else 1.0
    norm = PowerNorm(0.5 if is_count else 1.0, vmin=0, vmax=top)
    drawn = axis.imshow(values, cmap=SEQUENTIAL, norm=norm)
    axis.set_title(title)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    if not has_numbers:
        axis.figure.colorbar(drawn, ax=axis, shrink=0.6)
        return
    for row, column in zip(*np.nonzero(np.nan_to_num(values))):
        value = values[row, column]
        color = "white" if norm(value) > 0.55 else "black"
        axis.text(column, row, f"{value}" if is_count else f"{value:.2f}", ha="center", va="center", color=color)


def draw_pr_curve(report: DetectionReport, path: Path) -> None:
    """Draw interpolated precision over recall: a line for each class that has objects, and in black their mean."""
    names = plot_names(report.names)
    measured = [k for k in range(len(report.names)) if np.isfinite(report.pr_precision[k]).all()]
    measured.sort(key=lambda k: -report.pr_precision[k].mean())
    has_legend = len(measured) <= LEGEND_CLASSES
    with figure_file(path, 8.0, 5.0) as figure:
        axis = figure.subplots()
        if measured:
            mean = report.pr_precision[measured].mean(axis=0)  # (101,)
            label = f"all {len(measured)} classes  {mean.mean():.3f}" if len(measured) > 1 else ""
            one = f"{names[measured[0]]}  {mean.mean():.3f}"
            axis.plot(report.recalls, mean, color="white", linewidth=6.5, zorder=3)  # sets it off from the others
            axis.plot(report.recalls, mean, color=STRONG, linewidth=3.5, zorder=4, label=label or one)
        for number, k in enumerate(measured if len(measured) > 1 else ()):
            label = f"{names[k]}  {report.pr_precision[k].mean():.3f}"
            look = line_look(number) | {"label": label} if has_legend else {"color": QUIET, "alpha": 0.35}
            axis.plot(report.recalls, report.pr_precision[k], linewidth=1.3, **look)
        if measured:
            figure.legend(loc="outside right upper", title="area below the line")
        axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axis.set_title(f"Precision over recall at IoU {report.iou_threshold:g}")
