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
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from structures import Detections

MAX_CANDIDATES = 30_000  # per image: the best of them enter suppression, as in the public YOLO evaluations
BLOCK = 512  # candidates compared at once: three 1 MB float32 matrices, which stay in the cache


@torch.no_grad()
def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Indices (M,) int64 of the survivors, best first, M <= max_detections.

    boxes_xyxy (N, 4), scores (N,) and labels (N,) of any integer type; N may be 0. Boxes suppress only boxes of
    their own label. Rows with a non-finite score or corner are never returned.
    """
    is_finite = boxes_xyxy.isfinite().all(1) & scores.isfinite()
    rows = is_finite.nonzero().squeeze(1)
    order = rows[scores[rows].sort(stable=True, descending=True).indices]
    return _suppress(boxes_xyxy.float(), labels, order.split(BLOCK), iou_threshold, max_detections)


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
    image, ties by location and then class, go through batched_nms. Scores come back in their own type.
    """
    found = []
    for boxes, image_scores in zip(boxes_xyxy, scores):
        num_classes = image_scores.shape[1]
        image_scores = image_scores.masked_fill(~boxes.isfinite().all(1, keepdim=True), -torch.inf)
        if not multi_label:
            is_best = torch.zeros_like(image_scores, dtype=torch.bool)
            is_best.scatter_(1, image_scores.argmax(1, keepdim=True), True)
            image_scores = image_scores.masked_fill(~is_best, -torch.inf)
        flat = image_scores.flatten()
        candidates = ((flat > score_threshold) & flat.isfinite()).nonzero().squeeze(1)
        order = candidates[flat[candidates].sort(stable=True, descending=True).indices][:max_candidates]
        locations, labels = order // num_classes, order % num_classes
        boxes = boxes[locations]
        blocks = torch.arange(len(order), device=order.device).split(BLOCK)
        keep = _suppress(boxes.float(), labels, blocks, iou_threshold, max_detections)
        found.append(Detections(boxes[keep], flat[order[keep]], labels[keep]))
    return found


def _suppress(
    boxes_xyxy: Tensor, labels: Tensor, blocks: Iterable[Tensor], iou_threshold: float, max_detections: int
) -> Tensor:
    """Greedy suppression over blocks of row numbers, best first; the rows that survive (M,), best first."""
    threshold = _float32_at_most(iou_threshold)
    keep = labels.new_zeros(0, dtype=torch.int64)
    for block in blocks:
        if len(keep) >= max_detections:
            break
        for earlier in keep.split(BLOCK):
            is_suppressed = _suppresses(
                boxes_xyxy[earlier], labels[earlier], boxes_xyxy[block], labels[block], threshold
            )
            block = block[~is_suppressed.any(0)]
        within = _suppresses(boxes_xyxy[block], labels[block], boxes_xyxy[block], labels[block], threshold)
        keep = torch.cat((keep, block[_settle(within)]))
    return keep[:max_detections]


def _suppresses(a: Tensor, a_labels: Tensor, b: Tensor, b_labels: Tensor, threshold: float) -> Tensor:
    """(N, 4), (N,), (M, 4), (M,) -> (N, M) bool: same label, and IoU above the threshold."""
    ax1, ay1, ax2, ay2 = a[:, :, None].unbind(1)  # (N, 1) each
    bx1, by1, bx2, by2 = b.T.contiguous()[:, None]  # (1, M) each
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)  # (N, M)
    intersection = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0).mul_(width)
    union = torch.add((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)).sub_(intersection)
    return (intersection.div_(union) > threshold).logical_and_(a_labels[:, None] == b_labels)


def _settle(suppresses: Tensor) -> Tensor:
    """Who survives among N candidates in order, given who would suppress whom (N, N): (N,) bool.

    keep(i) = not any_{j < i} keep(j) and suppresses(j, i) has one solution. Iterating it from "all survive" makes
    candidate i right after as many rounds as its longest chain of suppressors, usually fewer than ten; a round that
    changes nothing has found the solution.
    """
    matrix = suppresses.triu(diagonal=1).float()
    keep = matrix.new_ones(len(matrix))
    while True:
        update = (keep @ matrix == 0).float()
        if torch.equal(update, keep):
            return keep.bool()
        keep = update


def _float32_at_most(value: float) -> float:
    """The largest float32 <= value. A float32 is above `value` exactly when it is above this."""
    rounded = torch.tensor(value, dtype=torch.float32)
    return (rounded if rounded.item() <= value else rounded.nextafter(torch.tensor(-torch.inf))).item()
