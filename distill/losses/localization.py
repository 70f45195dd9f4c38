"""Localization distillation: the student's box-edge distributions imitate the teacher's.

Zheng et al., "Localization Distillation for Dense Object Detection", arXiv:2102.12252. Needs a head that predicts each
edge as a distribution over R bins (Generalized Focal Loss, arXiv:2006.04388: YOLOv8, YOLOv5u), with equal bins in
student and teacher. `localization_kl` is the loss; its weight decides where it acts:

- main region: the student's positives, weighted as its own box loss weights them (by the sum of a location's target
  scores, 0 elsewhere) or by the teacher's best class score;
- valuable localization region: locations around the positives, `valuable_region`.

Computed in float32 for half-precision inputs, in float64 for float64; teacher and weight are detached.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import paired_iou
from distill.losses.keywords import by_keyword
from distill.losses.logits import as_logit_pair, weighted_mean
from layers.precision import at_least_float32
from structures import Targets


@by_keyword
def localization_kl(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    weight: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    temperature: float = 10.0,
) -> Tensor:
    """Localization distillation (LD): KL of the softened edge distributions, with T^2.

        L    = T^2 / max(M, 1) * sum_n w_n * 1/4 sum_{e in ltrb} KL(p^t_ne || p^s_ne)
        p_ne = softmax over the R bins of logit_ne / T

    T^2 undoes the 1/T^2 shrinkage of the gradient (Hinton et al., arXiv:1503.02531, sec. 2). Invariant to a constant
    added to the R logits of an edge.

    Args:
        s_logits, t_logits: (..., 4, R), before the softmax; every leading index is one location n.
        weight: w_n >= 0, (...,), bool or float. All zeros gives 0. None: 1 for each location.
        normaliser: M. None: sum_n w_n.
        temperature: T > 0. CrossKD (arXiv:2306.11369) takes T = 1, and the teacher's best class score as weight.
    Returns:
        scalar ().
    Differs from the released code: it takes the mean of the KL terms over the R bins, we take the sum, as KL is
    defined. Its loss weight (0.25 with 17 bins) is ours * R.
    """
    s_logits, t_logits = as_logit_pair(s_logits, t_logits)
    if s_logits.dim() < 2 or s_logits.shape[-2] != 4:
        raise ValueError(f"edge logits {tuple(s_logits.shape)} must be (..., 4, R)")
    log_p_s, log_p_t = (F.log_softmax(z / temperature, dim=-1) for z in (s_logits, t_logits))  # (..., 4, R)
    kl = (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1).mean(-1)  # (...,)
    return temperature**2 * weighted_mean(kl, weight, normaliser)


@torch.no_grad()
def valuable_region(
    *,
    boxes_xyxy: Tensor,
    gt_index: Tensor,
    targets: Targets,
    is_ignored: Tensor,
    gamma: float = 0.25,
) -> Tensor:
    """The valuable localization region (VLR): locations near an object that learn nothing, (B, A) bool.

    As published, for an assigner whose positives are the anchors that overlap g by at least alpha_g:

        V = { a : gamma alpha_g <= DIoU(anchor_a, g) <= alpha_g for an object g }

    The task-aligned assigner (arXiv:2108.07755) has neither anchors nor a threshold: it ranks predicted boxes and takes
    at most 10 of them. Here, with P_g the positives of g and b_a the box predicted at location a,

        V = { a in no P_g, not ignored : x_ga > 0 and x_ga >= gamma alpha_g for an object g of the image }
        x_ga = DIoU(b_a, g),    alpha_g = mean of x_ga over P_g

    So the region of g leaves out its positives, but has no upper limit alpha_g: a location that fits the object but was
    not among the first 10 belongs to it. An object without positives has no region. gamma = 0 takes every other
    location whose box has a DIoU above 0 with an object; a larger gamma takes fewer.

    Args:
        boxes_xyxy: (B, A, 4), pixels. Either the teacher's boxes, which fit from the first epoch on and overlap an
            object where the teacher's distributions describe it; or the student's, by which its assigner chose.
        gt_index: (B, A) int64, the row of `targets` that the student's assigner gives a location, or -1.
        is_ignored: (B, A) bool, locations to leave out: those whose center lies inside an ignored box.
        gamma: the published value is 0.25.
    Memory: about 100 bytes for every pair of an object with positives and a location.
    """
    b, a = gt_index.shape
    if boxes_xyxy.shape != (b, a, 4):
        raise ValueError(f"boxes {tuple(boxes_xyxy.shape)} must be (B, A, 4), gt_index {tuple(gt_index.shape)} (B, A)")
    boxes_xyxy = at_least_float32(boxes_xyxy)
    gt_xyxy = targets.boxes_xyxy.to(boxes_xyxy.dtype)
    is_positive = gt_index >= 0
    row = gt_index[is_positive]  # (P,)
    overlap = paired_diou(boxes_xyxy[is_positive], gt_xyxy[row])  # (P,)
    count = torch.bincount(row, minlength=len(targets))  # (N,)
    alpha = overlap.new_zeros(len(targets)).index_add_(0, row, overlap) / count.clamp(min=1)
    chosen = count.nonzero()[:, 0]  # (G,) objects with positives
    image = targets.image[chosen]
    x = paired_diou(boxes_xyxy[image], gt_xyxy[chosen, None])  # (G, A)
    is_near = (x > 0) & (x >= gamma * alpha[chosen, None])
    region = torch.zeros(b, a, dtype=torch.int32, device=gt_index.device)
    region = region.index_add_(0, image, is_near.int()) > 0
    region &= ~is_positive
    return region & ~is_ignored


def paired_diou(a: Tensor, b: Tensor) -> Tensor:
    """Distance-IoU of broadcast pairs: (..., 4), (..., 4) -> (...), in [-1, 1].

    Zheng et al., "Distance-IoU Loss", arXiv:1911.08287:  DIoU = IoU - rho^2 / c^2, rho the distance of the centers, c
    the diagonal of the smallest box around both. Two equal points have 0.
    """
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    diagonal = hull.square().sum(-1)  # c^2
    distance = (b[..., :2] + b[..., 2:] - a[..., :2] - a[..., 2:]).square().sum(-1) / 4  # rho^2
    return paired_iou(a, b) - distance / torch.where(diagonal > 0, diagonal, 1)
