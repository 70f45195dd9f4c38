"""SimOTA: of its matches, each object learns those that are cheapest by what the network predicts. YOLOv7 learns so.

OTA (arXiv:2103.14259) assigns locations to objects as an optimal transport problem. SimOTA (YOLOX, arXiv:2107.08430)
replaces its solver by a count for each object and a choice by cost. YOLOv7 (arXiv:2207.02696) takes the candidates from
YOLOv5's rule, assigners.anchor_ratio_matches.

Nothing here carries a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import box_iou
from structures import Targets
from yolo.assigners import AnchorMatches


@torch.no_grad()
def simota_matches(
    candidates: AnchorMatches,
    *,
    boxes_xyxy: Tensor,
    objectness_logits: Tensor,
    class_logits: Tensor,
    targets: Targets,
    topk: int = 10,
    iou_weight: float = 3.0,
) -> AnchorMatches:
    """The candidates that are learnt, each by one object of its image, which need not be the one it was matched to.

        k_g     = max(1, floor(sum of the `topk` largest IoU_gc))
        cost_gc = sum_k BCE(q_ck, [k is the label of g]) - iou_weight * log(IoU_gc),    q_ck = sqrt(p_ck o_c)
        g's choice: its k_g cheapest candidates c, of all in its image
        a location that several objects choose: of all objects of the image, it goes to the one with the lowest cost

    p and o are class and objectness probabilities. A location that fits several objects is a candidate once for each
    of them, with one cost, so that an object may learn it several times. Of these an object takes its own first, then
    the lower ones; of objects with equal cost the lower row of targets wins.

    Args, for M candidates, in their order:
        boxes_xyxy: decoded predictions (M, 4), pixels. objectness_logits: (M,). class_logits: (M, K).
        targets: every learnt object chooses, also one without a match of its own.
    Returns:
        the chosen candidates, in their order, with the `gt_index` of the object that learns them. A prediction that
        is nan is the cheapest, so that the loss becomes nan too.
    """
    gt_index, is_chosen = candidates.gt_index.clone(), torch.zeros_like(candidates.gt_index, dtype=torch.bool)  # (M,)
    for image in candidates.image.unique():
        c = (candidates.image == image).nonzero()[:, 0]  # (C,) candidates of this image
        rows = (targets.is_learnt & (targets.image == image)).nonzero()[:, 0]  # (G,) objects of this image
        overlap = box_iou(targets.boxes_xyxy[rows].to(boxes_xyxy.dtype), boxes_xyxy[c])  # (G, C)
        cost = class_cost(objectness_logits[c], class_logits[c], targets.labels[rows])
        cost = (cost - iou_weight * overlap.clamp(min=1e-8).log()).nan_to_num(nan=-torch.inf)  # (G, C)
        count = overlap.topk(min(topk, len(c)), dim=1).values.sum(1, keepdim=True).nan_to_num().clamp(min=1).floor()

        own_first = (candidates.gt_index[c] != rows[:, None]).int().argsort(dim=1, stable=True)  # (G, C)
        by_cost = own_first.gather(1, cost.gather(1, own_first).argsort(dim=1, stable=True))
        chooses = by_cost.argsort(dim=1) < count  # (G, C) bool: the inverse permutation is the rank

        locations, place = candidates.location[c].unique(return_inverse=True)  # (S,), (C,) in 0..S-1
        claims = chooses.new_zeros(len(rows), len(locations), dtype=torch.int64).index_add_(1, place, chooses.long())
        is_shared = ((claims > 0).sum(0) > 1)[place]  # (C,)
        owner = torch.where(is_shared, cost.argmin(0), chooses.int().argmax(0))  # (C,) in 0..G-1
        gt_index[c], is_chosen[c] = rows[owner], chooses.any(0)
    image, location, level = (x[is_chosen] for x in (candidates.image, candidates.location, candidates.level))
    return AnchorMatches(gt_index[is_chosen], image, location, level)


def class_cost(objectness_logits: Tensor, class_logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of q against the one-hot label, summed over classes: (C,), (C, K), labels (G,) -> (G, C).

    sum_k BCE(q_k, [k = label]) = -sum_k log(1 - q_k) + log(1 - q_label) - log q_label
    """
    log_q = (F.logsigmoid(class_logits) + F.logsigmoid(objectness_logits)[:, None]) / 2  # (C, K)
    log_q = log_q.clamp(max=-torch.finfo(log_q.dtype).tiny)  # below 0, or log(1 - q) would be -inf
    log_not_q = torch.log(-torch.expm1(log_q))
    return (log_not_q - log_q)[:, labels].T - log_not_q.sum(1)
