"""The losses of RT-DETR (arXiv:2304.08069): varifocal, L1 and GIoU, for each decoder layer and for the proposals.

Boxes are cxcywh_norm: center x, center y, width and height as fractions of the image. Everything is computed at least
in float32. Without objects the box terms are 0 with zero gradients, and the class term teaches the background.

In a distributed run N is the total over all processes, divided by the number of processes (layers.over_processes).

Differs from public code: ignored regions are no background (is_in_ignored), and the classes of an object may be soft
(structures.Targets.class_scores).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import box_area, cxcywh_to_xyxy, paired_giou, paired_intersection, paired_iou, xyxy_to_cxcywh
from layers.over_processes import joint_normaliser
from layers.precision import at_least_float32, compute_dtype
from rtdetr.matching import Matches
from structures import Targets

CLASS_GAIN, L1_GAIN, GIOU_GAIN = 1.0, 5.0, 2.0
VARIFOCAL_ALPHA, VARIFOCAL_GAMMA = 0.75, 2.0
IGNORED_FRACTION = 0.5  # of a query's box within one ignored region


def to_fractions(boxes_xyxy: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(N, 4) xyxy pixels -> (N, 4) cxcywh_norm, at least float32."""
    height, width = image_size
    return xyxy_to_cxcywh(at_least_float32(boxes_xyxy)) / boxes_xyxy.new_tensor([width, height, width, height])


def varifocal_loss(logits: Tensor, iou: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy against the overlap, with the background weighted down: (..., K), (...), (..., K) -> (..., K).

    Zhang et al., "VarifocalNet", arXiv:2008.13367.

        t_nk = IoU_n y_nk
        L_nk = w_nk BCE(z_nk, t_nk),    w_nk = t_nk + alpha sigmoid(z_nk)^gamma (1 - y_nk),    alpha = 3/4, gamma = 2

    classes y: the class of the matched object as a row that sums to 1, or zeros for a query without an object. No
    gradient flows through w and t.
    """
    target = iou.detach()[..., None] * classes
    weight = target + VARIFOCAL_ALPHA * logits.detach().sigmoid() ** VARIFOCAL_GAMMA * (1 - classes)
    return F.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none")


def query_losses(
    logits: Tensor,
    boxes: Tensor,
    matches: Matches,
    *,
    gt_boxes: Tensor,
    classes: Tensor,
    count: Tensor | float,
    is_left_out: Tensor | None = None,
) -> dict[str, Tensor]:
    """The three losses of the queries of L layers, summed over the layers, with b_m and g_m the boxes of match m.

        vfl  = 1 / N sum_nk L_nk      over all queries n: varifocal_loss with IoU(b_m, g_m), or 0 without a match
        l1   = 5 / N sum_m |b_m - g_m|_1
        giou = 2 / N sum_m (1 - GIoU(b_m, g_m))

    Args:
        logits: (B, L, Q, K). boxes: (B, L, Q, 4).
        matches: M pairs. gt_boxes: (G, 4). classes: (G, K), a row of class shares for each object.
        count: N, the number of objects that the sums are divided by.
        is_left_out: (B, L, Q) bool, queries whose background is not learnt; None: none.
    """
    dtype = compute_dtype(logits)  # noisy boxes have the dtype of the targets, which may be float64
    logits, boxes = logits.to(dtype), boxes.to(dtype)
    at = (matches.image, matches.layer, matches.query)
    predicted, true = boxes[at], gt_boxes[matches.row].to(boxes.dtype)  # (M, 4) each
    predicted_xyxy, true_xyxy = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(true)
    giou = paired_giou(predicted_xyxy, true_xyxy, eps=0)
    with torch.no_grad():
        iou = logits.new_zeros(logits.shape[:3]).index_put(at, paired_iou(predicted_xyxy, true_xyxy, eps=0))
        y = torch.zeros_like(logits).index_put(at, classes[matches.row].to(logits.dtype))
    vfl = varifocal_loss(logits, iou, y)  # (B, L, Q, K)
    if is_left_out is not None:
        is_matched = torch.zeros_like(is_left_out).index_put(at, torch.ones_like(matches.row, dtype=torch.bool))
        vfl = vfl.masked_fill((is_left_out & ~is_matched)[..., None], 0)
    return {
        "vfl": CLASS_GAIN * vfl.sum() / count,
        "l1": L1_GAIN * (predicted - true).abs().sum() / count,
        "giou": GIOU_GAIN * (1 - giou).sum() / count,
    }


def class_shares(targets: Targets, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(N, K): class_scores, or a one-hot row of each label."""
    if targets.class_scores is not None:
        return targets.class_scores.to(dtype)
    return F.one_hot(targets.labels, num_classes).to(dtype)


def is_in_ignored(boxes: Tensor, targets: Targets, image_size: tuple[int, int]) -> Tensor | None:
    """(B, L, Q) bool: at least half of the box lies within one ignored region of its image; None if there is none.

    boxes (B, L, Q, 4) cxcywh_norm. The crowd rule of COCO's evaluation, as for the anchors of Faster R-CNN.
    """
    regions = targets[targets.ignore]
    if not len(regions):
        return None
    corners = cxcywh_to_xyxy(boxes.detach())
    is_inside = torch.zeros(boxes.shape[:3], dtype=torch.bool, device=boxes.device)
    for image, region in zip(regions.image.tolist(), cxcywh_to_xyxy(to_fractions(regions.boxes_xyxy, image_size))):
        covered, area = paired_intersection(corners[image], region.to(corners.dtype)), box_area(corners[image])
        is_inside[image] |= (covered >= IGNORED_FRACTION * area) & (covered > 0)
    return is_inside


def object_count(count: int, like: Tensor) -> Tensor | float:
    """N of query_losses for `count` objects of this process: at least 1."""
    return joint_normaliser(float(count), like)
