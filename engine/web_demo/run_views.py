"""Views of the demo: checkpoints, curves and maps of runs, without Streamlit."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from checkpoint import CheckpointInfo, previous_path
from config import STUDENT, Config, GradientShare, TermConfig, from_tree
from datasets.folders import list_files
from datasets.letterbox import letterbox
from distill.terms import LOSSES
from engine.drawing.heat_maps import attention_heat, grid, heat_colors, heat_legend, overlay, stack, to_pictures
from engine.onnx_files.detector import SUFFIX
from engine.runtime import run_folder
from engine.runtime.run_folder import RunFolder
from errors import UserError
from weights import file_of_run
from yaml_files import read_yaml

CELL_SIDE = 420  # pixels: side of a heat map
BASELINE, DISTILLED = "baseline", "distilled"  # parts of the names of compare.py's rows
CURVES = {"mAP50-95": "metrics/mAP50-95", "mAP50": "metrics/mAP50"}


@dataclass(frozen=True)
class Run:
    """A run with weights, or an ONNX file of it. name: its folder below runs/, followed by the name of an ONNX file."""

    name: str
    folder: RunFolder
    weights: Path

    def config(self) -> Config | None:
        """The config of the run; None for a checkpoint without one."""
        if not self.folder.config.is_file():
            return None
        return from_tree(Config, read_yaml(self.folder.config), source=str(self.folder.config))

    def teachers(self) -> str:
        """`taught by coco` or `no teacher`, by the run's config; "" if there is none, or none of this version."""
        try:
            config = self.config()
        except UserError:
            return ""
        if config is None:
            return ""
        names = [term.teacher for term in config.terms if term.weight != 0]
        names += [config.pseudo_boxes.teacher] if config.pseudo_boxes else []
        unique = dict.fromkeys("itself" if name == STUDENT else name for name in names)
        return f"taught by {' and '.join(unique)}" if unique else "no teacher"

    def score(self) -> str:
        """`mAP 0.311 on test`, of these weights by the run's report; else that it was not measured."""
        unknown = "mAP not measured"
        if self.weights.suffix == SUFFIX or not self.folder.report.is_file():
            return unknown
        try:
            report = json.loads(self.folder.report.read_text(encoding="utf-8"))
            best = report.get("best_on_holdout")
            numbers = best["test"] if best and self.weights == self.folder.best else report["test"]
            return f"mAP {numbers['mAP50-95']:.3f} on {report['split']}"
        except (ValueError, KeyError, TypeError, AttributeError):  # half a report, or another program's
            return unknown


def find_runs(root: Path) -> dict[str, Run]:
    """Every run below `root` that has weights, by name, with its best weights, else its last. Links are followed.

    ONNX files below `root` are included, each after the run whose folder it is in.
    """
    found: dict[str, Run] = {}
    files = list_files(root, (".pt", ".safetensors", SUFFIX)) if root.is_dir() else []
    for weights in dict.fromkeys(path.parent for path in files if path.parent.name == "weights"):
        folder = RunFolder(weights.parent)
        paths = [path for path in (folder.best, folder.last) if path.is_file() or previous_path(path).is_file()]
        if paths:
            name = weights.parent.relative_to(root).as_posix()
            found[name] = Run(name, folder, paths[0])
    for path in (path for path in files if path.suffix == SUFFIX):
        parent = path.parent.parent if path.parent.name == "weights" else path.parent
        name = (parent.relative_to(root) / path.name).as_posix()
        found[name] = Run(name, RunFolder(parent), path)
    return dict(sorted(found.items()))


def default_pair(names: list[str]) -> tuple[str, str]:
    """The first baseline and its distilled run, by their names; without such names the first and the last run.

    ONNX files are chosen only if there is nothing else.
    """
    names = [name for name in names if not name.endswith(SUFFIX)] or names
    baseline = next((name for name in names if BASELINE in name), names[0])
    distilled = [name for name in names if DISTILLED in name]
    partner = baseline.replace(BASELINE, DISTILLED)
    return baseline, partner if partner in distilled else next(iter(distilled), names[-1])


def short_names(names: list[str]) -> list[str]:
    """The names without their common folders: demo/a, demo/b -> a, b."""
    parts = [name.split("/") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


# ---------------------------------------------------------------- files of a run


def read_curves(runs: dict[str, Run], column: str) -> dict[str, list]:
    """Columns epoch, value and run (its title), with a row for each epoch of each run that has a value.

    A run without values gets a row without one if another has values, so that each run has one color in all charts.
    """
    points: list[tuple[int, float | None, str]] = [
        (int(row["epoch"]), float(row[column]), title)
        for title, run in runs.items()
        for row in run_folder.read_metrics(run.folder.metrics)
        if row.get(column)
    ]
    with_values = {title for _, _, title in points}
    points += [(points[0][0], None, title) for title in runs if points and title not in with_values]
    return {name: [row[place] for row in points] for place, name in enumerate(("epoch", "value", "run"))}


def term_columns(config: Config) -> dict[str, TermConfig]:
    """The distillation terms of a run, by their column in metrics.csv."""
    return {f"train/{term.name or f'{term.loss}_{term.teacher}'}": term for term in config.terms}


def describe_term(term: TermConfig) -> str:
    """`2.0 x cwd on p3, p4, p5 of trained_longer, through conv1x1: <first line of the loss's docstring>`"""
    maps = f" on {', '.join(term.student_maps)}" if term.student_maps else ""
    adapter = "" if term.adapter == "none" else f", through an adapter {term.adapter}"
    summary = (LOSSES[term.loss].loss.__doc__ or "").strip().split("\n")[0]
    weight = (
        f"{term.weight.share:.0%} of the gradient" if isinstance(term.weight, GradientShare) else f"{term.weight:g}"
    )
    return f"{weight} x {term.loss}{maps}, from the teacher {term.teacher}{adapter}: {summary}"


def find_teachers(config: Config) -> dict[str, Path]:
    """The weights files of a run's teachers that still exist, by name; a teacher may be named by its run's folder."""
    files = {teacher.name: file_of_run(teacher.weights) for teacher in config.teachers if teacher.weights is not None}
    return {name: file for name, file in files.items() if file.is_file()}


def map_names(models: list[nn.Module]) -> list[str]:
    """The maps that all models have, in the order of the first model, from fine to coarse."""
    names = [probe_maps(model) for model in models]
    return [name for name in names[0] if all(name in others for others in names)] if names else []


@torch.inference_mode()
def probe_maps(model: nn.Module) -> list[str]:
    """The names of a model's maps, from a forward pass on an empty image."""
    device = next(model.parameters()).device
    features = model(torch.zeros(1, 3, 64, 64, device=device)).features
    return [name for name, value in features.items() if value.dim() == 4]


@torch.inference_mode()
def heat_sheet(models: dict[str, tuple[nn.Module, CheckpointInfo]], picture: np.ndarray, map_name: str) -> Image.Image:
    """The letterboxed picture, and for each model the picture under the heat of its map.

    Heat is the mean over channels of the absolute value, as in attention transfer (Zagoruyko & Komodakis,
    arXiv:1612.03928), scaled per map from its smallest value (black) to its largest (white).
    """
    columns: dict[str, list[Image.Image]] = {}
    for name, (model, info) in models.items():
        square, _, _ = letterbox(picture, info.image_size)
        images = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255  # (1, 3, S, S)
        letterboxed = to_pictures(images, CELL_SIDE, smooth=True)
        columns.setdefault("picture", letterboxed)
        features = model(images.to(next(model.parameters()).device)).features[map_name].cpu()  # (1, C, h, w)
        heat = to_pictures(heat_colors(attention_heat(features.abs())), CELL_SIDE, smooth=True)
        columns[name] = overlay(letterboxed, heat)
    sheet = grid(columns)
    return stack([sheet, heat_legend("Mean of absolute values", sheet.width)])
