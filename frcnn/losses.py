"""The four losses of Faster R-CNN (arXiv:1506.01497, sec. 3.1.2; second stage: Fast R-CNN, arXiv:1504.08083, sec. 2.3).

Pure functions of the sampled anchors and proposals (matching.py). All are computed at least in float32. Without samples
they are 0 with a gradient of 0. In a distributed run N is the total over all processes, divided by their number
(layers.over_processes).

    smooth_l1(d) = d^2 / (2 beta)    where |d| < beta,    else |d| - beta / 2

beta = 1/9 in both stages, as in torchvision. That is sigma = 3 with beta = 1 / sigma^2 of the authors' RPN; Fast R-CNN
has beta = 1 in the second stage.
"""

import torch.nn.functional as F
from torch import Tensor

from layers.over_processes import joint_normaliser
from layers.precision import at_least_float32

SMOOTH_L1_BETA = 1 / 9


def rpn_losses(
    *, objectness_logits: Tensor, is_positive: Tensor, box_deltas: Tensor, target_deltas: Tensor
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss over N sampled anchors of a batch, P of them positive.

        L_objectness = 1/N sum_n BCE(sigmoid(z_n), y_n),    L_box = 1/N sum_p sum_{i in xywh} smooth_l1(t_pi - t*_pi)

    objectness_logits (N,), is_positive (N,) bool; box_deltas and target_deltas (P, 4), of the positives only.
    Differs from the paper: it divides L_box by the number of anchor positions and weights it by 10, which is nearly the
    same.
    """
    logits = at_least_float32(objectness_logits)
    count = joint_normaliser(len(logits), logits)
    objectness = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits.dtype), reduction="sum") / count
    return objectness, _smooth_l1(box_deltas, target_deltas) / count


def roi_losses(
    *,
    class_logits: Tensor,
    labels: Tensor,
    box_deltas: Tensor,
    target_deltas: Tensor,
    class_scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Class and box loss over N sampled proposals of a batch, P of them positive.

        L_class = -1/N sum_n log softmax(z_n)_{y_n},    L_box = 1/N sum_p sum_{i in xywh} smooth_l1(t_pi - t*_pi)

    class_logits (N, 1 + K) with the background in column 0, labels (N,) in 0..K.
    box_deltas (P, 4): the offsets predicted for each positive's own class. target_deltas (P, 4).
    class_scores q (P, K), rows that sum to 1, in the order of the positives: their terms of L_class become
    -1/N sum_k q_pk log softmax(z_p)_k. The gradient flows into q.
    """
    logits = at_least_float32(class_logits)
    count = joint_normaliser(len(logits), logits)
    box = _smooth_l1(box_deltas, target_deltas) / count
    if class_scores is None:
        return F.cross_entropy(logits, labels, reduction="sum") / count, box
    log_p = logits.log_softmax(1)
    positive = class_scores.to(log_p.dtype) * log_p[labels > 0, 1:]  # (P, K)
    return -(positive.sum() + log_p[labels == 0, 0].sum()) / count, box


def _smooth_l1(deltas: Tensor, targets: Tensor) -> Tensor:
    deltas = at_least_float32(deltas)
    return F.smooth_l1_loss(deltas, targets.to(deltas.dtype), beta=SMOOTH_L1_BETA, reduction="sum")
