"""The teachers of a run: from the config to frozen models, and what they say of a batch.

A teacher is a detector of models.build, a model of models.build_teacher that only ever teaches, or the running average
of the student (arch: ema). It is frozen, in eval mode, folded for inference, and part of no checkpoint.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import models
from config import Config, TeacherConfig
from datasets.download import how_to_fetch
from distill.criterion import TeacherFacts
from distill.probing import probe
from errors import UserError
from layers.fusion import fuse
from teachers.clip_tokenizer import VOCABULARY_PATH, ClipTokenizer
from teachers.output_cache import OutputCache, cached_forward, fingerprint_of, image_key, split_output
from weights import load_public

EMA = "ema"  # as `arch` of a teacher
MOST_UPSAMPLED = 2.0  # a teacher that sees pictures enlarged by more sees mostly interpolation: a warning


@dataclass
class Teachers:
    """Frozen models by name, and what is known of each."""

    models: dict[str, nn.Module]
    facts: dict[str, TeacherFacts]
    bfloat16: bool = False
    changing: frozenset[str] = frozenset()  # names of those that learn: the student's average
    caches: dict[str, OutputCache] = field(default_factory=dict)  # of the teachers whose outputs are kept
    output_types: dict[str, type] = field(default_factory=dict)  # of the same teachers

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Any]:
        """Each teacher's output for images (B, 3, H, W) in [0, 1], at the size it sees.

        Not under torch.inference_mode: its tensors may not be saved for the student's backward, so what the terms read
        would have to be copied first.
        """
        outputs = {}
        for name, model in self.models.items():
            seen = resize_images(images, self.facts[name].image_size)
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
                if name in self.caches:
                    keys = [image_key(image) for image in images]
                    outputs[name] = cached_forward(model, seen, keys, self.caches[name], self.output_types[name])
                else:
                    outputs[name] = model(seen)
        return outputs

    def keep_outputs(self, folder: Path, max_gigabytes: float) -> None:
        """From now on ask each teacher once about an image: its outputs stay in `folder`.

        Call when its `requested_outputs` are set.
        UserError for a teacher whose output cannot be kept. The student's average changes, and is always asked.
        """
        for name, model in self.models.items():
            if name in self.changing:
                continue
            size = self.facts[name].image_size
            output = probe(model, size or 224)
            try:
                split_output(output)
            except TypeError as error:
                raise UserError(f"key 'teacher_cache_gigabytes': teacher {name!r}: {error}") from None
            fingerprint = fingerprint_of(model, image_size=size, bfloat16=self.bfloat16)
            self.caches[name] = OutputCache(folder / name, max_gigabytes / len(self.models), fingerprint)
            self.output_types[name] = type(output)


def resize_images(images: Tensor, size: int | None) -> Tensor:
    """Square images (B, 3, S, S) at another size, bilinear, averaged where they shrink; None leaves them."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def build_teachers(
    config: Config,
    names: tuple[str, ...],
    given: dict[str, nn.Module] | None = None,
    ema: nn.Module | None = None,
) -> Teachers:
    """Every teacher of the config, on the CPU. `names` are the dataset's classes.

    `given` modules stand in for weights and know the dataset's classes; one that reads text is asked for them, unless
    it has classes already. ema: the running average of the student.
    UserError for a teacher that no term names: its forward pass would cost time and teach nothing.
    """
    given = given or {}
    check_names(config, given)
    found, facts = {}, {}
    for index, teacher in enumerate(config.teachers):
        key = f"key 'teachers.{index}"
        if teacher.name in given:
            model, known = given[teacher.name], speak(given[teacher.name], teacher, key, names)
        else:
            model, known = load(teacher, key, names, ema)
        model.eval().requires_grad_(False)
        found[teacher.name] = model if teacher.arch == EMA else fuse(model)
        size = input_size(teacher, key, model, config.image_size)
        facts[teacher.name] = TeacherFacts(known, size, {str(s): str(t) for s, t in teacher.aliases.items()})
    return Teachers(found, facts, changing=frozenset(t.name for t in config.teachers if t.arch == EMA))


def check_names(config: Config, given: Collection[str]) -> None:
    """UserError for a name used twice, one that no term names, and a given module that the config does not name."""
    names = [teacher.name for teacher in config.teachers]
    for name in given:
        if name not in names:
            raise UserError(f"teacher {name!r} is not among the teachers of the config")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"key 'teachers.{index}.name': {name!r} is used twice")
        if name not in {term.teacher for term in config.terms}:
            raise UserError(f"key 'teachers.{index}.name': no term names the teacher {name!r}, it could never act")


def find_file(teacher: TeacherConfig, key: str) -> str | None:
    """The weights of a teacher; None for the student's average, which has none. UserError where they are not there."""
    if teacher.arch == EMA:
        if teacher.weights is not None:
            raise UserError(f"{key}.weights': found {teacher.weights!r}, the student's average has no file")
        return None
    if teacher.weights is None:
        advice = "" if teacher.arch in models.TEACHERS else "; compare.py trains a detector in place"
        raise UserError(f"{key}.weights': found none, expected a file{how_to_fetch(teacher.arch)}{advice}")
    if not Path(teacher.weights).is_file():
        found = f"{key}.weights': {teacher.weights}: no such file"
        raise UserError(f"{found}, expected weights of {teacher.arch}{how_to_fetch(teacher.arch)}")
    return teacher.weights


def load(
    teacher: TeacherConfig, key: str, names: tuple[str, ...], ema: nn.Module | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model of a teacher and the class names it knows, those of the dataset where its file has none."""
    if find_file(teacher, key) is None:
        if ema is None:
            raise UserError(f"{key}.arch': the student's average is not at hand here, expected another teacher")
        return ema, names
    if teacher.arch in models.TEACHERS:
        model = models.build_teacher(teacher.arch)
        load_public(model, teacher.weights)
        return model, speak(model, teacher, key, names)
    model, info = checkpoint.load_model(teacher.weights, teacher.arch)
    if info.names_from == "the release":
        print(f"{teacher.weights}: it does not name its classes; taken for COCO's {len(info.names)}")
    if info.names_from != "nothing" or len(info.names) != len(names):
        return model, info.names
    print(f"{teacher.weights}: it does not name its classes; taken for those of the dataset: {', '.join(names)}")
    return model, names


def speak(model: nn.Module, teacher: TeacherConfig, key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names a model that only teaches has for the dataset's classes; one that reads text is asked for them."""
    if not hasattr(model, "set_classes"):
        return names
    if not model.class_names:
        tokenizer = ClipTokenizer(teacher.vocabulary or VOCABULARY_PATH)
        try:
            model.set_classes(tuple(str(teacher.aliases.get(name, name)) for name in names), tokenizer)
        except UserError as error:
            raise UserError(f"{key}.aliases': {error}") from None
    return model.class_names


def check_input_size(teacher: TeacherConfig, key: str, multiple: int) -> None:
    """UserError where the pictures that a teacher is to see have a side that it does not take."""
    size = teacher.image_size
    if size is not None and (size < 1 or size % multiple):
        raise UserError(f"{key}.image_size': found {size}, expected a multiple of {multiple}")


def input_size(teacher: TeacherConfig, key: str, model: nn.Module, image_size: int) -> int | None:
    """The side in pixels of the pictures a teacher sees; None: those of the student as they are."""
    multiple = getattr(model, "size_multiple", 1)
    check_input_size(teacher, key, multiple)
    size = multiple * math.ceil((teacher.image_size or image_size) / multiple)
    if size > MOST_UPSAMPLED * image_size:
        print(
            f"teacher {teacher.name!r} sees pictures of {image_size} px enlarged to {size} px, by "
            f"{size / image_size:.1f}: little of what it then sees is there"
        )
    return None if size == image_size else size
