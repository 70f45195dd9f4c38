"""Matching that the metrics share: overlapping pairs of one group, and COCO's greedy assignment for many settings.

COCO's rule (pycocotools, cocoeval.py `evaluateImg`), for one image, class, area range and IoU threshold: detections
choose in order of falling score. Each takes, among the objects of the group that are still free, the one of highest
IoU at or above the threshold (of equal ones the last). It takes an ignored object (crowd, or an area outside of the
range) only if no object that counts is left for it; then the detection is ignored too. A crowd is never used up.

The rule is sequential within a group (image and class), but groups are independent. A "lane" is one pair of area range
and threshold; lanes differ only in the pairs that they allow. So one uint64 holds all lanes of a box, one bit each, and
step r of all groups runs as a few operations on whole arrays. Only pairs that overlap enough are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.tables import DetectionTable, GroundTruth

PAIRS_AT_ONCE = 1 << 17  # bounds the memory of IoU: about 20 float64 arrays of this length


@dataclass(frozen=True)
class Pairs:
    """P overlapping pairs, sorted by detection, then object.

    detection (P,), object (P,): rows of the given arrays. overlap (P,): float64.
    """

    detection: np.ndarray
    object: np.ndarray
    overlap: np.ndarray


def overlapping_pairs(
    *,
    boxes_xyxy: np.ndarray,
    box_area: np.ndarray,
    group: np.ndarray,
    object_boxes_xyxy: np.ndarray,
    object_area: np.ndarray,
    object_group: np.ndarray,
    object_is_crowd: np.ndarray,
    min_overlap: float,
) -> Pairs:
    """All pairs within a group whose overlap is above 0 and at least `min_overlap`.

        overlap = intersection / (area + object_area - intersection);   for a crowd: intersection / area

    boxes_xyxy (D, 4), box_area (D,) and group (D,) int64 describe the detections; the other arrays describe the
    objects, which are sorted by group. Time and result grow with the number of pairs inside groups, working memory with
    PAIRS_AT_ONCE (or the pairs of a single detection, if they are more).
    """
    first = np.searchsorted(object_group, group, side="left")
    count = np.searchsorted(object_group, group, side="right") - first
    kept = []
    for rows in _row_chunks(count):
        detection, obj, overlap = _pairs_of_rows(
            rows, first, count, boxes_xyxy, box_area, object_boxes_xyxy, object_area, object_is_crowd
        )
        is_kept = overlap >= min_overlap
        kept.append((detection[is_kept], obj[is_kept], overlap[is_kept]))
    if not kept:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Pairs(*(np.concatenate(column) for column in zip(*kept)))


def _row_chunks(count: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with count > 0, in runs of about PAIRS_AT_ONCE pairs."""
    rows = np.flatnonzero(count)
    total = np.cumsum(count[rows])
    limits = np.searchsorted(total, np.arange(PAIRS_AT_ONCE, total[-1] if len(total) else 0, PAIRS_AT_ONCE))
    return (chunk for chunk in np.split(rows, limits) if len(chunk))


def _pairs_of_rows(
    rows: np.ndarray,
    first: np.ndarray,
    count: np.ndarray,
    boxes: np.ndarray,
    area: np.ndarray,
    object_boxes: np.ndarray,
    object_area: np.ndarray,
    object_is_crowd: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """detection, object and overlap of all pairs of the detections `rows` that intersect."""
    repeats = count[rows]
    offset = np.cumsum(repeats) - repeats
    detection = np.repeat(rows, repeats)
    obj = np.arange(len(detection)) + np.repeat(first[rows] - offset, repeats)
    a, b = boxes.take(detection, axis=0), object_boxes.take(obj, axis=0)  # (P, 4)
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    touching = np.flatnonzero((width > 0) & (height > 0))
    detection, obj = detection[touching], obj[touching]
    intersection = width[touching] * height[touching]
    union = np.where(
        object_is_crowd[obj], area[detection], area[detection] + object_area[obj] - intersection
    )  # this order of operations is pycocotools': the last bit decides at a threshold
    return detection, obj, intersection / union


@dataclass(frozen=True)
class Matches:
    """The result for each detection in every lane. Bit a * T + t is the lane of area range a and IoU threshold t.

    rows (D,): the rows of the detection table that were matched (the best `max_detections` of each image and class),
        sorted by class, image and falling score.
    rank (D,): position 0.. of a detection within its image and class.
    true_positive (D,) uint64, ignored (D,) uint64: bits. A detection with neither bit is a false positive.
    num_objects (K, A) int64: objects that count, per class and area range.
    num_lanes: A * T.
    """

    rows: np.ndarray
    rank: np.ndarray
    true_positive: np.ndarray
    ignored: np.ndarray
    num_objects: np.ndarray
    num_lanes: int


def match(
    ground_truth: GroundTruth,
    detections: DetectionTable,
    *,
    iou_thresholds: np.ndarray,
    area_ranges: Sequence[tuple[float, float]],
    max_detections: int,
    ignore_difficult: bool = False,
) -> Matches:
    """COCO's greedy assignment (see the module) within every image and class.

    iou_thresholds (T,): rising. area_ranges: A pairs, both ends included. A * T is at most 64.
    ignore_difficult: ignore objects marked difficult, like objects outside of the area range.
    """
    num_areas, num_thresholds, num_classes = len(area_ranges), len(iou_thresholds), len(ground_truth.names)
    num_lanes = num_areas * num_thresholds
    if not 1 <= num_lanes <= 64 or np.any(np.diff(iou_thresholds) <= 0) or iou_thresholds[0] <= 0:
        raise ValueError(f"{num_areas} area ranges and IoU thresholds {iou_thresholds}: expected rising, 1..64 lanes")
    detections.check(ground_truth)

    object_group = ground_truth.labels * ground_truth.num_images + ground_truth.image
    object_rows = np.argsort(object_group, kind="stable")
    rows, group, rank = _ranked_rows(ground_truth, detections, max_detections)
    is_crowd = ground_truth.crowd[object_rows]
    object_area = ground_truth.area[object_rows]
    pairs = overlapping_pairs(
        boxes_xyxy=detections.boxes_xyxy[rows],
        box_area=detections.box_area[rows],
        group=group,
        object_boxes_xyxy=ground_truth.boxes_xyxy[object_rows],
        object_area=ground_truth.box_area[object_rows],
        object_group=object_group[object_rows],
        object_is_crowd=is_crowd,
        min_overlap=min(iou_thresholds[0], 1 - 1e-10),
    )

    never_counts = is_crowd | (ground_truth.difficult[object_rows] & ignore_difficult)
    counts = _in_range(object_area, area_ranges) & ~never_counts[:, None]  # (N, A)
    lanes_of_counts = _spread(counts, num_thresholds)
    true_positive, ignored = _assign(
        pairs, group, lanes_of_counts, is_crowd, np.minimum(iou_thresholds, 1 - 1e-10), num_areas, len(rows)
    )
    outside = ~_in_range(detections.box_area[rows], area_ranges)  # an unmatched detection out of range is ignored
    ignored |= _spread(outside, num_thresholds) & ~true_positive

    num_objects = np.zeros((num_classes, num_areas), dtype=np.int64)
    np.add.at(num_objects, ground_truth.labels[object_rows], counts)
    return Matches(rows, rank, true_positive, ignored, num_objects, num_lanes)


def _ranked_rows(
    ground_truth: GroundTruth, detections: DetectionTable, max_detections: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows, group and rank of the best detections of each group, sorted by group and falling score."""
    group = detections.labels * ground_truth.num_images + detections.image
    by_score = np.argsort(-detections.scores, kind="stable")
    rows = by_score[np.argsort(group[by_score], kind="stable")]
    group = group[rows]
    rank = position_in_run(group)
    kept = rank < max_detections
    return rows[kept], group[kept], rank[kept]


def position_in_run(keys: np.ndarray) -> np.ndarray:
    """(N,) sorted keys -> (N,) int64: 0 at the first of each run of equal keys, then 1, 2, ..."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(keys)])
    return np.arange(len(keys)) - np.repeat(starts, lengths)


def _in_range(area: np.ndarray, area_ranges: Sequence[tuple[float, float]]) -> np.ndarray:
    """(N,) -> (N, A) bool."""
    low, high = np.asarray(area_ranges, dtype=np.float64).T  # (A,) each
    return ~((area[:, None] < low) | (area[:, None] > high))


def _spread(flags: np.ndarray, num_thresholds: int) -> np.ndarray:
    """(N, A) bool -> (N,) uint64: flag a fills all T bits of area range a."""
    bits = np.zeros(len(flags), dtype=np.uint64)
    for a in range(flags.shape[1]):
        block = np.uint64(((1 << num_thresholds) - 1) << (a * num_thresholds))
        bits |= np.where(flags[:, a], block, np.uint64(0))
    return bits


def _assign(
    pairs: Pairs,
    group: np.ndarray,
    lanes_of_counts: np.ndarray,
    is_crowd: np.ndarray,
    iou_thresholds: np.ndarray,
    num_areas: int,
    num_detections: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the rule: the lanes where each detection took an object that counts, and where it took an ignored one.

    lanes_of_counts (N,) uint64: the lanes in which each object counts.
    """
    num_thresholds = len(iou_thresholds)
    num_reached = np.searchsorted(iou_thresholds, pairs.overlap, side="right")  # thresholds that each pair reaches
    lowest = sum(1 << (a * num_thresholds) for a in range(num_areas))  # the lowest threshold of every area range
    lanes_of_number = [((1 << n) - 1) * lowest for n in range(num_thresholds + 1)]  # the n lowest of every range
    reached = np.array(lanes_of_number, dtype=np.uint64)[num_reached]
    # The first pass offers the objects that count, the second the ignored ones, each by falling overlap, last first.
    order = np.lexsort((-pairs.object, -pairs.overlap, pairs.detection))
    detection, obj, reached = pairs.detection[order], pairs.object[order], reached[order]
    lanes = np.stack((reached & lanes_of_counts[obj], reached & ~lanes_of_counts[obj]))  # (2, P): the two passes
    pass_number, pair = np.nonzero(lanes)
    order = np.argsort(2 * detection[pair] + pass_number, kind="stable")
    pass_number, pair = pass_number[order], pair[order]
    lanes, detection, obj = lanes[pass_number, pair], detection[pair], obj[pair]

    step = position_in_run(group[detection])
    by_step = np.argsort(step, kind="stable")
    lanes, detection, obj, pass_number = lanes[by_step], detection[by_step], obj[by_step], pass_number[by_step]
    uses_up = np.where(is_crowd[obj], np.uint64(0), ~np.uint64(0))
    taken = np.zeros(len(is_crowd), dtype=np.uint64)
    matched = np.zeros((2, num_detections), dtype=np.uint64)  # by pass
    done = np.zeros(num_detections, dtype=np.uint64)
    begin = 0
    for end in np.cumsum(np.bincount(step)) if len(step) else ():
        now = slice(begin, end)  # one step of every group: no detection and no object twice
        d, g = detection[now], obj[now]
        done_before, taken_before = done[d], taken[g]
        new = lanes[now] & ~(done_before | taken_before)
        done[d] = done_before | new
        taken[g] = taken_before | (new & uses_up[now])
        matched[pass_number[now], d] |= new
        begin = end
    return matched[0], matched[1]
