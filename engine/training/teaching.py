"""The teachers of a run: builds frozen models from the config, and computes their outputs for a batch.

A teacher is a detector of models.build, a model of models.build_teacher that can only teach, or the running average of
the student (arch: ema). It is frozen, in eval mode, fused for inference, and part of no checkpoint.
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import fine_tuning
import models
from config import Config, TeacherConfig
from datasets.download import how_to_fetch
from distill.criterion import TeacherFacts
from distill.probing import probe
from errors import UserError, expect, naming, shortened
from layers.fusion import fuse
from teachers.clip_tokenizer import VOCABULARY_PATH, ClipTokenizer
from teachers.output_cache import OutputCache, cached_forward, fingerprint_of, image_key, parts_to_keep
from weights import file_of_run, load_public

EMA = "ema"  # the `arch` of a teacher that is the student's running average
MOST_UPSAMPLED = 2.0  # images enlarged by more than this are mostly interpolation: prints a warning


class ReadsText(Protocol):
    """A teacher that classifies by text: it takes the names of the classes before the first image."""

    class_names: tuple[str, ...]

    def set_classes(self, names: tuple[str, ...], tokenizer: ClipTokenizer) -> None: ...


class KeptOutputs(NamedTuple):
    """Where the outputs of a teacher are kept, the type of them, and the names of the parts that its terms read."""

    cache: OutputCache
    output_type: type
    parts: tuple[str, ...]


@dataclass
class Teachers:
    """Frozen models by name, and facts about each."""

    models: dict[str, nn.Module]
    facts: dict[str, TeacherFacts]
    bfloat16: bool = False
    changing: frozenset[str] = frozenset()  # names of teachers that change during the run: the student's average
    kept: dict[str, KeptOutputs] = field(default_factory=dict)  # of the teachers that run once per image

    @property
    def unchanging(self) -> dict[str, nn.Module]:
        """All but the student's average."""
        return {name: model for name, model in self.models.items() if name not in self.changing}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Any]:
        """Each teacher's output for images (B, 3, H, W) in [0, 1], resized to the teacher's image size.

        no_grad, not inference_mode: autograd may not save tensors of inference mode for the student's backward pass, so
        the maps that terms read would have to be copied first.
        """
        outputs = {}
        keys = [image_key(image) for image in images] if self.kept else []
        for name in self.models:
            compute = functools.partial(self._forward, name)
            kept = self.kept.get(name)
            outputs[name] = compute(images) if kept is None else cached_forward(compute, images, keys, *kept)
        return outputs

    def _forward(self, name: str, images: Tensor) -> Any:
        resized = resize_images(images, self.facts[name].image_size)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            return self.models[name](resized)

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each teacher whose outputs are kept: the parts of outputs that were found, absent, written and so on."""
        return {name: dataclasses.asdict(kept.cache.counts) for name, kept in self.kept.items()}

    def keep_outputs(self, folder: Path, max_gigabytes: float) -> None:
        """From now on run each teacher once per image, and keep the parts of its outputs that terms read in `folder`.

        Call it after `requested_outputs` are set. The student's average changes, so its outputs are not kept. UserError
        for another teacher whose output cannot be kept.
        """
        for name, model in self.unchanging.items():
            size = self.facts[name].image_size
            output = probe(model, size or 224)
            try:
                parts = parts_to_keep(output, getattr(model, "requested_outputs", None))
            except TypeError as error:
                raise UserError(f"key 'teacher_cache_gigabytes': teacher {name!r}: {error}") from None
            names = list(self.facts[name].class_names)
            fingerprint = fingerprint_of(model, image_size=size, bfloat16=self.bfloat16, class_names=names)
            cache = OutputCache(folder / name, max_gigabytes / len(self.models), fingerprint)
            self.kept[name] = KeptOutputs(cache, type(output), parts)


def resize_images(images: Tensor, size: int | None) -> Tensor:
    """Square images (B, 3, S, S) resized to another size, bilinear, with antialias; None returns them unchanged."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def build_teachers(
    config: Config,
    class_names: tuple[str, ...],
    given: dict[str, nn.Module] | None = None,
    ema: nn.Module | None = None,
) -> Teachers:
    """Every teacher of the config, on the CPU. class_names: the dataset's classes.

    given: modules by name, instead of weights, with the dataset's classes. One that reads text gets these classes as
    prompts, unless it has classes already.
    ema: the running average of the student.
    A teacher that no term names is not among them: it makes pseudo boxes before the training (pseudo_boxes.py).
    """
    given = given or {}
    check_names(config, given)
    frozen, facts = {}, {}
    teaching = {term.teacher for term in config.terms}  # others make pseudo boxes, or give the student its channels
    for index, teacher in enumerate(config.teachers):
        if teacher.name not in teaching:
            continue
        key = f"teachers.{index}"
        model, t_names = load_frozen(teacher, key, class_names, given, ema)
        frozen[teacher.name] = model
        size = input_size(teacher, key, model, config.image_size)
        facts[teacher.name] = TeacherFacts(t_names, size, teacher.class_aliases)
    return Teachers(frozen, facts, changing=frozenset(t.name for t in config.teachers if t.arch == EMA))


def load_frozen(
    teacher: TeacherConfig, key: str, class_names: tuple[str, ...], given: dict[str, nn.Module], ema: nn.Module | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The frozen model of a teacher, given or from its file, and the names of its classes."""
    if teacher.name in given:
        model = given[teacher.name]
        t_names = set_class_prompts(model, teacher, key, class_names)
    elif teacher.arch == EMA:
        if ema is None:
            raise UserError(f"key '{key}.arch': the student's average is not at hand here, expected another teacher")
        model, t_names = ema, class_names
    elif teacher.is_random:
        model, t_names = build_random(teacher, class_names)
    else:
        model, t_names = load_file(teacher, key, class_names)
    model.eval().requires_grad_(False)
    return (model if teacher.arch == EMA else fuse(model)), t_names  # a copy would not follow the student


def check_names(config: Config, given_names: Collection[str]) -> None:
    """UserError for a name used twice, a teacher that neither a term nor data.unlabelled.pseudo names, a teacher of
    pseudo boxes that is not there, and a given module that the config lacks.
    """
    names, pseudo = [teacher.name for teacher in config.teachers], config.pseudo_boxes
    if pseudo is not None and pseudo.teacher not in names:
        expected = ", ".join(names) or "a teacher: there is none"
        raise UserError(f"key 'data.unlabelled.pseudo.teacher': found {pseudo.teacher!r}, expected {expected}")
    for name in given_names:
        if name not in names:
            raise UserError(f"teacher {name!r} is not among the teachers of the config")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"key 'teachers.{index}.name': {name!r} is used twice")
        if name not in used_teachers(config):
            raise UserError(f"key 'teachers.{index}.name': no term names the teacher {name!r}, it could never act")


def used_teachers(config: Config) -> set[str]:
    """The names of the teachers of terms, of pseudo boxes, and of the channels that the student inherits."""
    used = {term.teacher for term in config.terms}
    for user in (config.student.inherit, config.pseudo_boxes):
        if user is not None and user.teacher is not None:
            used.add(user.teacher)
    return used


RUN_FILES = ("last.pt", "best.safetensors", "student.safetensors")


def find_file(teacher: TeacherConfig, key: str) -> str:
    """The weights file of a teacher that has one. UserError if it is missing."""
    if teacher.weights is None:
        advice = "" if teacher.arch in models.TEACHERS else "; compare.py trains a detector in place"
        raise UserError(f"key '{key}.weights': found none, expected a file{how_to_fetch(teacher.arch)}{advice}")
    file = file_of_run(teacher.weights)
    if not file.is_file():
        found = f"key '{key}.weights': {teacher.weights}: no such file"
        is_of_run = not file.suffix or file.name in RUN_FILES  # released weights would teach other classes
        advice = "; that run is to be trained first" if is_of_run else how_to_fetch(teacher.arch)
        raise UserError(f"{found}, expected weights of {teacher.arch}{advice}")
    return str(file)


def load_file(teacher: TeacherConfig, key: str, class_names: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in a teacher's file and the names of its classes: those of the dataset where the file has none."""
    path = find_file(teacher, key)
    if teacher.arch in models.TEACHERS:
        model = models.build_teacher(teacher.arch)
        load_public(model, path)
        return model, set_class_prompts(model, teacher, key, class_names)
    model, info = checkpoint.load_model(path, teacher.arch)
    fine_tuning.check_trained(info, Path(path))
    if info.names_from == "the release":
        print(f"{path}: it does not name its classes; taken for COCO's {len(info.names)}")
    if info.names_from != "nothing" or len(info.names) != len(class_names):
        return model, info.names
    print(f"{path}: it does not name its classes; taken for those of the dataset: {shortened(class_names)}")
    return model, class_names


def build_random(teacher: TeacherConfig, class_names: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of the teacher's architecture with random weights, the same ones every time, for the dataset's classes.

    One that reads text gets random directions for its prompts, so that it needs no vocabulary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if teacher.arch not in models.TEACHERS:
            return models.build(teacher.arch, len(class_names)), class_names
        model = models.build_teacher(teacher.arch)
        if not hasattr(model, "set_class_embeddings"):
            return model, class_names
        prompts = tuple(teacher.class_aliases.get(name, name) for name in class_names)
        width = cast(Tensor, model.background).shape[1]
        cast(Any, model).set_class_embeddings(prompts, torch.randn(len(class_names), width), torch.randn(1, width))
        return model, prompts


def set_class_prompts(
    model: nn.Module, teacher: TeacherConfig, key: str, class_names: tuple[str, ...]
) -> tuple[str, ...]:
    """Give the dataset's classes to a teacher that reads text and has none yet; returns the names of its classes."""
    if not hasattr(model, "set_classes"):
        return class_names
    reader = cast(ReadsText, model)
    if not reader.class_names:
        tokenizer = ClipTokenizer(teacher.vocabulary or VOCABULARY_PATH)
        with naming(f"key '{key}.aliases'"):
            reader.set_classes(tuple(teacher.class_aliases.get(name, name) for name in class_names), tokenizer)
    return reader.class_names


def check_input_size(teacher: TeacherConfig, key: str, multiple: int) -> None:
    """UserError where a teacher's image size is no multiple of what its model takes."""
    size = teacher.image_size
    is_met = size is None or (size >= 1 and size % multiple == 0)
    expect(is_met, f"key '{key}.image_size'", size, f"a multiple of {multiple}")


def input_size(teacher: TeacherConfig, key: str, model: nn.Module, image_size: int) -> int | None:
    """The side in pixels of the images that a teacher gets; None: the student's images unchanged."""
    multiple = getattr(model, "size_multiple", 1)
    check_input_size(teacher, key, multiple)
    size = multiple * math.ceil((teacher.image_size or image_size) / multiple)
    if size > MOST_UPSAMPLED * image_size:
        print(
            f"teacher {teacher.name!r} gets images of {image_size} px enlarged to {size} px, by a factor of "
            f"{size / image_size:.1f}: most of their detail is interpolated"
        )
    return None if size == image_size else size
