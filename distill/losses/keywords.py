"""Losses are called by keyword: student and teacher in the wrong order would give a number, too."""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def by_keyword(loss: Callable[P, R]) -> Callable[P, R]:
    """The same loss (or `forward` of one), whose TypeError for positional arguments names the keywords to use.

    ValueError for a temperature that is not above 0: below, the loss would teach the reverse of the teacher's order.
    """
    arguments = inspect.signature(loss).parameters.values()
    most_positional = sum(argument.kind is argument.POSITIONAL_OR_KEYWORD for argument in arguments)  # self of a method
    required = [a.name for a in arguments if a.kind is a.KEYWORD_ONLY and a.default is a.empty]
    others = [f"{a.name}={a.default}" for a in arguments if a.kind is a.KEYWORD_ONLY and a.default is not a.empty]

    @wraps(loss)
    def by_keyword_only(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > most_positional:
            expected = f"{loss.__qualname__}({', '.join(f'{name}=...' for name in required)})"
            optional = f"; optional: {', '.join(others)}" if others else ""
            raise TypeError(f"found {len(args) - most_positional} positional arguments, expected {expected}{optional}")
        temperature = kwargs.get("temperature", 1.0)
        if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature} must be above 0 and finite")
        return loss(*args, **kwargs)

    return by_keyword_only
