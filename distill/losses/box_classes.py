"""Box classification: one detector's classes of given boxes are soft labels for any other detector.

A two-stage and a one-stage detector share neither maps nor locations, but both can classify a given box:
`class_logits_at(output, boxes_per_image)` pools the box in a two-stage detector, and reads the locations near it in a
dense one. `box_class_kl` compares two such predictions, whatever the heads:

- a sigmoid head has K independent log-odds, one for each "this is a k";
- a softmax head has one distribution with the background in column 0, as torchvision's Faster R-CNN. `log_odds` turns
  it into the log-odds of each class against all else, background included, which mean the same.

`assigned_logits` takes a dense student's logits at its assigned locations instead. distill.given_boxes chooses the
boxes and classifies them with both models. `datasets.class_names.join_classes` joins class lists by name.
"""

from typing import Literal

import torch
from torch import Tensor

from distill.losses.keywords import by_keyword
from distill.losses.logits import as_logit_pair, weighted_mean
from kernels.sigmoid_kl import bernoulli_kl
from layers.precision import at_least_float32

Head = Literal["sigmoid", "softmax"]


@by_keyword
def box_class_kl(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    s_head: Head = "sigmoid",
    t_head: Head = "sigmoid",
    classes: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The student's classification of N boxes against the teacher's.

        L   = T^2 / max(sum_n w_n, 1) * sum_n w_n * sum_{(i, j)} KL(Bern(p^t_nj) || Bern(p^s_ni))
        p_n = sigmoid(z_n / T),    z_n = log_odds(logits_n)

    (i, j) runs over the classes that both have: column i of the student and column j of the teacher. Classes that only
    one of them has take no part; in a softmax they still count among "all else".

    Args:
        s_logits: (N, K_s), or (N, 1 + K_s) with the background in column 0 where s_head is "softmax".
        t_logits: (N, K_t) of the same N boxes, or (N, 1 + K_t) where t_head is "softmax".
        classes: J pairs of columns (i, j), as (student's (J,), teacher's (J,)) int64 from class_names.join_classes. The
            background is not counted. None: the class lists are equal.
        weight: w_n >= 0, (N,). None weighs all rows 1: the mean.
        temperature: T > 0.
    Returns:
        scalar ().
    """
    s_odds, t_odds = log_odds(s_logits, s_head), log_odds(t_logits, t_head)
    if classes is not None:
        s_odds, t_odds = s_odds[:, classes[0].to(s_odds.device)], t_odds[:, classes[1].to(t_odds.device)]
    s_odds, t_odds = as_logit_pair(s_odds, t_odds)
    kl = bernoulli_kl(s_odds / temperature, t_odds / temperature).sum(-1)  # (N,)
    return temperature**2 * weighted_mean(kl, weight)


def log_odds(logits: Tensor, head: Head) -> Tensor:
    """log p_k / (1 - p_k) of each class of each row, in float32 (float64 stays).

    sigmoid   (N, K) -> (N, K), the logits themselves
    softmax   (N, 1 + K) -> (N, K), column 0 the background:  z_k - log sum_{j != k} exp z_j

    The softmax form takes no logarithm of 1 - p, so a saturated row keeps its order; memory N (1 + K)^2.
    """
    logits = at_least_float32(logits)
    if head == "sigmoid":
        return logits
    if head != "softmax":
        raise ValueError(f"head {head!r} must be sigmoid or softmax")
    if logits.shape[1] < 2:
        return logits[:, 1:]
    is_self = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    others = logits[:, None, :].masked_fill(is_self, -torch.inf).logsumexp(-1)  # (N, 1 + K)
    return (logits - others)[:, 1:]


def boxes_by_image(boxes_xyxy: Tensor, image: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Split N boxes (N, 4) of images (N,), in any order, into one tensor (N_b, 4) per image for class_logits_at.

    Also returns row (N,), the place of each box among those of all images: class_logits_at(...)[row] is in the order
    of the input.
    """
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=batch_size).tolist()
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=order.device)
    return list(boxes_xyxy[order].split(counts)), row


def teacher_scale(image_size: tuple[int, int], t_image_size: tuple[int, int], *, like: Tensor) -> Tensor:
    """(4,): the factors that take xyxy boxes from the student's image size (H, W) to the teacher's.

    In the dtype of `like`, and on its device.
    """
    (height, width), (t_height, t_width) = image_size, t_image_size
    return like.new_tensor([t_width / width, t_height / height] * 2)


def assigned_logits(class_logits: Tensor, gt_index: Tensor) -> tuple[Tensor, Tensor]:
    """The student's logits at the locations that learn an object, and the object of each.

    class_logits (B, A, K) and gt_index (B, A) int64, row of Targets or -1 -> logits (P, K), row (P,). If t_logits
    (N, K) are the teacher's logits of the boxes of Targets, the pair to compare is logits and t_logits[row]. An object
    counts once for each location that learns it.
    """
    if class_logits.shape[:2] != gt_index.shape:
        raise ValueError(
            f"logits {tuple(class_logits.shape)} must be (B, A, K), gt_index {tuple(gt_index.shape)} (B, A)"
        )
    is_positive = gt_index >= 0
    return class_logits[is_positive], gt_index[is_positive]
