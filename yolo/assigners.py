"""Assigners: which location learns which object. Nothing here carries a gradient.

- `task_aligned_assignment`: TOOD (arXiv:2108.07755, section 3.2), for the anchor-free heads (YOLOv8, YOLOv5u). Its
  plain form, `plain_task_aligned_assignment`, comes first and is the specification.
- `anchor_ratio_matches`: the rule of YOLOv5's anchor head, which has no paper. It limits the ratio of the shapes and
  takes the object's cell and its two nearest neighbours. `assignment_of_matches` turns the matches into an Assignment.

Objects that are not learnt: rows marked `ignore`, boxes with a side that is not positive, and, for the anchor head,
boxes whose center lies outside the image. A location that learns no object learns the background, unless its center
lies in an ignored box.

The fast forms work on the flat rows of `Targets`, not on a padded (B, G, A) block, so one image with many objects does
not slow down the others. Every tie goes to the lower location or row, so every run gives the same result.

On CUDA the task-aligned assigner never waits for the device: its shapes depend on the input shapes alone, and masks
mark the valid rows. On a CPU it lists the valid rows only. Both give the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boxes import paired_ciou, xyxy_to_cxcywh
from structures import Targets

MAX_PAIRS = 2**24  # CUDA lists all pairs up to this number; an estimated 200 bytes each, 3.4 GB in all


@dataclass(frozen=True)
class Assignment:
    """What each of A locations of B images learns. Distillation takes its mask of the positives from here.

    is_positive (B, A) bool: the location learns an object.
    gt_index (B, A) int64: the object's row of `Targets`, or -1.
    target_scores (B, A, K): in [0, 1]; above 0 only at a positive, for the label of its object.
    is_ignored (B, A) bool: the location is not positive, and its center lies in an ignored box. It learns nothing.
    max_positives: upper bound on the number of positives, known without a device synchronisation, or None.
    """

    is_positive: Tensor
    gt_index: Tensor
    target_scores: Tensor
    is_ignored: Tensor
    max_positives: int | None = None

    def positives(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image and location of the positives, (P,) int64 each, in this order; is_real (P,) bool, False for padding.

        On CUDA P is max_positives. If there are more positives (nan, see _largest_per_row), the last ones are dropped.
        If there are fewer, place i is padded with location i of all B * A: padding with one repeated location would
        make the backward pass add its gradients one by one.
        """
        if not is_asynchronous(self.is_positive.device) or self.max_positives is None:
            image, location = self.is_positive.nonzero(as_tuple=True)
            return image, location, torch.ones_like(image, dtype=torch.bool)
        (B, A), flat = self.is_positive.shape, self.is_positive.flatten()
        index = torch.nonzero_static(flat, size=min(self.max_positives, B * A), fill_value=-1)[:, 0]  # (P,)
        is_real = index >= 0
        index = torch.where(is_real, index, torch.arange(len(index), device=index.device))
        return index // A, index % A, is_real


@dataclass(frozen=True)
class AnchorMatches:
    """M pairs (object, location) of an anchor head. An object has many locations; two objects may share one.

    gt_index: the object's row of `Targets`. image: its row of the batch. location: in 0..A-1. level: of the location.
    All are (M,) int64.
    """

    gt_index: Tensor
    image: Tensor
    location: Tensor
    level: Tensor


def make_points(
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Centers of all grid cells, in cells of their own level: points (A, 2) as x, y and strides (A, 1) in pixels.

    grid_sizes holds (h, w) per level. The levels are joined in order, each row by row; A = sum of h * w. A center lies
    at x + 1/2, y + 1/2, so points * strides are pixels.
    """
    points, steps = [], []
    for (h, w), stride in zip(grid_sizes, strides, strict=True):
        y = torch.arange(h, device=device, dtype=dtype) + 0.5
        x = torch.arange(w, device=device, dtype=dtype) + 0.5
        points.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), dim=-1).reshape(-1, 2))  # (h * w, 2)
        steps.append(torch.full((h * w, 1), float(stride), device=device, dtype=dtype))
    return torch.cat(points), torch.cat(steps)  # (A, 2), (A, 1)


def make_anchors(
    grid_sizes: list[tuple[int, int]], strides: Sequence[int], anchors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Locations of an anchor head: points (A, 2) in cells, strides (A, 1) in pixels, sizes (A, 2) w, h in pixels.

    anchors (L, n, 2) are in pixels; the results have their device and dtype. The levels are joined in order; within a
    level the anchor changes slowest: location = start of the level + (anchor * h + y) * w + x. A = sum of n * h * w.
    """
    n = anchors.shape[1]
    points, steps, sizes = [], [], []
    for level, (grid, stride) in enumerate(zip(grid_sizes, strides, strict=True)):
        p, s = make_points([grid], [stride], anchors.device, anchors.dtype)  # (h * w, 2), (h * w, 1)
        points.append(p.repeat(n, 1))
        steps.append(s.repeat(n, 1))
        # grid[0] * grid[1], not len(p): torch.export would take len(p) for a constant.
        sizes.append(anchors[level][:, None].expand(-1, grid[0] * grid[1], -1).reshape(-1, 2))
    return torch.cat(points), torch.cat(steps), torch.cat(sizes)


@torch.no_grad()
def plain_task_aligned_assignment(
    *,
    class_logits: Tensor,
    boxes_xyxy: Tensor,
    points: Tensor,
    strides: Tensor,
    targets: Targets,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    eps: float = 1e-9,
) -> Assignment:
    """Specification of task_aligned_assignment: image by image, in tables of G objects by A locations."""
    centers, gt_boxes = points * strides, targets.boxes_xyxy.to(boxes_xyxy.dtype)  # pixels
    gt_index = torch.full(class_logits.shape[:2], -1, device=class_logits.device)
    target_scores = torch.zeros_like(class_logits)
    for b in range(len(class_logits)):
        rows = (targets.is_learnt & (targets.image == b)).nonzero()[:, 0]  # (G,)
        if not len(rows):
            continue
        labels, boxes = targets.labels[rows], gt_boxes[rows]
        is_candidate = is_inside(centers, _widen(boxes, 2 * strides.min()))  # (G, A)
        overlap = paired_ciou(boxes_xyxy[b], boxes[:, None]).clamp(min=0)  # u (G, A)
        score = class_logits[b, :, labels].T.to(overlap.dtype).sigmoid()  # s (G, A)
        metric = torch.where(is_candidate, score**alpha * overlap**beta, 0)  # t (G, A)

        best = metric.argsort(dim=1, descending=True, stable=True)[:, :topk]
        is_chosen = torch.zeros_like(is_candidate).scatter(1, best, True) & (metric > 0)
        first = is_chosen.int().argmax(0)  # (A,) in 0..G-1, the lowest object that chose the location
        closest = torch.where(metric > 0, overlap, -1).argmax(0)  # (A,)
        owner = torch.where(is_chosen.sum(0) > 1, closest, first).where(is_chosen.any(0), -1)
        is_mine = owner == torch.arange(len(rows), device=owner.device)[:, None]  # (G, A)

        largest_metric, largest_overlap = (x.where(is_mine, 0).amax(1, keepdim=True) for x in (metric, overlap))
        target = metric * largest_overlap / (largest_metric + eps)  # (G, A)
        g, a = is_mine.nonzero(as_tuple=True)
        gt_index[b, a] = rows[g]
        target_scores[b, a, labels[g]] = target[g, a].to(target_scores.dtype)
    is_positive = gt_index >= 0
    is_ignored = in_ignored_box(centers, targets, len(gt_index)) & ~is_positive
    return Assignment(is_positive, gt_index, target_scores, is_ignored, max_positives=topk * len(targets))


@torch.no_grad()
def task_aligned_assignment(
    *,
    class_logits: Tensor,
    boxes_xyxy: Tensor,
    points: Tensor,
    strides: Tensor,
    targets: Targets,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    eps: float = 1e-9,
) -> Assignment:
    """Task-aligned one-to-many assignment: an object chooses the locations that already classify and locate it well.

    Feng et al., "TOOD: Task-aligned One-stage Object Detection", arXiv:2108.07755.

        t_ga = s_ga^alpha * u_ga^beta          s: score of g's label at a,  u: max(CIoU(b_a, g), 0)
        g's candidates: the locations whose center lies strictly inside g's box, with sides of at least 16 px
        g's choice:     the `topk` candidates with the largest t_ga, among those with t_ga > 0
        a chosen twice: of all objects that have a as a candidate, it goes to the one with the largest u_ga
        target score:   t_ga * max_a' u_ga' / (max_a' t_ga' + eps),  a' over the locations that g keeps

    Args:
        class_logits: (B, A, K). boxes_xyxy: the decoded predictions (B, A, 4), pixels.
        points: (A, 2) centers in cells. strides: (A, 1) in pixels.
    Returns:
        target_scores have the dtype and the memory layout of class_logits.

    Differs from the paper: u is CIoU, not IoU, as in YOLOv8. For the candidates, a side shorter than twice the smallest
    stride (16 px) is widened to that, as in public YOLOv8 code of 2026. Otherwise a small box between the centers would
    never be learnt, and an object could have fewer candidates than a smaller one with the same center.
    Differs from public YOLOv8 code: a location with t = 0 is not positive (there it has weight 0; the loss is equal).
    """
    (B, A), N = class_logits.shape[:2], len(targets)
    centers = points * strides  # (A, 2) pixels
    is_learnt, ignore = targets.is_learnt, targets.ignore  # (N,) each
    gt_boxes, gt_labels = targets.boxes_xyxy.to(boxes_xyxy.dtype), targets.labels.where(is_learnt, 0)

    reach = torch.where(ignore[:, None], gt_boxes, _widen(gt_boxes, 2 * strides.min()))  # (N, 4)
    pairs = _list_pairs(is_inside(centers, reach) & (is_learnt | ignore)[:, None])
    gt, image = pairs.gt, targets.image[pairs.gt]  # (P,) each
    cell = image * A + pairs.location  # (P,) in 0..B*A-1: the locations of all images in a row

    def over_cells(values: Tensor, start: int, reduce: str) -> Tensor:
        """(P,) -> (B*A,): the largest (amax) or least (amin) value of the pairs at each location, and of `start`."""
        return values.new_full((B * A,), start).scatter_reduce_(0, cell, values, reduce)

    overlap = paired_ciou(boxes_xyxy.reshape(-1, 4).index_select(0, cell), gt_boxes.index_select(0, gt))
    overlap = overlap.clamp(min=0)  # u (P,)
    score = class_logits[image, pairs.location, gt_labels[gt]].to(overlap.dtype).sigmoid()  # s (P,)
    is_candidate = pairs.is_real & is_learnt[gt]
    metric = torch.where(is_candidate, score**alpha * overlap**beta, 0)  # t (P,), 0 unless a candidate
    overlap = torch.where(metric != 0, overlap, 0)

    is_chosen = _largest_per_row(pairs.by_object(metric, N), topk).flatten()[pairs.slot]  # (P,)
    times_chosen = cell.new_zeros(B * A).scatter_add_(0, cell, is_chosen.long())
    is_closest = (metric != 0) & (over_cells(overlap, 0, "amax")[cell] == overlap)
    closest = over_cells(torch.where(is_closest, gt, N), N, "amin")  # of equal overlaps the lower row
    is_mine = torch.where(times_chosen[cell] > 1, gt == closest[cell], is_chosen)  # one pair per location now

    # Not scattered into (N,): all pairs of an object would write to one address.
    largest_metric, largest_overlap = (pairs.by_object(x.where(is_mine, 0), N).amax(1)[gt] for x in (metric, overlap))
    target = torch.where(is_mine, metric * largest_overlap / (largest_metric + eps), 0)  # (P,)

    gt_index = over_cells(torch.where(is_mine, gt, -1), -1, "amax").view(B, A)
    target = over_cells(target, 0, "amax").view(B, A, 1)
    label = torch.cat((gt_labels, gt_labels.new_zeros(1)))[gt_index]  # (B, A); row -1 takes the 0 at the end
    target_scores = torch.zeros_like(class_logits).scatter_(2, label[..., None], target.to(class_logits.dtype))
    is_positive = gt_index >= 0
    is_ignored = over_cells((pairs.is_real & ignore[gt]).long(), 0, "amax").view(B, A) > 0
    return Assignment(is_positive, gt_index, target_scores, is_ignored & ~is_positive, max_positives=topk * N)


@torch.no_grad()
def anchor_ratio_matches(
    *,
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    targets: Targets,
    ratio_threshold: float = 4.0,
) -> AnchorMatches:
    """Match objects to the anchors of similar shape, in the cell of their center and its two nearest neighbours.

        anchor p matches object g  <=>  max(w_g / w_p, w_p / w_g, h_g / h_p, h_p / h_g) < ratio_threshold
        cells: the one with g's center, its nearer neighbour left or right, and its nearer neighbour above or below

    Every level is matched, so an object has at most 3 n L locations. A neighbour must lie inside the grid; a center
    exactly halfway between two neighbours has neither.

    Args:
        anchors: (L, n, 2) widths and heights in pixels. grid_sizes: (h, w) per level. strides: pixels.
    Returns:
        M pairs, ordered by level, then cell (own, left, above, right, below), anchor, row. location as in make_anchors.

    Differs from public YOLOv5 code: a center exactly on the border of two cells gives each of them once (there, one
    cell twice). An object whose center lies outside the image has no match (there, it moves to the border cell).
    """
    rows = targets.is_learnt.nonzero()[:, 0]  # (N,)
    boxes = xyxy_to_cxcywh(targets.boxes_xyxy[rows].to(anchors.dtype))  # (N, 4) pixels
    neighbours = boxes.new_tensor([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]]).long()  # (5, 2) as x, y
    matches, start, n = [], 0, anchors.shape[1]
    for level, ((h, w), stride) in enumerate(zip(grid_sizes, strides, strict=True)):
        ratio = boxes[:, 2:] / anchors[level][:, None]  # (n, N, 2)
        fits = torch.maximum(ratio, 1 / ratio).amax(-1) < ratio_threshold  # (n, N)

        size = boxes.new_tensor([w, h])
        center = boxes[:, :2] / stride  # (N, 2) cells
        inside = ((center >= 0) & (center <= size)).all(-1)  # (N,)
        cell = center.floor().minimum(size - 1)  # a center on the right or lower border belongs to the last cell
        low = ((center - cell < 0.5) & (cell > 0)).T  # (2, N): the left, the upper neighbour
        high = ((center - cell > 0.5) & (cell + 1 < size)).T
        near = torch.cat((inside[None], low & inside, high & inside))  # (5, N)

        k, anchor, g = (near[:, None] & fits).nonzero(as_tuple=True)  # (5, n, N) -> (M_l,) each
        x, y = (cell.long()[g] + neighbours[k]).unbind(-1)
        location = start + (anchor * h + y) * w + x
        matches.append(torch.stack((rows[g], targets.image[rows[g]], location, torch.full_like(g, level))))  # (4, M_l)
        start += n * h * w
    return AnchorMatches(*torch.cat(matches, dim=1))


def last_match(matches: AnchorMatches, num_images: int, num_locations: int) -> Tensor:
    """(B, A) int64: for each location the index of its last match, or -1.

    The last match decides what objectness a shared location learns, as in public YOLOv5 code. So the order of the rows
    of `Targets` matters if two objects share a location.
    """
    key = matches.image * num_locations + matches.location  # (M,)
    last = key.new_full((num_images * num_locations,), -1)
    order = torch.arange(len(key), device=key.device)
    return last.scatter_reduce_(0, key, order, "amax").view(num_images, num_locations)


@torch.no_grad()
def assignment_of_matches(
    matches: AnchorMatches, scores: Tensor, *, points: Tensor, strides: Tensor, targets: Targets, shape: Sequence[int]
) -> Assignment:
    """Every location learns its last match; its target score, for the label of that object, is that of `scores` (M,).

    points (A, 2), strides (A, 1) as from make_anchors; shape is (B, A, K).
    """
    winner = last_match(matches, *shape[:2])  # (B, A)
    is_positive = winner >= 0
    gt_index = winner.clone()
    gt_index[is_positive] = row = matches.gt_index[winner[is_positive]]  # (P,)
    target_scores = scores.new_zeros(tuple(shape))
    image, location = is_positive.nonzero(as_tuple=True)
    target_scores[image, location, targets.labels[row]] = scores[winner[is_positive]]
    is_ignored = in_ignored_box(points * strides, targets, shape[0]) & ~is_positive
    return Assignment(is_positive, gt_index, target_scores, is_ignored)


def in_ignored_box(centers: Tensor, targets: Targets, num_images: int) -> Tensor:
    """centers (A, 2) in pixels -> (B, A) bool: the center lies strictly inside an ignored box of the image."""
    inside = is_inside(centers, targets.boxes_xyxy.to(centers.dtype)) & targets.ignore[:, None]  # (N, A)
    count = torch.zeros(num_images, len(centers), dtype=torch.int32, device=centers.device)
    return count.index_add_(0, targets.image, inside.int()) > 0


def is_asynchronous(device: torch.device) -> bool:
    """Whether the device computes while the host runs on: a shape that depends on values makes the host wait."""
    return device.type == "cuda"


def is_inside(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """points (A, 2) strictly inside boxes (N, 4), one unit -> (N, A) bool."""
    x, y = points.unbind(-1)  # (A,) each
    x1, y1, x2, y2 = boxes_xyxy[:, :, None].unbind(1)  # (N, 1) each
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def _widen(boxes_xyxy: Tensor, side: Tensor) -> Tensor:
    """Lengthen every side shorter than `side` to `side`, about the same center."""
    top_left, bottom_right = boxes_xyxy.chunk(2, dim=-1)  # (N, 2) each
    center, is_short = (top_left + bottom_right) / 2, bottom_right - top_left < side
    top_left = torch.where(is_short, center - side / 2, top_left)
    bottom_right = torch.where(is_short, center + side / 2, bottom_right)
    return torch.cat((top_left, bottom_right), dim=-1)


@dataclass(frozen=True)
class _Pairs:
    """P pairs of an object and a location of its image, ordered by object, then location.

    gt (P,): row of Targets. location (P,): in 0..A-1. is_real (P,) bool: False for padding.
    slot (P,) in 0..N*width-1: the pair's place in a block (N, width) with one row per object; width >= 1.
    """

    gt: Tensor
    location: Tensor
    is_real: Tensor
    slot: Tensor
    width: int

    def by_object(self, values: Tensor, num_objects: int) -> Tensor:
        """values (P,) -> (N, width), 0 where there is no pair."""
        block = values.new_zeros(num_objects * self.width)
        return block.scatter_(0, self.slot, values).view(num_objects, self.width)


def _list_pairs(is_pair: Tensor) -> _Pairs:
    """is_pair (N, A) bool -> its True pairs. On CUDA, up to MAX_PAIRS, all N * A pairs with `is_real` = is_pair."""
    N, A = is_pair.shape
    if is_asynchronous(is_pair.device) and N * A <= MAX_PAIRS:
        slot = torch.arange(N * A, device=is_pair.device)
        return _Pairs(slot // A, slot % A, is_pair.flatten(), slot, A)
    gt, location = is_pair.nonzero(as_tuple=True)
    sizes = torch.bincount(gt, minlength=N)
    width = max(1, int(sizes.max())) if N else 1
    rank = torch.arange(len(gt), device=gt.device) - (sizes.cumsum(0) - sizes)[gt]  # 0, 1, 2, ... within each object
    return _Pairs(gt, location, torch.ones_like(gt, dtype=torch.bool), gt * width + rank, width)


def _largest_per_row(values: Tensor, count: int) -> Tensor:
    """values (N, W) >= 0 -> (N, W) bool: the `count` largest nonzero values of each row; ties go to the first.

    topk and a count of the ties take a third of the time of a stable sort. Only topk's values are used, since its
    choice among equal entries is not defined. nan counts as the largest. A row with `count` nans keeps every nonzero
    value, so that the loss becomes nan.
    """
    is_nonzero = values != 0
    if values.shape[1] <= count:
        return is_nonzero
    last = values.topk(count, dim=1).values[:, -1:]  # (N, 1), 0 if the row has fewer than `count` nonzero values
    is_above, is_tie = ~(values <= last), values == last
    room = count - is_above.sum(1, keepdim=True)
    return is_nonzero & (is_above | (is_tie & (is_tie.cumsum(1, dtype=torch.int32) <= room)))
