"""Non-maximum suppression: class-wise, greedy, exact, and no further than `max_detections`.

Specification, over candidates in order of falling score (equal scores: lower index first):

    keep(i)  iff  no kept j before i has label_j = label_i and IoU(j, i) > iou_threshold

computed in pure PyTorch. Serial loops over candidates are what makes NMS slow on a CPU, so the order is walked in
blocks: a block first loses what the survivors of earlier blocks suppress (a matrix of IoUs), then settles itself
(`_settle`), and the walk ends once enough candidates have survived. Candidates far down the order, most of them at
the thresholds mAP is measured at, are neither compared nor even sorted.

IoU is float32, intersection / union without an epsilon, and the threshold is compared as the real number it is:
the arithmetic of torchvision.ops.nms, so that pairs exactly on the threshold fall on the same side. Two boxes without
area have the IoU 0 / 0 and do not suppress each other.

Differs from torchvision.ops.batched_nms, which for small sets moves the classes apart by an offset added to the
boxes: that rounds their coordinates, and a pair near the threshold can fall on the other side. Here coordinates are
never touched. Non-finite boxes and scores are dropped, there they are kept or spoil their neighbours.

On a CUDA device kernels.nms_triton computes the same set, see kernels.backend.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.nms_triton import batched_nms_triton, select_detections_triton
from structures import Detections

MAX_CANDIDATES = 30_000  # per image: the best of them enter suppression, as in the public YOLO evaluations
BLOCK = 512  # candidates compared at once: a matrix is 1 MB of float32, and the few alive at a time stay in the cache
MANY = 4096  # wanted survivors from which batched_nms takes one class after another
FIRST_LOCATIONS = 1024  # where select_detections looks first, then four times as many, then everywhere

Candidates = tuple[Tensor, Tensor, Tensor]  # row numbers (N,), boxes_xyxy (N, 4) float32, labels (N,); best first


@torch.no_grad()
def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Indices (M,) int64 of the survivors, best first, M <= max_detections.

    boxes_xyxy (N, 4), scores (N,) and labels (N,), integers of magnitude below 2^24; N may be 0. Boxes suppress only
    boxes of their own label. Rows with a non-finite score or corner are never returned.
    """
    if use_triton("batched_nms", boxes_xyxy, scores, labels):
        return batched_nms_triton(boxes_xyxy, scores, labels, _float32_at_most(iou_threshold), max_detections)
    is_finite = boxes_xyxy.isfinite().all(1) & scores.isfinite()
    rows = is_finite.nonzero().squeeze(1)
    rows = rows[scores[rows].sort(stable=True, descending=True).indices]  # best first
    boxes_xyxy, labels = boxes_xyxy[rows].float(), labels[rows]

    def walk(order: Tensor) -> Tensor:
        blocks = ((block, boxes_xyxy[block], labels[block]) for block in order.split(BLOCK))
        return _suppress(blocks, iou_threshold, max_detections)[0]

    order = torch.arange(len(rows), device=rows.device)
    if min(max_detections, len(rows)) <= MANY:
        return rows[walk(order)]
    # So many survivors are wanted that stopping early gains less than comparing each class with itself alone.
    labels_in_turn, order = labels.sort(stable=True)
    class_sizes = labels_in_turn.unique_consecutive(return_counts=True)[1].tolist()
    keep = torch.cat([walk(of_class) for of_class in order.split(class_sizes)])
    return rows[keep.sort().values[:max_detections]]


@torch.no_grad()
def select_detections(
    boxes_xyxy: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    multi_label: bool = True,
    max_candidates: int = MAX_CANDIDATES,
) -> list[Detections]:
    """Dense predictions boxes_xyxy (B, A, 4) and scores (B, A, K) -> the best detections of each of the B images.

    A candidate is a pair (location, class) whose score is above `score_threshold`: every such pair with
    `multi_label` (how mAP is measured), only the location's best class without. The best `max_candidates` of an
    image, ties by location and then class, are suppressed as in batched_nms; detections keep the given dtypes.
    B, A and K may be 0, max_candidates is at least 1.
    """
    unsupported = "scores are float64, expected float32 or narrower" if scores.dtype == torch.float64 else None
    if use_triton("select_detections", boxes_xyxy, scores, unsupported=unsupported) and scores.numel():
        threshold, limits = _float32_at_most(iou_threshold), (max_detections, multi_label, max_candidates)
        return select_detections_triton(boxes_xyxy, scores, score_threshold, threshold, *limits)
    return [
        _select(*image, score_threshold, iou_threshold, max_detections, multi_label, max_candidates)
        for image in zip(boxes_xyxy, scores)
    ]


def _select(
    boxes_xyxy: Tensor,
    scores: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
    multi_label: bool,
    max_candidates: int,
) -> Detections:
    """One image of select_detections: (A, 4), (A, K)."""
    if scores.numel() == 0:
        return Detections(boxes_xyxy[:0], scores.flatten(), torch.zeros(0, dtype=torch.int64, device=scores.device))
    best = scores.amax(1)  # (A,), nan or inf where any class is
    if not (boxes_xyxy.isfinite().all() and best.isfinite().all()):
        scores = scores.masked_fill(~(boxes_xyxy.isfinite().all(1, keepdim=True) & scores.isfinite()), -torch.inf)
        best = scores.amax(1)
    pair_scores = scores if multi_label else best[:, None]  # (A, C)
    columns = pair_scores.shape[1]

    def blocks() -> Iterator[Candidates]:
        for pairs in _best_first(pair_scores, best, score_threshold, max_candidates):
            for block in pairs.split(BLOCK):
                location = block // columns
                labels = block % columns if multi_label else scores[location].argmax(1)
                yield block, boxes_xyxy[location].float(), labels

    pairs, _, labels = _suppress(blocks(), iou_threshold, max_detections)
    location = pairs // columns
    return Detections(boxes_xyxy[location], scores[location, labels], labels)


def _best_first(scores: Tensor, best: Tensor, score_threshold: float, max_candidates: int) -> Iterator[Tensor]:
    """Pairs of finite scores (A, C) above the threshold, as location * C + column, best first, in a few growing pieces.

    best (A,): each location's highest score. The best n pairs lie in the n best locations, so a piece takes the pairs
    above the n-th location's best: a reader who stops early has not sorted the rest. Pieces are disjoint score ranges.
    """
    num_locations, columns = scores.shape
    ceiling, count = torch.inf, FIRST_LOCATIONS
    while True:
        floor = score_threshold
        if count < num_locations:
            floor = max(floor, best.topk(count).values[-1].item())
        rows = (best > floor).nonzero().squeeze(1)
        in_rows = scores[rows].flatten()
        chosen = ((in_rows > floor) & (in_rows <= ceiling)).nonzero().squeeze(1)
        values = in_rows[chosen]
        if len(chosen) > max_candidates:
            may_enter = values >= values.topk(max_candidates).values[-1]  # with all ties of the last
            chosen, values = chosen[may_enter], values[may_enter]
        chosen = chosen[values.sort(stable=True, descending=True).indices][:max_candidates]
        yield rows[chosen // columns] * columns + chosen % columns
        max_candidates -= len(chosen)
        if floor == score_threshold or max_candidates == 0:
            return
        ceiling, count = floor, (4 * count if count == FIRST_LOCATIONS else num_locations)


def _suppress(blocks: Iterable[Candidates], iou_threshold: float, max_detections: int) -> Candidates:
    """Greedy suppression over blocks of candidates, best first: those that survive, best first, M <= max_detections.

    There is at least one block, which may be empty.
    """
    threshold = _float32_at_most(iou_threshold)
    kept: Candidates = ()
    for candidates in blocks:
        kept = kept or tuple(column[:0] for column in candidates)
        if len(kept[0]) >= max_detections:
            break
        for start in range(0, len(kept[0]), BLOCK):
            _, boxes, labels = (column[start : start + BLOCK] for column in kept)
            is_free = _suppression(boxes, labels, *candidates[1:], threshold).amax(0) == 0
            candidates = tuple(column[is_free] for column in candidates)
        _, boxes, labels = candidates
        is_kept = _settle(_suppression(boxes, labels, boxes, labels, threshold))
        kept = tuple(torch.cat((old, new[is_kept])) for old, new in zip(kept, candidates))
    return tuple(column[:max_detections] for column in kept)


def _suppression(a: Tensor, a_labels: Tensor, b: Tensor, b_labels: Tensor, threshold: float) -> Tensor:
    """(N, 4), (N,), (M, 4), (M,) -> (N, M) float32: 1 where labels are equal and IoU is above the threshold, else 0.

    Comparisons are in place, hence float: PyTorch vectorises those, and is seven times slower at making a bool.
    """
    ax1, ay1, ax2, ay2 = a.T.contiguous()[:, :, None]  # (N, 1) each
    bx1, by1, bx2, by2 = b.T.contiguous()[:, None]  # (1, M) each
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)  # (N, M)
    intersection = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0).mul_(width)
    union = torch.add((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)).sub_(intersection)
    is_same = torch.sub(a_labels[:, None].float(), b_labels.float()).eq_(0)
    return intersection.div_(union).gt_(threshold).mul_(is_same)  # gt_ makes the nan of 0 / 0 a zero


def _settle(suppression: Tensor) -> Tensor:
    """Who survives among N candidates in order, given who would suppress whom (N, N): (N,) bool.

    keep(i) = not any_{j < i} keep(j) and suppression(j, i) has one solution. Iterating it from "all survive" makes
    candidate i right after as many rounds as its longest chain of suppressors, usually fewer than ten; a round that
    changes nothing has found the solution.
    """
    matrix = suppression.triu(diagonal=1)
    keep = matrix.new_ones(len(matrix))
    while True:
        update = (keep @ matrix).eq_(0)
        if torch.equal(update, keep):
            return keep.bool()
        keep = update


def _float32_at_most(value: float) -> float:
    """The largest float32 <= value. A float32 is above `value` exactly when it is above this."""
    rounded = torch.tensor(value, dtype=torch.float32)
    return (rounded if rounded.item() <= value else rounded.nextafter(torch.tensor(-torch.inf))).item()
