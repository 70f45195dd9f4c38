"""All models by name: `build("yolov8n", num_classes=80)` is a detector, `build_teacher("dinov2_vits14")` a teacher.

ARCHITECTURES and TEACHERS map names to builders. A detector may be a teacher too; a model of TEACHERS is never trained.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, expect
from frcnn.faster_rcnn import (
    build_fasterrcnn_mobilenet,
    build_fasterrcnn_resnet,
    build_fasterrcnn_resnet50_v2,
    build_fasterrcnn_vit_tiny,
)
from layers.channel_groups import find_groups
from layers.int8 import without_ranges
from layers.widths import set_widths, widths_of_shapes
from rtdetr.rtdetr import build_rtdetr
from structures import DetectionSettings
from teachers.clip import build_clip
from teachers.dinov2 import build_dinov2
from yolo.yolov5 import build_yolov5, build_yolov5u
from yolo.yolov7 import build_yolov7_tiny
from yolo.yolov8 import SIZES, Size, build_yolov8, depths_in

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "yolov8n": partial(build_yolov8, "n"),
    "yolov8s": partial(build_yolov8, "s"),
    "yolov8m": partial(build_yolov8, "m"),
    "yolov8l": partial(build_yolov8, "l"),
    "yolov8x": partial(build_yolov8, "x"),
    "yolov8_narrow": partial(build_yolov8, "narrow"),  # not released: a small matching network for few cores
    "yolov8_half": partial(build_yolov8, "half"),  # not released: as deep as n, to inherit from its weights
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
    "yolov7_tiny": build_yolov7_tiny,
    "fasterrcnn_resnet18": partial(build_fasterrcnn_resnet, 18),
    "fasterrcnn_resnet34": partial(build_fasterrcnn_resnet, 34),
    "fasterrcnn_resnet50": partial(build_fasterrcnn_resnet, 50),
    "fasterrcnn_resnet50_v2": build_fasterrcnn_resnet50_v2,
    "fasterrcnn_mobilenet_v3_small": partial(build_fasterrcnn_mobilenet, "small"),
    "fasterrcnn_mobilenet_v3_large": partial(build_fasterrcnn_mobilenet, "large"),
    "fasterrcnn_mobilenet_v3_large_320": partial(build_fasterrcnn_mobilenet, "large", eval_proposals=150),
    "fasterrcnn_vit_tiny": build_fasterrcnn_vit_tiny,
    "rtdetr_l": partial(build_rtdetr, "l"),
    "rtdetr_x": partial(build_rtdetr, "x"),
    "rtdetr_r18vd": partial(build_rtdetr, "r18vd"),
    "rtdetr_r50vd": partial(build_rtdetr, "r50vd"),
}

RENAMED = {"yolov8p": "yolov8_narrow"}  # names that older configs and checkpoints have

NEED_WEIGHTS = {  # families that do not learn from scratch on small data -> who found that
    "rtdetr": "its authors advise against it (RT-DETR issue 382), others report an AP of 0",
}

TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "clip_vit_b32": partial(build_clip, "vit_b32"),
    "clip_vit_b16": partial(build_clip, "vit_b16"),
    "dinov2_vits14": partial(build_dinov2, "vits14"),
    "dinov2_vits14_reg": partial(build_dinov2, "vits14_reg"),
    "dinov2_vitb14": partial(build_dinov2, "vitb14"),
    "dinov2_vitb14_reg": partial(build_dinov2, "vitb14_reg"),
    "dinov2_vitl14": partial(build_dinov2, "vitl14"),
    "dinov2_vitl14_reg": partial(build_dinov2, "vitl14_reg"),
}


# How the publishers of each family evaluate it: the YOLOs as in their current code, Faster R-CNN with the thresholds of
# its reference models, RT-DETR without suppression, because its queries do not repeat each other.
PUBLISHED_DETECTION = {
    "yolov8": DetectionSettings(0.001, 0.7, 300),
    "yolov5": DetectionSettings(0.001, 0.7, 300),
    "yolov7": DetectionSettings(0.001, 0.65, 300),
    "fasterrcnn": DetectionSettings(0.05, 0.5, 100),
    "rtdetr": DetectionSettings(0.001, 1.0, 300),
}


def published_detection(arch: str) -> DetectionSettings:
    """The published settings of the family of an architecture; those of YOLOv8 for a name of no family."""
    matching = (settings for family, settings in PUBLISHED_DETECTION.items() if arch.startswith(family))
    return next(matching, PUBLISHED_DETECTION["yolov8"])


def suppresses(arch: str) -> bool:
    """Whether detections of the family are chosen by non-maximum suppression."""
    return published_detection(arch).iou_threshold < 1


def check_suppression(what: str, arch: str, iou_threshold: float | None) -> None:
    """UserError for the threshold of a suppression, called `what`, that the family of the architecture does not have.

    None and 1 suppress nothing.
    """
    if iou_threshold is not None and not suppresses(arch):
        expect(iou_threshold == 1, what, f"{iou_threshold:g}, but boxes of {arch} are not suppressed", "none")


def build(arch: str, num_classes: int, *, widths: Mapping[str, int] | None = None, **shape: Any) -> nn.Module:
    """A freshly initialised detector (structures.Detector) for K = num_classes classes, on the CPU, in train mode.

    arch is a key of ARCHITECTURES; an unknown one is a UserError that names the nearest. The initial weights are drawn
    from torch's global generator during this call: seed it before.
    widths: other widths than those of the architecture, for each group of channels (layers/widths.py). A YOLOv8 has the
    blocks whose groups they name, so they also hold its depths. UserError for a group that the model does not have.
    shape: further arguments of the builder, such as those of `head_of`; of a YOLOv8 also its channels and depths.
    TypeError if the architecture does not have them.
    """
    check_arch(arch)
    expect(num_classes >= 1, f"architecture {arch!r}", f"{num_classes} classes", "at least 1")
    if widths is not None:
        shape |= depths_of(arch, widths)
    model = ARCHITECTURES[arch](num_classes, **shape)
    if widths is not None:
        try:
            set_widths(model, widths)
        except ValueError as error:
            raise UserError(f"architecture {arch!r}: {error}") from None
    return model


def widths_of(arch: str, num_classes: int, state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """The widths with which `build` makes a model that fits a state dict of `arch` for K classes.

    None where widths and depths are the architecture's own, or where no widths fit. Like the arguments of `head_of`
    they follow from names and shapes, so that the checkpoint of a pruned model is one like any other.
    """
    state = without_ranges(state)
    depths = depths_of(arch, state)
    with torch.device("meta"):
        own = build(arch, num_classes, widths=None, **head_of(arch, num_classes, dict(state)), **depths).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    is_own = not depths and all(name in shapes and value.shape == shapes[name] for name, value in own.items())
    if own.keys() != shapes.keys() or is_own:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            groups = find_groups(build(arch, num_classes, **depths))
    except ValueError:  # a family without channel groups
        return None
    return widths_of_shapes(groups, shapes)


def depths_of(arch: str, names: Iterable[str]) -> dict[str, Any]:
    """The argument `depths` with which `build` makes a YOLOv8 of the layers that a state dict or widths name.

    Empty where they are the architecture's own, and for other families, whose depths are fixed.
    """
    size = size_of(arch)
    if size is None or (depths := depths_in(names, size)) == size.all_depths:
        return {}
    return {"depths": depths}


def size_of(arch: str) -> Size | None:
    """The widths and depths of a YOLOv8; None for other families."""
    builder = ARCHITECTURES.get(arch)
    return SIZES[builder.args[0]] if isinstance(builder, partial) and builder.func is build_yolov8 else None


def head_of(arch: str, num_classes: int, state: dict[str, Tensor]) -> dict[str, int]:
    """The arguments with which `build` makes a class head that fits a state dict of `arch` for K classes.

    A head that starts from a released head for other classes keeps its width (class_width) or its outputs for other
    classes (other_classes). Both follow from shapes in the state dict, so a checkpoint need not store them.
    """
    if arch.startswith("fasterrcnn_"):
        bias = state.get("predictor.classify.bias")
        num_others = 0 if bias is None or bias.dim() == 0 else len(bias) - 1 - num_classes
        return {"other_classes": num_others} if num_others > 0 else {}
    weight = state.get("head.cls.0.0.conv.weight")
    if getattr(ARCHITECTURES.get(arch), "func", None) in (build_yolov8, build_yolov5u) and weight is not None:
        return {"class_width": len(weight)} if weight.dim() == 4 and len(weight) else {}
    return {}


def of_one_class(arch: str) -> tuple[nn.Module, dict[str, tuple[int, int]]]:
    """The model for K = 1, shapes without values; and the lengths that its biases and norms have for K = 1 and 2."""
    check_arch(arch)
    return _of_one_class(ARCHITECTURES[arch])


@lru_cache(maxsize=16)
def _of_one_class(make: Callable[..., nn.Module]) -> tuple[nn.Module, dict[str, tuple[int, int]]]:
    with torch.device("meta"):
        one, two = make(1), make(2).state_dict()
    return one, {name: (len(entry), len(two[name])) for name, entry in one.state_dict().items() if entry.dim() == 1}


def check_arch(arch: str) -> None:
    """UserError if `arch` is not a key of ARCHITECTURES."""
    if arch in RENAMED:
        raise UserError(f"architecture {arch!r} is called {RENAMED[arch]!r} now")
    if arch not in ARCHITECTURES:
        raise UserError(f"architecture {arch!r} is unknown, {_nearest(arch, ARCHITECTURES)}")


def build_teacher(name: str) -> nn.Module:
    """A freshly initialised teacher, on the CPU, in eval mode; name is a key of TEACHERS.

    Its weights are random until weights.load_public fills them. An unknown name is a UserError that names the nearest.
    """
    if name not in TEACHERS:
        raise UserError(f"teacher {name!r} is unknown, {_nearest(name, TEACHERS)}")
    return TEACHERS[name]().eval()


def _nearest(unknown: str, table: dict[str, Callable]) -> str:
    """The end of an error message: a similar name, if there is one, and all names of the table."""
    similarity = {name: SequenceMatcher(None, name, str(unknown).lower()).ratio() for name in table}
    nearest = max(similarity, key=lambda name: similarity[name])
    advice = f"did you mean {nearest!r}? There are" if similarity[nearest] >= 0.7 else "expected one of"
    return f"{advice} {', '.join(table)}"
