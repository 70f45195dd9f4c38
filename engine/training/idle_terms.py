"""Terms of weight 0: they are left out before anything is built, and one line says so.

A grid of weights has rows with a 0. Such a term would cost the passes of its teacher and change nothing.
"""

import dataclasses
from typing import TypeVar

from config import Config, GradientShare, TermConfig
from distill.checks import check_terms, term_name
from engine.training.teaching import used_teachers

AnyConfig = TypeVar("AnyConfig", bound=Config)


def without_idle_terms(config: AnyConfig) -> tuple[AnyConfig, str]:
    """The config without its terms of weight 0 and the teachers that only they named; the line that says so, or "".

    A config whose every term is left out is the student alone. UserError for any other mistake in its terms: one that
    is left out is checked like the others.
    """
    idle = [term for term in config.terms if is_idle(term)]
    if not idle:
        return config, ""
    as_if_active = tuple(dataclasses.replace(term, weight=1.0) if term in idle else term for term in config.terms)
    check_terms(as_if_active, tuple(teacher.name for teacher in config.teachers))
    terms = tuple(term for term in config.terms if term not in idle)
    weighting = config.teacher_weighting if terms else "fixed"
    active = dataclasses.replace(config, terms=terms, teacher_weighting=weighting)
    unneeded = {term.teacher for term in idle} - used_teachers(active)
    active = dataclasses.replace(active, teachers=tuple(t for t in config.teachers if t.name not in unneeded))
    line = f"left out, weight 0: {', '.join(map(term_name, idle))}"
    if not terms:
        line = f"every term has weight 0 ({', '.join(map(term_name, idle))}): the student learns without them"
        line += "" if used_teachers(active) else ", alone"
    names = [teacher.name for teacher in config.teachers if teacher.name in unneeded]
    return active, line + (f"; no need of teacher {', '.join(names)}" if names else "")


def is_idle(term: TermConfig) -> bool:
    weight = term.weight.share if isinstance(term.weight, GradientShare) else term.weight
    return weight == 0
