"""engine/evaluation/measuring.py: a model on an index, in one process and in two."""

import json
import time

import numpy as np
import pytest
import torch

from engine.evaluation import measuring
from errors import UserError
from metrics.tables import DetectionTable, GroundTruth
from structures import DetectionSettings
from tests.engine.evaluation.known_answers import KnowsTheAnswers, evaluate_as_one_of_several, make_index
from tests.forked_processes import run_group


@pytest.fixture
def known(tmp_path):
    index = make_index(tmp_path)
    return KnowsTheAnswers(index, 64), index


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_come_back_in_pixels_of_the_original_picture(known, batch_size, workers):
    model, index = known
    result = measuring.evaluate_model(
        model, index, DetectionSettings(), image_size=64, batch_size=batch_size, workers=workers
    )
    found = result.detections[result.detections.scores > 0.1]
    expected = result.ground_truth
    assert found.image.tolist() == expected.image.tolist() == [i for i in range(7) for _ in range(i)]
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    np.testing.assert_array_equal(found.labels, expected.labels)
    alarms = result.detections[result.detections.scores < 0.1]
    assert [box[2:].tolist() for box in alarms.boxes_xyxy] == [[s.width, s.height] for s in index.samples]  # clipped
    assert result.numbers["mAP50-95"] == pytest.approx(1.0) == result.numbers["AR_100"]
    assert result.numbers["precision"] == result.numbers["recall"] == 1.0
    assert result.report.best.score_threshold > 0.01


def test_model_is_left_as_it_was_and_gets_the_settings(known):
    model, index = known
    model.train()
    measuring.evaluate_model(model, index, DetectionSettings(0.02, 0.6, 17), image_size=64, batch_size=4)
    assert model.training
    assert model.calls == [{"score_threshold": 0.02, "iou_threshold": 0.6, "max_detections": 17}] * 2
    model.detect = lambda output, **settings: (_ for _ in ()).throw(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        measuring.evaluate_model(model, index, DetectionSettings(), image_size=64, batch_size=4)
    assert model.training


@pytest.mark.parametrize("protocol", ["voc07", "voc12"])
def test_voc_protocols_ignore_difficult_objects(known, protocol):
    model, index = known
    result = measuring.evaluate_model(model, index, DetectionSettings(), image_size=64, batch_size=4, protocol=protocol)
    assert result.numbers["AP50"] == pytest.approx(1.0)
    assert result.report.instances.sum() == sum((~s.ignore).sum() for s in index.samples) < len(result.ground_truth)
    assert "mAP50-95" in result.table() and f"{protocol[-2:]}" in protocol


def test_non_finite_boxes_name_the_picture(known):
    model, index = known
    answer = model.answer
    broken = lambda number: answer(number) if number != 3 else nan_boxes(answer(number))
    model.answer = broken
    with pytest.raises(UserError, match=r"3\.png: the model found boxes that are not finite") as error:
        measuring.evaluate_model(model, index, DetectionSettings(), image_size=64, batch_size=4)
    assert error.value.exit_code == 3


def nan_boxes(detections):
    detections.boxes_xyxy[0, 0] = torch.nan
    return detections


def test_another_number_of_classes_is_refused(known):
    model, index = known
    model.num_classes = 4
    with pytest.raises(UserError, match="the model has 4 classes, the dataset 3"):
        measuring.evaluate_model(model, index, DetectionSettings(), image_size=64, batch_size=4)


def test_two_processes_find_what_one_finds(known, tmp_path):
    model, index = known
    alone = measuring.evaluate_model(model, index, DetectionSettings(), image_size=64, batch_size=2)
    finished = run_group(evaluate_as_one_of_several, [(tmp_path,)] * 2, folder=tmp_path)
    assert [child.code for child in finished] == [0, 0], finished
    answers = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert answers[0]["numbers"] == answers[1]["numbers"] == pytest.approx(alone.numbers)
    assert [answer["pictures"] for answer in answers] == [2, 2]  # batches: 4 pictures and 3
    for name, rows in answers[0]["detections"].items():
        np.testing.assert_array_equal(rows, getattr(alone.detections, name))


def test_metrics_of_a_small_test_set_are_quick():
    """72 pictures x 300 detections, 3 classes, as after each epoch on BCCD; the bound is on CPU time."""
    rng = np.random.default_rng(0)

    def boxes(count):
        corner = rng.random((count, 2)) * 250
        return np.concatenate((corner, corner + 20 + rng.random((count, 2)) * 60), axis=1)

    image = np.repeat(np.arange(72), 13)
    ground_truth = GroundTruth(image, boxes(len(image)), rng.integers(0, 3, len(image)), 72, ("a", "b", "c"))
    image = np.repeat(np.arange(72), 300)
    detections = DetectionTable(image, boxes(len(image)), rng.random(len(image)), rng.integers(0, 3, len(image)))
    best = min(cpu_seconds(lambda: measuring.measure(ground_truth, detections)) for _ in range(3))
    assert best < 0.3


def cpu_seconds(function):
    began = time.process_time()
    function()
    return time.process_time() - began
