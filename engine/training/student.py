"""The detector that is trained: builds it from its config, loads its start weights, and freezes parts of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import checkpoint
import models
from config import Config, ModelConfig
from datasets.download import how_to_fetch
from errors import UserError
from frcnn.norm import freeze_norms
from frcnn.pretrained import Backbone, freeze, load_backbone

# How the names of the released files begin, where that differs from the name of the backbone.
RELEASED_BACKBONES = {"vit_tiny": ("deit_tiny", "vit_tiny")}


def build_student(
    config: Config,
    names: tuple[str, ...],
    saved: dict[str, Tensor] | None = None,
    say: Callable[[str], None] = lambda line: print(line),
) -> nn.Module:
    """The student, fresh from config.seed or started from the weights in its config (checkpoint.start_model).

    saved: the state that a resumed run loads later. The start weights are then not read: their file may be gone.
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
        file = find_backbone_file(Path(config.student.backbone_weights), arch)
        load_backbone(backbone_of(student), file)
    freeze_backbone(student, config.student)
    return student


def check_backbone(settings: ModelConfig) -> None:
    """UserError for keys about a backbone that this student lacks, or that contradict one another."""
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
    """Freeze the stages and the norms of a Faster R-CNN's backbone that the config names."""
    if settings.trainable_stages is not None:
        try:
            freeze(backbone_of(student), settings.trainable_stages)
        except ValueError as error:
            raise UserError(f"key 'student.trainable_stages': {error}") from None
    if settings.frozen_norms:
        freeze_norms(backbone_of(student))


def backbone_of(detector: nn.Module) -> Backbone:
    """The backbone of a Faster R-CNN."""
    return cast(Backbone, detector.backbone)


def find_backbone_file(path: Path, arch: str) -> Path:
    """The file `path`, or the one file of arch's backbone in the folder `path` or in a folder of it.

    With a folder, one config fits all students: "resnet18-f37072fd.pth" belongs to "fasterrcnn_resnet18". UserError,
    with the file to get, where there is no such file or more than one.
    """
    if path.is_file():
        return path
    backbone = re.sub(r"(_v2|_320)$", "", arch.removeprefix("fasterrcnn_"))  # forms of the detector, same backbone
    names = RELEASED_BACKBONES.get(backbone, (backbone,))
    advice = how_to_fetch(names[0])
    if not path.is_dir():
        raise UserError(f"key 'student.backbone_weights': {path}: no such file or folder{advice}")
    files = sorted(
        file
        for file in (*path.glob("*.*"), *path.glob("*/*.*"))
        if any(re.match(re.escape(name) + r"[_.-]", file.name) for name in names)
    )
    if len(files) == 1:
        return files[0]
    expected = " or ".join(f"{name}-*.pth" for name in names)
    found = ", ".join(file.name for file in files) or "none"
    raise UserError(f"key 'student.backbone_weights': {path}: found {found}, expected one {expected}{advice}")
