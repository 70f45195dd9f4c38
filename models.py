"""Every detector by name: `build("yolov8n", num_classes=80)`. One table from names to builders, and nothing else."""

from collections.abc import Callable
from difflib import SequenceMatcher
from functools import partial

from torch import nn

from errors import UserError
from yolo.yolov5 import build_yolov5, build_yolov5u
from yolo.yolov8 import build_yolov8

ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "yolov8n": partial(build_yolov8, "n"),
    "yolov8s": partial(build_yolov8, "s"),
    "yolov8m": partial(build_yolov8, "m"),
    "yolov8l": partial(build_yolov8, "l"),
    "yolov8x": partial(build_yolov8, "x"),
    "yolov5n": partial(build_yolov5, "n"),
    "yolov5s": partial(build_yolov5, "s"),
    "yolov5m": partial(build_yolov5, "m"),
    "yolov5l": partial(build_yolov5, "l"),
    "yolov5x": partial(build_yolov5, "x"),
    "yolov5nu": partial(build_yolov5u, "n"),
    "yolov5su": partial(build_yolov5u, "s"),
    "yolov5mu": partial(build_yolov5u, "m"),
    "yolov5lu": partial(build_yolov5u, "l"),
    "yolov5xu": partial(build_yolov5u, "x"),
}


def build(arch: str, num_classes: int) -> nn.Module:
    """A freshly initialised detector (structures.Detector) for K = num_classes classes, on the CPU, in train mode.

    arch is a key of ARCHITECTURES; an unknown one is a UserError that names the nearest. Initial weights are drawn
    from torch's global generator, here and nowhere later: seed it before the call.
    """
    if arch not in ARCHITECTURES:
        nearest = max(ARCHITECTURES, key=lambda name: SequenceMatcher(None, name, str(arch).lower()).ratio())
        raise UserError(
            f"architecture {arch!r} is unknown, did you mean {nearest!r}? There are {', '.join(ARCHITECTURES)}"
        )
    if num_classes < 1:
        raise UserError(f"architecture {arch!r}: found {num_classes} classes, expected at least 1")
    return ARCHITECTURES[arch](num_classes)
