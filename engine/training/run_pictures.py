"""The pictures of a run: detections beside labels, and the maps of teacher and student.

A run ends with the files predictions.jpg, distillation.jpg (if a term compares maps) and matplotlib's plots. The first
two go to TensorBoard at every evaluation as well.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from config import TermConfig
from datasets.index import DatasetIndex
from datasets.loader import Loader
from distill.adapters import like_adapted, resize_like
from distill.outputs import named_map
from distill.terms import LOSSES
from engine.drawing import plots, style
from engine.drawing.heat_maps import (
    attention_heat,
    common_colors,
    grid,
    heat_colors,
    heat_legend,
    overlay,
    stack,
    text_legend,
    to_pictures,
)
from engine.drawing.predictions import prediction_sheet, spread
from engine.drawing.stamp import stamp_file, stamped
from engine.runtime.progress import Progress
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup
from engine.training.teaching import resize_images
from layers.eval_mode import in_eval_mode
from metrics.report import DetectionReport
from teachers.dinov2 import DINOv2, patch_pca

NUM_PICTURES = 4  # in distillation.jpg, and in the predictions at each evaluation
NUM_PREDICTED = 12  # in predictions.jpg
FILES = ("predictions.jpg", "distillation.jpg", "results.png", "confusion_matrix.png", "pr_curve.png")
SIDE = 200  # pixels of a cell in distillation.jpg
MAP_LEGEND = "Maps: vectors that are alike have like colors (red, green, blue: three principal components)."
SHARED_LEGEND = " The last two columns share their colors: the more alike they look, the better the student imitates."


def evaluation_pictures(setup: TrainingSetup, index: DatasetIndex) -> dict[str, Image.Image]:
    """By their names in TensorBoard: "predictions", and "distillation/<term>" for each term that compares maps."""
    maps = {f"distillation/{name}": sheet for name, sheet in map_pictures(setup, index).items()}
    sheets = {"predictions": prediction_picture(setup, index, NUM_PICTURES)} | maps
    return {name: stamped(sheet, setup.config.plumbing) for name, sheet in sheets.items()}


def draw(setup: TrainingSetup, details: DetectionReport, folder: RunFolder, progress: Progress) -> None:
    """The files of a finished run, stamped where it is no measurement."""
    write_pictures(setup, details, folder, progress)
    for name in FILES:
        stamp_file(folder.path / name, setup.config.plumbing)


def write_pictures(setup: TrainingSetup, details: DetectionReport, folder: RunFolder, progress: Progress) -> None:
    prediction_picture(setup, setup.splits.test, NUM_PREDICTED).save(folder.path / "predictions.jpg", quality=90)
    if sheets := map_pictures(setup, setup.splits.test):
        stack(list(sheets.values()), gap=SIDE // 5).save(folder.path / "distillation.jpg", quality=90)
    if not style.is_available():
        progress.say("without plots: matplotlib is not installed (pip install '.[plots]')")
        return
    plots.draw_results(folder.metrics, folder.path / "results.png")
    plots.draw_confusion(details, folder.path / "confusion_matrix.png")
    plots.draw_pr_curve(details, folder.path / "pr_curve.png")


def prediction_picture(setup: TrainingSetup, index: DatasetIndex, count: int) -> Image.Image:
    return prediction_sheet(
        setup.ema.model,
        index,
        image_size=setup.config.image_size,
        device=setup.processes.device,
        iou_threshold=setup.config.evaluation.detection.iou_threshold,
        count=count,
    )


@torch.no_grad()
def map_pictures(setup: TrainingSetup, index: DatasetIndex) -> dict[str, Image.Image]:
    """One sheet for each term that compares maps, by its name: its first pair of maps for a few pictures of a split.

    Columns: the student's image; for DINOv2, its patch tokens and the attention of its class token; the student's map
    before and after the adapter; the teacher's map at the same grid, in the same colors as the adapted one. The student
    is the trained one, not its average, because the adapters belong to it. No model changes.
    """
    terms = {name: term for name, term in setup.criterion.terms.items() if LOSSES[term.loss].compares == "map"}
    if not terms or not len(index):
        return {}
    chosen = spread(index, NUM_PICTURES)
    loader = Loader(chosen, image_size=setup.config.image_size, batch_size=len(chosen), seed=0, shuffle=False)
    images = next(loader.epoch(0)).images.to(setup.processes.device).float() / 255  # (B, 3, S, S)
    with in_eval_mode(setup.student), in_eval_mode(setup.criterion):
        s_output = setup.student.forward(images)  # not __call__, which may be compiled
        return {name: term_sheet(setup, name, term, images, s_output) for name, term in terms.items()}


def term_sheet(setup: TrainingSetup, name: str, term: TermConfig, images: Tensor, s_output: Any) -> Image.Image:
    """Draw the sheet of one term: see map_pictures. images: the student's, (B, 3, S, S)."""
    pictures = to_pictures(images, SIDE, smooth=True)
    columns: dict[str, Sequence[Image.Image]] = {"picture": pictures}
    teacher = setup.teachers.models[term.teacher]
    resized = resize_images(images, setup.teachers.facts[term.teacher].image_size)
    is_dino = isinstance(teacher, DINOv2)
    with requesting(teacher, {"patches", "class_attention"} if is_dino else set()):
        t_output = teacher.forward(resized)
    if is_dino:
        columns[f"tokens of {term.teacher}"] = to_pictures(patch_pca(t_output.features["patches"].cpu()), SIDE)
        heat = to_pictures(heat_colors(attention_heat(t_output.class_attention)), SIDE, smooth=True)
        columns[f"attention of {term.teacher}"] = overlay(pictures, heat)
    s_name, t_name = term.student_maps[0], term.teacher_maps[0]
    s_map, t_map = named_map(s_output, s_name).float(), named_map(t_output, t_name)
    columns[f"student's {s_name}"] = to_pictures(patch_pca(s_map.cpu()), SIDE)
    adapter = cast(nn.ModuleList, setup.criterion.adapters[name])[0]
    adapted = adapter(s_map)
    t_map = like_adapted(adapter, resize_like(t_map, adapted))
    titles = (f"adapted {s_name}", f"{t_name} of {term.teacher}")
    is_adapted = adapted.shape == t_map.shape
    if is_adapted:
        both = common_colors(adapted.cpu(), t_map.cpu())
        columns |= {title: to_pictures(colors, SIDE) for title, colors in zip(titles, both)}
    else:  # a loss that compares maps of different widths
        columns[titles[1]] = to_pictures(patch_pca(t_map.cpu()), SIDE)
    sheet = grid(columns, heading=f"{name}: {s_name} learns from {t_name} of {term.teacher}")
    legends = [text_legend(MAP_LEGEND + (SHARED_LEGEND if is_adapted else ""), sheet.width)]
    if is_dino:
        legends.append(heat_legend("Attention of the class token, mean of its heads", sheet.width))
    return stack([sheet, *legends])


@contextlib.contextmanager
def requesting(teacher: nn.Module, names: set[str]) -> Iterator[None]:
    """Inside, the teacher's output has these parts as well as those that its terms read."""
    before = getattr(teacher, "requested_outputs", None)
    if before is not None and names:
        teacher.requested_outputs = before | names
    try:
        yield
    finally:
        if before is not None:
            teacher.requested_outputs = before
