"""The COCO detection metric, equal to pycocotools' `COCOeval(iouType="bbox")` to the last digit of its numbers.

Lin et al., "Microsoft COCO: Common Objects in Context", arXiv:1405.0312. The algorithm is that of the reference
implementation (cocodataset/cocoapi). Precision is interpolated at 101 recalls: the best precision at that recall or
above. As there, thresholds are float64 `np.linspace` values and every sort is stable; a recall of 29/100 would fall on
the other side of a float32 threshold.

`plain_evaluate` is the specification, one detection at a time. `evaluate` gives the same numbers for whole datasets.

Differences, on purpose: an object with annotation id 0 can be found (pycocotools reads that id as "unmatched"); a
detection of an unknown class is an error (pycocotools drops it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from metrics.matching import Matches, match
from metrics.tables import DetectionTable, GroundTruth

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = (1, 10, 100)  # of one class in one image
AREA_RANGES = {  # square pixels, both ends included
    "all": (0.0**2, 1e5**2),
    "small": (0.0**2, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
ABSENT = -1.0  # the value of a number where there is nothing to measure


@dataclass(frozen=True, eq=False)
class CocoResult:
    """The COCO numbers. A number is -1 where there is nothing to measure: no object of that class or size.

    names: the K class names.
    iou_thresholds (T,), area_names (A), max_detections (M); R is the number of RECALL_THRESHOLDS.
    precision (T, R, K, A, M): interpolated precision. recall (T, K, A, M): the highest recall reached.
    num_objects (K, A): objects that count.
    """

    names: tuple[str, ...]
    iou_thresholds: np.ndarray
    area_names: tuple[str, ...]
    max_detections: tuple[int, ...]
    precision: np.ndarray
    recall: np.ndarray
    num_objects: np.ndarray

    @property
    def numbers(self) -> dict[str, float]:
        """The 12 numbers in pycocotools' order: AP, AP50, AP75, AP_small.., AR_1, AR_10, AR_100, AR_small.."""
        return self._numbers(slice(None))

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """The same numbers for each class alone."""
        return {name: self._numbers(slice(k, k + 1)) for k, name in enumerate(self.names)}

    @property
    def ap_per_iou(self) -> dict[float, float]:
        """AP at each IoU threshold, over all classes and areas."""
        return {
            round(float(t), 10): mean_of_measured(self.precision[i, :, :, 0, -1])
            for i, t in enumerate(self.iou_thresholds)
        }

    @property
    def ap(self) -> np.ndarray:
        """(K,): AP of each class over the IoU thresholds."""
        return np.array([mean_of_measured(self.precision[:, :, k, 0, -1]) for k in range(len(self.names))])

    @property
    def ap50(self) -> np.ndarray:
        """(K,): AP of each class at IoU 0.5."""
        at = np.isclose(self.iou_thresholds, 0.5)
        return np.array([mean_of_measured(self.precision[at, :, k, 0, -1]) for k in range(len(self.names))])

    def _numbers(self, classes: slice) -> dict[str, float]:
        precision, recall = self.precision[:, :, classes], self.recall[:, classes]
        at50, at75 = np.isclose(self.iou_thresholds, 0.5), np.isclose(self.iou_thresholds, 0.75)
        numbers = {
            "AP": mean_of_measured(precision[..., 0, -1]),
            "AP50": mean_of_measured(precision[at50][..., 0, -1]),
            "AP75": mean_of_measured(precision[at75][..., 0, -1]),
        }
        for a, area in enumerate(self.area_names[1:], 1):
            numbers[f"AP_{area}"] = mean_of_measured(precision[..., a, -1])
        for m, limit in enumerate(self.max_detections):
            numbers[f"AR_{limit}"] = mean_of_measured(recall[..., 0, m])
        for a, area in enumerate(self.area_names[1:], 1):
            numbers[f"AR_{area}"] = mean_of_measured(recall[..., a, -1])
        return numbers


def mean_of_measured(values: np.ndarray) -> float:
    """The mean of the values that are not -1; -1 where all are."""
    measured = values[values > ABSENT]
    return float(np.mean(measured)) if measured.size else ABSENT


def plain_evaluate(
    ground_truth: GroundTruth, detections: DetectionTable, *, iou_thresholds: Sequence[float] = tuple(IOU_THRESHOLDS),
    area_ranges: dict[str, tuple[float, float]] | None = None, max_detections: Sequence[int] = MAX_DETECTIONS,
    ignore_difficult: bool = False,
) -> CocoResult:  # fmt: skip
    """Specification: the contract of `evaluate`, one class, size, IoU threshold and limit after the other."""
    areas = AREA_RANGES if area_ranges is None else area_ranges
    T, R, K = len(iou_thresholds), len(RECALL_THRESHOLDS), len(ground_truth.names)
    A, M = len(areas), len(max_detections)
    precision, recall = np.full((T, R, K, A, M), ABSENT), np.full((T, K, A, M), ABSENT)
    num_objects = np.zeros((K, A), dtype=np.int64)
    never_counts = ground_truth.crowd | (ground_truth.difficult & ignore_difficult)
    for k, (a, (low, high)) in product(range(K), enumerate(areas.values())):
        counts = ~never_counts & (ground_truth.area >= low) & (ground_truth.area <= high)  # (N,)
        num_objects[k, a] = counts[ground_truth.labels == k].sum()
        if not num_objects[k, a]:
            continue
        for (t, threshold), (m, limit) in product(enumerate(iou_thresholds), enumerate(max_detections)):
            scored = []  # (score, whether it found an object) of every detection that is not ignored
            for image in range(ground_truth.num_images):
                objects = np.flatnonzero((ground_truth.image == image) & (ground_truth.labels == k))
                rows = np.flatnonzero((detections.image == image) & (detections.labels == k))
                rows = rows[np.argsort(-detections.scores[rows], kind="stable")][:limit]
                matched = _match_in_order(ground_truth, detections, objects, rows, counts, threshold)
                for row, found in zip(rows, matched):
                    is_counted = counts[found] if found is not None else low <= detections.box_area[row] <= high
                    if is_counted:
                        scored.append((detections.scores[row], found is not None))
            scored.sort(key=lambda pair: -pair[0])  # stable: equal scores by image, then by row
            num_true = np.cumsum([is_true for _, is_true in scored])
            precision_at = num_true / (np.arange(1, len(scored) + 1) + np.spacing(1))
            recall_at = num_true / num_objects[k, a]
            recall[t, k, a, m] = max(recall_at, default=0)
            for r, needed in enumerate(RECALL_THRESHOLDS):
                precision[t, r, k, a, m] = max(precision_at[recall_at >= needed], default=0)
    thresholds = np.asarray(iou_thresholds, dtype=np.float64)
    return CocoResult(
        ground_truth.names, thresholds, tuple(areas), tuple(max_detections), precision, recall, num_objects
    )


def _match_in_order(
    ground_truth: GroundTruth, detections: DetectionTable, objects: np.ndarray, rows: np.ndarray, counts: np.ndarray,
    threshold: float,
) -> list[int | None]:  # fmt: skip
    """The object that each detection in `rows` (best first) takes, all of one image and class: see metrics.matching."""
    taken: list[int | None] = []
    for row in rows:
        choices = [(False, 0.0, -1)]  # (whether it counts, overlap, row of the ground truth)
        for g in objects:
            corners = np.stack((detections.boxes_xyxy[row], ground_truth.boxes_xyxy[g]))
            width, height = corners[:, 2:].min(0) - corners[:, :2].max(0)
            intersection = max(width, 0) * max(height, 0)
            area = detections.box_area[row]
            union = area if ground_truth.crowd[g] else area + ground_truth.box_area[g] - intersection
            is_free = ground_truth.crowd[g] or g not in taken
            if is_free and intersection > 0 and intersection / union >= min(threshold, 1 - 1e-10):
                choices.append((counts[g], intersection / union, g))
        _, _, best = max(choices)
        taken.append(None if best < 0 else best)
    return taken


def evaluate(
    ground_truth: GroundTruth,
    detections: DetectionTable,
    *,
    iou_thresholds: Sequence[float] = tuple(IOU_THRESHOLDS),
    area_ranges: dict[str, tuple[float, float]] | None = None,
    max_detections: Sequence[int] = MAX_DETECTIONS,
    ignore_difficult: bool = False,
) -> CocoResult:
    """The COCO numbers of all detections, against the objects of all images.

    Equal scores are ordered by `image`, then by row. In each image, the best max(max_detections) detections of each
    class count.

    Args:
        iou_thresholds: rising. At most 64 combinations with the area ranges.
        area_ranges: name -> (low, high), square pixels, both included. AP and AR use the first. None: COCO's all,
            small, medium, large.
        max_detections: rising. AP uses the last.
        ignore_difficult: ignore objects marked difficult, like objects outside of the area range. COCO has no such
            mark, so by default they count.
    """
    area_ranges = AREA_RANGES if area_ranges is None else area_ranges
    thresholds = np.asarray(iou_thresholds, dtype=np.float64)
    max_detections = tuple(max_detections)
    if not max_detections or list(max_detections) != sorted(set(max_detections)) or max_detections[0] < 1:
        raise ValueError(f"max_detections {max_detections}: expected rising numbers from 1")
    matches = match(
        ground_truth,
        detections,
        iou_thresholds=thresholds,
        area_ranges=list(area_ranges.values()),
        max_detections=max_detections[-1],
        ignore_difficult=ignore_difficult,
    )
    num_thresholds, num_classes, num_areas = len(thresholds), len(ground_truth.names), len(area_ranges)
    precision = np.full((num_thresholds, len(RECALL_THRESHOLDS), num_classes, num_areas, len(max_detections)), ABSENT)
    recall = np.full((num_thresholds, num_classes, num_areas, len(max_detections)), ABSENT)
    labels = detections.labels[matches.rows]
    class_starts = np.searchsorted(labels, np.arange(num_classes + 1))
    for k in range(num_classes):
        if not matches.num_objects[k].any():
            continue
        in_class = np.arange(class_starts[k], class_starts[k + 1])
        # by falling score; equal scores by image, then by position in the image
        in_class = in_class[np.argsort(-detections.scores[matches.rows[in_class]], kind="stable")]
        for m, limit in enumerate(max_detections):
            chosen = in_class[matches.rank[in_class] < limit]
            precision[:, :, k, :, m], recall[:, k, :, m] = _curves(matches, chosen, k, num_thresholds)
    return CocoResult(
        ground_truth.names,
        thresholds,
        tuple(area_ranges),
        max_detections,
        precision,
        recall,
        matches.num_objects,
    )


def _curves(matches: Matches, chosen: np.ndarray, k: int, num_thresholds: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R, A) and highest recall (T, A) of class k from its detections `chosen`, best first.

    Recall rises, and precision peaks, only at true positives. So the curve is computed only there.
    """
    num_objects = matches.num_objects[k]  # (A,)
    num_areas = len(num_objects)
    true = unpack_lanes(matches.true_positive[chosen], matches.num_lanes)  # (D, L)
    counted = ~unpack_lanes(matches.ignored[chosen], matches.num_lanes).view(bool)
    place, lane = np.nonzero(true)
    num_true = np.cumsum(true, axis=0, dtype=np.int32)[place, lane]
    num_counted = np.cumsum(counted, axis=0, dtype=np.int32)[place, lane]
    # at[l, n - 1]: precision when lane l finds its n-th object; 0 where it never does
    at = np.zeros((matches.num_lanes, max(num_objects.max(), 1)))
    at[lane, num_true - 1] = num_true / (num_counted + np.spacing(1))
    best_from = np.maximum.accumulate(at[:, ::-1], axis=1)[:, ::-1]  # at this recall or above
    best_from = best_from.reshape(num_areas, num_thresholds, -1)
    num_found = true.sum(axis=0, dtype=np.int64).reshape(num_areas, num_thresholds)

    precision = np.full((num_thresholds, len(RECALL_THRESHOLDS), num_areas), ABSENT)
    recall = np.full((num_thresholds, num_areas), ABSENT)
    for a in np.flatnonzero(num_objects):
        needed = np.searchsorted(np.arange(num_objects[a] + 1) / num_objects[a], RECALL_THRESHOLDS)  # objects to find
        precision[:, :, a] = best_from[a][:, np.maximum(needed - 1, 0)]
        recall[:, a] = num_found[a] / num_objects[a]
    return precision, recall


def unpack_lanes(bits: np.ndarray, num_lanes: int) -> np.ndarray:
    """(D,) uint64 -> (D, L) uint8 of 0 and 1."""
    as_bytes = bits.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(as_bytes, axis=1, bitorder="little", count=num_lanes)


def format_numbers(result: CocoResult) -> str:
    """One line for each of the 12 numbers, in the form of pycocotools."""
    low, high = result.iou_thresholds[0], result.iou_thresholds[-1]
    over_all = f"{low:.2f}:{high:.2f}" if len(result.iou_thresholds) > 1 else f"{low:.2f}"
    lines = []
    for name, value in result.numbers.items():
        title = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
        iou = {"AP50": "0.50", "AP75": "0.75"}.get(name, over_all)
        suffix = name.partition("_")[2]
        area = suffix if suffix in result.area_names else result.area_names[0]
        limit = int(suffix) if suffix.isdigit() else result.max_detections[-1]
        lines.append(f" {title} @[ IoU={iou:<9} | area={area:>6s} | maxDets={limit:>3d} ] = {value:0.3f}")
    return "\n".join(lines)


def format_per_iou(result: CocoResult) -> str:
    """One line for each IoU threshold."""
    return "\n".join(f" AP @ IoU={t:.2f} = {value:.4f}" for t, value in result.ap_per_iou.items())
