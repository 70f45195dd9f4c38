"""Which location learns which object. Nothing here carries a gradient.

- `task_aligned_assignment`: TOOD (arXiv:2108.07755, section 3.2), for the anchor-free heads (YOLOv8, YOLOv5u).
- `anchor_ratio_matches`: YOLOv5's rule for its anchor head, which has no paper: a limit on the ratio of the shapes,
  and the two nearest neighbours of the object's cell. `assignment_of_matches` puts it into the form of the other.

Both work on the flat rows of `Targets`, not on a padded (B, G, A) block, so an image with many objects costs the others
nothing. Both give the same result on every run: of equal candidates, the lower location or row wins.

Rows marked `ignore`, with a side that is not positive, or of a center outside the image (anchor head) are not learnt;
a location whose center lies in an ignored box and that learns nothing else is not taught to be background either.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from boxes import paired_ciou, xyxy_to_cxcywh
from structures import Targets


@dataclass(frozen=True)
class Assignment:
    """What each of A locations of B images learns. Also the mask of the positives for distillation.

    is_positive (B, A) bool: the location learns an object; gt_index (B, A) int64: the object's row of `Targets`, or -1;
    target_scores (B, A, K): in [0, 1], above 0 only at a positive and its object's label; is_ignored (B, A) bool: not
    positive, and the center lies in an ignored box, so the location is not background either.
    """

    is_positive: Tensor
    gt_index: Tensor
    target_scores: Tensor
    is_ignored: Tensor


@dataclass(frozen=True)
class AnchorMatches:
    """The pairs (object, location) of an anchor head; an object has many, and two objects may share a location.

    row (M,) of `Targets`, image (M,) of the batch, location (M,) in 0..A-1 and its level (M,), all int64.
    """

    row: Tensor
    image: Tensor
    location: Tensor
    level: Tensor


def make_points(
    grid_sizes: list[tuple[int, int]],
    strides: list[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Centers of all grid cells, in cells of their own level: points (A, 2) as x, y and strides (A, 1) in pixels.

    grid_sizes holds (h, w) per level. Levels follow one another, each row by row; A = sum of h * w. A center lies at
    x + 1/2, y + 1/2, so that points * strides are pixels.
    """
    points, steps = [], []
    for (h, w), stride in zip(grid_sizes, strides, strict=True):
        y = torch.arange(h, device=device, dtype=dtype) + 0.5
        x = torch.arange(w, device=device, dtype=dtype) + 0.5
        points.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), dim=-1).reshape(-1, 2))  # (h * w, 2)
        steps.append(torch.full((h * w, 1), float(stride), device=device, dtype=dtype))
    return torch.cat(points), torch.cat(steps)  # (A, 2), (A, 1)


def make_anchors(
    grid_sizes: list[tuple[int, int]], strides: list[int], anchors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Locations of an anchor head: points (A, 2) in cells, strides (A, 1) in pixels, sizes (A, 2) w, h in pixels.

    anchors (L, n, 2) in pixels give device and dtype. Levels follow one another; within a level the anchor changes
    slowest: location = start of the level + (anchor * h + y) * w + x. A = sum of n * h * w.
    """
    n = anchors.shape[1]
    points, steps, sizes = [], [], []
    for level, (grid, stride) in enumerate(zip(grid_sizes, strides, strict=True)):
        p, s = make_points([grid], [stride], anchors.device, anchors.dtype)  # (h * w, 2), (h * w, 1)
        points.append(p.repeat(n, 1))
        steps.append(s.repeat(n, 1))
        # Not len(p), which is a constant to torch.export.
        sizes.append(anchors[level][:, None].expand(-1, grid[0] * grid[1], -1).reshape(-1, 2))
    return torch.cat(points), torch.cat(steps), torch.cat(sizes)


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
    """Task-aligned one-to-many assignment: objects choose the locations that already classify and locate them well.

    Feng et al., "TOOD: Task-aligned One-stage Object Detection", arXiv:2108.07755.

        t_ga = s_ga^alpha * u_ga^beta          s: score of g's label at a,  u: max(CIoU(b_a, g), 0)
        g's candidates: the locations whose center lies strictly inside its box
        g's choice:     the `topk` candidates of largest t_ga, of those with t_ga > 0
        a chosen twice: its object is the one with the largest u_ga of all objects it is a candidate of
        target score:   t_ga * max_a' u_ga' / (max_a' t_ga' + eps),  a' over g's locations after that

    Args:
        class_logits: (B, A, K). boxes_xyxy: the decoded predictions (B, A, 4), pixels.
        points: (A, 2) centers in cells. strides: (A, 1) in pixels.
    Returns:
        target_scores have the dtype and the memory layout of class_logits.

    Differs from the paper: u is CIoU, not IoU, as in YOLOv8. A side shorter than the smallest stride counts as twice
    that stride when candidates are sought, since such a box may lie between all centers and would never be learnt.
    Differs from public YOLOv8 code: locations of t = 0 are no positives (there they have weight 0, the loss is equal).
    """
    B, A = class_logits.shape[:2]
    centers, smallest = points * strides, strides.min()  # (A, 2) pixels
    rows = _learnable_rows(targets)  # (N,)
    gt_boxes = targets.boxes_xyxy[rows].to(boxes_xyxy.dtype)  # (N, 4)
    gt_labels, gt_images = targets.labels[rows], targets.image[rows]  # (N,) each

    gt, point = _is_inside(centers, _widen(gt_boxes, smallest)).nonzero(as_tuple=True)  # (P,) pairs, by gt, then point
    image = gt_images[gt]
    location = image * A + point  # (P,) in 0..B*A-1
    overlap = paired_ciou(boxes_xyxy.reshape(-1, 4).index_select(0, location), gt_boxes.index_select(0, gt))
    overlap = overlap.clamp(min=0)  # u (P,)
    score = class_logits[image, point, gt_labels[gt]].to(overlap.dtype).sigmoid()
    metric = score**alpha * overlap**beta  # t (P,)
    some = metric.nonzero()[:, 0]
    gt, location, overlap, metric = (x[some] for x in (gt, location, overlap, metric))

    chosen = _largest_per_group(metric, gt, len(rows), topk)  # (P,) bool
    claims = torch.bincount(location[chosen], minlength=B * A)[location]  # (P,)
    best = overlap.new_zeros(B * A).scatter_reduce_(0, location, overlap, "amax")[location] == overlap
    first = location.new_full((B * A,), len(rows))
    first.scatter_reduce_(0, location[best], gt[best], "amin")  # equal overlaps: the lower row
    wins = torch.where(claims > 1, gt == first[location], chosen & (claims == 1)).nonzero()[:, 0]
    gt, location, overlap, metric = (x[wins] for x in (gt, location, overlap, metric))  # one pair per location now

    largest_metric = metric.new_zeros(len(rows)).scatter_reduce_(0, gt, metric, "amax")  # (N,)
    largest_overlap = overlap.new_zeros(len(rows)).scatter_reduce_(0, gt, overlap, "amax")
    target = metric * largest_overlap[gt] / (largest_metric[gt] + eps)

    gt_index = rows.new_full((B * A,), -1)
    gt_index[location] = rows[gt]
    gt_index = gt_index.view(B, A)
    target_scores = torch.zeros_like(class_logits)
    target_scores[location // A, location % A, gt_labels[gt]] = target.to(target_scores.dtype)
    is_positive = gt_index >= 0
    return Assignment(is_positive, gt_index, target_scores, in_ignored_box(centers, targets, B) & ~is_positive)


@torch.no_grad()
def anchor_ratio_matches(
    *,
    grid_sizes: list[tuple[int, int]],
    strides: list[int],
    anchors: Tensor,
    targets: Targets,
    ratio_threshold: float = 4.0,
) -> AnchorMatches:
    """Objects go to the anchors of similar shape, in the cell of their center and its two nearest neighbours.

        anchor p takes object g  <=>  max(w_g / w_p, w_p / w_g, h_g / h_p, h_p / h_g) < ratio_threshold
        cells: the one with g's center; left or right and above or below of it, the one nearer than half a cell

    On every level, so an object may have up to 3 n L locations. A neighbour outside the grid does not exist, and at
    exactly half a cell there is none.

    Args:
        anchors: (L, n, 2) widths and heights in pixels. grid_sizes: (h, w) per level. strides: pixels.
    Returns:
        M pairs, location as in make_anchors; level by level, then cell (own, left, above, right, below), anchor, row.

    Differs from public YOLOv5 code: a center exactly on the border of two cells gives each of the two once (there,
    one cell twice), and objects whose center lies outside the image are left out (there, moved to the border cell).
    """
    rows = _learnable_rows(targets)  # (N,)
    boxes = xyxy_to_cxcywh(targets.boxes_xyxy[rows].to(anchors.dtype))  # (N, 4) pixels
    neighbours = boxes.new_tensor([[0, 0], [-1, 0], [0, -1], [1, 0], [0, 1]]).long()  # (5, 2) as x, y
    found, start, n = [], 0, anchors.shape[1]
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
        found.append(torch.stack((rows[g], targets.image[rows[g]], location, torch.full_like(g, level))))  # (4, M_l)
        start += n * h * w
    return AnchorMatches(*torch.cat(found, dim=1))


def last_match(matches: AnchorMatches, num_images: int, num_locations: int) -> Tensor:
    """(B, A) int64: for each location the last of its matches, as an index into them, or -1.

    Public YOLOv5 code lets the last one decide what objectness a shared location learns; so the order of the rows
    counts where two objects share a location.
    """
    key = matches.image * num_locations + matches.location  # (M,)
    last = key.new_full((num_images * num_locations,), -1)
    order = torch.arange(len(key), device=key.device)
    return last.scatter_reduce_(0, key, order, "amax").view(num_images, num_locations)


@torch.no_grad()
def assignment_of_matches(
    matches: AnchorMatches, scores: Tensor, *, points: Tensor, strides: Tensor, targets: Targets, shape: tuple
) -> Assignment:
    """The last match of every location, and its score of `scores` (M,) as target at its object's label.

    points (A, 2), strides (A, 1) as from make_anchors; shape is (B, A, K).
    """
    winner = last_match(matches, *shape[:2])  # (B, A)
    is_positive = winner >= 0
    gt_index = winner.clone()
    gt_index[is_positive] = row = matches.row[winner[is_positive]]  # (P,)
    target_scores = scores.new_zeros(shape)
    image, location = is_positive.nonzero(as_tuple=True)
    target_scores[image, location, targets.labels[row]] = scores[winner[is_positive]]
    is_ignored = in_ignored_box(points * strides, targets, shape[0]) & ~is_positive
    return Assignment(is_positive, gt_index, target_scores, is_ignored)


def in_ignored_box(centers: Tensor, targets: Targets, num_images: int) -> Tensor:
    """centers (A, 2) in pixels -> (B, A) bool: the center lies strictly inside an ignored box of the image."""
    found = torch.zeros(num_images, len(centers), dtype=torch.int32, device=centers.device)
    boxes = targets.boxes_xyxy[targets.ignore].to(centers.dtype)
    return found.index_add_(0, targets.image[targets.ignore], _is_inside(centers, boxes).int()) > 0


def _learnable_rows(targets: Targets) -> Tensor:
    has_area = (targets.boxes_xyxy[:, 2:] > targets.boxes_xyxy[:, :2]).all(-1)
    return (has_area & ~targets.ignore).nonzero()[:, 0]


def _is_inside(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """points (A, 2) strictly inside boxes (N, 4), one unit -> (N, A) bool."""
    x, y = points.unbind(-1)  # (A,) each
    x1, y1, x2, y2 = boxes_xyxy[:, :, None].unbind(1)  # (N, 1) each
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def _widen(boxes_xyxy: Tensor, smallest: Tensor) -> Tensor:
    """A side shorter than `smallest` becomes twice `smallest`, about the same center; the others stay as they are."""
    top_left, bottom_right = boxes_xyxy.chunk(2, dim=-1)  # (N, 2) each
    center, is_short = (top_left + bottom_right) / 2, bottom_right - top_left < smallest
    top_left = torch.where(is_short, center - smallest, top_left)
    bottom_right = torch.where(is_short, center + smallest, bottom_right)
    return torch.cat((top_left, bottom_right), dim=-1)


def _largest_per_group(values: Tensor, group: Tensor, num_groups: int, count: int) -> Tensor:
    """values (P,) > 0, group (P,) ascending -> (P,) bool: the `count` largest of each group; of equal ones, the first.

    Padding to one row per group and topk takes a third of the time of two stable sorts; only topk's values are used,
    since which of equal entries it takes is not defined.
    """
    sizes = torch.bincount(group, minlength=num_groups)
    longest = int(sizes.max()) if len(values) else 0
    if longest <= count:
        return torch.ones_like(group, dtype=torch.bool)
    padded = values.new_zeros(num_groups, longest)
    padded[group, _rank_in_group(group, sizes)] = values
    last = padded.topk(count, dim=1).values[:, -1].contiguous()[group]  # (P,) 0 where all of the group are taken
    is_above, is_tie = ~(values <= last), values == last  # nan counts as above, so that the loss shows it
    room = (count - torch.bincount(group[is_above], minlength=num_groups))[group[is_tie]]
    ties = torch.bincount(group[is_tie], minlength=num_groups)
    is_above[is_tie] = _rank_in_group(group[is_tie], ties) < room
    return is_above


def _rank_in_group(group: Tensor, sizes: Tensor) -> Tensor:
    """group (P,) ascending, sizes = its counts -> (P,): 0, 1, 2, ... within each group."""
    return torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]
