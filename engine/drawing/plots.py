"""The plots of a run: results.png, confusion_matrix.png, pr_curve.png (matplotlib), predictions.jpg (Pillow)."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from datasets.images import read_image
from datasets.index import DatasetIndex, Sample
from datasets.loader import Loader
from engine.drawing.detections import draw_detections
from engine.drawing.fonts import drawable
from engine.runtime import run_folder
from metrics.report import DetectionReport
from structures import Detections, Detector

TILE = 320  # pixels of a picture in predictions.jpg
LEGEND_CLASSES = 20  # with more classes, lines get one colour and no legend


def is_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def save_figure(figure, path: Path) -> None:
    """Write a figure: each text in a font that has its characters (fonts.drawable), `$` without its special meaning."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        shown, font = drawable(text.get_text(), default=default_font())
        if shown != text.get_text():
            text.set_text(shown)
        if font != default_font():
            text.set_fontproperties(FontProperties(fname=font, size=text.get_fontsize()))
    figure.savefig(path, dpi=110)


def plot_names(names: Sequence[str]) -> list[str]:
    """Names that matplotlib can draw: with numbers if a name has characters that no installed font has."""
    return [drawable(name, number, default=default_font())[0] for number, name in enumerate(names)]


@functools.lru_cache(maxsize=1)
def default_font() -> str:
    """The file of matplotlib's default font."""
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties())


def _figure(width: float, height: float):
    """A figure that is only written to files: no window, no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_results(metrics_csv: Path, path: Path) -> None:
    """Plot each column of metrics.csv over the epochs; the AP at all IoU thresholds share one plot."""
    rows = run_folder.read_metrics(metrics_csv)
    if not rows:
        return
    left_out = ("epoch", "time", run_folder.PLUMBING)
    names = [name for name in rows[0] if name not in left_out and any(row[name] for row in rows)]
    per_iou = [name for name in names if name in run_folder.AP_COLUMNS]
    plotted = {name: [name] for name in names if name not in per_iou} | (
        {"metrics/AP at IoU": per_iou} if per_iou else {}
    )
    columns = min(5, len(plotted))
    lines = -(-len(plotted) // columns)
    figure = _figure(3 * columns, 2.4 * lines)
    for (title, group), axis in zip(plotted.items(), figure.subplots(lines, columns, squeeze=False).flat):
        for number, name in enumerate(group):
            points = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
            shade = (
                str(0.8 * number / len(group)) if len(group) > 1 else None
            )  # of grey: the strictest threshold is the palest
            axis.plot(*zip(*points), marker="." if len(points) < 30 else None, linewidth=1.2, color=shade)
        axis.set_title(f"{title} 0.50 to 0.95" if len(group) > 1 else title, fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in figure.axes[len(plotted) :]:
        axis.set_axis_off()
    save_figure(figure, path)


def draw_confusion(report: DetectionReport, path: Path) -> None:
    """Draw the confusion matrix. A column is a true class; its rows are the fractions found as each class or missed.

    The last column counts the detections that match no object.
    """
    counts = report.confusion.astype(np.float64)  # (K + 1, K + 1)
    totals = counts.sum(axis=0, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    names = [*plot_names(report.names), "background"]
    size = min(4 + 0.45 * len(names), 24)
    figure = _figure(size, size)
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        for i, j in np.ndindex(counts.shape):
            if counts[i, j]:
                text = f"{int(counts[i, j])}" if j == len(names) - 1 else f"{shares[i, j]:.2f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 0.5 else "k")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("true")
    axis.set_ylabel("predicted")
    given = report.given.score_threshold
    axis.set_title(f"IoU {report.iou_threshold:g}, score {given:g} and above", fontsize=9)
    save_figure(figure, path)


def draw_pr_curve(report: DetectionReport, path: Path) -> None:
    """Draw interpolated precision over recall: a line for each class that has objects, and their mean."""
    figure = _figure(6.5, 5)
    axis = figure.subplots()
    names = plot_names(report.names)
    measured = [k for k in range(len(report.names)) if np.isfinite(report.pr_precision[k]).all()]
    has_legend = len(measured) <= LEGEND_CLASSES
    for k in measured:
        label = f"{names[k]} {report.pr_precision[k].mean():.3f}" if has_legend else None
        axis.plot(report.recalls, report.pr_precision[k], linewidth=1, label=label, color=None if has_legend else "0.8")
    if measured:
        mean = report.pr_precision[measured].mean(axis=0)  # (101,)
        axis.plot(report.recalls, mean, linewidth=2.5, color="tab:blue", label=f"all classes {mean.mean():.3f}")
        axis.legend(fontsize=7)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(f"IoU {report.iou_threshold:g}; the numbers are areas", fontsize=9)
    save_figure(figure, path)


@torch.no_grad()
def prediction_sheet(
    model: nn.Module,
    index: DatasetIndex,
    *,
    image_size: int,
    device: torch.device,
    count: int,
    score_threshold: float = 0.25,
    iou_threshold: float = 0.7,
    columns: int = 4,
) -> Image.Image:
    """`count` pictures spread over the split, each drawn twice: with its labels and with the model's detections."""
    detector = cast(Detector, model)  # PyTorch types every attribute of a module as Tensor | Module
    chosen = spread(index, count)
    tiles = []
    loader = Loader(chosen, image_size=image_size, batch_size=4, seed=0, shuffle=False)
    for batch in loader.epoch(0):
        output = model(batch.images.to(device).float() / 255)
        found = detector.detect(
            output, score_threshold=score_threshold, iou_threshold=iou_threshold, max_detections=100
        )
        for row, detections in enumerate(found):
            sample = chosen.samples[int(batch.indices[row])]
            boxes = batch.unletterbox(row, detections.boxes_xyxy.float().cpu(), sample.width, sample.height)
            scale = TILE / max(sample.width, sample.height)  # shrunk before drawing, so that labels can be read
            size = (max(1, round(scale * sample.width)), max(1, round(scale * sample.height)))
            picture = Image.fromarray(read_image(sample.image_path)).resize(size, Image.Resampling.BILINEAR)
            truth = labels_of(sample)
            truth = Detections(truth.boxes_xyxy * scale, truth.scores, truth.labels)
            shown = Detections(boxes * scale, detections.scores.float().cpu(), detections.labels.cpu())
            tiles.append(draw_detections(picture, truth, index.names, show_scores=False))
            tiles.append(draw_detections(picture, shown, index.names))
    return contact_sheet(tiles, columns)


def spread(index: DatasetIndex, count: int) -> DatasetIndex:
    """At most `count` pictures of an index, at equal distances from its first to its last."""
    rows = np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)
    return index.subset(sorted(set(rows.tolist())))


def labels_of(sample: Sample) -> Detections:
    """The labelled objects of a picture as detections with score 1, without ignored objects."""
    counts = ~sample.ignore
    boxes_xyxy = torch.from_numpy(sample.boxes_xyxy[counts]).float()
    return Detections(boxes_xyxy, torch.ones(len(boxes_xyxy)), torch.from_numpy(sample.labels[counts]))


def contact_sheet(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of at most TILE x TILE, row by row on white."""
    rows, gap = -(-len(tiles) // columns), 4
    sheet = Image.new("RGB", ((TILE + gap) * min(columns, len(tiles)), (TILE + gap) * rows), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (TILE + gap), i // columns * (TILE + gap)))
    return sheet
