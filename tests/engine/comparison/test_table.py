"""engine/comparison/table.py: means, spreads, costs and verdicts against numbers worked out by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from engine.comparison.study import plan
from engine.comparison.table import (
    T_QUANTILES,
    Result,
    as_json,
    cost_per_step,
    differences,
    half_width,
    markdown,
    verdict,
)
from tests.tiny_training import tiny_config

TERM = {"teacher": "given", "loss": "mse", "weight": 1.0, "student_maps": ["p3"]}


def report(mAP, *, seconds=60.0, steps=100, **changes):
    test = {"mAP50": mAP + 0.2, "mAP50-95": mAP, "precision": 0.8, "recall": 0.7, "f1": 0.75}
    machine = {"device": "cpu", "precision": "float32", "threads": 1, "torch": "2"}
    return {"test": test, "seconds": seconds, "steps": steps, "parameters": 3_000_000} | machine | changes


@pytest.fixture
def study(tmp_path):
    teachers = [{"name": "given", "arch": "yolov8n", "weights": "given.pt"}]
    config = tiny_config(tmp_path, tmp_path / "runs", name="study", teachers=teachers)
    rows = {"baseline": None, "taught": {"terms": [TERM]}, "slow": {"terms": [TERM], "against": ["taught"]}}
    return plan(config, rows, seeds=3, source="study")


@pytest.fixture
def results(study):
    found = {row.name: Result(row) for row in study.rows}
    found["baseline"].reports |= {0: report(0.50), 1: report(0.52), 2: report(0.51)}
    found["taught"].reports |= {
        0: report(0.53, seconds=90.0),
        1: report(0.56, seconds=90.0),
        2: report(0.545, steps=75),
    }
    return found


def test_a_table_of_some_classes_names_them(study, results):
    data = dataclasses.replace(study.config.data, classes=("dog", "cat"))
    some = dataclasses.replace(study, config=dataclasses.replace(study.config, data=data))
    assert "test `test`, classes dog, cat alone, 64 px, batch 8. " in markdown(some, results)
    assert "test `test`, 64 px, batch 8. " in markdown(study, results)


def test_verdict_by_hand():
    # mean 0.02, standard deviation 0.01, standard error 0.01 / sqrt(3) = 0.00577; times 4.303: 0.0248
    assert half_width(np.array([0.01, 0.02, 0.03])) == pytest.approx(0.02484, abs=1e-5)
    assert verdict(np.array([0.01, 0.02, 0.03])) == "no difference that 3 seeds can tell"
    # the same spread around 0.03
    assert verdict(np.array([0.02, 0.03, 0.04])) == "better"
    assert verdict(np.array([-0.02, -0.03, -0.04])) == "worse"
    # two seeds, standard deviation 0.0014, standard error 0.001, times 12.706: 0.0127
    assert verdict(np.array([0.011, 0.013])) == "no difference that 2 seeds can tell"
    assert verdict(np.array([0.012, 0.014])) == "better"
    assert verdict(np.array([0.5])) == "one seed: not decided"
    assert verdict(np.array([])) == "not trained yet"
    assert verdict(np.array([0.0, 0.0])) == "no difference that 2 seeds can tell"


@pytest.mark.parametrize("degrees", range(1, len(T_QUANTILES) + 1))
def test_quantiles_of_student(degrees):
    """The density integrated up to the quantile is 0.975."""
    x = np.linspace(0, T_QUANTILES[degrees - 1], 200_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    assert 0.5 + np.trapezoid(scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x) == pytest.approx(0.975, abs=2e-5)


def test_many_seeds_are_judged_by_the_last_quantile():
    values = np.arange(40.0)
    assert half_width(values) == pytest.approx(2.228 * values.std(ddof=1) / math.sqrt(40))


def test_where_nothing_has_an_effect_one_verdict_in_twenty_says_so():
    rng = np.random.default_rng(0)
    decided = np.mean([verdict(row) in ("better", "worse") for row in rng.normal(size=(4000, 3))])
    assert 0.04 < decided < 0.06


def test_differences_are_paired_by_seed(results):
    results["slow"].reports |= {2: report(0.5)}
    first, second = differences(results)
    assert (first.name, first.against, first.seeds) == ("taught", "baseline", (0, 1, 2))
    assert first.mAP == pytest.approx([0.03, 0.04, 0.035]) and first.verdict == "better"
    assert (second.name, second.against, second.seeds) == ("slow", "taught", (2,))
    assert second.mAP == pytest.approx([-0.045]) and second.verdict == "one seed: not decided"


def test_cost_of_a_step_is_relative_to_the_student_alone(results):
    # 0.9, 0.9 and 0.8 seconds a step against 0.6
    assert cost_per_step(results["taught"], results) == pytest.approx((0.9 + 0.9 + 0.8) / 3 / 0.6)
    assert cost_per_step(results["baseline"], results) == 1
    assert cost_per_step(results["slow"], results) is None


def test_the_text(study, results):
    text = markdown(study, results)
    assert (
        "| baseline | yolov8n | 3.00 M | 2 | 3 | 0.710 ± 0.010 | 0.510 ± 0.010 | 0.800 ± 0.000 | 0.700 ± 0.000 "
        "| 0.750 ± 0.000 | 1.00 | 1.0 |" in text
    )
    assert "| taught | yolov8n | 3.00 M | 2 | 3 | 0.745 ± 0.015 | 0.545 ± 0.015 |" in text and "| 1.44 | 1.3 |" in text
    assert "| slow | yolov8n | - | 2 | 0 of 3 | - | - | - | - | - | - | - |" in text
    # standard deviation 0.005, standard error 0.00289, times 4.303: 0.0124
    assert "| taught | baseline | 3 | +0.035 ± 0.005 | +0.035 ± 0.005 | +0.023 .. +0.047 | better |" in text
    assert "| slow | taught | 0 | - | - | - | not trained yet |" in text
    assert "Not trained yet, row (seeds): slow (0, 1, 2)." in text
    assert "Trained on cpu, float32, 1 threads, torch 2." in text
    results["slow"].failures[1] = "step 7: mse is nan"
    assert "Failed: slow with seed 1: step 7: mse is nan" in markdown(study, results)


def test_one_seed_has_no_spread(study, results):
    for result in results.values():
        result.reports = {0: report(0.5)}
    text = markdown(study, results)
    assert "| taught | yolov8n | 3.00 M | 2 | 1 of 3 | 0.700 | 0.500 | 0.800 |" in text
    assert "| taught | baseline | 1 | +0.000 | +0.000 | - | one seed: not decided |" in text


def test_what_is_not_defined_is_a_dash_and_null(study, results):
    """A report has null for the precision of nothing."""
    results["slow"].reports = {0: report(0.0)}
    results["slow"].reports[0]["test"]["precision"] = None
    assert "| slow | yolov8n | 3.00 M | 2 | 1 of 3 | 0.200 | 0.000 | - | 0.700 |" in markdown(study, results)
    assert json.loads(as_json(study, results))["rows"][2]["precision"] == [None]


def test_the_numbers_as_json(study, results):
    tree = json.loads(as_json(study, results))
    baseline, taught, slow = tree["rows"]
    assert taught["mAP"] == pytest.approx([0.53, 0.56, 0.545]) and taught["seeds"] == [0, 1, 2]
    assert taught["terms"][0]["loss"] == "mse" and taught["runs"] == ["taught_seed0", "taught_seed1", "taught_seed2"]
    assert taught["cost_per_step"] == pytest.approx(1.4444, abs=1e-4) and baseline["differences"] == []
    (difference,) = taught["differences"]
    assert (difference["against"], difference["verdict"]) == ("baseline", "better")
    assert difference["mAP_mean"] == pytest.approx(0.035) and difference["mAP_std"] == pytest.approx(0.005)
    assert difference["mAP50_mean"] == pytest.approx(0.035) and difference["mAP_half_width"] == pytest.approx(
        0.0124, abs=1e-4
    )
    assert slow["missing_seeds"] == [0, 1, 2] and slow["cost_per_step"] is None and slow["parameters"] is None
    assert tree["config"]["name"] == "study"
