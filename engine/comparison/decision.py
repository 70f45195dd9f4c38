"""The rule by which a study decides: fixed in its file beforehand, so that nobody can choose it by the numbers.

    decide: {metric: mAP, smallest: 0.005, level: 0.95, seeds: 5}

Runs are paired by seed; d_i is the difference of pair i of n. The confidence interval of the true difference is

    mean(d) +- t * std(d) / sqrt(n)          std with n - 1, P(|T| <= t) = level for Student's T with n - 1 degrees

The first line that holds is the verdict:

    not decided                          n < seeds
    not defined                          some d_i is not: a run has no number in this metric
    no difference larger than smallest   the interval lies in -smallest .. smallest, even if 0 is outside it
    better, worse                        the interval lies above 0, or below 0
    undecided                            otherwise: more seeds could tell

If no row had any effect, one in 1 / (1 - level) would still be called better or worse.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.runtime.run_folder import git
from errors import expect


@dataclass(frozen=True)
class DecisionRule:
    """When a row of a study is better or worse than another; engine/comparison/decision.py has the definition."""

    metric: Literal["mAP50", "mAP", "precision", "recall", "F1"] = "mAP"  # of the test split, from the last EMA weights
    smallest: float = 0.005  # the smallest difference that would matter
    level: float = 0.95  # of the confidence interval
    seeds: int = 5  # pairs of runs that a verdict needs; rows are trained with this number unless --seeds is given

    def check(self, source: str) -> None:
        """UserError for a number out of range."""
        for key, fits, expected in (
            ("smallest", self.smallest >= 0, "0 or more"),
            ("level", 0 < self.level < 1, "a number between 0 and 1"),
            ("seeds", self.seeds >= 2, "at least 2"),
        ):
            expect(fits, f"{source}: key 'decide.{key}'", getattr(self, key), expected)

    def half_width(self, values: np.ndarray) -> float:
        """Half the confidence interval of the mean of n >= 2 values."""
        n = len(values)
        return student_quantile(self.level, n - 1) * float(values.std(ddof=1)) / math.sqrt(n)

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """The confidence interval of the mean of n values; None for less than two, or with one that is not defined."""
        if len(values) < 2 or not np.isfinite(values).all():
            return None
        mean, half = float(values.mean()), self.half_width(values)
        return mean - half, mean + half

    def verdict(self, values: np.ndarray) -> str:
        """The verdict on paired differences (n,)."""
        n = len(values)
        if n == 0:
            return "not trained yet"
        if n < self.seeds:
            return f"not decided: {n} of {self.seeds} seeds"
        if not np.isfinite(values).all():
            return "not defined"
        mean, half = float(values.mean()), self.half_width(values)
        if self.smallest and -self.smallest <= mean - half and mean + half <= self.smallest:
            return f"no difference larger than {self.smallest:g}"
        if abs(mean) > half:
            return "better" if mean > 0 else "worse"
        return "undecided"

    def describe(self) -> str:
        """The rule in words, for the table."""
        small = f"{self.smallest:g}"
        inside = f"inside -{small} .. {small} there is no difference larger than {small}; else above 0 a row is better"
        return (
            f"the {100 * self.level:g} % confidence interval of the mean difference in {self.metric} (Student's t) "
            f"decides, from {self.seeds} seeds on: {inside if self.smallest else 'above 0 a row is better'}, below 0 "
            f"worse, and else undecided"
        )


DEFAULT_RULE = DecisionRule(smallest=0.0, seeds=2)  # of a file without one


def student_quantile(level: float, degrees: int) -> float:
    """The t >= 0 with P(|T| <= t) = level in 0..1 for Student's T with `degrees` >= 1 degrees of freedom."""
    low, high = 0.0, 1.0
    while student_probability(high, degrees) < level:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if middle in (low, high):  # neighbours in float64
            return high
        low, high = (middle, high) if student_probability(middle, degrees) < level else (low, middle)


def student_probability(t: float, degrees: int) -> float:
    """P(|T| <= t): a finite sum in sin and cos of theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2
    term = total = 1.0 if not is_odd else math.cos(theta) if degrees > 1 else 0.0
    for k in range(2 + is_odd, degrees, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if is_odd else math.sin(theta) * total


def rule_origin(path: str | Path, overrides: Iterable[str]) -> str:
    """Where the rule of a file that was read with these overrides comes from."""
    return "the command line" if any(o.startswith("decide") for o in overrides) else when_committed(path)


def when_committed(path: str | Path) -> str:
    """How the rule of a study's file is dated: by the last commit of the file, and whether it was changed since."""
    path = Path(path).resolve()
    if (changes := git(path.parent, "status", "--porcelain", "--", path.name)) is None:
        return f"{path.name}, of unknown date: in no git checkout"
    date = git(path.parent, "log", "-1", "--format=%cs", "--", path.name)  # an error before the first commit of all
    if not date:
        return f"{path.name}, not committed"
    return f"{path.name}, changed since its commit of {date}" if changes else f"{path.name}, committed {date}"
