"""The benchmark of a linear head on learnt pictures runs, measures what eval.py would, and goes on where it was."""

import json

import numpy as np
import pytest
import torch

import checkpoint
import models
from benchmarks import linear_head as bench
from distill.condense.linear_head import fit_head
from distill.condense.network_pool import set_statistics
from engine.evaluation.measuring import evaluate_model
from tests.tiny_training import SIZE


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A YOLOv8n of two classes with fresh weights, whose features differ."""
    torch.manual_seed(0)
    model = models.build("yolov8n", 2)
    set_statistics(model, torch.rand(8, 3, SIZE, SIZE))
    path = tmp_path_factory.mktemp("network") / "last.pt"
    state = {"arch": "yolov8n", "names": ["green", "red"], "image_size": SIZE, "epoch": 1, "step": 1}
    checkpoint.save(path, state | {"ema": model.state_dict()})
    return path


@pytest.fixture
def arguments(tiny_data, weights, tmp_path):
    tiny = ["--format", "yolo", "--data", str(tiny_data), "--val", "test", "--weights", str(weights), "--threads", "1"]
    return [
        *tiny,
        "--image-size",
        str(SIZE),
        "--per-class",
        "1",
        "--draws",
        "2",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "r.json"),
    ]


def test_rows_are_measured_once_and_compared(arguments, tmp_path, capsys, one_thread):
    bench.main([*arguments, "--rows", "full,random,matched", "--pictures", str(tmp_path / "pictures")])
    report = json.loads((tmp_path / "r.json").read_text())
    rows = report["sizes"]["1"]["rows"]
    assert set(rows) == {"random", "matched"} and len(report["full"]["mAP"]) == 1
    assert all(len(row[metric]) == 2 for row in rows.values() for metric in bench.METRICS)
    cost = rows["matched"]["cost"][0]
    assert cost["seconds_per_step"] > 0 and 0.05 < cost["peak_gigabytes"] < 20 and cost["moved_of_255"] > 0
    difference = report["sizes"]["1"]["differences"]["matched"]["random"]
    expected = [a - b for a, b in zip(rows["matched"]["mAP"], rows["random"]["mAP"])]
    assert difference["differences"] == pytest.approx(expected) and difference["verdict"] == "not decided: 2 of 5 seeds"
    assert "commit" in report and report["threads"] == 1 and (tmp_path / "pictures" / "matched_1.png").is_file()
    capsys.readouterr()
    bench.main([*arguments, "--rows", "random,matched,k_center"])
    printed = capsys.readouterr().out
    assert "k_center, 1 a class" in printed and "matched, 1 a class" not in printed


def test_the_student_is_measured_as_the_detector_that_it_is(arguments, weights, one_thread):
    """Features kept once against a whole detector with the head in its place, measured by evaluate_model."""
    parser_arguments = [*arguments, "--rows", "random"]
    made = bench.Bench(bench.arguments_of(parser_arguments))
    head = fit_head(made.data, made.fresh, 0.2)
    model, _ = checkpoint.load_model(weights)
    head = [theta + torch.tensor([0.0] * (theta.shape[1] - 1) + [4.0]) for theta in head]  # above the score threshold
    for branch, theta in zip(model.head.cls, head, strict=True):
        branch[-1].weight.data = theta[:, :-1, None, None].float()
        branch[-1].bias.data = theta[:, -1].float()
    detection = models.published_detection("yolov8n")
    expected = evaluate_model(model, made.test.real.index, detection, image_size=SIZE, batch_size=8)
    got, expected = made.test.measure(head).detections, expected.detections
    assert len(got) == len(expected) > 50
    for name, tolerance in (("scores", 1e-5), ("boxes_xyxy", 0.05)):  # folded BatchNorms round otherwise
        mine, theirs = (np.sort(getattr(table, name), axis=0) for table in (got, expected))
        np.testing.assert_allclose(mine, theirs, atol=tolerance, rtol=1e-3)
    assert np.bincount(got.labels, minlength=2).tolist() == np.bincount(expected.labels, minlength=2).tolist()
