"""VOC average precision: recorded oracles, a loop-by-loop reference, and the two pixel conventions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from metrics import voc
from metrics.files import read_detections, read_ground_truth
from metrics.tables import DetectionTable, GroundTruth, inclusive_to_continuous
from tests.reference import detection_metrics as reference
from tests.reference.random_detections import as_rows, as_tables, random_coco_set


def random_tables(seed):
    """Like the COCO sets, with some objects difficult."""
    ground_truth, detections = as_tables(*random_coco_set(seed))
    is_difficult = (np.random.default_rng(seed).random(len(ground_truth)) < 0.2) & ~ground_truth.crowd
    return replace(ground_truth, difficult=is_difficult), detections


@pytest.mark.parametrize("style", ["voc07", "voc12"])
@pytest.mark.parametrize("pixel", [0.0, 1.0], ids=["continuous", "inclusive"])
def test_matches_reference(style, pixel):
    thresholds = (0.3, 0.5, 0.75)
    measured = 0
    for seed in range(60):
        ground_truth, detections = random_tables(seed)
        result = voc.evaluate(
            ground_truth, detections, style=style, iou_thresholds=thresholds, inclusive_pixels=pixel == 1
        )
        truths, found = as_rows(ground_truth, detections)
        for k in range(len(ground_truth.names)):
            of_class = [[row for row in rows if row["label"] == k] for rows in (truths, found)]
            for t, threshold in enumerate(thresholds):
                expected = reference.voc_ap(*of_class, threshold, style, pixel)
                measured += expected is not None
                assert result.ap[t, k] == pytest.approx(-1 if expected is None else expected, abs=1e-12), (seed, k)
    assert measured > 200


@pytest.mark.parametrize(("style", "key"), [("voc07", "voc07_11pt"), ("voc12", "voc_area")])
def test_voc2012_oracle(shared_data, style, key):
    oracle = json.loads((shared_data / "evaluator_oracles" / "voc2012_100_expected.json").read_text())
    expected = oracle["plus_one_pixel_convention"][key]
    folder = shared_data / "voc2012_100"
    annotations = read_ground_truth(folder / "Annotations")
    tables = read_detections(folder / "detections" / "abs_xyx2y2", annotations)
    result = voc.evaluate(*tables, style=style, inclusive_pixels=True)
    assert result.numbers["AP50"] == pytest.approx(expected["mAP"], abs=1e-9)
    got = {name: row["AP50"] for name, row in result.per_class.items()}
    assert got == pytest.approx(expected["per_class_AP"], abs=1e-9)


@pytest.mark.parametrize(("style", "key"), [("voc07", "AP_11_point"), ("voc12", "AP_every_point")])
def test_seven_image_oracle(shared_data, style, key):
    folder = shared_data / "evaluator_oracles" / "voc_toy_7images"
    expected = json.loads((folder / "expected.json").read_text())[key]  # written with 10 decimals
    annotations = read_ground_truth(folder / "groundtruths", text_boxes="xywh")
    tables = read_detections(folder / "detections", annotations, text_boxes="xywh")
    result = voc.evaluate(*tables, style=style, iou_thresholds=(0.3,), inclusive_pixels=True)
    assert result.numbers["AP30"] == pytest.approx(expected, abs=1e-9)


def one_class(objects, found, scores, **columns):
    zeros = np.zeros(len(found), int)
    ground_truth = GroundTruth(np.zeros(len(objects), int), objects, np.zeros(len(objects), int), 1, ("a",), **columns)
    return ground_truth, DetectionTable(zeros, found, scores, zeros)


BOX = [0.0, 0.0, 40.0, 40.0]


def test_pixel_conventions():
    """10 x 10 and 10 x 5 pixels, as VOC writes them: IoU 1/2 by its count, 4/9 as continuous corners."""
    as_written = one_class([[1.0, 1.0, 10.0, 10.0]], [[1.0, 1.0, 10.0, 5.0]], [0.5])
    assert voc.evaluate(*as_written, style="voc12", inclusive_pixels=True).numbers["AP50"] == pytest.approx(1.0)
    assert voc.evaluate(*as_written, style="voc12").numbers["AP50"] == 0.0
    # In the frame of the index (xmin - 1, ymin - 1, xmax, ymax) VOC's own count needs no further pixel.
    in_index = one_class([[0.0, 0.0, 10.0, 10.0]], [[0.0, 0.0, 10.0, 5.0]], [0.5])
    assert voc.evaluate(*in_index, style="voc12").numbers["AP50"] == pytest.approx(1.0)
    moved = [inclusive_to_continuous(table).boxes_xyxy.tolist() for table in as_written]
    assert moved == [table.boxes_xyxy.tolist() for table in in_index]


def test_second_hit_is_punished_unless_the_object_is_difficult():
    far = [100.0, 0.0, 140.0, 40.0]
    found = [BOX, BOX, far, far]
    tables = one_class([BOX, far], found, [0.9, 0.8, 0.7, 0.6], difficult=[False, True])
    recall, precision = voc.evaluate(*tables, style="voc12").curves[0]
    np.testing.assert_allclose(recall, [1.0, 1.0])  # both hits on the difficult object have vanished
    np.testing.assert_allclose(precision, [1.0, 0.5])


def test_a_detection_looks_at_its_best_object_only():
    """Where COCO would give the second detection the next best object, VOC calls it a duplicate."""
    objects = [[0.0, 0.0, 40.0, 40.0], [0.0, 0.0, 40.0, 30.0]]
    found = [[0.0, 0.0, 40.0, 40.0], [0.0, 0.0, 40.0, 39.0]]  # both overlap object 0 most
    result = voc.evaluate(*one_class(objects, found, [0.9, 0.8]), style="voc12")
    assert result.numbers["AP50"] == pytest.approx(0.5)


@pytest.mark.parametrize("is_left_first", [True, False])
def test_of_equal_overlaps_the_first_object_is_taken(is_left_first):
    """The first detection overlaps both objects by 0.6; the second is the left one, a duplicate if it was taken."""
    left, right = [0.0, 0.0, 40.0, 40.0], [20.0, 0.0, 60.0, 40.0]
    objects = [left, right] if is_left_first else [right, left]
    recall, _ = voc.evaluate(*one_class(objects, [[10.0, 0.0, 50.0, 40.0], left], [0.9, 0.8]), style="voc12").curves[0]
    assert recall[-1] == (0.5 if is_left_first else 1.0)


@pytest.mark.parametrize("style", ["voc07", "voc12"])
def test_empty_and_perfect(style):
    assert voc.evaluate(*one_class([], [], []), style=style).numbers == {"AP": -1.0, "AP50": -1.0}
    assert voc.evaluate(*one_class([], [BOX], [0.5]), style=style).numbers["AP"] == -1.0
    assert voc.evaluate(*one_class([BOX], [], []), style=style).numbers["AP"] == 0.0
    assert voc.evaluate(*one_class([BOX], [BOX], [0.5]), style=style).numbers["AP"] == pytest.approx(1.0)
    only_difficult = one_class([BOX], [BOX], [0.5], difficult=[True])
    assert voc.evaluate(*only_difficult, style=style).numbers["AP"] == -1.0


def test_iou_exactly_at_the_threshold_is_found():
    tables = one_class([BOX], [[0.0, 0.0, 40.0, 20.0]], [0.5])
    assert voc.evaluate(*tables, style="voc12").numbers["AP50"] == pytest.approx(1.0)


def test_bad_calls():
    tables = one_class([BOX], [BOX], [0.5])
    with pytest.raises(ValueError, match="voc08"):
        voc.evaluate(*tables, style="voc08")
    with pytest.raises(ValueError, match="above 0"):
        voc.evaluate(*tables, style="voc07", iou_thresholds=(0.0,))
