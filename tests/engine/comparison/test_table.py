"""engine/comparison/table.py: means, spreads, costs and verdicts against numbers worked out by hand."""

import dataclasses
import json

import numpy as np
import pytest

from engine.comparison.decision import DecisionRule
from engine.comparison.study import build_study
from engine.comparison.table import Result, as_json, cost_per_step, differences, markdown
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
    return build_study(config, rows, seeds=3, source="study")


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


def test_differences_are_paired_by_seed(results):
    results["slow"].reports |= {2: report(0.5)}
    first, second = differences(results)
    assert (first.name, first.against, first.seeds) == ("taught", "baseline", (0, 1, 2))
    assert first.mAP == pytest.approx([0.03, 0.04, 0.035]) and first.verdict == "better"
    assert (second.name, second.against, second.seeds) == ("slow", "taught", (2,))
    assert second.mAP == pytest.approx([-0.045]) and second.verdict == "not decided: 1 of 2 seeds"


def test_cost_of_a_step_is_relative_to_the_student_alone(results):
    # 0.9, 0.9 and 0.8 seconds a step against 0.6
    assert cost_per_step(results["taught"], results) == pytest.approx((0.9 + 0.9 + 0.8) / 3 / 0.6)
    assert cost_per_step(results["baseline"], results) == 1
    assert cost_per_step(results["slow"], results) is None


def test_the_text(study, results):
    text = markdown(study, results)
    assert (
        "| baseline | yolov8_narrow | 3.00 M | 2 | 3 | 0.710 ± 0.010 | 0.510 ± 0.010 | 0.800 ± 0.000 | 0.700 ± 0.000 "
        "| 0.750 ± 0.000 | 1.00 | 1.0 |" in text
    )
    assert "| taught | yolov8_narrow | 3.00 M | 2 | 3 | 0.745 ± 0.015 | 0.545 ± 0.015 |" in text
    assert "| 1.44 | 1.3 |" in text
    # standard deviation 0.005, standard error 0.00289, times 4.303: 0.0124
    assert "| taught | baseline | 3 | +0.035 ± 0.005 | +0.035 ± 0.005 | +0.023 .. +0.047 | better |" in text
    assert "| slow |" not in text  # it has no number yet
    assert "Not trained yet, row (seeds): slow (0, 1, 2)." in text
    assert "Trained on cpu, float32, 1 thread, torch 2." in text
    shares = {"mse_big": {"lowest": 0.0, "highest": 0.0, "stayed": False}, "cwd_big": {"lowest": 0.1, "highest": 0.2}}
    results["taught"].reports[1] |= {"distillation": shares}
    idle = "taught with seed 1: mse_big was 0 in every epoch, it never acted"
    assert f"\n{idle}.\n" in markdown(study, results) and "cwd_big" not in markdown(study, results)
    assert json.loads(as_json(study, results))["rows"][1]["notes"] == [idle]
    results["slow"].failures[1] = "step 7: mse is nan"
    assert "Failed: slow with seed 1: step 7: mse is nan" in markdown(study, results)


def test_a_comparison_without_a_finished_pair_is_not_mentioned(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "runs", name="study")
    against = {"against": ["alone"], "differs": ["epochs"]}
    rows = {"alone": None, "longer": against | {"epochs": 5}, "longest": against | {"epochs": 7}}
    study = build_study(config, rows, seeds=3, source="study")
    results = {row.name: Result(row) for row in study.rows}
    results["alone"].reports[0] = report(0.5)
    text = markdown(study, results)
    assert "compared to" not in text and "paired" not in text and "differ in" not in text
    assert text.endswith("\n\nNot trained yet, row (seeds): alone (1, 2); longer, longest (0, 1, 2).\n")
    results["longer"].reports[0] = report(0.5)
    text = markdown(study, results)
    assert "| longer | alone | 1 |" in text and "\nlonger and alone differ in epochs 5 and 2.\n" in text
    assert "longest and" not in text and "longer (1, 2); longest (0, 1, 2)." in text
    assert json.loads(as_json(study, results))["rows"][2]["notes"] == ["longest and alone differ in epochs 7 and 2"]


def test_one_seed_has_no_spread(study, results):
    for result in results.values():
        result.reports = {0: report(0.5)}
    text = markdown(study, results)
    assert "| taught | yolov8_narrow | 3.00 M | 2 | 1 of 3 | 0.700 | 0.500 | 0.800 |" in text
    assert "| taught | baseline | 1 | +0.000 | +0.000 | - | not decided: 1 of 2 seeds |" in text


def test_what_is_not_defined_is_a_dash_and_null(study, results):
    """A report has null for the precision of nothing."""
    results["slow"].reports = {0: report(0.0)}
    results["slow"].reports[0]["test"]["precision"] = None
    assert "| slow | yolov8_narrow | 3.00 M | 2 | 1 of 3 | 0.200 | 0.000 | - | 0.700 |" in markdown(study, results)
    assert json.loads(as_json(study, results))["rows"][2]["precision"] == [None]


def test_a_difference_that_is_not_defined_has_no_interval_and_no_verdict(study, results):
    """More seeds would not tell: `undecided` would be wrong, and JSON has no nan."""
    results["taught"].reports[1]["test"]["precision"] = None
    study = dataclasses.replace(study, rule=DecisionRule("precision", seeds=3))
    assert "| +0.035 ± 0.005 | - | not defined |" in markdown(study, results)
    (difference,) = json.loads(as_json(study, results))["rows"][1]["differences"]
    assert difference["interval"] is None and difference["verdict"] == "not defined"
    assert DecisionRule(seeds=2).verdict(np.array([np.nan, 0.1])) == "not defined"


def test_the_numbers_as_json(study, results):
    tree = json.loads(as_json(study, results))
    baseline, taught, slow = tree["rows"]
    assert taught["mAP"] == pytest.approx([0.53, 0.56, 0.545]) and taught["seeds"] == [0, 1, 2]
    assert taught["terms"][0]["loss"] == "mse" and taught["runs"] == ["taught_seed0", "taught_seed1", "taught_seed2"]
    assert taught["cost_per_step"] == pytest.approx(1.4444, abs=1e-4) and baseline["differences"] == []
    (difference,) = taught["differences"]
    assert (difference["against"], difference["verdict"]) == ("baseline", "better")
    assert difference["mAP_mean"] == pytest.approx(0.035) and difference["mAP_std"] == pytest.approx(0.005)
    assert difference["mAP50_mean"] == pytest.approx(0.035)
    assert difference["interval"] == pytest.approx([0.0226, 0.0474], abs=1e-4)
    rule = {"origin": "the default", "metric": "mAP", "smallest": 0.0, "level": 0.95, "seeds": 2}
    assert tree["rule"] == rule
    assert slow["missing_seeds"] == [0, 1, 2] and slow["cost_per_step"] is None and slow["parameters"] is None
    assert tree["config"]["name"] == "study"


def test_the_rule_of_the_file_decides_and_stands_in_the_table(study, results):
    """By its metric, at its level, and with its date. mAP50 has other differences than mAP here."""
    for seed in (0, 1, 2):
        results["taught"].reports[seed]["test"]["mAP50"] = results["baseline"].reports[seed]["test"]["mAP50"] - 0.001
    rule = DecisionRule("mAP50", 0.01, 0.9, 3)
    study = dataclasses.replace(study, rule=rule, rule_origin="study.yaml, committed 2026-12-01")
    text = markdown(study, results)
    assert "| 90 % interval of mAP50 | verdict |" in text
    assert (
        "The rule (study.yaml, committed 2026-12-01): the 90 % confidence interval of the mean difference in mAP50"
        in (text)
    )
    assert "from 3 seeds on: inside -0.01 .. 0.01 there is no difference larger than 0.01; else above 0 a row" in text
    assert "| -0.001 ± 0.000 | +0.035 ± 0.005 | -0.001 .. -0.001 | no difference larger than 0.01 |" in text
    tree = json.loads(as_json(study, results))
    assert tree["rule"]["origin"] == "study.yaml, committed 2026-12-01" and tree["rule"]["metric"] == "mAP50"
    assert tree["rows"][1]["differences"][0]["verdict"] == "no difference larger than 0.01"
    one = dataclasses.replace(rule, seeds=4)
    assert "| not decided: 3 of 4 seeds |" in markdown(dataclasses.replace(study, rule=one), results)


def test_the_untrained_start_is_a_line_once(study, results):
    """Of rows that begin at the same weights; a row without a start of its own has none."""
    assert "untrained start" not in markdown(study, results)
    start = {"mAP50": 0.4, "mAP50-95": 0.3, "precision": 0.8, "recall": 0.7, "f1": 0.75}
    for name in ("baseline", "taught"):
        for seed in results[name].reports:
            results[name].reports[seed]["start"] = start | {"mAP50-95": 0.3 + 0.01 * (seed - 1)}
    lines = markdown(study, results).splitlines()
    first, second = (n for n, line in enumerate(lines) if line.startswith(("| untrained start", "| baseline |")))
    assert second == first + 1
    start = "| untrained start | yolov8_narrow | 3.00 M | 0 | 3 | 0.400 ± 0.000 | 0.300 ± 0.010 |"
    assert lines[first].startswith(start)
    assert json.loads(as_json(study, results))["rows"][0]["start"]["mAP"] == pytest.approx([0.29, 0.3, 0.31])
    row = results["taught"].row
    other = dataclasses.replace(row.config, student=dataclasses.replace(row.config.student, weights="other.pt"))
    results["taught"].row = dataclasses.replace(row, config=other)
    assert markdown(study, results).count("| untrained start of ") == 2


def test_a_row_with_random_teachers_has_no_verdict(study, results):
    """Its line, its note and its differences say so; those of other rows do not change."""
    taught = results["taught"].row
    (teacher,) = taught.config.teachers
    config = dataclasses.replace(taught.config, teachers=(dataclasses.replace(teacher, weights="random"),))
    results["taught"].row = dataclasses.replace(taught, config=config)
    text = markdown(study, results)
    assert "\n| taught [plumbing] | yolov8_narrow |" in text and "\n| baseline | yolov8_narrow |" in text
    assert "\n**taught: plumbing, not a measurement: random weights in given.**\n" in text
    assert {difference.name: difference.verdict for difference in differences(results)} == {
        "taught": "plumbing",
        "slow": "plumbing",  # it is compared to that row
    }
    rows = {row["name"]: row for row in json.loads(as_json(study, results))["rows"]}
    assert rows["taught"]["plumbing"] and rows["taught"]["differences"][0]["verdict"] == "plumbing"
    assert rows["baseline"]["plumbing"] is None
