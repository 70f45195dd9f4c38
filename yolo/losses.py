"""Losses of the YOLO heads, one pure function per term, and the decoding of their boxes.

- Anchor-free heads (YOLOv8, YOLOv5u): `yolov8_losses`; boxes from `decode_distances`.
- Anchor head (YOLOv5, YOLOv7): `yolov5_losses`; boxes from `decode_anchor_offsets`.

Every loss is computed in float32, also under autocast and for half-precision inputs, or in float64 for float64 inputs.
The returned scalars are weighted, and normalised so that their size does not depend on the batch size. Without objects
the box terms are 0 with zero gradients, and the other terms teach the background.

In a distributed run S, |M_l| and B are totals over all processes, divided by the number of processes
(layers.over_processes). The averaged gradients then equal those of the joined batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import cxcywh_to_xyxy, distances_to_xyxy, paired_ciou, xyxy_to_distances
from layers.over_processes import joint_mean, joint_normaliser
from layers.precision import at_least_float32
from structures import Targets
from yolo.assigners import (
    AnchorMatches,
    Assignment,
    anchor_ratio_matches,
    assignment_of_matches,
    in_ignored_box,
    last_match,
    make_anchors,
    task_aligned_assignment,
)
from yolo.simota import simota_matches


def decode_distances(box_logits: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """box_logits (..., A, 4, R) in ltrb order, points (A, 2) in cells, strides (A, 1) -> xyxy pixels (..., A, 4).

    An edge distance, in cells, is the expectation over the integer bins 0..R-1 (Generalized Focal Loss,
    arXiv:2006.04388):  d = sum_r r * softmax(z)_r
    """
    bins = torch.arange(box_logits.shape[-1], dtype=box_logits.dtype, device=box_logits.device)
    ltrb = (box_logits.softmax(-1) * bins).sum(-1)  # (..., A, 4); a matmul would be bfloat16 under autocast
    return distances_to_xyxy(points, ltrb) * strides


def decode_anchor_offsets(box_logits: Tensor, points: Tensor, strides: Tensor, sizes: Tensor) -> Tensor:
    """box_logits (..., A, 4); points (A, 2), strides (A, 1), sizes (A, 2) of make_anchors -> xyxy pixels (..., A, 4).

        center = (cell + 2 sigmoid(z_xy) - 1/2) * stride,    width, height = (2 sigmoid(z_wh))^2 * anchor

    `points` are cell centers, cell + 1/2. A box center may lie up to half a cell outside its cell; a side is at most
    four times its anchor's.
    """
    xy, wh = (2 * box_logits.sigmoid()).chunk(2, dim=-1)  # (..., A, 2) each, in 0..2
    return cxcywh_to_xyxy(torch.cat(((points - 1 + xy) * strides, wh.square() * sizes), dim=-1))


# ---------------------------------------------------------------------------------------------------------- terms


def classification_loss(class_logits: Tensor, target_scores: Tensor, is_ignored: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every location and class against soft targets, summed.

        L = sum_n sum_k -t_nk log sigmoid(z_nk) - (1 - t_nk) log(1 - sigmoid(z_nk))
          = sum_n sum_k softplus(z_nk) - t_nk z_nk

    The second form is computed: on a transposed head map it takes two thirds of the time of torch's own function.

    class_logits and target_scores (..., K); locations with is_ignored (...) contribute 0. Returns a scalar.
    """
    softplus = F.softplus(class_logits, threshold=40).sum(-1)  # -log(1 - sigmoid(z)), exact in float64
    linear = (class_logits * target_scores).sum(-1)  # (...)
    if is_ignored is not None:
        softplus, linear = (x.masked_fill(is_ignored, 0) for x in (softplus, linear))
    return softplus.sum() - linear.sum()


def ciou_loss(predicted_xyxy: Tensor, target_xyxy: Tensor) -> Tensor:
    """1 - CIoU (arXiv:1911.08287), per pair: (N, 4), (N, 4) in one unit -> (N,) in [0, 2.5). 0 for equal boxes."""
    return 1 - paired_ciou(predicted_xyxy, target_xyxy)


def distribution_focal_loss(box_logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy against the two bins around each true distance: (N, 4, R) and (N, 4) in bins -> (N,).

    Li et al., "Generalized Focal Loss", arXiv:2006.04388, eq. 6, averaged over the four edges:

        L_n = 1/4 sum_e -(l + 1 - d) log softmax(z_ne)_l - (d - l) log softmax(z_ne)_(l + 1),    l = floor(d)

    d is first clamped to 0..R-1-0.01, as in public YOLO code, so that bin l + 1 exists. R is at least 2.
    """
    last = box_logits.shape[-1] - 1
    d = distances.clamp(min=0, max=last - 0.01)
    low = d.floor()
    log_p = box_logits.log_softmax(-1)  # (N, 4, R)
    pair = torch.stack((low, low + 1), dim=-1).long()  # (N, 4, 2)
    share = torch.stack((low + 1 - d, d - low), dim=-1)
    return -(share * log_p.gather(-1, pair)).sum(-1).mean(-1)


def objectness_loss(
    objectness_logits: Tensor, target: Tensor, level_sizes: list[int], balance: Sequence[float]
) -> Tensor:
    """Binary cross-entropy against each location's overlap with its object: a mean per level, weighted by `balance`.

        L = sum_l balance_l / (B A_l) sum_(b, a in l) BCE(z_ba, o_ba)

    objectness_logits and target o (B, A), A_l = level_sizes. A location with target -1 contributes 0 to the sum. B = 0
    gives 0.
    """
    bce = F.binary_cross_entropy_with_logits(objectness_logits, target.clamp(min=0), reduction="none")  # (B, A)
    means = [x.mean() if len(x) else x.sum() for x in torch.where(target < 0, 0, bce).split(level_sizes, dim=1)]
    return sum(weight * mean for weight, mean in zip(balance, means, strict=True))


# ------------------------------------------------------------------------------------------------ anchor-free heads


def yolov8_assignment(
    *, box_logits: Tensor, class_logits: Tensor, points: Tensor, strides: Tensor, targets: Targets
) -> Assignment:
    """task_aligned_assignment for raw logits; arguments as in yolov8_losses. No gradient."""
    with torch.no_grad():
        boxes_xyxy = decode_distances(at_least_float32(box_logits), points, strides)  # (B, A, 4) pixels
    logits = at_least_float32(class_logits)
    return task_aligned_assignment(
        class_logits=logits, boxes_xyxy=boxes_xyxy, points=points, strides=strides, targets=targets
    )


def yolov8_losses(
    *,
    box_logits: Tensor,
    class_logits: Tensor,
    points: Tensor,
    strides: Tensor,
    targets: Targets,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
    assignment: Assignment | None = None,
) -> dict[str, Tensor]:
    """The three terms of the anchor-free heads, over the task-aligned positives P with target scores t.

        w_n = the alignment of n with its object g_n (the assigner's target score),    S = max(sum_n w_n, 1)
        t_nk = w_n p_(g_n)k at positives, 0 elsewhere,    p_gk = class_scores, or [k is the label of g] without them
        box = box_gain / S * sum_(n in P) w_n (1 - CIoU(b_n, g_n))         boxes in cells
        cls = cls_gain / S * sum_(all n, k) BCE(z_nk, t_nk)
        dfl = dfl_gain / S * sum_(n in P) w_n DFL(z_n, ltrb distances of g_n from point n)

    Args:
        box_logits: (B, A, 4, R), edges in ltrb order. class_logits: (B, A, K).
        points: (A, 2) centers in cells. strides: (A, 1) in pixels. Both as from make_points.
        targets: labels in 0..K-1; may be empty. The assigner uses `labels`, not `class_scores`.
        assignment: the result of yolov8_assignment for the same predictions, or None to compute it here.
    Returns:
        {"box", "cls", "dfl"}: scalars (), not multiplied by B. cls is affine in class_scores, because w and S do not
        depend on them.
    """
    box_logits, class_logits = at_least_float32(box_logits), at_least_float32(class_logits)
    points, strides = points.to(box_logits.dtype), strides.to(box_logits.dtype)
    if assignment is None:
        assignment = yolov8_assignment(
            box_logits=box_logits, class_logits=class_logits, points=points, strides=strides, targets=targets
        )
    image, n, is_real = assignment.positives()  # (P,) each
    row = assignment.gt_index[image, n].clamp(min=0)
    weight = torch.where(is_real, assignment.target_scores[image, n, targets.labels[row]], 0)  # w (P,)
    total = joint_normaliser(weight.sum(), weight)  # S
    target_scores = assignment.target_scores  # t (B, A, K)
    if targets.class_scores is not None:
        shares = weight[:, None] * targets.class_scores[row].to(weight.dtype)  # (P, K)
        target_scores = torch.zeros_like(target_scores).index_put((image, n), shares, accumulate=True)

    # Padding rows get finite inputs, not only weight 0: an infinite gradient times 0 would be nan.
    logits = torch.where(is_real[:, None, None], box_logits[image, n], 0)  # (P, 4, R)
    gt_xyxy = torch.where(is_real[:, None], targets.boxes_xyxy[row].to(logits.dtype) / strides[n], 0)  # (P, 4) cells
    predicted_xyxy = decode_distances(logits, points[n], torch.ones_like(strides[n]))  # (P, 4) cells
    box = (weight * ciou_loss(predicted_xyxy, gt_xyxy)).sum() / total
    dfl = (weight * distribution_focal_loss(logits, xyxy_to_distances(points[n], gt_xyxy))).sum() / total
    cls = classification_loss(class_logits, target_scores, assignment.is_ignored) / total
    return {"box": box_gain * box, "cls": cls_gain * cls, "dfl": dfl_gain * dfl}


# ----------------------------------------------------------------------------------------------------- anchor head


def matched_ciou(
    matches: AnchorMatches,
    box_logits: Tensor,
    *,
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    targets: Targets,
) -> Tensor:
    """The CIoU (M,) of the box that each matched location predicts with its object. Gradient flows."""
    box_logits = at_least_float32(box_logits)
    anchors = anchors.to(box_logits.dtype)
    predicted_xyxy, steps = matched_boxes(matches, box_logits, grid_sizes=grid_sizes, strides=strides, anchors=anchors)
    gt_xyxy = targets.boxes_xyxy[matches.gt_index].to(box_logits.dtype)
    return paired_ciou(predicted_xyxy / steps, gt_xyxy / steps)  # (M, 4) cells -> (M,)


def matched_boxes(
    matches: AnchorMatches,
    box_logits: Tensor,
    *,
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
) -> tuple[Tensor, Tensor]:
    """The boxes_xyxy (M, 4) in pixels that the matched locations predict, and their strides (M, 1)."""
    points, steps, sizes = (x[matches.location] for x in make_anchors(grid_sizes, strides, anchors))
    return decode_anchor_offsets(box_logits[matches.image, matches.location], points, steps, sizes), steps


def yolov7_matches(
    *,
    box_logits: Tensor,
    objectness_logits: Tensor,
    class_logits: Tensor,
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    targets: Targets,
) -> AnchorMatches:
    """Those of anchor_ratio_matches that simota_matches chooses by the predictions; arguments as in yolov5_losses."""
    anchors = anchors.to(at_least_float32(box_logits).dtype)
    matches = anchor_ratio_matches(grid_sizes=grid_sizes, strides=strides, anchors=anchors, targets=targets)
    logits = (box_logits, objectness_logits, class_logits)
    box_logits, objectness_logits, class_logits = (at_least_float32(x.detach()) for x in logits)
    boxes_xyxy, _ = matched_boxes(matches, box_logits, grid_sizes=grid_sizes, strides=strides, anchors=anchors)
    return simota_matches(
        matches,
        boxes_xyxy=boxes_xyxy,
        objectness_logits=objectness_logits[matches.image, matches.location],
        class_logits=class_logits[matches.image, matches.location],
        targets=targets,
    )


def yolov5_assignment(
    *,
    box_logits: Tensor,
    class_logits: Tensor,
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    targets: Targets,
    matches: AnchorMatches,
) -> Assignment:
    """The anchor head's positives, arguments as in yolov5_losses; target scores are max(CIoU, 0). No gradient."""
    with torch.no_grad():
        ciou = matched_ciou(
            matches, box_logits, grid_sizes=grid_sizes, strides=strides, anchors=anchors, targets=targets
        )
    points, steps, _ = make_anchors(grid_sizes, strides, anchors.to(ciou.dtype))
    return assignment_of_matches(
        matches, ciou.clamp(min=0), points=points, strides=steps, targets=targets, shape=tuple(class_logits.shape)
    )


def yolov5_losses(
    *,
    box_logits: Tensor,
    objectness_logits: Tensor,
    class_logits: Tensor,
    grid_sizes: list[tuple[int, int]],
    strides: Sequence[int],
    anchors: Tensor,
    targets: Targets,
    matches: AnchorMatches,
    box_gain: float = 0.05,
    obj_gain: float = 1.0,
    cls_gain: float = 0.5,
    balance: tuple[float, ...] = (4.0, 1.0, 0.4),
) -> dict[str, Tensor]:
    """The three terms of the anchor head, over the matches M_l of each level l.

        box = box_gain * sum_l 1 / |M_l| sum_(m in M_l) (1 - CIoU(b_m, g_m))                  boxes in cells
        obj = obj_gain * sum_l balance_l * mean_(b, a in l) BCE(z_ba, o_ba),   o = max(CIoU, 0), detached; 0 elsewhere
        cls = cls_gain * sum_l 1 / (|M_l| K) sum_(m in M_l) sum_k BCE(z_mk, p_mk)
        p_mk = class_scores of g_m, or [k is the label of g_m] without them

    Args:
        box_logits: (B, A, 4). objectness_logits: (B, A). class_logits: (B, A, K). A in the order of make_anchors.
        anchors: (L, n, 2) in pixels. grid_sizes: L pairs (h, w). strides: L, pixels. balance: L weights.
        targets: labels in 0..K-1; may be empty.
        matches: those to learn: of anchor_ratio_matches (YOLOv5), or yolov7_matches of the same predictions (YOLOv7).
    Returns:
        {"box", "obj", "cls"}: scalars (), not multiplied by B.

    If two objects share a location, both count in box and cls, and o is that of the last match.
    Differs from public YOLOv5 code: K = 1 has a cls term too, and the gains are used as given (its train.py first
    scales cls by K / 80 and obj by (image size / 640)^2).
    """
    box_logits, objectness_logits, class_logits = map(at_least_float32, (box_logits, objectness_logits, class_logits))
    anchors = anchors.to(box_logits.dtype)
    ciou = matched_ciou(matches, box_logits, grid_sizes=grid_sizes, strides=strides, anchors=anchors, targets=targets)
    counts = torch.bincount(matches.level, minlength=len(strides)).to(ciou.dtype)
    weight = 1 / joint_normaliser(counts, ciou)[matches.level]  # 1 / |M_l| (M,)
    box = (weight * (1 - ciou)).sum()

    logits = class_logits[matches.image, matches.location]  # (M, K)
    if targets.class_scores is None:
        shares = F.one_hot(targets.labels[matches.gt_index], class_logits.shape[-1]).to(logits.dtype)
    else:
        shares = targets.class_scores[matches.gt_index].to(logits.dtype)  # (M, K)
    cls = (weight * F.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(-1)).sum()

    winner = last_match(matches, *objectness_logits.shape)  # (B, A)
    target = torch.zeros_like(objectness_logits)
    target[winner >= 0] = ciou.detach().clamp(min=0)[winner[winner >= 0]]
    points, steps, _ = make_anchors(grid_sizes, strides, anchors)
    target[in_ignored_box(points * steps, targets, len(target)) & (winner < 0)] = -1
    sizes = [anchors.shape[1] * h * w for h, w in grid_sizes]
    obj = joint_mean(objectness_loss(objectness_logits, target, sizes, balance), len(target))
    return {"box": box_gain * box, "obj": obj_gain * obj, "cls": cls_gain * cls}
