"""FLOPs of forward passes and of a training step, counted from a config: no weights, and no number is computed.

A FLOP is an addition or a multiplication in a convolution or matrix product (torch's FlopCounterMode, on the meta
device). Activations, normalisation, RoIAlign, non-maximum suppression and attention's softmax are not counted.
"""

import functools
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from config import Config
from engine.training.pseudo_boxes import pseudo_image_size
from engine.training.splits import open_indexes
from engine.training.teaching import EMA, pseudo_of
from frcnn.faster_rcnn import PYRAMID_WIDTH, ROI_SAMPLES, FasterRCNN
from frcnn.heads import POOLED_SIZE

USUAL_CLASSES = 80  # of heads, where data.classes names none: no dataset is opened to count


def step_flops(config: Config) -> float:
    """FLOPs of a training step for one picture: three forward passes of the student and one of each term's teacher.

    Three, because the backward pass computes two products for each of the forward pass. Not counted: adapters and
    trained parts of losses, what else a loss computes, augmentation, the optimizer.
    """
    total = 3.0 * forward_flops(config.student.arch, config.image_size, count_classes(config), is_trained=True)
    named = {term.teacher for term in config.terms}
    for teacher in config.teachers:
        if teacher.name in named:
            arch = config.student.arch if teacher.arch == EMA else teacher.arch
            total += forward_flops(arch, teacher.image_size or config.image_size, count_classes(config))
    return total


def pseudo_flops(config: Config) -> float:
    """FLOPs of making the pseudo boxes of a run, once; 0 without. Opens the dataset to count its pictures."""
    if (pseudo := pseudo_of(config)) is None:
        return 0.0
    teacher = next(teacher for teacher in config.teachers if teacher.name == pseudo.teacher)
    pictures = len(open_indexes(config)["unlabelled"])
    return float(pictures * forward_flops(teacher.arch, pseudo_image_size(config), count_classes(config)))


def count_classes(config: Config) -> int:
    return len(config.data.classes) or USUAL_CLASSES


@functools.cache
def forward_flops(arch: str, image_size: int, num_classes: int, *, is_trained: bool = False) -> int:
    """FLOPs of a forward pass for one square picture, whose side is rounded up to what the model takes.

    is_trained: of a Faster R-CNN also the second stage, for the ROI_SAMPLES boxes of a picture that it learns from.
    """
    with torch.device("meta"):
        model: nn.Module
        model = models.build_teacher(arch) if arch in models.TEACHERS else models.build(arch, num_classes)
        multiple = getattr(model, "size_multiple", 1)
        side = multiple * math.ceil(image_size / multiple)
        images = torch.empty(1, 3, side, side)
        pooled = torch.empty(ROI_SAMPLES, PYRAMID_WIDTH, POOLED_SIZE, POOLED_SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
        if is_trained and isinstance(model, FasterRCNN):
            model.predictor(model.box_head(pooled))
    return counter.get_total_flops()
