"""comparison.png, read from the figure itself: its panels, intervals, numbers and pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
from engine.comparison import plot
from engine.comparison.decision import DecisionRule
from engine.comparison.pictures import Outcome, Pictures, disagreement
from engine.comparison.study import build_study
from engine.comparison.table import Result
from structures import Detections
from tests.engine.comparison.test_table import TERM, report
from tests.engine.drawing.figures import Kept, check, legend_of
from tests.tiny_training import tiny_config

LONG = "a_row_with_a_name_of_more_than_forty_letters"


@pytest.fixture
def study(tmp_path):
    teachers = [{"name": "given", "arch": "yolov8n", "weights": "given.pt"}]
    config = tiny_config(tmp_path, tmp_path / "runs", name="study", teachers=teachers)
    rows = {"baseline": None, "taught": {"terms": [TERM]}, LONG: {"terms": [TERM]}}
    made = build_study(config, rows, seeds=3, source="study")
    return dataclasses.replace(made, rule=DecisionRule(smallest=0.01, seeds=2))


def results_of(study, *rows: list[float]) -> dict[str, Result]:
    found = {row.name: Result(row) for row in study.rows}
    for result, scores in zip(found.values(), rows):
        result.reports |= {seed: report(score) for seed, score in enumerate(scores)}
    return found


@pytest.fixture
def kept(monkeypatch):
    return Kept(monkeypatch, plot)


def pictures(columns: int) -> Pictures:
    cell = (Image.new("RGB", (60, 40), "grey"), "1 of 2 found, 0 false")
    return Pictures({f"row {n}" if n else "labels": [cell, cell] for n in range(columns)}, 9)


def test_scores_and_differences_with_their_intervals(kept, study, tmp_path):
    results = results_of(study, [0.50, 0.52, 0.51], [0.53, 0.56, 0.545], [0.49])
    plot.write(tmp_path / "c.png", study, results, with_pictures=False)
    check(kept.figure)
    scores, differences = kept.axes
    assert [text.get_text() for text in scores.texts] == ["0.510", "0.545", "0.490", "0.710", "0.745", "0.690"]
    assert [text.get_text() for text in differences.texts] == ["+0.035", "-0.010"]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["baseline", "taught", LONG[:31] + "…"]
    assert legend_of(scores) == ["mAP", "mAP50"] and scores.get_title(loc="left") == "Scores of yolov8_narrow"
    assert legend_of(differences) == ["better", "too few seeds", "too small to matter"]
    assert differences.get_title(loc="left") == "mAP minus baseline" and "95 %" in differences.get_xlabel()
    # standard deviation 0.005, standard error 0.00289, times 4.303: 0.0124
    first = next(line for line in differences.lines if len(line.get_xdata()) == 2)
    assert first.get_xdata() == pytest.approx([0.035 - 0.0124, 0.035 + 0.0124], abs=1e-4)
    assert {line.get_marker() for line in differences.lines if len(line.get_xdata()) == 1} >= {"|", "^", "o"}


def test_a_difference_that_is_not_defined_has_no_interval(kept, study, tmp_path):
    results = results_of(study, [0.50, 0.52], [0.53, 0.56])
    results["taught"].reports[0]["test"]["precision"] = None
    study = dataclasses.replace(study, rule=DecisionRule("precision", seeds=2))
    plot.write(tmp_path / "c.png", study, results, with_pictures=False)
    assert legend_of(kept.axes[1]) == ["not defined", "too small to matter"]
    assert not [line for line in kept.axes[1].lines if line.get_marker() == "|"]


def test_a_row_with_random_weights_has_no_verdict(kept, tmp_path):
    teachers = [{"name": "given", "arch": "yolov8n", "weights": "random"}]
    config = tiny_config(tmp_path, tmp_path / "runs", name="study", teachers=teachers)
    study = build_study(config, {"baseline": None, "taught": {"terms": [TERM]}}, seeds=2, source="study")
    plot.write(tmp_path / "c.png", study, results_of(study, [0.5, 0.5], [0.6, 0.6]), with_pictures=False)
    assert legend_of(kept.axes[1]) == ["plumbing, no measurement"]


def test_an_interval_wider_than_the_axis_ends_in_arrows_before_the_numbers(kept, study, tmp_path):
    results = results_of(study, [0.50, 0.52], [0.50, 0.53])
    plot.write(tmp_path / "c.png", study, results, with_pictures=False)
    check(kept.figure)
    for axis in kept.axes:
        assert {"<", ">"} <= {line.get_marker() for line in axis.lines}
        box = min(text.get_window_extent().x0 for text in axis.texts)
        ends = [x for line in axis.lines for x in line.get_xdata() if line.get_ydata()[0] != 0 or len(x_of(line)) > 1]
        pixels = [axis.transData.transform((x, 0))[0] for x in ends]
        assert max(pixels) < box and min(pixels) > axis.bbox.x0 + 5  # half an arrow is outside the frame otherwise


def x_of(line) -> np.ndarray:
    return np.asarray(line.get_xdata())


def test_there_is_no_empty_panel(kept, study, tmp_path):
    """One row alone: no differences; no run folder: no curves."""
    plot.write(tmp_path / "c.png", study, results_of(study, [0.5]), with_pictures=False)
    check(kept.figure)
    assert len(kept.axes) == 1 and "interval" not in kept.axes[0].get_xlabel()


def test_without_a_finished_run_the_picture_says_so(kept, study, tmp_path):
    plot.write(tmp_path / "c.png", study, results_of(study), with_pictures=True)
    assert [axis.get_title(loc="left") for axis in kept.axes] == ["No run has finished"]


def test_curves_and_pictures(kept, study, tmp_path, monkeypatch):
    results = results_of(study, [0.50, 0.52], [0.53, 0.56])
    for result in list(results.values())[:2]:
        for seed in result.seeds:
            folder = result.row.folder(seed)
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text("epoch,metrics/mAP50-95\n1,\n2,0.3\n4,0.4\n")
    monkeypatch.setattr(plot, "compare_pictures", lambda config, rows: pictures(1 + len(rows)))
    plot.write(tmp_path / "c.png", study, results, with_pictures=True)
    check(kept.figure)
    assert len(kept.axes) == 2 + 1 + 2 * 3  # scores and differences, curves, two lines of labels and two rows
    curves = kept.axes[2]
    assert len(curves.lines) == 4 and all(list(line.get_xdata()) == [2, 4] for line in curves.lines)
    assert all(line.get_marker() == "o" for line in curves.lines) and curves.get_ylabel() and curves.get_xlabel()
    assert legend_of(kept.figure.subfigs[1]) == ["baseline", "taught"]
    titles = [axis.get_title(loc="left") for axis in kept.axes[3:6]]
    assert titles == ["labels", "row 1", "row 2"]
    assert all(axis.get_xlabel() == "1 of 2 found, 0 false" for axis in kept.axes[3:])
    assert "2 of 9 test pictures on which the models differ most" in kept.figure.subfigs[2].get_suptitle()


def test_the_pictured_rows_are_the_first_the_best_teacher_and_the_best(study):
    results = list(results_of(study, [0.1], [0.2], [0.3]).values())
    many = [dataclasses.replace(results[n % 3], row=dataclasses.replace(results[n % 3].row)) for n in range(6)]
    for number, (result, score) in enumerate(zip(many, (0.1, 0.7, 0.8, 0.9, 0.2, 0.3))):
        object.__setattr__(result.row, "name", f"row{number}")
        object.__setattr__(result.row, "is_teacher", number in (1, 2))
        result.reports = {0: report(score)}
    assert [result.name for result in plot.pictured(many)] == ["row0", "row2", "row3"]
    assert [result.name for result in plot.pictured(many[:3])] == ["row0", "row1", "row2"]


def boxes(*rows: tuple) -> Detections:
    """Rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return Detections(table[:, :4].float(), table[:, 4].float(), table[:, 5].long())


def test_what_a_model_found():
    truth = boxes((0, 0, 10, 10, 1, 0), (20, 0, 30, 10, 1, 1), (40, 0, 50, 10, 1, 1), (60, 0, 70, 10, 1, 1))
    found = boxes(
        (0, 0, 10, 9, 0.6, 0),  # the first object, but a better score takes it
        (0, 0, 10, 10, 0.9, 0),
        (20, 0, 30, 10, 0.8, 0),  # of another class
        (40, 0, 50, 4, 0.7, 1),  # an IoU of 0.4
        (61, 0, 70, 10, 0.4, 1),
    )
    outcome = Outcome.of(found, truth)
    assert outcome.is_found.tolist() == [True, False, False, True] and outcome.num_false == 3
    assert outcome.caption == "2 of 4 found, 3 false"
    assert Outcome.of(boxes(), truth).caption == "0 of 4 found, 0 false"
    assert Outcome.of(found, boxes()).caption == "0 of 0 found, 5 false"


def test_disagreement():
    def outcome(is_found, num_false=0):
        return Outcome(np.array(is_found), num_false)

    assert disagreement([outcome([True, False])]) == 0
    assert disagreement([outcome([True, False], 2), outcome([True, False], 2)]) == 0
    assert disagreement([outcome([True, True]), outcome([True, False])]) == 1  # one of two: 4 / 2 / 2
    assert disagreement([outcome([True], 1), outcome([True], 4), outcome([True], 2)]) == 3
