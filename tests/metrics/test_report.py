"""Precision, recall, F1, curves and the confusion matrix against loops over one box at a time."""

import numpy as np
import pytest

from metrics import coco
from metrics.report import confusion_matrix, detection_report, format_table, one_to_one
from metrics.tables import DetectionTable, GroundTruth
from tests.reference import detection_metrics as reference
from tests.reference.random_detections import as_rows, as_tables, random_coco_set


@pytest.mark.parametrize("iou_threshold", [0.5, 0.75])
def test_points_match_reference(iou_threshold):
    measured = 0
    for seed in range(0, 60, 2):
        ground_truth, detections = as_tables(*random_coco_set(seed))
        report = detection_report(
            ground_truth, detections, iou_threshold=iou_threshold, score_threshold=0.5
        )  # many scores are 0.5
        truths, found = as_rows(ground_truth, detections)
        for k in range(len(ground_truth.names)):
            of_class = [[row for row in rows if row["label"] == k] for rows in (truths, found)]
            for point in (report.best, report.given):
                expected = reference.precision_recall_f1(*of_class, iou_threshold, point.score_threshold)
                got = point.precision[k], point.recall[k], point.f1[k]
                measured += expected is not None
                assert got == pytest.approx(expected or (np.nan,) * 3, abs=1e-12, nan_ok=True), (seed, k)
    assert measured > 50


def test_confusion_matches_reference():
    confused = 0
    for seed in range(60):
        ground_truth, detections = as_tables(*random_coco_set(seed))
        num_classes = len(ground_truth.names)
        got = confusion_matrix(ground_truth, detections, iou_threshold=0.45, score_threshold=0.5)
        expected = reference.confusion(*as_rows(ground_truth, detections), num_classes, 0.45, 0.5)
        np.testing.assert_array_equal(got, expected, err_msg=f"seed {seed}")
        confused += got[:num_classes, :num_classes].sum() - np.trace(got[:num_classes, :num_classes])
    assert confused > 20


@pytest.mark.parametrize("seed", [3, 8, 46, 69])
def test_identities(seed):
    ground_truth, detections = as_tables(*random_coco_set(seed))
    report = detection_report(ground_truth, detections)
    has_objects = report.instances > 0
    num_classes = len(report.names)
    # Every object that counts is in its column once; recall never rises with the score; F1 is the harmonic mean.
    np.testing.assert_array_equal(report.confusion.sum(axis=0)[:num_classes], report.instances)
    assert (np.diff(report.recall[has_objects], axis=1) <= 0).all()
    precision, recall = report.precision[has_objects], report.recall[has_objects]
    with np.errstate(invalid="ignore"):
        harmonic = np.nan_to_num(2 * precision * recall / (precision + recall))
    np.testing.assert_allclose(report.f1[has_objects], harmonic, atol=1e-12)
    mean_f1 = report.f1[has_objects].mean(axis=0)
    assert report.best.mean_f1 == pytest.approx(mean_f1.max())
    assert report.best.score_threshold == report.scores[np.flatnonzero(mean_f1 == mean_f1.max())[-1]]
    assert np.isnan(report.pr_precision[~has_objects]).all()
    assert report.confusion[num_classes, num_classes] == 0


def test_pr_curve_is_cocos_at_that_threshold():
    ground_truth, detections = as_tables(*random_coco_set(3))  # fewer than 100 detections an image
    result = coco.evaluate(ground_truth, detections)
    report = detection_report(ground_truth, detections)
    measured = report.instances > 0
    np.testing.assert_allclose(report.pr_precision.mean(axis=1)[measured], result.ap50[measured], atol=1e-12)


BOX, FAR = [0.0, 0.0, 40.0, 40.0], [100.0, 0.0, 140.0, 40.0]


def test_a_wrong_class_a_miss_and_a_false_alarm():
    ground_truth = GroundTruth([0, 0], [BOX, FAR], [0, 1], 1, ("a", "b"))
    detections = DetectionTable([0, 0, 0], [BOX, [200, 0, 240, 40], FAR], [0.9, 0.8, 0.1], [1, 0, 1])
    matrix = confusion_matrix(ground_truth, detections)
    assert matrix.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]  # [predicted, true]


def test_difficult_objects_are_ignored_where_asked():
    ground_truth = GroundTruth([0, 0], [BOX, FAR], [0, 0], 1, ("a",), difficult=[False, True])
    detections = DetectionTable([0, 0], [BOX, FAR], [0.9, 0.8], [0, 0])
    counted = detection_report(ground_truth, detections)
    assert counted.instances.tolist() == [2] and counted.confusion.tolist() == [[2, 0], [0, 0]]
    ignored = detection_report(ground_truth, detections, ignore_difficult=True)
    assert ignored.instances.tolist() == [1] and ignored.confusion.tolist() == [[1, 0], [0, 0]]
    assert ignored.given.precision.tolist() == ignored.given.recall.tolist() == [1.0]


def test_empty_inputs():
    nothing = GroundTruth([], np.zeros((0, 4)), [], 3, ("a", "b"))
    report = detection_report(nothing, DetectionTable.empty())
    assert np.isnan(report.best.mean_f1) and report.confusion.sum() == 0 and report.images.tolist() == [0, 0]
    missed = detection_report(GroundTruth([0], [BOX], [1], 3, ("a", "b")), DetectionTable.empty())
    assert missed.best.mean_f1 == missed.best.mean_recall == missed.best.mean_precision == 0
    assert missed.confusion[2].tolist() == [0, 1, 0]
    alarm = detection_report(nothing, DetectionTable([2], [BOX], [0.5], [0]))
    assert alarm.confusion[:, 2].tolist() == [1, 0, 0]


def test_one_to_one_takes_what_a_loop_takes():
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 60):
        a, b = rng.integers(0, 12, size), rng.integers(0, 12, size)
        expected, used_a, used_b = set(), set(), set()
        for x, y in zip(a.tolist(), b.tolist()):
            if x not in used_a and y not in used_b:
                expected.add((x, y))
                used_a.add(x)
                used_b.add(y)
        taken = list(zip(*(column.tolist() for column in one_to_one(a, b))))
        assert len(taken) == len(expected) and set(taken) == expected


def test_table():
    ground_truth = GroundTruth([0, 1, 1], [BOX, BOX, FAR], [0, 0, 0], 2, ("cell", "nothing here"))
    detections = DetectionTable([0, 1], [BOX, FAR], [0.9, 0.8], [0, 0])
    result = coco.evaluate(ground_truth, detections)
    lines = format_table(detection_report(ground_truth, detections), result.ap50, result.ap).splitlines()
    assert lines[0].split() == ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"]
    assert lines[1].split()[:5] == ["all", "2", "3", "1.0000", "0.6667"]
    assert lines[2].split()[:3] == ["cell", "2", "3"]
    assert lines[3].split() == ["nothing", "here", "0", "0", "-", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1
