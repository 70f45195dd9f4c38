"""Distillation of a DETR's decoder: two predictions of the same query are compared, so nothing has to be matched.

`query_agreement` is the loss. distill.decoder_queries chooses the queries: those of a student at its earlier layers and
at its last one, or queries made from the labelled objects, which student and teacher both decode.
"""

import torch
from torch import Tensor

from boxes import box_area, cxcywh_to_xyxy, paired_giou
from distill.losses.keywords import by_keyword
from distill.losses.logits import as_logit_pair, weighted_mean
from kernels.sigmoid_kl import bernoulli_kl

LEAST_AREA = 1e-12  # of the image, both boxes together: below, corners coincide in float32 and GIoU is 0 / 0


@by_keyword
def query_agreement(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    s_boxes: Tensor,
    t_boxes: Tensor,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    repeats: int = 1,
) -> Tensor:
    """Classes and boxes of N queries, each weighted by how sure the teacher is that it has found an object.

        L   = 1 / max(sum_n w_n, 1) * sum_n w_n * [ a_c sum_k KL(Bern(p^t_nk) || Bern(p^s_nk))
                                                    + a_1 |b^s_n - b^t_n|_1 + a_g (1 - GIoU(b^s_n, b^t_n)) ]
        w_n = max_k p^t_nk / R,    p_nk = sigmoid(logit_nk)

    The weight lets the few queries with an object count more than the hundreds of background, whose boxes mean nothing.

    Args:
        s_logits, t_logits: (..., K), before the sigmoid; every leading index is one query n.
        s_boxes, t_boxes: (..., 4) cxcywh_norm: center x, center y, width and height as fractions of the image. Of two
            boxes without an area (LEAST_AREA) only the distance counts.
        repeats: R, how many queries stand for the same thing, so that a process which repeats its objects more
            often than another does not count more.
        class_weight, l1_weight, giou_weight: a_c, a_1, a_g. The defaults are those of RT-DETR (arXiv:2304.08069).
    Returns:
        scalar (); 0 for no queries.
    """
    s_logits, t_logits = as_logit_pair(s_logits, t_logits)
    s_boxes, t_boxes = as_logit_pair(s_boxes, t_boxes)
    if s_boxes.shape != (*s_logits.shape[:-1], 4):
        raise ValueError(f"boxes {tuple(s_boxes.shape)} must be (..., 4), logits {tuple(s_logits.shape)} (..., K)")
    classes = bernoulli_kl(s_logits, t_logits).sum(-1)  # (...)
    distance = (s_boxes - t_boxes).abs().sum(-1)
    s_xyxy, t_xyxy = cxcywh_to_xyxy(s_boxes), cxcywh_to_xyxy(t_boxes)
    has_area = (box_area(s_xyxy) + box_area(t_xyxy) > LEAST_AREA)[..., None]
    whole = s_xyxy.new_tensor([0.0, 0.0, 1.0, 1.0])  # in place of a box without area, so that no gradient is 0 / 0
    giou = paired_giou(torch.where(has_area, s_xyxy, whole), torch.where(has_area, t_xyxy, whole), eps=0)
    difference = class_weight * classes + l1_weight * distance + giou_weight * (1 - giou)
    return weighted_mean(difference, t_logits.sigmoid().amax(-1) / repeats)
