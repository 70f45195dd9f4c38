"""The flat tables: what they check, and how samples become ground truth."""

from pathlib import Path

import numpy as np
import pytest

from datasets.index import ANY_CLASS, Sample
from metrics import tables
from metrics.tables import DetectionTable, GroundTruth, ground_truth_from_samples, inclusive_to_continuous


def test_defaults_are_the_corners_area_and_no_flags():
    ground_truth = GroundTruth([0], [[1, 2, 4, 6]], [0], 2, ["a"])
    assert ground_truth.area.tolist() == ground_truth.box_area.tolist() == [12.0]
    assert not ground_truth.crowd.any() and not ground_truth.difficult.any()
    assert ground_truth.boxes_xyxy.dtype == np.float64 and ground_truth.names == ("a",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [2]}, "labels: row 0 is 2, expected 0..1"),
        ({"labels": [-1]}, "labels: row 0 is -1"),
        ({"image": [3]}, "image: row 0 is 3, expected 0..2"),
        ({"image": [0, 1]}, "image: shape"),
        ({"image": [0.0]}, "whole numbers"),
        ({"boxes_xyxy": [[0, 0, 1]]}, "boxes_xyxy: shape"),
        ({"boxes_xyxy": [[0, 0, 1, np.nan]]}, "not finite"),
        ({"names": ("a", "a")}, "given twice"),
        ({"area": [1.0, 2.0]}, "area: shape"),
    ],
)
def test_ground_truth_is_checked(change, message):
    good = {"image": [0], "boxes_xyxy": [[0, 0, 1, 1]], "labels": [0], "num_images": 3, "names": ("a", "b")}
    GroundTruth(**good)
    with pytest.raises(ValueError, match=message):
        GroundTruth(**(good | change))


def test_detections_are_checked():
    with pytest.raises(ValueError, match="scores: row 0 is not a number"):
        DetectionTable([0], [[0, 0, 1, 1]], [np.nan], [0])
    with pytest.raises(ValueError, match="scores: shape"):
        DetectionTable([0], [[0, 0, 1, 1]], [0.5, 0.6], [0])


def test_concatenate_and_choose():
    table = DetectionTable([0, 1], [[0, 0, 1, 1], [0, 0, 2, 2]], [0.5, 0.6], [0, 1])
    assert len(DetectionTable.concatenate([])) == len(DetectionTable.empty()) == 0
    twice = DetectionTable.concatenate([table, DetectionTable.empty(), table])
    assert twice.image.tolist() == [0, 1, 0, 1]
    assert twice[twice.scores > 0.55].box_area.tolist() == [4.0, 4.0]


def test_inclusive_boxes_gain_a_pixel_and_mask_areas_stay():
    ground_truth = GroundTruth([0, 0], [[1, 1, 1, 1], [1, 1, 3, 3]], [0, 0], 1, ("a",), area=[0.0, 2.5])
    moved = inclusive_to_continuous(ground_truth)
    assert moved.boxes_xyxy.tolist() == [[0, 0, 1, 1], [0, 0, 3, 3]]
    assert moved.box_area.tolist() == [1.0, 9.0] and moved.area.tolist() == [1.0, 2.5]


def sample(boxes, labels, ignore, crowd):
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    area = tables.corner_area(boxes) * 0.5
    return Sample(Path("p.jpg"), 0, 100, 100, boxes, np.array(labels, int), np.array(ignore, bool), area, crowd)


def test_samples_become_ground_truth():
    samples = [
        sample([[0, 0, 10, 10], [1, 1, 5, 5]], [1, 0], [False, True], np.array([False, False])),
        sample([], [], [], None),
        sample([[0, 0, 9, 9], [2, 2, 8, 8]], [ANY_CLASS, 2], [True, True], np.array([True, True])),
    ]
    ground_truth = ground_truth_from_samples(samples, ["a", "b", "c"])
    assert ground_truth.num_images == 3
    assert ground_truth.image.tolist() == [0, 0, 2, 2, 2, 2]
    assert ground_truth.labels.tolist() == [1, 0, 0, 1, 2, 2]  # the region of any class is a crowd of each
    assert ground_truth.crowd.tolist() == [False, False, True, True, True, True]
    assert ground_truth.difficult.tolist() == [False, True, False, False, False, False]
    assert ground_truth.area.tolist() == [50.0, 8.0, 40.5, 40.5, 40.5, 18.0]
    assert ground_truth.box_area.tolist() == [100.0, 16.0, 81.0, 81.0, 81.0, 36.0]
    assert len(ground_truth_from_samples([], ["a"])) == 0


def test_any_class_is_the_index_constant():
    assert tables.ANY_CLASS == ANY_CLASS
