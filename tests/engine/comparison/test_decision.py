"""The rule of a study: its verdicts by hand, Student's quantiles against tables, and the date of its file."""

import math
import subprocess

import numpy as np
import pytest

from engine.comparison.decision import (
    DEFAULT_RULE,
    DecisionRule,
    student_probability,
    student_quantile,
    when_committed,
)
from errors import UserError

# P(|T| <= t) = level: t to three decimals, as printed in textbooks, for 1, 2, 3, 4, 9, 10, 30 and 120 degrees.
DEGREES = (1, 2, 3, 4, 9, 10, 30, 120)
TABLE = {
    0.80: (3.078, 1.886, 1.638, 1.533, 1.383, 1.372, 1.310, 1.289),
    0.90: (6.314, 2.920, 2.353, 2.132, 1.833, 1.812, 1.697, 1.658),
    0.95: (12.706, 4.303, 3.182, 2.776, 2.262, 2.228, 2.042, 1.980),
    0.99: (63.657, 9.925, 5.841, 4.604, 3.250, 3.169, 2.750, 2.617),
    0.999: (636.619, 31.599, 12.924, 8.610, 4.781, 4.587, 3.646, 3.373),
}


@pytest.mark.parametrize("level", TABLE)
def test_quantiles_are_those_of_the_tables(level):
    assert [student_quantile(level, n) for n in DEGREES] == pytest.approx(TABLE[level], abs=5.01e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 8, 39])
def test_probability_is_the_integral_of_the_density(degrees):
    x = np.linspace(0, 2.7, 20_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert student_probability(2.7, degrees) == pytest.approx(2 * np.trapezoid(density, x), abs=1e-8)
    assert student_probability(student_quantile(0.5, degrees), degrees) == pytest.approx(0.5, abs=1e-14)


def test_verdicts_by_hand():
    """Three seeds, standard deviation 0.01: the interval is the mean +- 4.303 * 0.01 / sqrt(3) = 0.0248."""
    rule, spread = DecisionRule(smallest=0.03, seeds=3), np.array([-0.01, 0.0, 0.01])
    assert rule.half_width(spread) == pytest.approx(0.02484, abs=1e-5)
    for mean, verdict in (
        (0.0, "no difference larger than 0.03"),
        (0.005, "no difference larger than 0.03"),  # up to 0.0298
        (0.006, "undecided"),  # up to 0.0308
        (-0.006, "undecided"),
        (0.024, "undecided"),  # from -0.0008
        (0.026, "better"),  # from 0.0012
        (-0.026, "worse"),
    ):
        assert rule.verdict(spread + mean) == verdict, mean
    assert rule.verdict(np.full(3, 0.01)) == "no difference larger than 0.03"  # surely above 0, and too small to matter
    assert rule.verdict(spread[:2] + 9) == "not decided: 2 of 3 seeds"
    assert rule.verdict(spread[:0]) == "not trained yet"


def test_the_default_calls_no_difference_small():
    assert DEFAULT_RULE.verdict(np.array([0.02, 0.03, 0.04])) == "better"
    assert DEFAULT_RULE.verdict(np.array([0.01, 0.02, 0.03])) == "undecided"
    assert DEFAULT_RULE.verdict(np.array([0.5])) == "not decided: 1 of 2 seeds"
    assert DEFAULT_RULE.verdict(np.zeros(2)) == "undecided"  # equal rows too: `describe` names no other verdict


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_where_nothing_has_an_effect_as_many_verdicts_as_announced_say_so(level):
    rule = DecisionRule(smallest=0.0, level=level, seeds=3)
    found = [rule.verdict(row) in ("better", "worse") for row in np.random.default_rng(0).normal(size=(4000, 3))]
    assert np.mean(found) == pytest.approx(1 - level, abs=0.2 * (1 - level))


@pytest.mark.parametrize(
    "values, key", [({"smallest": -0.1}, "smallest"), ({"level": 1.0}, "level"), ({"seeds": 1}, "seeds")]
)
def test_numbers_out_of_range_are_refused(values, key):
    with pytest.raises(UserError, match=rf"study.yaml: key 'decide.{key}': found {values[key]}, expected"):
        DecisionRule(**values).check("study.yaml")


def test_the_date_is_that_of_the_files_commit(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\n")
    assert when_committed(path) == "study.yaml, of unknown date: in no git checkout"
    who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    git = lambda *arguments: subprocess.run(
        ["git", "-C", str(tmp_path), *who, *arguments],
        check=True,
        capture_output=True,
        env={"GIT_COMMITTER_DATE": "2026-03-04T12:00:00", "PATH": "/usr/bin:/bin:/usr/local/bin"},
    )
    git("init")
    assert when_committed(path) == "study.yaml, not committed"
    git("add", "study.yaml")
    git("commit", "-m", "x")
    (tmp_path / "other.yaml").write_text("")
    assert when_committed(path) == "study.yaml, committed 2026-03-04"
    path.write_text("name: y\n")
    assert when_committed(path) == "study.yaml, changed since its commit of 2026-03-04"
