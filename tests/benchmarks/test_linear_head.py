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
from engine.condensing.frozen_backbone import FrozenBackbone
from engine.evaluation.measuring import evaluate_model
from errors import UserError
from tests.tiny_training import SIZE

STUDENT, OTHER = "yolov8_narrow", "yolov5n"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Detectors of two classes with fresh weights, whose features differ: the file of each."""
    found = {}
    for arch in (STUDENT, OTHER):
        torch.manual_seed(0)
        model = models.build(arch, 2)
        set_statistics(model, torch.rand(8, 3, SIZE, SIZE))
        found[arch] = tmp_path_factory.mktemp("network") / f"{arch}.pt"
        state = {"arch": arch, "names": ["green", "red"], "image_size": SIZE, "epoch": 1, "step": 1}
        checkpoint.save(found[arch], state | {"ema": model.state_dict()})
    return found


@pytest.fixture
def weights(networks):
    return networks[STUDENT]


@pytest.fixture
def arguments(tiny_data, weights, tmp_path):
    return [
        *("--format", "yolo", "--data", str(tiny_data), "--val", "test", "--weights", str(weights), "--arch", STUDENT),
        *("--image-size", str(SIZE), "--per-class", "1", "--draws", "2", "--steps", "1", "--threads", "1"),
        *("--out", str(tmp_path / "r.json")),
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


def put_in_place(model, head) -> None:
    """Make the learnt head the class head of a detector. An anchor head reports an objectness of 1."""
    if hasattr(model.head, "cls"):
        for branch, theta in zip(model.head.cls, head, strict=True):
            branch[-1].weight.data = theta[:, :-1, None, None].float()
            branch[-1].bias.data = theta[:, -1].float()
        return
    groups = iter(head)
    for conv in model.head.predict:
        weight, bias = conv.weight.data.unflatten(0, (3, 7)), conv.bias.data.unflatten(0, (3, 7))
        for anchor in range(3):
            theta = next(groups)
            weight[anchor, 5:, :, 0, 0], bias[anchor, 5:] = theta[:, :-1].float(), theta[:, -1].float()
            weight[anchor, 4], bias[anchor, 4] = 0, 100
    assert next(groups, None) is None


@pytest.mark.parametrize("arch", [STUDENT, OTHER])
def test_the_student_is_measured_as_the_detector_that_it_is(arch, arguments, networks, one_thread):
    """Features kept once against a whole detector with the head in its place, measured by evaluate_model."""
    own = ["--rows", "random", "--weights", str(networks[arch]), "--arch", arch]
    made = bench.Bench(bench.arguments_of([*arguments, *own]))
    head = fit_head(made.data, made.fresh, 0.02)
    model, _ = checkpoint.load_model(networks[arch])
    head = [theta + torch.tensor([0.0] * (theta.shape[1] - 1) + [4.0]) for theta in head]  # above the score threshold
    put_in_place(model, head)
    detection = models.published_detection(arch)
    expected = evaluate_model(model, made.test.real.index, detection, image_size=SIZE, batch_size=8)
    got, expected = made.test.measure(head).detections, expected.detections
    assert len(got) == len(expected) > 50
    for name, tolerance in (("scores", 1e-5), ("boxes_xyxy", 0.05)):  # folded BatchNorms round otherwise
        mine, theirs = (np.sort(getattr(table, name), axis=0) for table in (got, expected))
        np.testing.assert_allclose(mine, theirs, atol=tolerance, rtol=1e-3)
    assert np.bincount(got.labels, minlength=2).tolist() == np.bincount(expected.labels, minlength=2).tolist()


@pytest.mark.parametrize("arch", ["yolov5n", "yolov7_tiny"])
def test_the_locations_of_an_anchor_head_are_its_own(arch):
    """Centers, sizes and order as the detector decodes them; a group has one anchor of one level."""
    model = models.build(arch, 2).eval()
    grid = FrozenBackbone(model, SIZE, 2).grid
    points, strides, sizes = model._locations(model(torch.zeros(1, 3, SIZE, SIZE)))
    torch.testing.assert_close(grid.centers, points * strides)
    torch.testing.assert_close(grid.sides, (sizes[:, 0] * sizes[:, 1]).sqrt())
    assert grid.group_sizes == tuple((SIZE // stride) ** 2 for stride in (8, 16, 32) for _ in range(3))
    assert all(len(part.unique()) == 1 for part in grid.sides.split(grid.group_sizes))
    expected = [5 / 2 / 3 / (640 / stride) ** 2 for stride in (8, 16, 32) for _ in range(3)]
    assert np.exp(grid.prior_logits).tolist() == pytest.approx(expected)


def test_a_detector_of_two_stages_is_refused():
    with pytest.raises(UserError, match=r"'condense.network': FasterRCNN has no linear layer .* expected yolov8\*"):
        FrozenBackbone(models.build("fasterrcnn_mobilenet_v3_small", 2), SIZE, 2)


def test_pictures_learnt_for_another_detector(arguments, networks, tmp_path, one_thread):
    """For a copy of the student they are those of matched; for YOLOv5n they are others, and train the same student."""
    numbers = {}
    for arch in networks:
        report = tmp_path / f"{arch}.json"
        other = ["--other", str(networks[arch]), "--other-arch", arch, "--out", str(report), "--draws", "1"]
        bench.main([*arguments, *other, "--rows", "matched,transferred"])
        numbers[arch] = json.loads(report.read_text())["sizes"]["1"]["rows"]
        assert json.loads(report.read_text())["settings"]["other"] == f"{arch}.pt"
    distance = lambda arch, row: numbers[arch][row]["cost"][0]["last_distance"]
    assert distance(STUDENT, "transferred") == distance(STUDENT, "matched") == distance(OTHER, "matched")
    assert numbers[STUDENT]["transferred"]["mAP"] == numbers[STUDENT]["matched"]["mAP"]
    assert distance(OTHER, "transferred") != distance(OTHER, "matched")


@pytest.mark.parametrize(
    ("rows", "message"), [("matched,nose", "found 'nose', expected some of"), ("transferred", "--other WEIGHTS")]
)
def test_rows_that_are_refused(arguments, rows, message):
    with pytest.raises(UserError, match=message):
        bench.arguments_of([*arguments, "--rows", rows])
