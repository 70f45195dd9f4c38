"""Checks of a config's distillation terms that need no model: teacher, loss, weight, maps and parameters.

A wrong term is a UserError with the key, what was found and what was expected.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from config import STUDENT, GradientShare, TermConfig
from distill.terms import LOSSES
from errors import UserError

RENAMED = {"box_beliefs": "box_classes"}  # losses, by their old names
LOGITS = {"soft_class": "class_logits", "quality_focal": "class_logits", "localization": "box_logits"}  # by loss
OTHER_BRANCH = {"crosskd_classes": "box", "crosskd_edges": "cls"}  # by loss: prefix of the maps that it cannot compare
FIXED_MAPS = {name: (name,) for name in ("boxes", "outputs", "layers", "queries")}  # by Term.reads: it names no maps
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # by parameter; all others are 0 or more
    "temperature": (lambda number: number > 0, "a number above 0"),
    **dict.fromkeys(
        ("psi", "drop", "score_threshold"), (lambda number: 0 <= number < 1, "a number of 0 up to less than 1")
    ),
}
ReadWith = dict[str, tuple[str, tuple[str, ...]]]  # a parameter -> another one, and its values that read the first
BOXES_READ: ReadWith = {
    "score_threshold": ("boxes", ("teacher",)),
    "max_boxes": ("boxes", ("teacher", "proposals")),
}
READ_WITH: dict[str, ReadWith] = {  # by loss; with other values the parameter would change nothing
    "masked_mse": {name: ("mask", ("anchors",)) for name in ("psi", "anchor_sizes", "anchor_ratios")},
    "localization": {"gamma": ("region", ("valuable",))},
    "box_classes": BOXES_READ | {"boxes": ("at", ("boxes",))},
    **dict.fromkeys(("softmax_kl", "decoupled_kl", "prediction_correlation"), BOXES_READ),
}


def check_terms(terms: tuple[TermConfig, ...], teachers: tuple[str, ...]) -> dict[str, TermConfig]:
    """The terms of a config by their names, with names and maps filled in. teachers: their names."""
    if STUDENT in teachers:
        raise UserError(f"teacher {STUDENT!r}: this name stands for the student itself, expected another")
    by_name: dict[str, TermConfig] = {}
    for index, term in enumerate(terms):
        key = f"terms.{index}"
        term = check_term(term, key, teachers)
        name = term_name(term)
        if name in by_name:
            raise UserError(f"{key}: the name {name!r} is used twice; give one of the terms another `name`")
        by_name[name] = term
    return by_name


def check_term(term: TermConfig, key: str, teachers: tuple[str, ...]) -> TermConfig:
    """One term, as check_terms returns it."""
    if term.loss in RENAMED:
        raise UserError(f"{key}.loss: found {term.loss!r}, which is called {RENAMED[term.loss]!r} now")
    if term.loss not in LOSSES:
        raise UserError(f"{key}.loss: found {term.loss!r}, expected one of {', '.join(LOSSES)}")
    teachers = (STUDENT,) if LOSSES[term.loss].reads == "layers" else teachers
    if term.teacher not in teachers:
        raise UserError(f"{key}.teacher: found {term.teacher!r}, expected one of {', '.join(teachers) or 'no teacher'}")
    place, weight = f"{key}.weight", term.weight
    if isinstance(weight, GradientShare):
        place, weight = f"{place}.share", weight.share
    if not weight > 0 or not math.isfinite(weight):
        raise UserError(f"{place}: found {weight}, expected a number above 0: the term could never act")
    if term.stop_epoch is not None and term.stop_epoch <= 0:
        raise UserError(f"{key}.stop_epoch: found {term.stop_epoch}, expected more than 0: the term could never act")
    if term.final_fraction and term.decay == "none":
        raise UserError(f"{key}.final_fraction: found {term.final_fraction} with decay none, expected linear or cosine")
    if term.content_only and (LOSSES[term.loss].reads != "map" or LOSSES[term.loss].finishes_maps):
        raise UserError(f"{key}.content_only: loss {term.loss!r} compares more than maps, expected false")
    student_maps, teacher_maps = check_maps(term, key)
    parameters = LOSSES[term.loss].parameters()
    for name in term.parameters:
        if name not in parameters:
            expected = ", ".join(sorted(parameters)) or "none"
            raise UserError(f"{key}.parameters: found {name!r}, expected of loss {term.loss!r}: {expected}")
        value = term.parameters[name]
        if expected := expected_instead(name, value, parameters[name].default):
            raise UserError(f"{key}.parameters.{name}: found {value!r}, expected {expected}")
    check_choices(term, key)
    name = term_name(term)
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"{key}.name: found {name!r}, expected letters, digits, _ and - (it names a column of the log)")
    return dataclasses.replace(term, name=name, student_maps=student_maps, teacher_maps=teacher_maps)


def check_choices(term: TermConfig, key: str) -> None:
    """UserError for a parameter that changes nothing, because another one chooses what does not read it."""
    parameters = LOSSES[term.loss].parameters()
    values = {name: argument.default for name, argument in parameters.items()} | term.parameters
    for name, (other, choices) in READ_WITH.get(term.loss, {}).items():
        if values[name] != parameters[name].default and values[other] not in choices:
            raise UserError(
                f"{key}.parameters.{name}: found {values[name]!r} beside {other}: {values[other]}, which does not read "
                f"it, expected {other}: {' or '.join(choices)}"
            )


def term_name(term: TermConfig) -> str:
    """Its name in the losses and in the log."""
    return term.name or f"{term.loss}_{term.teacher}"


def check_maps(term: TermConfig, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the student's and the teacher's maps, pair by pair; UserError where they do not fit the loss."""
    reads = LOSSES[term.loss].reads
    if reads in FIXED_MAPS:
        for side in ("student_maps", "teacher_maps"):
            if getattr(term, side) not in ((), FIXED_MAPS[reads]):
                raise UserError(f"{key}.{side}: loss {term.loss!r} compares {reads}, expected no names of maps")
        return FIXED_MAPS[reads], FIXED_MAPS[reads]
    if not term.student_maps:
        raise UserError(f"{key}.student_maps: found none, expected at least one name")
    default = ("image_logits",) * len(term.student_maps) if reads == "image" else term.student_maps
    teacher_maps = term.teacher_maps or default
    if len(teacher_maps) != len(term.student_maps):
        raise UserError(
            f"{key}.teacher_maps: found {len(teacher_maps)}, expected {len(term.student_maps)}, one per student map"
        )
    for side, names in (("student_maps", term.student_maps), ("teacher_maps", teacher_maps)):
        logits = LOGITS.get(term.loss)
        if logits and set(names) != {logits}:
            raise UserError(f"{key}.{side}: found {', '.join(names)}, loss {term.loss!r} compares {logits}")
    for name in teacher_maps:
        if name.startswith(OTHER_BRANCH.get(term.loss, "-")):
            raise UserError(
                f"{key}.teacher_maps: found {name!r}, a map of the branch that loss {term.loss!r} is not for"
            )
    return tuple(term.student_maps), tuple(teacher_maps)


def expected_instead(name: str, value: Any, default: Any) -> str:
    """The values that a parameter takes, if `value` is none of them; "" if it is. The loss checks words itself.

    A number out of range would train without an error: a temperature below 0 reverses the teacher's scores.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        return ""
    if isinstance(default, tuple | None):
        numbers = value if isinstance(value, list | tuple) else ()
        fits = numbers and all(expected_instead("temperature", number, 1.0) == "" for number in numbers)
        return "" if fits or value is default else "a list of numbers above 0"
    if isinstance(default, int):
        return "" if is_number and value >= 1 and value == int(value) else "a whole number, at least 1"
    is_in_range, expected = RANGES.get(name, (lambda number: number >= 0, "a number, 0 or more"))
    return "" if is_number and is_in_range(value) else expected
