"""comparison.png: scores and differences with a dot per seed, learning curves, and drawn detections."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import checkpoint
from config import Config
from datasets import open_dataset
from datasets.images import read_image
from engine.comparison.decision import DecisionRule
from engine.comparison.study import Study
from engine.comparison.table import Result, differences
from engine.drawing.detections import draw_detections
from engine.drawing.plots import labels_of, save_figure
from engine.drawing.stamp import stamp_file
from engine.prediction.predictor import Predictor
from engine.runtime import run_folder
from errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = 4
PICTURED_ROWS = 5  # columns of pictures beside the labels
CURVES = 10  # rows with a curve: more lines cannot be told apart
SCORE_THRESHOLD = 0.3  # of the boxes that are drawn
COLORS = {"better": "tab:green", "worse": "tab:red"}  # by verdict; others are grey


def require_plots() -> None:
    """UserError if matplotlib is missing: call it before the training, not after."""
    require("matplotlib", "plots", "comparison.png")


def write(path: Path, study: Study, results: dict[str, Result], *, with_pictures: bool) -> Path:
    """Draw the rows that have finished runs, and the first pictures of the test split that have objects."""
    require_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure, SubFigure

    finished = [result for result in results.values() if result.reports]
    strips = picture_strips(study.config, pictured(finished)) if with_pictures and finished else {}
    curves = [curve for result in finished for curve in read_curves(result)]
    height = max(4.2, 1.5 + 0.34 * len(finished))
    below = 3.2 * PICTURES * picture_aspect(strips) if strips else 0.0
    figure = Figure(figsize=(max(13.0, 3.2 * len(strips)), height + below), layout="constrained")
    FigureCanvasAgg(figure)
    top: Figure | SubFigure = figure
    if strips:
        (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[height, below])
        draw_pictures(bottom.subplots(PICTURES, len(strips), squeeze=False), strips)
    axes = top.subplots(1, 3 if curves else 2)
    draw_scores(axes[0], finished)
    draw_differences(axes[1], results, study.rule)
    if curves:
        draw_curves(axes[2], curves)
    figure.suptitle(study.config.name)
    save_figure(figure, path)
    marked = [f"{result.name}: {result.row.config.plumbing}" for result in finished if result.row.config.plumbing]
    stamp_file(path, "; ".join(marked))
    return path


def draw_scores(axis: "Axes", finished: list[Result]) -> None:
    """mAP50 and mAP of each row: the bar is the mean, each dot a seed."""
    for offset, (metric, color) in enumerate({"mAP50": "tab:blue", "mAP": "tab:orange"}.items()):
        positions = np.arange(len(finished)) + 0.4 * (offset - 0.5)
        means = [result.values(metric).mean() for result in finished]
        axis.barh(positions, means, height=0.36, color=color, alpha=0.6, label=metric)
        for position, result, mean in zip(positions, finished, means):
            values = result.values(metric)
            if len(values) > 1:
                axis.plot(values, np.full(len(values), position), "k.", markersize=3)
            axis.annotate(f" {mean:.3f}", (max(values), position), va="center", fontsize=7)
    axis.set_yticks(range(len(finished)), [f"{r.name} ({r.row.config.student.arch})" for r in finished], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("on the test split, last EMA weights")
    axis.margins(x=0.12)
    axis.legend(loc="lower right", fontsize=8)


def draw_differences(axis: "Axes", results: dict[str, Result], rule: DecisionRule) -> None:
    """The paired difference of each comparison in the rule's metric: a dot per seed, and the interval of the mean."""
    drawn = [difference for difference in differences(results, rule) if difference.seeds]
    for position, difference in enumerate(drawn):
        color = COLORS.get(difference.verdict, "0.4")
        values = difference.decisive
        axis.plot(values, np.full(len(values), position), ".", color=color, markersize=4, alpha=0.7)
        half = rule.half_width(values) if len(values) > 1 else 0.0
        axis.errorbar(values.mean(), position, xerr=half, fmt="D", color=color, markersize=4, capsize=3)
    if drawn:
        limit = 1.15 * max(np.abs(difference.decisive).max() for difference in drawn) + 1e-3
        axis.set_xlim(-limit, limit)  # by the dots: the interval of two seeds would fill the axis
    axis.axvline(0, color="k", linewidth=0.8)
    axis.set_yticks(range(len(drawn)), [f"{d.name} - {d.against}" for d in drawn], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"paired difference in {rule.metric}, {100 * rule.level:g} % interval")


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


def draw_curves(axis: "Axes", curves: list[tuple[str, list[int], list[float]]]) -> None:
    """mAP during training of the first CURVES rows, a line per run."""
    names = list(dict.fromkeys(name for name, _, _ in curves))[:CURVES]
    labelled = set()
    for name, epochs, values in curves:
        if name in names:
            label = None if name in labelled else name
            axis.plot(epochs, values, color=f"C{names.index(name)}", alpha=0.8, linewidth=1, label=label)
            labelled.add(name)
    axis.set_xlabel("epoch")
    axis.set_ylabel("mAP during training")
    axis.legend(fontsize=8)


def pictured(finished: list[Result]) -> list[Result]:
    """At most PICTURED_ROWS rows in their order: the first row, the teachers, then the others with the best mAP."""
    ranked = sorted(finished, key=lambda r: (r is not finished[0], not r.row.is_teacher, -r.values("mAP").mean()))
    chosen = {result.name for result in ranked[:PICTURED_ROWS]}
    return [result for result in finished if result.name in chosen]


def picture_strips(config: Config, results: list[Result]) -> dict[str, list[np.ndarray]]:
    """Title -> PICTURES drawn pictures: the labels, then the detections of each row's first finished seed."""
    index = open_dataset(config.data.format, config.data.root, config.data.test, classes=config.data.classes)
    samples = [sample for sample in index.samples if len(sample.boxes_xyxy)][:PICTURES]
    pictures = [read_image(sample.image_path) for sample in samples]
    labels = [labels_of(sample) for sample in samples]
    drawn = [draw_detections(p, d, index.names, show_scores=False) for p, d in zip(pictures, labels)]
    strips = {"labels": [np.asarray(picture) for picture in drawn]}
    for result in results:
        folder = run_folder.RunFolder(result.row.folder(result.seeds[0]))
        model, info = checkpoint.load_model(folder.last)
        iou_threshold = info.evaluation.iou_threshold
        assert iou_threshold is not None  # CheckpointInfo.evaluation gives it
        predictor = Predictor(
            model,
            image_size=info.image_size,
            score_threshold=SCORE_THRESHOLD,
            iou_threshold=iou_threshold,
        )
        found = predictor(pictures)
        strips[result.name] = [np.asarray(draw_detections(p, d, index.names)) for p, d in zip(pictures, found)]
    return strips


def draw_pictures(axes: np.ndarray, strips: dict[str, list[np.ndarray]]) -> None:
    for column, (title, pictures) in enumerate(strips.items()):
        for axis, picture in zip(axes[:, column], pictures):
            axis.imshow(picture)
        axes[0, column].set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()


def picture_aspect(strips: dict[str, list[np.ndarray]]) -> float:
    """The mean height / width of the pictures."""
    return float(np.mean([picture.shape[0] / picture.shape[1] for picture in strips["labels"]]))
