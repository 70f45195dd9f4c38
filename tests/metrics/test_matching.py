"""Pairs against all-pairs loops, chunk by chunk, and the greedy rule where one image is very full."""

import numpy as np
import pytest

from metrics import matching
from metrics.coco import AREA_RANGES, IOU_THRESHOLDS, unpack_lanes
from metrics.tables import DetectionTable, GroundTruth
from tests.reference import detection_metrics as reference
from tests.reference.random_detections import as_rows, as_tables, random_coco_set


@pytest.mark.parametrize("pairs_at_once", [1, 7, 1 << 17])
@pytest.mark.parametrize("min_overlap", [0.0, 0.5])
def test_overlapping_pairs_are_all_pairs_of_a_group(monkeypatch, pairs_at_once, min_overlap):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs_at_once)
    for seed in range(0, 30, 5):
        ground_truth, detections = as_tables(*random_coco_set(seed))
        by_image = np.argsort(ground_truth.image, kind="stable")
        pairs = matching.overlapping_pairs(
            boxes_xyxy=detections.boxes_xyxy,
            box_area=detections.box_area,
            group=detections.image,
            object_boxes_xyxy=ground_truth.boxes_xyxy[by_image],
            object_area=ground_truth.box_area[by_image],
            object_group=ground_truth.image[by_image],
            object_is_crowd=ground_truth.crowd[by_image],
            min_overlap=min_overlap,
        )
        truths, found = as_rows(ground_truth, detections)
        expected = {
            (d, o): value
            for d in range(len(found))
            for o in range(len(truths))
            if found[d]["image"] == truths[by_image[o]]["image"]
            if (value := reference.overlap(found[d], truths[by_image[o]])) >= min_overlap and value > 0
        }
        keys = list(zip(pairs.detection.tolist(), pairs.object.tolist()))
        assert keys == sorted(keys) and set(keys) == expected.keys()
        np.testing.assert_allclose(pairs.overlap, [expected[key] for key in keys], rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_position_in_run(count):
    keys = np.sort(np.random.default_rng(count).integers(0, 3, count))
    expected = [list(keys[:i]).count(key) for i, key in enumerate(keys)]
    assert matching.position_in_run(keys).tolist() == expected


def test_sixty_four_lanes_and_no_more():
    ground_truth = GroundTruth([0], [[0, 0, 10, 10]], [0], 1, ("a",))
    detections = DetectionTable([0], [[0, 0, 10, 10]], [0.5], [0])
    settings = {"area_ranges": list(AREA_RANGES.values()), "max_detections": 1}
    thresholds = np.linspace(0.1, 0.9, 16)
    matches = matching.match(ground_truth, detections, iou_thresholds=thresholds, **settings)
    true = unpack_lanes(matches.true_positive, 64).reshape(4, 16)
    assert true.tolist() == [[1] * 16, [1] * 16, [0] * 16, [0] * 16]  # "all" and "small"
    with pytest.raises(ValueError, match="lanes"):
        matching.match(ground_truth, detections, iou_thresholds=np.linspace(0.1, 0.9, 17), **settings)


def test_a_crowded_image_follows_the_rule():
    """200 detections that all overlap 30 objects: many steps in one group."""
    rng = np.random.default_rng(0)
    objects = np.array([0.0, 0.0, 100.0, 100.0]) + rng.integers(-12, 13, (30, 4))
    found = np.array([0.0, 0.0, 100.0, 100.0]) + rng.integers(-12, 13, (200, 4))
    scores = rng.integers(0, 50, 200) / 50
    ground_truth = GroundTruth(np.zeros(30, int), objects, np.zeros(30, int), 1, ("a",), crowd=rng.random(30) < 0.1)
    detections = DetectionTable(np.zeros(200, int), found, scores, np.zeros(200, int))
    matches = matching.match(
        ground_truth, detections, iou_thresholds=IOU_THRESHOLDS, area_ranges=[(0, 1e10)], max_detections=200
    )
    true, ignored = unpack_lanes(matches.true_positive, 10), unpack_lanes(matches.ignored, 10)
    truths, rows = as_rows(ground_truth, detections)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        expected = [outcome for _, outcome in reference.greedy_outcomes(truths, rows, threshold)]
        assert ["true" if a else "ignored" if b else "false" for a, b in zip(true[:, t], ignored[:, t])] == expected
    assert 0 < true.sum() < true.size
