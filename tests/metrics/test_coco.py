"""The COCO numbers: recorded oracles, pycocotools on random sets, and what the protocol says in words."""

import contextlib
import copy
import io
import json
from dataclasses import fields

import numpy as np
import pytest

from metrics import coco
from metrics.files import read_detections, read_ground_truth
from metrics.tables import DetectionTable, GroundTruth
from tests.reference.random_detections import as_tables, random_coco_set

NUM_RANDOM_SETS = 500


def run_pycocotools(dataset, results, **parameters):
    coco_module = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_module.COCO()
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
        if results:
            found = truth.loadRes(copy.deepcopy(results))
        else:  # loadRes cannot read an empty list
            found = coco_module.COCO()
            found.dataset = {**dataset, "annotations": []}
            found.createIndex()
        evaluation = cocoeval.COCOeval(truth, found, "bbox")
        for name, value in parameters.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        if not parameters:
            evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("block", range(10))
def test_equals_pycocotools_on_random_sets(block):
    seen = {"crowd": 0, "tie": 0, "empty image": 0, "on a limit": 0, "beyond 100": 0, "absent class": 0, "nothing": 0}
    for seed in range(block, NUM_RANDOM_SETS, 10):
        dataset, results = random_coco_set(seed)
        expected = run_pycocotools(dataset, results)
        ground_truth, detections = as_tables(dataset, results)
        result = coco.evaluate(ground_truth, detections)
        got = np.array(list(result.numbers.values()))
        np.testing.assert_allclose(got, expected.stats, rtol=0, atol=1e-12, err_msg=f"seed {seed}")
        np.testing.assert_allclose(result.precision, expected.eval["precision"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.recall, expected.eval["recall"], rtol=0, atol=1e-12)
        seen["crowd"] += ground_truth.crowd.any()
        seen["tie"] += len(set(detections.scores)) < len(detections)
        seen["empty image"] += len(set(ground_truth.image)) < ground_truth.num_images
        seen["on a limit"] += np.isin(ground_truth.area, [32.0**2, 96.0**2]).any()
        groups = np.unique(np.stack((detections.image, detections.labels)), axis=1, return_counts=True)[1]
        seen["beyond 100"] += groups.max(initial=0) > 100
        seen["absent class"] += len(set(ground_truth.labels)) < len(ground_truth.names)
        seen["nothing"] += not len(detections)
    assert all(seen.values()), seen  # the sets do hold the cases they are meant to


def test_other_settings_equal_pycocotools():
    for seed in (3, 4, 23):
        dataset, results = random_coco_set(seed)
        expected = run_pycocotools(
            dataset,
            results,
            iouThrs=np.array([0.3, 0.55, 1.0]),
            maxDets=[2, 5],
            areaRng=[[0, 1e10], [1024, 9216]],
            areaRngLbl=["all", "middle"],
        )
        result = coco.evaluate(
            *as_tables(dataset, results),
            iou_thresholds=(0.3, 0.55, 1.0),
            max_detections=(2, 5),
            area_ranges={"all": (0, 1e10), "middle": (1024, 9216)},
        )
        np.testing.assert_allclose(result.precision, expected.eval["precision"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.recall, expected.eval["recall"], rtol=0, atol=1e-12)


def random_tables(seed):
    """A small random set; some objects difficult, some boxes without area or turned inside out."""
    rng = np.random.default_rng([seed, 1])
    ground_truth, detections = as_tables(*random_coco_set(seed))
    for table in (ground_truth, detections):
        table.boxes_xyxy[rng.random(len(table)) < 0.1, 2] -= 40.0  # box_area stays what a file says
        bad = rng.random(len(table)) < 0.1
        table.boxes_xyxy[bad, 2:] = table.boxes_xyxy[bad, :2]
        table.box_area[bad] = 0.0
    ground_truth.difficult[:] = rng.random(len(ground_truth)) < 0.2
    return ground_truth, detections


SETTINGS = [
    {"iou_thresholds": (0.5, 0.75), "max_detections": (1, 100)},
    {"iou_thresholds": (0.3, 0.55, 1.0), "max_detections": (2, 5), "ignore_difficult": True},
]


@pytest.mark.parametrize("options", SETTINGS, ids=["coco", "other"])
def test_evaluate_equals_the_specification(options):
    for seed in range(60):
        if seed % 23:  # not the sets with 130 detections of a class, which take a second each
            ground_truth, detections = random_tables(seed)
            got = coco.evaluate(ground_truth, detections, **options)
            expected = coco.plain_evaluate(ground_truth, detections, **options)
            for field in fields(expected):
                np.testing.assert_array_equal(getattr(got, field.name), getattr(expected, field.name), str(seed))


def test_specification_equals_pycocotools():
    for seed in (3, 4, 12):
        dataset, results = random_coco_set(seed)
        expected = run_pycocotools(dataset, results, iouThrs=np.array([0.5, 0.8]))
        result = coco.plain_evaluate(*as_tables(dataset, results), iou_thresholds=(0.5, 0.8))
        np.testing.assert_allclose(result.precision, expected.eval["precision"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.recall, expected.eval["recall"], rtol=0, atol=1e-12)


def test_coco_val2014_oracle(shared_data):
    folder = shared_data / "evaluator_oracles" / "coco_val2014_100"
    annotations = read_ground_truth(folder / "instances_val2014_100.json")
    tables = read_detections(folder / "instances_val2014_fakebbox100_results.json", annotations)
    expected = json.loads((folder / "expected.json").read_text())["expected"]
    assert coco.evaluate(*tables).numbers == pytest.approx(expected, abs=1e-9)


def test_list_of_dicts_oracle(shared_data):
    oracle = json.loads((shared_data / "evaluator_oracles" / "list_of_dicts" / "four_coco_images.json").read_text())
    expected = oracle["expected_coco"]
    per_class = expected.pop("per_class")

    def column(part, key):
        return np.concatenate([np.array(image[part][key]) for image in oracle["images"]])

    def image(part):
        return np.repeat(np.arange(4), [len(i[part]["labels"]) for i in oracle["images"]])

    names = tuple(str(k) for k in range(50))
    ground_truth = GroundTruth(image("target"), column("target", "boxes"), column("target", "labels"), 4, names)
    detections = DetectionTable(
        image("pred"), column("pred", "boxes"), column("pred", "scores"), column("pred", "labels")
    )
    result = coco.evaluate(ground_truth, detections)
    assert result.numbers == pytest.approx(expected, abs=1e-9)
    for row in per_class.values():
        got = result.per_class[str(row.pop("category_id"))]
        assert {key: got[key] for key in row} == pytest.approx(row, abs=1e-9)


def one_class(objects, found, scores, **columns):
    ground_truth = GroundTruth(np.zeros(len(objects), int), objects, np.zeros(len(objects), int), 1, ("a",), **columns)
    zeros = np.zeros(len(found), int)
    return ground_truth, DetectionTable(zeros, found, scores, zeros)


BOX = [0.0, 0.0, 40.0, 40.0]


def test_perfect_detections_score_one_and_absent_sizes_minus_one():
    numbers = coco.evaluate(*one_class([BOX], [BOX], [0.3])).numbers
    assert [numbers[key] for key in ("AP", "AP_medium", "AR_1")] == pytest.approx([1.0] * 3)
    assert numbers["AP_small"] == numbers["AR_large"] == -1


@pytest.mark.parametrize("evaluate", [coco.evaluate, coco.plain_evaluate])
@pytest.mark.parametrize(("objects", "found"), [([], []), ([], [BOX]), ([BOX], [])], ids=["both", "truth", "found"])
def test_empty_tables(objects, found, evaluate):
    result = evaluate(*one_class(objects, found, [0.5] * len(found)))
    expected = 0.0 if objects else -1.0
    assert result.numbers["AP"] == result.numbers["AR_100"] == expected
    assert list(result.ap_per_iou) == pytest.approx(np.arange(0.5, 1.0, 0.05).tolist())
    assert set(result.ap_per_iou.values()) == {expected}


def test_no_classes_and_no_images():
    nothing = GroundTruth([], np.zeros((0, 4)), [], 0, ())
    for evaluate in (coco.evaluate, coco.plain_evaluate):
        assert set(evaluate(nothing, DetectionTable.empty()).numbers.values()) == {-1.0}


def test_a_crowd_absorbs_by_intersection_over_detection_area():
    crowd = [0.0, 0.0, 400.0, 400.0]
    inside = [[10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 70.0, 70.0]]  # IoU with the crowd is 0.0025
    objects = [[500.0, 500.0, 540.0, 540.0], crowd]
    found, scores = [*inside, objects[0]], [0.9, 0.8, 0.1]
    punished = coco.evaluate(*one_class(objects[:1], found, scores)).numbers["AP"]
    excused = coco.evaluate(*one_class(objects, found, scores, crowd=[False, True])).numbers["AP"]
    assert excused == pytest.approx(1.0) and punished == pytest.approx(1 / 3)


LEFT, RIGHT, BETWEEN = [0.0, 0.0, 40.0, 40.0], [20.0, 0.0, 60.0, 40.0], [10.0, 0.0, 50.0, 40.0]


@pytest.mark.parametrize(("objects", "recall"), [([LEFT, RIGHT], 1.0), ([RIGHT, LEFT], 0.5)], ids=["last", "first"])
def test_of_equal_overlaps_the_last_object_is_taken(objects, recall):
    """BETWEEN overlaps both by 0.6 and chooses first; whether LEFT is still free decides the second detection."""
    xywh = lambda box: [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    dataset = {
        "info": {},
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": xywh(box), "area": 1600.0, "iscrowd": 0}
            for n, box in enumerate(objects, 1)
        ],
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": xywh(box), "score": score}
        for box, score in ((BETWEEN, 0.9), (LEFT, 0.8))
    ]
    for evaluate in (coco.evaluate, coco.plain_evaluate):
        result = evaluate(*one_class(objects, [BETWEEN, LEFT], [0.9, 0.8]))
        assert result.recall[0, 0, 0, -1] == recall
    np.testing.assert_array_equal(result.recall, run_pycocotools(dataset, results).eval["recall"])


def test_difficult_objects_count_unless_asked():
    tables = one_class([BOX, [100.0, 0.0, 140.0, 40.0]], [BOX], [0.5], difficult=[False, True])
    assert coco.evaluate(*tables).numbers["AR_100"] == pytest.approx(0.5)
    assert coco.evaluate(*tables, ignore_difficult=True).numbers["AR_100"] == pytest.approx(1.0)


def test_ap_at_each_iou_is_the_mean_of_ap():
    result = coco.evaluate(*as_tables(*random_coco_set(3)))
    assert np.mean(list(result.ap_per_iou.values())) == pytest.approx(result.numbers["AP"])
    assert result.ap_per_iou[0.75] == result.numbers["AP75"]


def test_order_of_images_and_rows_does_not_matter_without_ties():
    ground_truth, detections = as_tables(*random_coco_set(23))
    rng = np.random.default_rng(0)
    scores = rng.permutation(len(detections)) / len(detections)
    detections = DetectionTable(detections.image, detections.boxes_xyxy, scores, detections.labels)
    expected = coco.evaluate(ground_truth, detections).numbers
    assert coco.evaluate(ground_truth, detections[rng.permutation(len(detections))]).numbers == expected


def test_bad_calls():
    tables = one_class([BOX], [BOX], [0.5])
    with pytest.raises(ValueError, match="labels: row 0 is 1"):
        coco.evaluate(tables[0], DetectionTable([0], [BOX], [0.5], [1]))
    with pytest.raises(ValueError, match="image: row 0 is 7"):
        coco.evaluate(tables[0], DetectionTable([7], [BOX], [0.5], [0]))
    with pytest.raises(ValueError, match="max_detections"):
        coco.evaluate(*tables, max_detections=(10, 1))
    with pytest.raises(ValueError, match="rising"):
        coco.evaluate(*tables, iou_thresholds=(0.5, 0.4))


def test_lines_are_pycocotools_lines():
    dataset, results = random_coco_set(3)
    out = io.StringIO()
    evaluation = run_pycocotools(dataset, results)
    with contextlib.redirect_stdout(out):
        evaluation.summarize()
    assert coco.format_numbers(coco.evaluate(*as_tables(dataset, results))) == out.getvalue().rstrip("\n")
