"""Non-maximum suppression: class-wise, greedy and exact; it stops at `max_detections`.

Specification, over candidates in order of falling score (ties: lower index first):

    keep(i)  iff  no kept j before i has label_j = label_i and IoU(j, i) > iou_threshold

A serial loop over candidates makes NMS slow on a CPU, so this implementation takes them in blocks. The survivors of
earlier blocks suppress candidates of a block (a matrix of IoUs), then the candidates of the block suppress each other
(`_settle`). It stops once enough candidates have survived. The candidates after that, which are most of them at the low
thresholds of mAP, are neither compared nor sorted.

IoU is float32, intersection / union without an epsilon, and the threshold is not rounded before the comparison. This is
the arithmetic of torchvision.ops.nms: pairs exactly on the threshold get the same result. Two boxes without area have
the IoU 0 / 0 and do not suppress each other.

Differs from torchvision.ops.batched_nms: for small sets that function separates the classes by an offset added to the
boxes, which rounds their coordinates and can change the result near the threshold. Coordinates are never changed here.
Non-finite boxes and scores are dropped; torchvision keeps them, or they affect their neighbours.

On a CUDA device kernels.nms_triton computes the same set (kernels.backend).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.nms_triton import batched_nms_triton, select_detections_triton
from structures import Detections

MAX_CANDIDATES = 30_000  # per image, the best ones, as in the public YOLO evaluations
BLOCK = 512  # candidates compared at once: a matrix is 1 MB of float32, and the few in use at a time stay in the cache
MANY = 4096  # batched_nms takes one class after another if more survivors than this may be returned
FIRST_LOCATIONS = 1024  # select_detections takes the best 1,024 locations first, then 4,096, then all


class Candidates(NamedTuple):
    """N candidates, best first: row numbers (N,), boxes_xyxy (N, 4) float32, labels (N,)."""

    rows: Tensor
    boxes_xyxy: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> "Candidates":
        return Candidates(self.rows[index], self.boxes_xyxy[index], self.labels[index])


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
        blocks = (Candidates(block, boxes_xyxy[block], labels[block]) for block in order.split(BLOCK))
        return _suppress(blocks, iou_threshold, max_detections).rows

    order = torch.arange(len(rows), device=rows.device)
    if min(max_detections, len(rows)) <= MANY:
        return rows[walk(order)]
    # With this many survivors, comparing only within a class saves more than stopping early.
    sorted_labels, order = labels.sort(stable=True)
    class_sizes = sorted_labels.unique_consecutive(return_counts=True)[1].tolist()
    keep = torch.cat([walk(rows_of_class) for rows_of_class in order.split(class_sizes)])
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

    A candidate is a pair (location, class) with a score above `score_threshold`: every such pair with `multi_label`, as
    for mAP, or only the best class of a location without it. The best `max_candidates` of an image (ties: location,
    then class) are suppressed as in batched_nms. Detections keep the dtypes of the inputs. B, A and K may be 0;
    max_candidates is at least 1.
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
    best = scores.amax(1)  # (A,), nan or inf if a class is
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
                yield Candidates(block, boxes_xyxy[location].float(), labels)

    pairs, _, labels = _suppress(blocks(), iou_threshold, max_detections)
    location = pairs // columns
    return Detections(boxes_xyxy[location], scores[location, labels], labels)


def _best_first(scores: Tensor, best: Tensor, score_threshold: float, max_candidates: int) -> Iterator[Tensor]:
    """Pairs of finite scores (A, C) above the threshold, as location * C + column, best first, in a few growing pieces.

    best (A,): the highest score of each location. The best n pairs lie in the n best locations, so a piece consists of
    the pairs above the best score of the n-th location. Pieces are disjoint score ranges; a caller that stops early has
    not sorted the rest.
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
            may_enter = values >= values.topk(max_candidates).values[-1]  # includes all ties of the last one
            chosen, values = chosen[may_enter], values[may_enter]
        chosen = chosen[values.sort(stable=True, descending=True).indices][:max_candidates]
        yield rows[chosen // columns] * columns + chosen % columns
        max_candidates -= len(chosen)
        if floor == score_threshold or max_candidates == 0:
            return
        ceiling, count = floor, (4 * count if count == FIRST_LOCATIONS else num_locations)


def _suppress(blocks: Iterable[Candidates], iou_threshold: float, max_detections: int) -> Candidates:
    """Greedy suppression over blocks of candidates, best first -> the first M <= max_detections survivors, best first.

    There is at least one block, which may be empty.
    """
    threshold = _float32_at_most(iou_threshold)
    kept: Candidates | None = None
    for candidates in blocks:
        kept = kept or candidates.take(slice(0))
        if len(kept.rows) >= max_detections:
            break
        for start in range(0, len(kept.rows), BLOCK):
            is_free = _suppression(kept.take(slice(start, start + BLOCK)), candidates, threshold).amax(0) == 0
            candidates = candidates.take(is_free)
        survivors = candidates.take(_settle(_suppression(candidates, candidates, threshold)))
        kept = Candidates(*(torch.cat(columns) for columns in zip(kept, survivors)))
    assert kept is not None
    return kept.take(slice(max_detections))


def _suppression(a: Candidates, b: Candidates, threshold: float) -> Tensor:
    """N and M candidates -> (N, M) float32: 1 if their labels are equal and their IoU is above the threshold, else 0.

    The comparisons are in place, so the result is float: PyTorch vectorises them, and a bool result takes seven times
    as long.
    """
    ax1, ay1, ax2, ay2 = a.boxes_xyxy.T.contiguous()[:, :, None]  # (N, 1) each
    bx1, by1, bx2, by2 = b.boxes_xyxy.T.contiguous()[:, None]  # (1, M) each
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)  # (N, M)
    intersection = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0).mul_(width)
    union = torch.add((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)).sub_(intersection)
    is_same = torch.sub(a.labels[:, None].float(), b.labels.float()).eq_(0)
    return intersection.div_(union).gt_(threshold).mul_(is_same)  # gt_ turns the nan of 0 / 0 into 0


def _settle(suppression: Tensor) -> Tensor:
    """The survivors (N,) bool of N candidates, best first, given which would suppress which (N, N).

    keep(i) = not any_{j < i} (keep(j) and suppression(j, i)) has one solution. Iterated from "all survive", candidate i
    is correct after as many rounds as its longest chain of suppressors has members, usually fewer than ten. A round
    without a change has reached the solution.
    """
    matrix = suppression.triu(diagonal=1)
    keep = matrix.new_ones(len(matrix))
    while True:
        update = (keep @ matrix).eq_(0)
        if torch.equal(update, keep):
            return keep.bool()
        keep = update


def _float32_at_most(value: float) -> float:
    """The largest float32 <= value: a float32 is above it exactly if it is above `value`."""
    rounded = torch.tensor(value, dtype=torch.float32)
    return (rounded if rounded.item() <= value else rounded.nextafter(torch.tensor(-torch.inf))).item()
