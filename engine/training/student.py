"""The detector that is trained: builds it from its config, loads its start weights, and freezes parts of it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import checkpoint
import fine_tuning
import models
from config import Config, ModelConfig
from datasets.download import how_to_fetch
from distill.pruning import scores
from distill.pruning.files import read_widths
from distill.pruning.inherit import inherited_state
from engine.training.int8 import prepare_int8
from engine.training.optimization import BACKBONE
from errors import UserError, expect, naming, shortened
from frcnn.faster_rcnn import FasterRCNN
from frcnn.norm import freeze_norms
from frcnn.pretrained import Backbone, freeze, load_backbone
from layers.channel_groups import find_groups
from random_streams import Stream, seeded_generator
from weights import file_of_run

# How the names of the released files begin, where that differs from the name of the backbone.
RELEASED_BACKBONES = {"vit_tiny": ("deit_tiny", "vit_tiny")}


def build_student(
    config: Config,
    class_names: tuple[str, ...],
    saved: dict[str, Tensor] | None = None,
    say: Callable[[str], None] = print,
    given: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """The student, fresh from config.seed or started from the weights in its config (fine_tuning.start_model, inherit).

    saved: the state that a resumed run loads later. The start weights are then not read: their file may be gone.
    given: teachers by name, instead of their weights.
    """
    check_backbone(config.student)
    torch.manual_seed(config.seed)
    arch, path = config.student.arch, config.student.weights
    if saved is not None:
        student = checkpoint.build_for(arch, len(class_names), saved)
    elif config.student.inherit is not None:
        student = inherit(config, class_names, say, given or {})
    elif path is not None:
        student = fine_tuning.start_model(arch, class_names, path, new_head=config.student.new_head, say=say)
    else:
        student = models.build(arch, len(class_names), widths=widths_in_config(config.student))
        warn_of_random_weights(arch, say)
    if config.student.backbone_weights is not None:
        file = find_backbone_file(Path(config.student.backbone_weights), arch)
        load_backbone(backbone_of(student), file)
    freeze_backbone(student, config.student)
    if config.student.roi_samples is not None:
        cast(FasterRCNN, student).roi_samples = config.student.roi_samples
    check_backbone_factor(student, config)
    prepare_int8(student, config)
    return student


def warn_of_random_weights(arch: str, say: Callable[[str], None]) -> None:
    """One line for a family that is known not to learn from random weights on small data."""
    for family, known in models.NEED_WEIGHTS.items():
        if arch.startswith(family):
            found = f"warning: {arch} starts from random weights, from which it does not learn on small data"
            say(f"{found}: {known}; expected student.weights")


def widths_in_config(settings: ModelConfig) -> dict[str, int] | None:
    """The widths of student.widths; UserError, with the key, for a file that does not fit."""
    if settings.widths is None:
        return None
    with naming("key 'student.widths'"):
        return read_widths(settings.widths, settings.arch)


def inherit(
    config: Config, class_names: tuple[str, ...], say: Callable[[str], None], given: Mapping[str, nn.Module]
) -> nn.Module:
    """The student as a selection of the channels of a wider model; what each of its keys means: config.InheritConfig.

    The wider model first becomes one for the dataset's classes (fine_tuning.start_model), joined by the aliases of the
    teacher that it is. Then it is cut.
    """
    settings, choice = config.student, config.student.inherit
    assert choice is not None
    if choice.teacher is not None and choice.teacher in given:
        source, wide = f"teacher {choice.teacher!r}", given[choice.teacher]
    else:
        arch, source = inherit_source(config)
        aliases = None if choice.teacher is None else config.teacher_named(choice.teacher).class_aliases
        wide = fine_tuning.start_model(arch, class_names, source, new_head=settings.new_head, aliases=aliases, say=say)
    head = models.head_of(settings.arch, len(class_names), wide.state_dict())
    head.pop("class_width", None)  # the student's own
    student = models.build(settings.arch, len(class_names), widths=widths_in_config(settings), **head)
    groups = find_groups(wide)
    if choice.by == "random":
        values = scores.random(groups, seeded_generator(Stream.CHANNELS, config.seed))
    else:
        values = {"bn_gamma": scores.bn_gamma, "l2": scores.l2}[choice.by](wide.state_dict(), groups)
    with naming(f"key 'student.inherit': {source}", ValueError):
        state = inherited_state(student, wide, groups, values)
    if settings.new_head:
        class_head = cast(tuple[str, ...], student.class_head)
        state |= {name: value for name, value in student.state_dict().items() if name.startswith(class_head)}
    student.load_state_dict(state)
    say(f"{source}: {settings.arch} begins with a part of its channels, chosen by {choice.by}")
    return student


def inherit_source(config: Config) -> tuple[str, str]:
    """The architecture and the file that the student inherits from; UserError where it cannot."""
    choice = config.student.inherit
    assert choice is not None
    arch, path = choice.arch, choice.weights
    if choice.teacher is not None:
        teacher = config.teacher_named(choice.teacher)
        arch, path, found = teacher.arch, teacher.weights, f"key 'student.inherit.teacher': {choice.teacher!r}"
        if teacher.is_random:
            raise UserError(f"{found} has random weights, expected a file to begin from")
        if path is None:
            raise UserError(f"{found} has no weights; compare.py trains it in place first")
    assert path is not None
    if not file_of_run(path).is_file():
        raise UserError(f"key 'student.inherit': {path}: no such file, expected a weights file or a run")
    if arch is None:
        try:
            arch = checkpoint.load_model(path)[1].arch
        except UserError as error:
            raise UserError(f"{error}; released weights need student.inherit.arch", error.exit_code) from None
        check_same_family(config.student.arch, arch)
    return arch, path


def check_inherit(config: Config) -> None:
    """UserError for keys of student.inherit that contradict others, or that name a model of another family or depth."""
    settings, choice = config.student, config.student.inherit
    if choice is None:
        return
    for other in ("weights", "backbone_weights"):
        if (found := getattr(settings, other)) is not None:
            raise UserError(f"key 'student.{other}': found {found} beside student.inherit, expected one of them")
    if (choice.teacher is None) == (choice.weights is None):
        found = f"teacher {choice.teacher!r} and weights {choice.weights!r}"
        raise UserError(f"key 'student.inherit': found {found}, expected one of them")
    arch = choice.arch
    if choice.teacher is not None:
        arches = {teacher.name: teacher.arch for teacher in config.teachers}
        if choice.teacher not in arches:
            expected = ", ".join(arches) or "a teacher: there are none"
            raise UserError(f"key 'student.inherit.teacher': found {choice.teacher!r}, expected {expected}")
        expect(arch is None, "key 'student.inherit.arch'", f"{arch} beside a teacher, which has its own", "none")
        arch = arches[choice.teacher]
    if arch is not None:
        check_same_family(settings.arch, arch)


def check_same_family(arch: str, other: str) -> None:
    """UserError unless the first architecture has the layers of the other one, and no wider ones."""
    if other not in models.ARCHITECTURES:
        raise UserError(f"key 'student.inherit': found {other}, expected a wider model of the family of {arch}")
    with torch.device("meta"):
        own, theirs = models.build(arch, 1).state_dict(), models.build(other, 1).state_dict()
    if differing := own.keys() ^ theirs.keys():
        found = f"{arch} and {other} are of different families or depths: only one of them has {min(differing)}"
        raise UserError(f"key 'student.inherit': {found}")
    if any(own[name].numel() > theirs[name].numel() for name in own):
        raise UserError(f"key 'student.inherit': {arch} is wider than {other}, expected a wider model to inherit from")


def check_widths(settings: ModelConfig) -> None:
    """UserError for a file of widths that this architecture does not have."""
    if settings.widths is None:
        return
    if settings.weights is not None:
        found = f"found {settings.widths} beside student.weights"
        raise UserError(f"key 'student.widths': {found}, which have widths of their own, expected one of them")
    widths = widths_in_config(settings)
    with torch.random.fork_rng(devices=[]), naming(f"key 'student.widths': {settings.widths}"):
        models.build(settings.arch, 1, widths=widths)


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
    if (samples := settings.roi_samples) is not None and not (has_backbone and samples >= 1):
        expected = "at least 1" if has_backbone else f"none, since {settings.arch} has no second stage"
        raise UserError(f"key 'student.roi_samples': found {samples}, expected {expected}")
    is_fresh = settings.weights is None and settings.backbone_weights is None and settings.inherit is None
    if settings.frozen_norms and is_fresh:
        raise UserError(
            "key 'student.frozen_norms': found true without weights, expected backbone_weights or weights; in a "
            "fresh backbone the gammas of residual branches are 0, and would stay so"
        )


def freeze_backbone(student: nn.Module, settings: ModelConfig) -> None:
    """Freeze the stages and the norms of a Faster R-CNN's backbone that the config names."""
    if settings.trainable_stages is not None:
        with naming("key 'student.trainable_stages'", ValueError):
            freeze(backbone_of(student), settings.trainable_stages)
    if settings.frozen_norms:
        freeze_norms(backbone_of(student))


def check_backbone_factor(student: nn.Module, config: Config) -> None:
    """UserError for a learning rate of the backbone's own where there is no backbone, or all of it is frozen."""
    factor = config.optimizer.backbone_factor
    learning = (name for name, parameter in student.named_parameters() if parameter.requires_grad)
    if factor != 1 and not any(name.startswith(BACKBONE) for name in learning):
        found = f"key 'optimizer.backbone_factor': found {factor}, but no backbone of {config.student.arch} learns"
        raise UserError(f"{found}, expected 1")


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
    found = shortened(file.name for file in files) or "none"
    raise UserError(f"key 'student.backbone_weights': {path}: found {found}, expected one {expected}{advice}")
