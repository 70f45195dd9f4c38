"""The lines of `train.py --list`: architectures, teachers and losses."""

import inspect
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

import models
from distill.terms import LOSSES

FAMILIES = {  # beginning of a name -> what it is; the longest that fits counts
    "yolov8": "one stage, no anchors; a box edge is a distribution over distances",
    "yolov8_narrow": "a YOLOv8 of half the width of n, not released: for few cores",
    "yolov8_half": "a YOLOv8 as deep as n at half its width, not released: starts as a part of a wider one",
    "yolov7": "one stage, three anchor boxes on each location, objectness, SimOTA assignment",
    "yolov5": "one stage, three anchor boxes on each location, objectness",
    "fasterrcnn": "two stages: proposals, then a class and a box for each",
    "rtdetr": "a transformer with queries, no suppression; needs weights to start from",
    "dinov2": "features of a self-supervised transformer: map `patches`",
    "clip": "classes from their names: `image_logits`, and features: map `patches`",
}
WITHOUT_ANCHORS = "one stage, no anchors: YOLOv5's backbone under YOLOv8's head"  # yolov5nu to yolov5xu


def listing() -> str:
    """Each name with its parameters (millions) and one line; each term with the first line of its loss's docstring.

    Where two terms share a loss, the lines are those of the terms.
    """
    blocks = []
    for title, names, build in (
        ("architectures: student.arch, and teachers", models.ARCHITECTURES, lambda name: models.build(name, 80)),
        ("models that only teach: teachers.0.arch", models.TEACHERS, models.build_teacher),
    ):
        lines = [f"# {title}"]
        for name in names:
            lines.append(f"{name:<34} {count_parameters(build, name) / 1e6:6.1f} M   {describe(name)}")
        blocks.append("\n".join(lines))
    lines = ["# losses: terms.0.loss; docs/losses has each with its equation and a config line"]
    uses = Counter(term.loss for term in LOSSES.values())
    for name, term in LOSSES.items():
        first = (inspect.getdoc(term.loss if uses[term.loss] == 1 else term.compute) or "").splitlines()[0].rstrip(".")
        lines.append(f"{name:<24} {term.compares:<8} {first}")
    return "\n\n".join([*blocks, "\n".join(lines)])


def count_parameters(build: Callable[[str], nn.Module], name: str) -> int:
    with torch.device("meta"):  # shapes alone
        return sum(parameter.numel() for parameter in build(name).parameters())


def describe(name: str) -> str:
    """What a model is, by the beginning of its name."""
    if name.startswith("yolov5") and name.endswith("u"):
        return WITHOUT_ANCHORS
    family = max((start for start in FAMILIES if name.startswith(start)), key=len, default="")
    return FAMILIES.get(family, "")
