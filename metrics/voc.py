"""Pascal VOC average precision: the 11-point form of VOC2007 and the area form of VOC2010 and later.

Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 88 (2010), section 4.2, and the VOC2012
development kit (VOCevaldet.m). For one class, the detections of all images are taken in order of falling score. Each is
compared with the object of its class and image that it overlaps most (of equal ones the first):

    IoU below the threshold, or no object     false positive
    the object is difficult                   the detection does not count
    the object was found before               false positive
    otherwise                                 true positive

    precision(r) = true positives / (true + false positives) at recall r = true positives / objects not difficult
    11-point:  AP = 1/11 sum over r in {0, 0.1, .., 1} of max_{r' >= r} precision(r')
    area:      AP = integral over r of max_{r' >= r} precision(r')

Pixels: VOC files hold the first and the last pixel of a box, 1-based, and VOC measures width = xmax - xmin + 1. The
project's continuous boxes are (xmin - 1, ymin - 1, xmax, ymax), so width = x2 - x1 already includes the "+ 1". This
holds for an index read by datasets.voc and for the predictions of a model trained on it. If both tables hold boxes as
written in the files, evaluate them with `inclusive_pixels=True`.

Differences, on purpose: VOC has no crowd regions (COCO, KITTI DontCare). Here they absorb detections that would be
false positives, where intersection / detection area reaches the threshold. The 11 recalls are the float64
`np.linspace(0, 1, 11)` of the public implementations, so a recall of exactly 3/10 falls just below the fourth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metrics.coco import ABSENT, mean_of_measured
from metrics.matching import Pairs, overlapping_pairs
from metrics.tables import DetectionTable, GroundTruth, inclusive_to_continuous

RECALLS_2007 = np.linspace(0.0, 1.0, 11)
IOU_THRESHOLDS = (0.5,)

Style = Literal["voc07", "voc12"]


@dataclass(frozen=True, eq=False)
class VocResult:
    """The VOC numbers.

    names: the K classes.
    ap (T, K): at iou_thresholds (T,); -1 for a class without an object that counts.
    num_objects (K,): objects neither difficult nor crowd.
    curves: for each class recall (D,) and precision (D,) after each of its detections that count, at the first IoU
        threshold.
    """

    names: tuple[str, ...]
    style: Style
    iou_thresholds: np.ndarray
    ap: np.ndarray
    num_objects: np.ndarray
    curves: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def ap_per_iou(self) -> dict[float, float]:
        """The mean AP over classes at each IoU threshold."""
        return {round(float(t), 10): mean_of_measured(self.ap[i]) for i, t in enumerate(self.iou_thresholds)}

    @property
    def numbers(self) -> dict[str, float]:
        """AP50, AP55, ..: the mean over classes at each IoU threshold; AP: the mean over those."""
        per_iou = self.ap_per_iou
        return {"AP": mean_of_measured(self.ap)} | {f"AP{100 * t:.0f}": value for t, value in per_iou.items()}

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """The same numbers of each class alone."""
        keys = [f"AP{100 * t:.0f}" for t in self.iou_thresholds]
        return {
            name: {"AP": mean_of_measured(self.ap[:, k])} | dict(zip(keys, map(float, self.ap[:, k])))
            for k, name in enumerate(self.names)
        }


def evaluate(
    ground_truth: GroundTruth,
    detections: DetectionTable,
    *,
    style: Style,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    inclusive_pixels: bool = False,
) -> VocResult:
    """VOC average precision of every class, over all detections. Equal scores are ordered by image, then by row.

    Args:
        style: "voc07" (11 points) or "voc12" (area).
        iou_thresholds: each gives an AP of its own. A detection at or above it is a hit.
        inclusive_pixels: the boxes of both tables hold their first and last pixel (width = x2 - x1 + 1).
    """
    if style not in ("voc07", "voc12"):
        raise ValueError(f"style {style!r}: expected voc07 or voc12")
    thresholds = np.asarray(iou_thresholds, dtype=np.float64)
    if not len(thresholds) or thresholds.min() <= 0:
        raise ValueError(f"iou_thresholds {thresholds}: expected numbers above 0")
    detections.check(ground_truth)
    if inclusive_pixels:
        ground_truth, detections = inclusive_to_continuous(ground_truth), inclusive_to_continuous(detections)
    num_classes = len(ground_truth.names)
    detections = detections[np.lexsort((detections.image, -detections.scores, detections.labels))]
    class_starts = np.searchsorted(detections.labels, np.arange(num_classes + 1))
    counts = ~(ground_truth.difficult | ground_truth.crowd)
    num_objects = np.bincount(ground_truth.labels[counts], minlength=num_classes)

    best_overlap, best_object, crowd_overlap = _best_overlaps(ground_truth, detections, thresholds.min())
    ap = np.full((len(thresholds), num_classes), ABSENT)
    curves = []
    for t, threshold in enumerate(thresholds):
        is_hit = best_overlap >= threshold
        is_candidate = is_hit & ~ground_truth.difficult[best_object] if len(ground_truth) else is_hit
        is_true = np.zeros(len(detections), dtype=bool)
        rows = np.flatnonzero(is_candidate)
        is_true[rows[np.unique(best_object[rows], return_index=True)[1]]] = True  # best score per object
        is_ignored = (is_hit & ~is_candidate) | (~is_hit & (crowd_overlap >= threshold))
        for k in range(num_classes):
            in_class = slice(class_starts[k], class_starts[k + 1])
            true = is_true[in_class][~is_ignored[in_class]]
            num_true = np.cumsum(true)
            precision = num_true / np.arange(1, len(true) + 1)
            recall = num_true / max(num_objects[k], 1)
            if num_objects[k]:
                ap[t, k] = (eleven_point_ap if style == "voc07" else area_ap)(recall, precision)
            if t == 0:
                curves.append((recall, precision))
    return VocResult(ground_truth.names, style, thresholds, ap, num_objects, tuple(curves))


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Recall (D,), rising, and precision (D,) after each detection -> AP of VOC2007; 0 for D = 0."""
    reached = recall[:, None] >= RECALLS_2007  # (D, 11)
    return float(np.where(reached, precision[:, None], 0.0).max(axis=0, initial=0.0).mean())


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Recall (D,), rising, and precision (D,) after each detection -> AP of VOC2010 and later; 0 for D = 0."""
    best_from = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best_from))


def _best_overlaps(
    ground_truth: GroundTruth, detections: DetectionTable, min_overlap: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each detection, (D,) each: the highest IoU with a non-crowd object, its row, the highest crowd overlap.

    0 (and row 0) where no overlap reaches `min_overlap`.
    """
    object_group = ground_truth.labels * ground_truth.num_images + ground_truth.image
    object_rows = np.argsort(object_group, kind="stable")
    is_crowd = ground_truth.crowd[object_rows]
    pairs = overlapping_pairs(
        boxes_xyxy=detections.boxes_xyxy,
        box_area=detections.box_area,
        group=detections.labels * ground_truth.num_images + detections.image,
        object_boxes_xyxy=ground_truth.boxes_xyxy[object_rows],
        object_area=ground_truth.box_area[object_rows],
        object_group=object_group[object_rows],
        object_is_crowd=is_crowd,
        min_overlap=min_overlap,
    )
    best_overlap, crowd_overlap = np.zeros(len(detections)), np.zeros(len(detections))
    best_object = np.zeros(len(detections), dtype=np.int64)
    on_crowd = is_crowd[pairs.object]
    detection, obj, overlap = _first_best(pairs, ~on_crowd)
    best_overlap[detection], best_object[detection] = overlap, object_rows[obj]
    detection, _, overlap = _first_best(pairs, on_crowd)
    crowd_overlap[detection] = overlap
    return best_overlap, best_object, crowd_overlap


def _first_best(pairs: Pairs, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Among the chosen pairs, for each detection the one of highest overlap; of equal ones the first object."""
    detection, obj, overlap = pairs.detection[chosen], pairs.object[chosen], pairs.overlap[chosen]
    order = np.lexsort((obj, -overlap, detection))
    detection, first = np.unique(detection[order], return_index=True)
    return detection, obj[order][first], overlap[order][first]


def format_numbers(result: VocResult) -> str:
    """One line for each IoU threshold."""
    title = {"voc07": "VOC07 11-point", "voc12": "VOC area"}[result.style]
    return "\n".join(f" {title} AP @ IoU={t:.2f} = {value:.4f}" for t, value in result.ap_per_iou.items())
