"""FLOPs of forward passes and of a training step, counted from a config. A weights file is read for its widths alone.

A FLOP is an addition or a multiplication in a convolution or matrix product (torch's FlopCounterMode, on the meta
device). Activations, normalisation, RoIAlign, non-maximum suppression and attention's softmax are not counted.
"""

import functools
import math
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import models
from config import Config
from distill.pruning.files import read_widths
from engine.training.pseudo_boxes import pseudo_image_size
from engine.training.splits import open_indexes
from engine.training.teaching import EMA
from frcnn.faster_rcnn import PYRAMID_WIDTH, ROI_SAMPLES, FasterRCNN
from frcnn.heads import POOLED_SIZE
from weights import file_of_run

Widths = tuple[tuple[str, int], ...] | None  # of a pruned model (layers/widths.py), hashable
USUAL_CLASSES = 80  # of heads, where data.classes names none: no dataset is opened to count


def step_flops(config: Config) -> float:
    """FLOPs of a training step for one picture: three forward passes of the student and one of each term's teacher.

    Three, because the backward pass computes two products for each of the forward pass. Not counted: adapters and
    trained parts of losses, what else a loss computes, augmentation, the optimizer.
    """
    student, size, count = config.student, config.image_size, count_classes(config)
    widths = widths_in(student.weights, student.arch)
    if student.widths is not None and Path(student.widths).is_file():
        widths = tuple(read_widths(student.widths, student.arch).items())
    total = 3.0 * forward_flops(
        student.arch, size, count, is_trained=True, widths=widths, roi_samples=student.roi_samples
    )
    named = {term.teacher for term in config.terms}
    for teacher in config.teachers:
        if teacher.name in named:
            arch = config.student.arch if teacher.arch == EMA else teacher.arch
            of_teacher = widths if teacher.arch == EMA else widths_in(teacher.weights, arch)
            total += forward_flops(arch, teacher.image_size or size, count, widths=of_teacher)
    return total


def widths_in(path: str | None, arch: str) -> Widths:
    """The widths of a pruned model in a file or a run; None for any other model, and for one that is not there yet."""
    if path is None or arch not in models.ARCHITECTURES or not (file := file_of_run(path)).is_file():
        return None
    return _read_widths(str(file), arch, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_widths(path: str, arch: str, version: int) -> Widths:
    model, info = checkpoint.load_model(path, arch)
    widths = models.widths_of(arch, len(info.names), model.state_dict())
    return None if widths is None else tuple(widths.items())


def pseudo_flops(config: Config) -> float:
    """FLOPs of making the pseudo boxes of a run, once; 0 without. Opens the dataset to count its pictures."""
    if (pseudo := config.pseudo_boxes) is None:
        return 0.0
    teacher = config.teacher_named(pseudo.teacher)
    pictures = len(open_indexes(config)["unlabelled"])
    size, widths = pseudo_image_size(config), widths_in(teacher.weights, teacher.arch)
    return float(pictures * forward_flops(teacher.arch, size, count_classes(config), widths=widths))


def count_classes(config: Config) -> int:
    return len(config.data.classes) or USUAL_CLASSES


@functools.cache
def forward_flops(
    arch: str,
    image_size: int,
    num_classes: int,
    *,
    is_trained: bool = False,
    widths: Widths = None,
    roi_samples: int | None = None,
) -> int:
    """FLOPs of a forward pass for one square picture, whose side is rounded up to what the model takes.

    is_trained: of a Faster R-CNN also the second stage, for the boxes of a picture that it learns from.
    roi_samples: their number, as student.roi_samples.
    widths: of a pruned model.
    """
    model: nn.Module
    if widths is not None:  # found by a pass with numbers
        with torch.random.fork_rng(devices=[]):
            model = models.build(arch, num_classes, widths=dict(widths)).to("meta")
    with torch.device("meta"):
        if widths is None:
            model = models.build_teacher(arch) if arch in models.TEACHERS else models.build(arch, num_classes)
        multiple = getattr(model, "size_multiple", 1)
        side = multiple * math.ceil(image_size / multiple)
        images = torch.empty(1, 3, side, side)
        width = model.channels["p2"] if isinstance(model, FasterRCNN) and "p2" in model.channels else PYRAMID_WIDTH
        pooled = torch.empty(roi_samples or ROI_SAMPLES, width, POOLED_SIZE, POOLED_SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
        if is_trained and isinstance(model, FasterRCNN):
            model.predictor(model.box_head(pooled))
    return counter.get_total_flops()
