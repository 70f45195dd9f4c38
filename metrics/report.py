"""The numbers beside AP that YOLO tools print: precision, recall and F1, their curves, the confusion matrix, the table.

    precision(c) = TP / (TP + FP),   recall(c) = TP / objects,   F1(c) = 2 TP / (TP + FP + objects)

TP and FP count the detections with a score of at least c, matched by COCO's rule (metrics.matching) at one IoU
threshold. Ignored objects (crowd, and with ignore_difficult the difficult ones) and detections matched to them count
nowhere.

Differences from Ultralytics' `ap_per_class`: our curves are exact counts on a grid of scores; theirs are interpolated
between detections, and smoothed before the search for the best F1. The AP columns of our table are those of the
evaluated protocol (COCO: 101 points, at most 100 detections of a class in an image).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metrics.coco import RECALL_THRESHOLDS, mean_of_measured
from metrics.coco import evaluate as evaluate_coco
from metrics.matching import match, overlapping_pairs
from metrics.tables import DetectionTable, GroundTruth

SCORE_GRID = np.linspace(0.0, 1.0, 1001)
ALL_DETECTIONS = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """precision, recall and f1, (K,) each, of the detections with a score of at least `score_threshold`.

    nan for a class without objects. Precision is 0 where nothing is detected. The means leave out the nan classes; they
    are nan where no class has objects.
    """

    score_threshold: float
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def mean_precision(self) -> float:
        return nan_mean(self.precision)

    @property
    def mean_recall(self) -> float:
        return nan_mean(self.recall)

    @property
    def mean_f1(self) -> float:
        return nan_mean(self.f1)


@dataclass(frozen=True, eq=False)
class DetectionReport:
    """The report of detection_report.

    names: the K classes.
    num_images: all images.
    images (K,), instances (K,): images with an object of the class, and objects of the class.
    best: the point of the score grid with the highest mean F1 (of equal ones the last).
    given: the point at the given score threshold.
    scores (S,), precision, recall, f1 (K, S): the curves over the score; nan rows for classes without objects.
    recalls (101,), pr_precision (K, 101): COCO's interpolated precision at this IoU threshold; nan as above.
    confusion (K + 1, K + 1) int64: [predicted, true]. The last row and column are the background: confusion[K, j]
        counts missed objects of class j, confusion[i, K] detections of class i where there is no object.
    """

    names: tuple[str, ...]
    num_images: int
    images: np.ndarray
    instances: np.ndarray
    iou_threshold: float
    best: OperatingPoint
    given: OperatingPoint
    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    recalls: np.ndarray
    pr_precision: np.ndarray
    confusion: np.ndarray


def detection_report(
    ground_truth: GroundTruth,
    detections: DetectionTable,
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.25,
    ignore_difficult: bool = False,
) -> DetectionReport:
    """Precision, recall, F1 and curves at one IoU threshold; the confusion matrix at that and at `score_threshold`.

    All detections count; there is no limit per image.
    """
    matches = match(
        ground_truth,
        detections,
        iou_thresholds=np.array([iou_threshold]),
        area_ranges=[(-np.inf, np.inf)],
        max_detections=ALL_DETECTIONS,
        ignore_difficult=ignore_difficult,
    )
    num_classes = len(ground_truth.names)
    labels, scores = detections.labels[matches.rows], detections.scores[matches.rows]
    is_true, is_false = matches.true_positive != 0, (matches.true_positive | matches.ignored) == 0
    instances = matches.num_objects[:, 0]
    grid = np.append(SCORE_GRID, score_threshold)
    num_true, num_false = (
        _count_from(grid, scores[chosen], labels[chosen], num_classes) for chosen in (is_true, is_false)
    )
    precision, recall, f1 = _rates(num_true, num_false, instances)  # (K, S + 1)
    sum_of_f1 = f1[instances > 0, :-1].sum(axis=0)  # (S,)
    best = int(np.flatnonzero(sum_of_f1 == sum_of_f1.max())[-1])

    def point(column: int) -> OperatingPoint:
        return OperatingPoint(float(grid[column]), precision[:, column], recall[:, column], f1[:, column])

    coco = evaluate_coco(
        ground_truth,
        detections,
        iou_thresholds=(iou_threshold,),
        area_ranges={"all": (-np.inf, np.inf)},
        max_detections=(ALL_DETECTIONS,),
        ignore_difficult=ignore_difficult,
    )
    pr_precision = coco.precision[0, :, :, 0, 0].T  # (K, R)
    return DetectionReport(
        names=ground_truth.names,
        num_images=ground_truth.num_images,
        images=_images_per_class(ground_truth, ignore_difficult),
        instances=instances,
        iou_threshold=iou_threshold,
        best=point(best),
        given=point(-1),
        scores=SCORE_GRID,
        precision=precision[:, :-1],
        recall=recall[:, :-1],
        f1=f1[:, :-1],
        recalls=RECALL_THRESHOLDS,
        pr_precision=np.where(instances[:, None] > 0, pr_precision, np.nan),
        confusion=confusion_matrix(
            ground_truth,
            detections,
            iou_threshold=iou_threshold,
            score_threshold=score_threshold,
            ignore_difficult=ignore_difficult,
        ),
    )


def _count_from(thresholds: np.ndarray, scores: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, S) float64: of each class, how many of the scores are at least each threshold."""
    ordered = [np.sort(scores[labels == k]) for k in range(num_classes)]
    counts = [len(of_class) - np.searchsorted(of_class, thresholds, side="left") for of_class in ordered]
    return np.array(counts, dtype=np.float64).reshape(num_classes, len(thresholds))


def _rates(
    num_true: np.ndarray, num_false: np.ndarray, instances: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """precision, recall and F1 (K, S) of counts (K, S), see the head of this file; nan for a class without objects."""
    found, objects = num_true + num_false, instances[:, None]
    rates = (
        num_true / np.maximum(found, 1),
        num_true / np.maximum(objects, 1),
        2 * num_true / np.maximum(found + objects, 1),
    )
    precision, recall, f1 = (np.where(objects > 0, rate, np.nan) for rate in rates)
    return precision, recall, f1


def _is_ignored(ground_truth: GroundTruth, ignore_difficult: bool) -> np.ndarray:
    return ground_truth.crowd | (ground_truth.difficult & ignore_difficult)


def _images_per_class(ground_truth: GroundTruth, ignore_difficult: bool) -> np.ndarray:
    counts = ~_is_ignored(ground_truth, ignore_difficult)
    keys = np.unique(ground_truth.labels[counts] * ground_truth.num_images + ground_truth.image[counts])
    return np.bincount(keys // max(ground_truth.num_images, 1), minlength=len(ground_truth.names))


def confusion_matrix(
    ground_truth: GroundTruth,
    detections: DetectionTable,
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.25,
    ignore_difficult: bool = False,
) -> np.ndarray:
    """(K + 1, K + 1) int64, [predicted, true], of the detections from `score_threshold` on. The last is the background.

    Detections and objects of one image, of any classes, are paired one to one by falling IoU (equal ones by score, then
    by row) down to `iou_threshold`. An unpaired detection is not counted if it overlaps an ignored object of its class
    by at least that much.
    """
    num_classes = len(ground_truth.names)
    detections.check(ground_truth)
    detections = detections[detections.scores >= score_threshold]
    detections = detections[np.argsort(-detections.scores, kind="stable")]
    is_ignored = _is_ignored(ground_truth, ignore_difficult)

    def pairs_with(
        objects: np.ndarray, group: np.ndarray, object_group: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        objects = objects[np.argsort(object_group[objects], kind="stable")]
        pairs = overlapping_pairs(
            boxes_xyxy=detections.boxes_xyxy,
            box_area=detections.box_area,
            group=group,
            object_boxes_xyxy=ground_truth.boxes_xyxy[objects],
            object_area=ground_truth.box_area[objects],
            object_group=object_group[objects],
            object_is_crowd=ground_truth.crowd[objects],
            min_overlap=iou_threshold,
        )
        return pairs.detection, objects[pairs.object], pairs.overlap

    detection, obj, overlap = pairs_with(np.flatnonzero(~is_ignored), detections.image, ground_truth.image)
    order = np.lexsort((obj, detection, -overlap))
    detection, obj = one_to_one(detection[order], obj[order])
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    np.add.at(matrix, (detections.labels[detection], ground_truth.labels[obj]), 1)
    is_missed = ~is_ignored
    is_missed[obj] = False
    matrix[num_classes, :num_classes] = np.bincount(ground_truth.labels[is_missed], minlength=num_classes)

    is_left = np.ones(len(detections), dtype=bool)
    is_left[detection] = False
    excused, _, _ = pairs_with(
        np.flatnonzero(is_ignored),
        detections.labels * ground_truth.num_images + detections.image,
        ground_truth.labels * ground_truth.num_images + ground_truth.image,
    )
    is_left[excused] = False
    matrix[:num_classes, num_classes] = np.bincount(detections.labels[is_left], minlength=num_classes)
    return matrix


def one_to_one(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy pairing: take the pairs (a_i, b_i) in order, skip a pair whose a or b is taken; returns the taken pairs.

    A pair that is the first one of both its members is always taken. Taking all such pairs at once, in rounds, gives
    the result of the loop over pairs.
    """
    taken_a, taken_b = [], []
    while len(a):
        is_first = np.zeros((2, len(a)), dtype=bool)
        is_first[0, np.unique(a, return_index=True)[1]] = True
        is_first[1, np.unique(b, return_index=True)[1]] = True
        now = is_first.all(axis=0)
        taken_a.append(a[now])
        taken_b.append(b[now])
        left = ~(np.isin(a, a[now]) | np.isin(b, b[now]))
        a, b = a[left], b[left]
    if not taken_a:
        return a, b
    return np.concatenate(taken_a), np.concatenate(taken_b)


def nan_mean(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan where all are."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def format_table(report: DetectionReport, ap50: np.ndarray, ap: np.ndarray, columns: Sequence[str] = ()) -> str:
    """The table `Class Images Instances P R mAP50 mAP50-95`: an "all" row, then one per class.

    ap50, ap (K,): of the protocol; -1 is shown as "-", like every number of a class without objects. P and R are at the
    score of the best mean F1. `columns` renames the last two columns.
    """
    last = tuple(columns) or ("mAP50", "mAP50-95")
    width = max([len("Class"), *(len(name) for name in report.names)]) + 2
    header = ("Images", "Instances", "P", "R", *last)
    lines = [f"{'Class':>{width}}" + "".join(f"{title:>11}" for title in header)]
    best = report.best
    means = (best.mean_precision, best.mean_recall, mean_of_measured(ap50), mean_of_measured(ap))
    rows = [("all", report.num_images, int(report.instances.sum()), means)]
    for k, name in enumerate(report.names):
        values = (best.precision[k], best.recall[k], ap50[k], ap[k])
        rows.append((name, int(report.images[k]), int(report.instances[k]), values))
    for name, images, instances, values in rows:
        cells = "".join(f"{'-' if not value >= 0 else format(value, '.4f'):>11}" for value in values)
        lines.append(f"{name:>{width}}{images:>11}{instances:>11}{cells}")
    return "\n".join(lines)
