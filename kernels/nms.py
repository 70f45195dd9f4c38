"""Non-maximum suppression: class-wise, greedy and exact; it stops at `max_detections`.

Specification, over candidates in order of falling score (ties: lower index first):

    keep(i)  iff  no kept j before i has label_j = label_i and IoU(j, i) > iou_threshold

A serial loop over candidates makes NMS slow on a CPU, so this implementation takes them in blocks. The survivors of
earlier blocks suppress candidates of a block (a matrix of IoUs), then the candidates of the block suppress each other
(`_survivors`). It stops once enough candidates have survived. The candidates after that, which are most of them at the
low thresholds of mAP, are neither compared nor sorted. Few candidates on a CPU are compared class by class in numpy
(`_keep_by_class`): there the number of calls counts, and numpy's are cheaper than PyTorch's.

IoU is float32, intersection / union without an epsilon, and the threshold is not rounded before the comparison. This is
the arithmetic of torchvision.ops.nms: pairs exactly on the threshold get the same result. Two boxes without area have
the IoU 0 / 0 and do not suppress each other.

Differs from torchvision.ops.batched_nms: for small sets that function separates the classes by an offset added to the
boxes, which rounds their coordinates and can change the result near the threshold. Coordinates are never changed here.
Non-finite boxes and scores are dropped; torchvision keeps them, or they affect their neighbours.

On a CUDA device kernels.nms_triton computes the same set (kernels.backend).
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.nms_triton import batched_nms_triton, select_detections_triton
from structures import Detections

MAX_CANDIDATES = 30_000  # per image, the best ones, as in the public YOLO evaluations
BLOCK = 512  # candidates compared at once: a matrix is 1 MB of float32, and the few in use at a time stay in the cache
FEW = 1024  # up to this many candidates are one block, in which most of the survivors are found
MAX_BAND = 256  # a block whose largest class is larger is compared as one matrix, not class by class
BAND_CHUNK = 1 << 16  # pairs compared at once class by class
MANY = 4096  # batched_nms takes one class after another if more survivors than this may be returned
FIRST_LOCATIONS = 1024  # select_detections takes the best 1,024 locations first, then 4,096, then all


class Candidates(NamedTuple):
    """N candidates, best first: row numbers (N,), boxes_xyxy (N, 4) float32, labels (N,)."""

    rows: Tensor
    boxes_xyxy: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> "Candidates":
        """Those that a mask, a slice or positions choose."""
        return Candidates(self.rows[index], self.boxes_xyxy[index], self.labels[index])


@torch.no_grad()
def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_detections: int
) -> Tensor:
    """Indices (M,) int64 of the survivors, best first, M <= max_detections.

    boxes_xyxy (N, 4), scores (N,) and labels (N,), integers of magnitude below 2^24; N may be 0. Boxes suppress only
    boxes of their own label. Rows with a non-finite score or corner are never returned. iou_threshold: 0 or more.
    """
    if use_triton("batched_nms", boxes_xyxy, scores, labels):
        return batched_nms_triton(boxes_xyxy, scores, labels, _float32_at_most(iou_threshold), max_detections)
    threshold = _float32_at_most(iou_threshold)
    is_few = len(scores) <= FEW and boxes_xyxy.device.type == "cpu"
    if is_few and boxes_xyxy.dtype == scores.dtype == torch.float32:
        few = _nms_of_few(boxes_xyxy.detach().numpy(), scores.detach().numpy(), labels.float().numpy(), threshold)
        if few is not None:
            return torch.from_numpy(few[:max_detections])
    rows = scores.sort(stable=True, descending=True).indices  # best first
    if not math.isfinite((boxes_xyxy.sum() + scores.sum()).item()):  # finite numbers may add up to infinity, too
        is_finite = boxes_xyxy.isfinite().all(1) & scores.isfinite()
        rows = rows[is_finite[rows]]
    boxes_xyxy, labels = boxes_xyxy.index_select(0, rows).float(), labels.index_select(0, rows)
    if len(rows) <= FEW:
        return rows.index_select(0, _survivors(boxes_xyxy, labels, threshold)[:max_detections])
    if min(max_detections, len(rows)) <= MANY:
        blocks = (Candidates(*part) for part in zip(rows.split(BLOCK), boxes_xyxy.split(BLOCK), labels.split(BLOCK)))
        return _suppress(blocks, threshold, max_detections).rows
    # With this many survivors, comparing only within a class saves more than stopping early.
    sorted_labels, order = labels.sort(stable=True)
    class_sizes = sorted_labels.unique_consecutive(return_counts=True)[1].tolist()
    if max(class_sizes) <= MAX_BAND:
        return rows[_survivors(boxes_xyxy, labels, threshold)[:max_detections]]

    def walk(order: Tensor) -> Tensor:
        blocks = (Candidates(block, boxes_xyxy[block], labels[block]) for block in order.split(BLOCK))
        return _suppress(blocks, threshold, max_detections).rows

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
    if not math.isfinite((boxes_xyxy.sum() + best.amax()).item()):  # finite numbers may add up to infinity, too
        scores = scores.masked_fill(~(boxes_xyxy.isfinite().all(1, keepdim=True) & scores.isfinite()), -torch.inf)
        best = scores.amax(1)

    def blocks() -> Iterator[Candidates]:
        pair_scores = scores if multi_label else best[:, None]  # (A, C)
        for locations, columns in _best_first(pair_scores, best, score_threshold, max_candidates):
            size = FEW if len(locations) <= FEW else BLOCK
            for location, column in zip(locations.split(size), columns.split(size)):
                labels = column if multi_label else scores.index_select(0, location).argmax(1)
                yield Candidates(location, boxes_xyxy.index_select(0, location).float(), labels)

    location, _, labels = _suppress(blocks(), _float32_at_most(iou_threshold), max_detections)
    return Detections(boxes_xyxy.index_select(0, location), scores[location, labels], labels)


def _best_first(
    scores: Tensor, best: Tensor, score_threshold: float, max_candidates: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of finite scores (A, C) above the threshold, (location, column), best first, in a few growing pieces.

    best (A,): the highest score of each location. The best n pairs lie in the n best locations, so a piece consists of
    the pairs above the best score of the n-th location. Pieces are disjoint score ranges; a caller that stops early has
    not sorted the rest.
    """
    columns = scores.shape[1]
    above = (best > score_threshold).nonzero().squeeze(1)  # the locations with a pair above the threshold
    best = best.index_select(0, above)
    ceiling, count = torch.inf, FIRST_LOCATIONS
    while True:
        floor, rows = score_threshold, above
        if count < len(above):
            floor = best.topk(count).values[-1].item()
            rows = above[best > floor]
        in_rows = scores.index_select(0, rows).flatten()
        is_chosen = in_rows > floor
        chosen = (is_chosen if ceiling == torch.inf else is_chosen & (in_rows <= ceiling)).nonzero().squeeze(1)
        values = in_rows.index_select(0, chosen)
        if len(chosen) > max_candidates:
            may_enter = values >= values.topk(max_candidates).values[-1]  # includes all ties of the last one
            chosen, values = chosen[may_enter], values[may_enter]
        chosen = chosen.index_select(0, values.sort(stable=True, descending=True).indices)[:max_candidates]
        yield rows.index_select(0, chosen // columns), chosen % columns
        max_candidates -= len(chosen)
        if count >= len(above) or max_candidates == 0:
            return
        ceiling, count = floor, (4 * count if count == FIRST_LOCATIONS else len(above))


def _suppress(blocks: Iterable[Candidates], threshold: float, max_detections: int) -> Candidates:
    """Greedy suppression over blocks of candidates, best first -> the first M <= max_detections survivors, best first.

    There is at least one block, which may be empty.
    """
    kept: Candidates | None = None
    for candidates in blocks:
        if kept is not None and len(kept.rows) >= max_detections:
            break
        if kept is not None:
            for start in range(0, len(kept.rows), BLOCK):
                is_free = _suppression(kept.take(slice(start, start + BLOCK)), candidates, threshold).amax(0) == 0
                candidates = candidates.take(is_free)
        survivors = candidates.take(_survivors(candidates.boxes_xyxy, candidates.labels, threshold))
        kept = survivors if kept is None else Candidates(*(torch.cat(columns) for columns in zip(kept, survivors)))
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


def _nms_of_few(boxes_xyxy: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray | None:
    """batched_nms without a limit, in numpy, whose calls take half the time of PyTorch's, which is most of it for few
    candidates. None where _keep_by_class is None.
    """
    with np.errstate(all="ignore"):
        rows = np.argsort(-scores, kind="stable")
        if not math.isfinite(boxes_xyxy.sum() + scores.sum()):
            rows = rows[(np.isfinite(boxes_xyxy).all(1) & np.isfinite(scores))[rows]]
        keep = _keep_by_class(boxes_xyxy[rows], labels[rows], threshold)
    return None if keep is None else rows[keep]


def _survivors(boxes_xyxy: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Positions (M,), ascending, of the candidates that survive each other: (N, 4) and (N,), best first; N may be 0.

    On a CPU class by class, where no class is large; else as one matrix, or block by block.
    """
    keep = None
    if boxes_xyxy.device.type == "cpu":
        with np.errstate(all="ignore"):
            keep = _keep_by_class(boxes_xyxy.numpy(), labels.float().numpy(), threshold)  # no bfloat16
    if keep is not None:
        return torch.from_numpy(np.flatnonzero(keep))
    count = len(labels)
    candidates = Candidates(torch.arange(count, device=labels.device), boxes_xyxy, labels)
    if count > BLOCK:
        blocks = (candidates.take(slice(start, start + BLOCK)) for start in range(0, count, BLOCK))
        return _suppress(blocks, threshold, count).rows
    return candidates.rows[_settle(_suppression(candidates, candidates, threshold))]


def _keep_by_class(boxes_xyxy: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray | None:
    """keep (N,) of N candidates, best first, as _settle finds it; None if a class has more than MAX_BAND of them.

    Sorted by class, a candidate is suppressed only by candidates that stand directly before it. So it is compared with
    the `band` before it, one less than the largest class has: a matrix (band, N), which costs little beside (N, N) when
    there are many classes. Its rows are windows of one array, each an element further on, and nothing is copied for
    them. The array begins with `band` candidates at infinity, which touch no other.
    """
    count = len(labels)
    by_class = labels.argsort(kind="stable")
    labels = labels[by_class]
    ends = np.flatnonzero(labels[1:] != labels[:-1])
    band = int(np.diff(ends, prepend=-1, append=count - 1).max()) - 1 if count else 0
    if band > MAX_BAND:
        return None
    rows = np.full((6, band + count), np.inf, np.float32)  # x1, y1, x2, y2, area, label
    rows[:4, band:] = boxes_xyxy[by_class].T
    sides = rows[2:4, band:] - rows[:2, band:]
    np.multiply(sides[0], sides[1], out=rows[4, band:])
    rows[5, band:] = labels
    keep = np.ones(band + count, bool)
    step = max(BAND_CHUNK // max(band, 1), 1)
    for start in range(0, count, step):
        shape = (band, min(step, count - start))
        own = rows[:, None, band + start : band + start + step]  # (6, 1, step)
        other = np.ndarray((6, *shape), np.float32, rows, 4 * start, (rows.strides[0], 4, 4))  # (6, band, step)
        lengths = np.minimum(other[2:4], own[2:4])
        lengths -= np.maximum(other[:2], own[:2])
        np.maximum(lengths, 0, out=lengths)
        overlap = np.multiply(lengths[0], lengths[1], out=lengths[0])
        union = other[4] + own[4]
        union -= overlap
        overlap /= union
        suppression = overlap > threshold  # False for the nan of 0 / 0
        suppression &= other[5] == own[5]
        before = np.ndarray(shape, bool, keep, start, (1, 1))  # the keep of `other`
        kept = keep[band + start : band + start + step]
        while True:  # as in _settle
            update = ~(suppression & before).any(0)
            if (update == kept).all():
                break
            kept[:] = update
    found = np.empty(count, bool)
    found[by_class] = keep[band:]
    return found


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


@lru_cache
def _float32_at_most(value: float) -> float:
    """The largest float32 <= value: a float32 is above it exactly if it is above `value`."""
    rounded = torch.tensor(value, dtype=torch.float32)
    return (rounded if rounded.item() <= value else rounded.nextafter(torch.tensor(-torch.inf))).item()
