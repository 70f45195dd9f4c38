"""comparison.png: scores and paired differences with intervals, learning curves, and drawn detections."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.comparison.decision import DecisionRule
from engine.comparison.pictures import COLUMNS, Pictures, compare_pictures
from engine.comparison.study import Study
from engine.comparison.table import NO_VERDICT, Difference, Result, differences
from engine.drawing.stamp import stamp_file
from engine.drawing.style import (
    BLUE,
    POINTS,
    QUIET,
    STRONG,
    VERMILLION,
    WIDTH,
    count_epochs,
    figure_file,
    line_look,
    marker_for,
    shorten,
)
from engine.runtime import run_folder
from errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

CURVES = 10  # rows with a curve: more lines cannot be told apart
ROW_HEIGHT, LINE_HEIGHT = 0.36, 0.22  # inches: of a row of results, and of a line of text
METRICS = {"mAP": (BLUE, "o"), "mAP50": (VERMILLION, "s")}
KINDS = {  # beginning of a verdict -> color and marker
    "better": (BLUE, "^"),
    "worse": (VERMILLION, "v"),
    "no difference": (QUIET, "s"),
    "undecided": (QUIET, "D"),
    "not decided": (QUIET, "o"),
    "not defined": (QUIET, "x"),
    NO_VERDICT: (QUIET, "P"),
}
EXPLAINED = {
    "no difference": "no difference that matters",
    "not decided": "too few seeds",
    NO_VERDICT: "plumbing, no measurement",
}


def require_plots() -> None:
    """UserError if matplotlib is missing: call it before the training, not after."""
    require("matplotlib", "plots", "comparison.png")


def write(path: Path, study: Study, results: dict[str, Result], *, with_pictures: bool) -> Path:
    """Draw the rows that have finished runs, and test pictures on which they differ. No part is drawn empty."""
    require_plots()
    finished = [result for result in results.values() if result.reports]
    compared = [difference for difference in differences(results, study.rule) if difference.seeds]
    curves = [curve for result in finished for curve in read_curves(result)]
    pictures = compare_pictures(study.config, pictured(finished)) if with_pictures and finished else None
    heights = [1.7 + ROW_HEIGHT * max(len(finished), len(compared), 3)]
    heights += [3.0] if curves else []
    heights += [picture_height(pictures)] if pictures else []
    with figure_file(path, WIDTH, sum(heights) + 0.4) as figure:
        figure.suptitle(study.config.name)
        parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        axes = parts.pop(0).subplots(1, 2 if compared else 1, squeeze=False)[0]
        draw_scores(axes[0], finished, study.rule)
        if compared:
            draw_differences(axes[1], compared, study.rule)
        if curves:
            draw_curves(parts.pop(0), curves)
        if pictures:
            draw_pictures(parts.pop(0), pictures)
    marked = [f"{result.name}: {result.row.config.plumbing}" for result in finished if result.row.config.plumbing]
    stamp_file(path, "; ".join(marked))
    return path


def draw_scores(axis: "Axes", finished: list[Result], rule: DecisionRule) -> None:
    """mAP50 and mAP of each row: the mean as a large mark, each seed as a dot, and the interval of the mean."""
    limits = limits_of([result.values(metric) for metric in METRICS for result in finished])
    for offset, (metric, (color, marker)) in enumerate(METRICS.items()):
        for row, result in enumerate(finished):
            values = result.values(metric)
            ends = rule.interval(values)
            draw_mean(axis, values, row + 0.4 * (0.5 - offset), ends, limits, color, marker, f"{values.mean():.3f}")
        axis.plot([], [], color=color, marker=marker, linestyle="", label=metric)
    models = {result.row.config.student.arch for result in finished}
    labels = [r.name if len(models) == 1 else f"{r.name} ({r.row.config.student.arch})" for r in finished]
    title = f"Scores of {models.pop()}" if len(models) == 1 else "Scores" if models else "No run has finished"
    frame_rows(axis, title, labels, limits, f"0 to 1; test split, last EMA weights{interval_note(finished, rule)}")


def draw_differences(axis: "Axes", compared: list[Difference], rule: DecisionRule) -> None:
    """The paired difference of each comparison in the rule's metric: a dot per seed, and the interval of the mean."""
    limits = limits_of([np.append(difference.decisive, 0.0) for difference in compared])
    kinds = [next(kind for kind in KINDS if difference.verdict.startswith(kind)) for difference in compared]
    for row, (difference, kind) in enumerate(zip(compared, kinds)):
        values = difference.decisive
        draw_mean(axis, values, row, difference.interval, limits, *KINDS[kind], f"{values.mean():+.3f}")
    for kind in dict.fromkeys(kinds):
        color, marker = KINDS[kind]
        axis.plot([], [], color=color, marker=marker, linestyle="", label=EXPLAINED.get(kind, kind))
    axis.axvline(0, color=STRONG, linewidth=1)
    if rule.smallest:
        axis.axvspan(-rule.smallest, rule.smallest, color="#DDDDDD", zorder=0, label="too small to matter")
    others = {difference.against for difference in compared}
    labels = [d.name if len(others) == 1 else f"{d.name} - {d.against}" for d in compared]
    other = f" minus {shorten(others.pop())}" if len(others) == 1 else ", difference"
    frame_rows(axis, f"{rule.metric}{other}", labels, limits, f"paired by seed{interval_note(compared, rule)}")


def interval_note(rows: Sequence[Result | Difference], rule: DecisionRule) -> str:
    return f"; {100 * rule.level:g} % interval" if any(len(row.seeds) > 1 for row in rows) else ""


def limits_of(values: list[np.ndarray]) -> tuple[float, float]:
    """The range of the seeds and some room: the interval of two seeds, nine times as wide, would hide them."""
    every = np.concatenate([*values, np.zeros(0)])
    every = every[np.isfinite(every)] if np.isfinite(every).any() else np.zeros(1)
    room = 0.2 * max(every.max() - every.min(), 0.02)
    return float(every.min() - room), float(every.max() + room)


def draw_mean(
    axis: "Axes",
    values: np.ndarray,
    row: float,
    ends: tuple[float, float] | None,
    limits: tuple[float, float],
    color: str,
    marker: str,
    text: str,
) -> None:
    """The mean of a row, its seeds, its interval (which ends in an arrow where it leaves the limits) and its number."""
    mean = float(values.mean())
    if ends is not None:
        low, high = max(ends[0], limits[0]), min(ends[1], limits[1])
        axis.plot([low, high], [row, row], color=color, linewidth=1.4)
        for end, at, arrow in ((ends[0], low, "<"), (ends[1], high, ">")):
            axis.plot(at, row, "|" if end == at else arrow, color=color, markersize=7 if end == at else 5)
        axis.plot(values, np.full(len(values), row), ".", color=STRONG, markersize=4, alpha=0.6, zorder=4)
    axis.plot(mean, row, marker, color=color, markersize=7, markeredgecolor="white", zorder=3)
    axis.text(0.985, row, text, transform=axis.get_yaxis_transform(), ha="right", va="center", color=color)


def frame_rows(axis: "Axes", title: str, labels: Sequence[str], limits: tuple[float, float], caption: str) -> None:
    """Name the rows, the first at the top, leave room for the numbers, and put the legend between title and frame."""
    axis.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axis.set_ylim(len(labels) - 0.4, -0.6)
    span = limits[1] - limits[0]
    axis.set_xlim(limits[0] - 0.03 * span, limits[1] + 0.24 * span)  # room for an arrow, and for one and the numbers
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(caption)
    legend = axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.995), ncols=2, handletextpad=0.3, columnspacing=1.0)
    lines = -(-len(legend.get_texts()) // 2)
    axis.set_title(title, pad=10 + 1.6 * POINTS * lines)


def read_curves(result: Result) -> list[tuple[str, list[int], list[float]]]:
    """(row, epochs, mAP) of each run that was evaluated during training."""
    found = []
    for seed in result.seeds:
        lines = run_folder.read_metrics(run_folder.RunFolder(result.row.folder(seed)).metrics)
        points = [(int(x["epoch"]), float(x["metrics/mAP50-95"])) for x in lines if x.get("metrics/mAP50-95")]
        if points:
            epochs, values = map(list, zip(*points))
            found.append((result.name, epochs, values))
    return found


def draw_curves(part: "SubFigure", curves: list[tuple[str, list[int], list[float]]]) -> None:
    """mAP during training of the first CURVES rows, a line per run; the first row in black."""
    axis = part.subplots()
    every = list(dict.fromkeys(name for name, _, _ in curves))
    labelled = set()
    for name, epochs, values in curves:
        if name in every[:CURVES]:
            number = every.index(name)
            look = line_look(number - 1) if number else {"color": STRONG}
            label = None if name in labelled else shorten(name)
            axis.plot(epochs, values, label=label, marker=marker_for(len(epochs)), markersize=4, linewidth=1.4, **look)
            labelled.add(name)
    some = f", the first {CURVES} rows" if len(every) > CURVES else ""
    axis.set_title(f"mAP during training, a line per run{some}")
    axis.set_ylabel("mAP, 0 to 1")
    count_epochs(axis)
    part.legend(loc="outside right upper")


def pictured(finished: list[Result]) -> list[Result]:
    """At most COLUMNS - 1 rows in their order: the first row, the best teacher, and the others with the best mAP."""
    ranked = sorted(finished, key=lambda r: -r.values("mAP").mean())
    teachers, others = [r for r in ranked if r.row.is_teacher], [r for r in ranked if not r.row.is_teacher]
    ordered = dict.fromkeys([result.name for result in [finished[0], *teachers[:1], *others, *teachers[1:]]])
    chosen = list(ordered)[: COLUMNS - 1]
    return [result for result in finished if result.name in chosen]


def picture_height(pictures: Pictures) -> float:
    """Inches of the pictures and the texts above them."""
    width = WIDTH / len(pictures.columns)
    heights = [
        max(column[line][0].height / column[line][0].width for column in pictures.columns.values()) * width
        for line in range(pictures.num_lines)
    ]
    return sum(heights) + LINE_HEIGHT * (pictures.num_lines + 3)


def draw_pictures(part: "SubFigure", pictures: Pictures) -> None:
    part.suptitle(pictures.heading, fontsize=POINTS + 1, x=0.01, ha="left")
    axes = part.subplots(pictures.num_lines, len(pictures.columns), squeeze=False)
    for column, (title, cells) in enumerate(pictures.columns.items()):
        for line, (picture, caption) in enumerate(cells):
            axis = axes[line, column]
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_xlabel(caption, loc="left")
        axes[0, column].set_title(shorten(title))
