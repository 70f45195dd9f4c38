"""The detector that is trained: from its config to a model with its start weights, and what of it does not learn."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import models
from config import Config, ModelConfig
from datasets.download import how_to_fetch
from errors import UserError
from frcnn.norm import freeze_norms
from frcnn.pretrained import freeze, load_backbone

# The released files' names begin with these, where they differ from the name of the backbone.
RELEASED_BACKBONES = {"vit_tiny": ("deit_tiny", "vit_tiny")}


def build_student(
    config: Config,
    names: tuple[str, ...],
    saved: dict[str, Tensor] | None = None,
    say: Callable[[str], None] = lambda line: print(line),
) -> nn.Module:
    """The student, fresh from config.seed, or started from the weights its config names (checkpoint.start_model).

    saved: the state that a resumed run will fill it with, instead of those weights, whose file may be gone by then.
    """
    check_backbone(config.student)
    torch.manual_seed(config.seed)
    arch, path = config.student.arch, config.student.weights
    if saved is not None:
        student = models.build(arch, len(names), **models.head_of(arch, len(names), saved))
    elif path is not None:
        student = checkpoint.start_model(arch, names, path, new_head=config.student.new_head, say=say)
    else:
        student = models.build(arch, len(names))
    if not hasattr(student, "losses"):
        raise UserError(f"key 'student.arch': {arch} can only teach: it has no training losses here")
    if config.student.backbone_weights is not None:
        load_backbone(student.backbone, find_backbone_file(Path(config.student.backbone_weights), arch))
    freeze_backbone(student, config.student)
    return student


def check_backbone(settings: ModelConfig) -> None:
    """UserError for keys about a backbone that this student does not have, or that contradict one another."""
    has_backbone = settings.arch.startswith("fasterrcnn")
    if settings.backbone_weights is not None:
        path = settings.backbone_weights
        if settings.weights is not None:
            raise UserError(f"key 'student.backbone_weights': found {path}, expected none beside student.weights")
        if not has_backbone:
            raise UserError(f"key 'student.backbone_weights': {settings.arch} has no released backbone, expected none")
    for key, is_given in (
        ("trainable_stages", settings.trainable_stages is not None),
        ("frozen_norms", settings.frozen_norms),
    ):
        if is_given and not has_backbone:
            raise UserError(f"key 'student.{key}': {settings.arch} learns as a whole, expected none")
    if settings.frozen_norms and settings.weights is None and settings.backbone_weights is None:
        raise UserError(
            "key 'student.frozen_norms': found true without weights, expected backbone_weights or weights; in a "
            "fresh backbone the gammas of residual branches are 0, and would stay so"
        )


def freeze_backbone(student: nn.Module, settings: ModelConfig) -> None:
    """What of a Faster R-CNN's backbone does not learn, as the config says."""
    if settings.trainable_stages is not None:
        try:
            freeze(student.backbone, settings.trainable_stages)
        except ValueError as error:
            raise UserError(f"key 'student.trainable_stages': {error}") from None
    if settings.frozen_norms:
        freeze_norms(student.backbone)


def find_backbone_file(path: Path, arch: str) -> Path:
    """`path`, or where it is a folder the one file in it, or in a folder of it, that is named as arch's backbone is.

    "resnet18-f37072fd.pth" for "fasterrcnn_resnet18": so one config fits all students. UserError that says what to get.
    """
    if path.is_file():
        return path
    backbone = re.match(r"fasterrcnn_(.*?)(_v2|_320)?$", arch)[1]  # forms of the detector, not of its backbone
    names = RELEASED_BACKBONES.get(backbone, (backbone,))
    advice = how_to_fetch(names[0])
    if not path.is_dir():
        raise UserError(f"key 'student.backbone_weights': {path}: no such file or folder{advice}")
    found = sorted(
        file
        for file in (*path.glob("*.*"), *path.glob("*/*.*"))
        if any(re.match(re.escape(name) + r"[_.-]", file.name) for name in names)
    )
    if len(found) == 1:
        return found[0]
    expected = " or ".join(f"{name}-*.pth" for name in names)
    what = ", ".join(file.name for file in found) or "none"
    raise UserError(f"key 'student.backbone_weights': {path}: found {what}, expected one {expected}{advice}")
