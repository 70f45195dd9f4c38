"""Checks of a config's distillation terms that need no model: teacher, loss, weight, maps and parameters.

A wrong term is a UserError with the key, what was found and what was expected.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from config import STUDENT, GradientShare, TermConfig, from_tree, to_tree
from distill.terms import LOSSES
from errors import UserError, expect

RENAMED = {"box_beliefs": "box_classes"}  # losses, by their old names
FIXED_MAPS = {name: (name,) for name in ("boxes", "outputs", "layers", "queries")}  # by Term.compares: it names no maps
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # by parameter; all others are 0 or more
    "temperature": (lambda number: number > 0, "a number above 0"),
    **dict.fromkeys(
        ("psi", "drop", "score_threshold"), (lambda number: 0 <= number < 1, "a number of 0 up to less than 1")
    ),
}


def check_terms(terms: Sequence[TermConfig], teachers: tuple[str, ...]) -> dict[str, TermConfig]:
    """The terms of a config by their names, with names and maps filled in. teachers: their names."""
    if STUDENT in teachers:
        raise UserError(f"teacher {STUDENT!r}: this name stands for the student itself, expected another")
    by_name: dict[str, TermConfig] = {}
    for index, term in enumerate(terms):
        key = f"terms.{index}"
        term = from_tree(TermConfig, to_tree(term), source=key)  # one made in Python may hold anything
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
    expect(term.loss in LOSSES, f"{key}.loss", repr(term.loss), f"one of {', '.join(LOSSES)}")
    entry = LOSSES[term.loss]
    teachers = (STUDENT,) if entry.compares == "layers" else teachers
    expected = f"one of {', '.join(teachers) or 'no teacher'}"
    expect(term.teacher in teachers, f"{key}.teacher", repr(term.teacher), expected)
    place, weight = f"{key}.weight", term.weight
    if isinstance(weight, GradientShare):
        place, weight = f"{place}.share", weight.share
    is_met = weight > 0 and math.isfinite(weight)
    expect(is_met, place, weight, "a number above 0: the term could never act")
    is_met = term.stop_epoch is None or term.stop_epoch > 0
    expect(is_met, f"{key}.stop_epoch", term.stop_epoch, "more than 0: the term could never act")
    is_met = not term.final_fraction or term.decay != "none"
    expect(is_met, f"{key}.final_fraction", f"{term.final_fraction} with decay none", "linear or cosine")
    expect(0 <= term.final_fraction <= 1, f"{key}.final_fraction", term.final_fraction, "a number in 0..1")
    is_met = 0 <= term.warmup_epochs < math.inf
    expect(is_met, f"{key}.warmup_epochs", term.warmup_epochs, "a number of epochs, 0 or more")
    if term.content_only and (entry.compares != "map" or entry.runs_teacher_layers):
        raise UserError(f"{key}.content_only: loss {term.loss!r} compares more than maps, expected false")
    student_maps, teacher_maps = check_maps(term, key)
    check_parameters(term, f"{key}.parameters")
    name = term_name(term)
    is_met = name.replace("-", "_").isidentifier()
    expect(is_met, f"{key}.name", repr(name), "letters, digits, _ and - (it names a column of the log)")
    expect(not hasattr(nn.ModuleDict, name), f"{key}.name", repr(name), "another: PyTorch has an attribute so called")
    return dataclasses.replace(term, name=name, student_maps=student_maps, teacher_maps=teacher_maps)


def check_parameters(term: TermConfig, key: str) -> None:
    """UserError for a parameter that the loss lacks, that is out of range, or that another one makes without effect."""
    parameters = LOSSES[term.loss].parameters()
    for name, value in term.parameters.items():
        expected = f"of loss {term.loss!r}: {', '.join(sorted(parameters)) or 'none'}"
        expect(name in parameters, key, repr(name), expected)
        expected = expected_instead(name, value, parameters[name].default)
        expect(not expected, f"{key}.{name}", repr(value), expected)
    values = {name: argument.default for name, argument in parameters.items()} | term.parameters
    for name, (other, choices) in LOSSES[term.loss].only_with.items():
        is_met = values[name] == parameters[name].default or values[other] in choices
        found = f"{values[name]!r} beside {other}: {values[other]}, which does not read it"
        expect(is_met, f"{key}.{name}", found, f"{other}: {' or '.join(choices)}")


def term_name(term: TermConfig) -> str:
    """Its name in the losses and in the log."""
    return term.name or f"{term.loss}_{term.teacher}"


def check_maps(term: TermConfig, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the student's and the teacher's maps, pair by pair; UserError where they do not fit the loss."""
    entry, fixed = LOSSES[term.loss], FIXED_MAPS.get(LOSSES[term.loss].compares)
    if fixed is not None:
        for side in ("student_maps", "teacher_maps"):
            if getattr(term, side) not in ((), fixed):
                raise UserError(f"{key}.{side}: loss {term.loss!r} compares {fixed[0]}, expected no names of maps")
        return fixed, fixed
    expect(bool(term.student_maps), f"{key}.student_maps", "none", "at least one name")
    default = ("image_logits",) * len(term.student_maps) if entry.compares == "image" else term.student_maps
    teacher_maps = term.teacher_maps or default
    count = len(term.student_maps)
    expect(len(teacher_maps) == count, f"{key}.teacher_maps", len(teacher_maps), f"{count}, one per student map")
    for side, names in (("student_maps", term.student_maps), ("teacher_maps", teacher_maps)):
        if entry.only_output is not None and set(names) != {entry.only_output}:
            raise UserError(f"{key}.{side}: found {', '.join(names)}, loss {term.loss!r} compares {entry.only_output}")
    for name in teacher_maps:
        if entry.other_branch is not None and name.startswith(entry.other_branch):
            raise UserError(
                f"{key}.teacher_maps: found {name!r}, a map of the branch that loss {term.loss!r} is not for"
            )
    return tuple(term.student_maps), tuple(teacher_maps)


def expected_instead(name: str, value: Any, default: Any) -> str:
    """The values that a parameter takes, if `value` is none of them; "" if it is. The loss checks words itself.

    A number out of range would train without an error: a temperature below 0 reverses the teacher's scores.
    """
    if isinstance(default, str):
        return ""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, tuple | None):
        is_list = isinstance(value, list | tuple) and len(value) > 0
        fits, expected = value is default or (is_list and all(map(is_above_0, value))), "a list of numbers above 0"
    elif isinstance(default, int):
        fits, expected = is_above_0(value) and value == int(value), "a whole number, at least 1"
    else:
        is_in_range, expected = RANGES.get(name, (lambda number: number >= 0, "a number, 0 or more"))
        fits = is_number(value) and is_in_range(value)
    return "" if fits else expected


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_above_0(value: Any) -> bool:
    return is_number(value) and value > 0
