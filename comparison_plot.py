"""comparison.png: bars with one dot per seed, the learning curves, and what each model sees in the same pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import checkpoint
import run_folder
from config import Config
from datasets import open_dataset
from datasets.images import read_image
from drawing import draw_detections
from errors import require
from predict import Predictor
from structures import Detections

if TYPE_CHECKING:
    from compare import Row

PICTURES = 4
SCORE_THRESHOLD = 0.3  # of the boxes that are drawn


def require_plots() -> None:
    """UserError where matplotlib is missing; asked before hours of training, not after."""
    require("matplotlib", "plots", "comparison.png")


def write(path: Path, config: Config, rows: list["Row"]) -> Path:
    """Draw the comparison of finished runs; the pictures are the first of the test split that hold objects."""
    require_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strips = picture_strips(config, rows)
    columns = len(strips)
    figure = Figure(figsize=(3.2 * columns, 4.2 + 3.2 * PICTURES * picture_aspect(strips)), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.2, 3.2 * PICTURES * picture_aspect(strips)])
    bars, curves = top.subplots(1, 2)
    draw_bars(bars, rows)
    draw_curves(curves, rows)
    axes = bottom.subplots(PICTURES, columns, squeeze=False)
    for column, (title, pictures) in enumerate(strips.items()):
        for axis, picture in zip(axes[:, column], pictures):
            axis.imshow(picture)
        axes[0, column].set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(config.name)
    figure.savefig(path, dpi=110)
    return path


def draw_bars(axis, rows: list["Row"]) -> None:
    """mAP50 and mAP side by side per row: the bar is the mean, each dot a seed."""
    for offset, (metric, color) in enumerate({"mAP50": "tab:blue", "mAP": "tab:orange"}.items()):
        positions = np.arange(len(rows)) + 0.4 * (offset - 0.5)
        means = [row.values(metric).mean() for row in rows]
        axis.bar(positions, means, width=0.36, color=color, alpha=0.6, label=metric)
        for position, row, mean in zip(positions, rows, means):
            values = row.values(metric)
            if len(values) > 1:
                axis.plot(np.full(len(values), position), values, "k.", markersize=4)
            axis.annotate(f"{mean:.3f}", (position, mean), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(rows)), [f"{row.name}\n{row.arch}" for row in rows], fontsize=8)
    axis.set_ylabel("on the test split, last EMA weights")
    axis.margins(y=0.2)
    axis.legend(loc="upper left")


def draw_curves(axis, rows: list["Row"]) -> None:
    """mAP after each epoch, where the runs were evaluated on the way; a faint line per seed."""
    for index, row in enumerate(rows):
        for seed, folder in enumerate(row.folders):
            points = [
                (int(line["epoch"]), float(line["metrics/mAP50-95"]))
                for line in run_folder.read_metrics(run_folder.RunFolder(folder).metrics)
                if line.get("metrics/mAP50-95")
            ]
            if points:
                x, y = zip(*points)
                axis.plot(x, y, color=f"C{index}", alpha=0.8, linewidth=1, label=row.name if seed == 0 else None)
    axis.set_xlabel("epoch")
    axis.set_ylabel("mAP on the way")
    if axis.has_data():
        axis.legend(fontsize=8)


def picture_strips(config: Config, rows: list["Row"]) -> dict[str, list[np.ndarray]]:
    """Title -> PICTURES drawn pictures: the labels first, then what each row's first seed finds."""
    index = open_dataset(config.data.format, config.data.root, config.data.test)
    samples = [sample for sample in index.samples if len(sample.boxes_xyxy)][:PICTURES]
    pictures = [read_image(sample.image_path) for sample in samples]
    labels = [
        Detections(
            torch.from_numpy(sample.boxes_xyxy[~sample.ignore]).float(),
            torch.ones(int((~sample.ignore).sum())),
            torch.from_numpy(sample.labels[~sample.ignore]),
        )
        for sample in samples
    ]
    drawn = [draw_detections(p, d, index.names, show_scores=False) for p, d in zip(pictures, labels)]
    strips = {"labels": [np.asarray(picture) for picture in drawn]}
    for row in rows:
        model, info = checkpoint.load_model(row.folders[0] / "weights" / "last.pt")
        found = Predictor(model, image_size=info.image_size, score_threshold=SCORE_THRESHOLD)(pictures)
        strips[row.name] = [np.asarray(draw_detections(p, d, index.names)) for p, d in zip(pictures, found)]
    return strips


def picture_aspect(strips: dict[str, list[np.ndarray]]) -> float:
    """The mean height / width of the pictures."""
    return float(np.mean([picture.shape[0] / picture.shape[1] for picture in strips["labels"]]))
