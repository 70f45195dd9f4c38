"""What the demo shows of runs: their checkpoints, curves and maps, and two models on one picture. Without Streamlit."""

import functools
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from checkpoint import CheckpointInfo, previous_path
from config import Config, TermConfig, from_tree
from datasets.letterbox import letterbox
from distill.terms import LOSSES
from engine.drawing.heat_maps import attention_heat, grid, heat_colors, overlay, to_pictures
from engine.onnx_files.detector import SUFFIX, OnnxDetector
from engine.prediction.predictor import Predictor
from engine.runtime import run_folder
from engine.runtime.run_folder import RunFolder
from engine.runtime.timing import rotate, wall_seconds
from structures import Detections
from yaml_files import read_yaml

ROUNDS = 3  # of the timing, after one that is not measured
CELL_SIDE = 260  # pixels of a heat map
BASELINE, DISTILLED = "baseline", "distilled"  # parts of the names of compare.py's rows
CURVES = {"mAP50-95": "metrics/mAP50-95", "mAP50": "metrics/mAP50"}


@dataclass(frozen=True)
class Run:
    """A run with weights to load, or an ONNX file of it. name: its folder below runs/, and the file's name."""

    name: str
    folder: RunFolder
    weights: Path

    @property
    def version(self) -> float:
        """Changes when the weights do."""
        return self.weights.stat().st_mtime if self.weights.is_file() else 0.0

    def config(self) -> Config | None:
        """None where a checkpoint was put there without its config."""
        if not self.folder.config.is_file():
            return None
        return from_tree(Config, read_yaml(self.folder.config), source=str(self.folder.config))


def find_runs(root: Path) -> dict[str, Run]:
    """Every run at any depth below `root` that has weights, by name: the held-out best, else the last.

    Every ONNX file below `root` as well, each behind the run whose folder it is in.
    """
    found = {}
    for weights in root.glob("**/weights"):
        folder = RunFolder(weights.parent)
        paths = [path for path in (folder.best, folder.last) if path.is_file() or previous_path(path).is_file()]
        if paths:
            name = weights.parent.relative_to(root).as_posix()
            found[name] = Run(name, folder, paths[0])
    for path in root.glob(f"**/*{SUFFIX}"):
        folder = path.parent.parent if path.parent.name == "weights" else path.parent
        name = (folder.relative_to(root) / path.name).as_posix()
        found[name] = Run(name, RunFolder(folder), path)
    return dict(sorted(found.items()))


def default_pair(names: list[str]) -> tuple[str, str]:
    """The first baseline, and the distilled run beside it; the first and the last where names do not say.

    ONNX files are chosen where there is nothing else.
    """
    names = [name for name in names if not name.endswith(SUFFIX)] or names
    baseline = next((name for name in names if BASELINE in name), names[0])
    distilled = [name for name in names if DISTILLED in name]
    beside = baseline.replace(BASELINE, DISTILLED)
    return baseline, beside if beside in distilled else next(iter(distilled), names[-1])


def short_names(names: list[str]) -> list[str]:
    """Without the folders that all of them share: demo/a, demo/b -> a, b."""
    parts = [name.split("/") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


# ---------------------------------------------------------------- two models on one picture


@dataclass(frozen=True)
class Result:
    """What a model found in a picture, and how long it takes: letterbox, model and suppression, a batch of one."""

    found: Detections
    milliseconds: float


def compare(
    models: dict[str, tuple[nn.Module, CheckpointInfo]],
    picture: np.ndarray,
    *,
    score_threshold: float,
    iou_threshold: float,
    device: torch.device | str = "cpu",
) -> dict[str, Result]:
    """Each model's detections and the median of its times; they take turns, so that none has the quieter machine."""
    predictors = {
        name: Predictor(
            model,
            image_size=info.image_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            device=device,
        )
        for name, (model, info) in models.items()
    }
    found: dict[str, Detections] = {}

    def run(name: str) -> None:
        found[name] = predictors[name]([picture])[0]

    seconds = rotate({name: functools.partial(run, name) for name in predictors}, ROUNDS, wall_seconds)
    return {name: Result(found[name], 1000 * statistics.median(seconds[name])) for name in predictors}


def count_classes(results: dict[str, tuple[Detections, tuple[str, ...]]]) -> dict[str, list]:
    """Columns of a table: "class", then how many each model found; classes that nobody found are left out."""
    counts = {
        column: {name: int((found.labels == label).sum()) for label, name in enumerate(names)}
        for column, (found, names) in results.items()
    }
    every = dict.fromkeys(name for column in counts.values() for name, count in column.items() if count)
    rows = {"class": [*every, "all"]}
    for column, count in counts.items():
        rows[column] = [*(count.get(name, 0) for name in every), sum(count.values())]
    return rows


# ---------------------------------------------------------------- what a run wrote


def read_curves(runs: dict[str, Run], column: str) -> dict[str, list]:
    """Columns epoch, value and run, a row for each epoch of each run that has a value, under the runs' titles.

    Where one run has values, each other has at least a row without one: so its color is the same in every chart.
    """
    found = [
        (int(row["epoch"]), float(row[column]), title)
        for title, run in runs.items()
        for row in run_folder.read_metrics(run.folder.metrics)
        if row.get(column)
    ]
    known = {title for _, _, title in found}
    found += [(found[0][0], None, title) for title in runs if found and title not in known]
    return {name: [row[place] for row in found] for place, name in enumerate(("epoch", "value", "run"))}


def term_columns(config: Config) -> dict[str, TermConfig]:
    """The columns of metrics.csv that hold a run's distillation terms."""
    return {f"train/{term.name or f'{term.loss}_{term.teacher}'}": term for term in config.terms}


def describe_term(term: TermConfig) -> str:
    """`2.0 x cwd on p3, p4, p5 of trained_longer, through conv1x1: <first line of the loss's docstring>`"""
    maps = f" on {', '.join(term.student_maps)}" if term.student_maps else ""
    adapter = "" if term.adapter == "none" else f", through an adapter {term.adapter}"
    summary = (LOSSES[term.loss].loss.__doc__ or "").strip().split("\n")[0]
    return f"{term.weight:g} x {term.loss}{maps}, from the teacher {term.teacher}{adapter}: {summary}"


def find_teachers(config: Config) -> dict[str, Path]:
    """The teachers of a run whose weights are still there and are checkpoints of ours."""
    return {
        teacher.name: Path(teacher.weights)
        for teacher in config.teachers
        if teacher.weights is not None and Path(teacher.weights).is_file()
    }


def with_maps(models: dict[str, tuple[nn.Module, CheckpointInfo]]) -> dict[str, tuple[nn.Module, CheckpointInfo]]:
    """Without those of ONNX files, which give boxes and scores alone."""
    return {name: pair for name, pair in models.items() if not isinstance(pair[0], OnnxDetector)}


def map_names(models: list[nn.Module]) -> list[str]:
    """The maps that all of them give, from fine to coarse as the first lists them."""
    known = [probe_maps(model) for model in models]
    return [name for name in known[0] if all(name in others for others in known)] if known else []


@torch.inference_mode()
def probe_maps(model: nn.Module) -> list[str]:
    device = next(model.parameters()).device
    features = model(torch.zeros(1, 3, 64, 64, device=device)).features
    return [name for name, value in features.items() if value.dim() == 4]


@torch.inference_mode()
def heat_sheet(models: dict[str, tuple[nn.Module, CheckpointInfo]], picture: np.ndarray, map_name: str) -> Image.Image:
    """The picture as the models see it, and over it where each one's map is strong.

    Heat is the mean over channels of the absolute value, from a map's least (black) to its most (white), as in
    attention transfer (Zagoruyko & Komodakis, arXiv:1612.03928): the scale is each map's own.
    """
    columns = {}
    for name, (model, info) in models.items():
        square, _, _ = letterbox(picture, info.image_size)
        images = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255  # (1, 3, S, S)
        seen = to_pictures(images, CELL_SIDE, smooth=True)
        columns.setdefault("picture", seen)
        features = model(images.to(next(model.parameters()).device)).features[map_name].cpu()  # (1, C, h, w)
        heat = to_pictures(heat_colors(attention_heat(features.abs())), CELL_SIDE, smooth=True)
        columns[name] = overlay(seen, heat)
    return grid(columns)
