"""Beliefs about given boxes: any detector's opinion of a box as soft labels for any other.

Feature maps of a two-stage and a one-stage detector have little in common, and their locations nothing. But both can be
asked about a given box: `class_logits_at(output, boxes_per_image)` pools it in a two-stage detector and reads the
locations near it in a dense one. `box_class_kl` compares two such answers, whatever the heads behind them:

- a sigmoid head answers K independent questions, "is this a k?", each by its log-odds;
- a softmax head answers one, with a background column first (Faster R-CNN as torchvision has it). Its probability of
  class k against all else, background included, is an answer to the same question: log_odds turns it into one.

A dense student may also learn at its assigned locations instead of reading given boxes: `assigned_logits`.
Class lists are joined by name: `join_classes`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.logits import as_logit_pair, bernoulli_kl, weighted_mean
from kernels.backend import at_least_float32

Head = Literal["sigmoid", "softmax"]


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
    """What the student says of N boxes, against what the teacher says of them.

        L   = T^2 / max(sum_n w_n, 1) * sum_n w_n * sum_{(i, j)} KL(Bern(p^t_nj) || Bern(p^s_ni))
        p_n = sigmoid(z_n / T),    z_n = log_odds(logits_n)

    over the pairs (i, j) of a class of the student and the same class of the teacher. Classes that only one of them
    knows take no part; in a softmax they still count among "all else".

    Args:
        s_logits: (N, K_s), with a background column in front, (N, 1 + K_s), where s_head is "softmax".
        t_logits: (N, K_t) of the same N boxes, or (N, 1 + K_t) where t_head is "softmax".
        classes: J pairs of columns as (student's (J,), teacher's (J,)) int64 from join_classes, background not
            counted. None: the lists are equal.
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


def join_classes(
    student_names: Sequence[str], teacher_names: Sequence[str], *, aliases: dict[str, str] | None = None
) -> tuple[Tensor, Tensor]:
    """Columns that mean the same class: (student's (J,), teacher's (J,)) int64, in the student's order.

    Names are equal up to case, spaces, underscores and hyphens: "Potted Plant" is "pottedplant". aliases names the
    teacher's class for a student's where they still differ: {"aeroplane": "airplane"}.
    Raises ValueError for a name that stands twice in a list, an alias from or to a class that is in neither, two
    classes of the student that are one of the teacher, and no class in common.
    """
    s_columns, t_columns = columns_by_name("student", student_names), columns_by_name("teacher", teacher_names)
    renamed = {plain(s): plain(t) for s, t in (aliases or {}).items()}
    for s, t in renamed.items():
        if s not in s_columns or t not in t_columns:
            raise ValueError(f"alias {s}: {t} must lead from a class of the student to one of the teacher")
    wanted = {name: renamed.get(name, name) for name in s_columns}
    pairs = [(column, t_columns[wanted[name]]) for name, column in s_columns.items() if wanted[name] in t_columns]
    for name in s_columns:
        rivals = [other for other in s_columns if other != name and wanted[other] == wanted[name]]
        if rivals and wanted[name] in t_columns:
            raise ValueError(f"the student's classes {name} and {rivals[0]} are both the teacher's {wanted[name]}")
    if not pairs:
        raise ValueError(
            f"no class in common: the student knows {', '.join(student_names)}, the teacher {', '.join(teacher_names)}"
        )
    s_index, t_index = torch.tensor(pairs, dtype=torch.int64).T
    return s_index, t_index


def columns_by_name(who: str, names: Sequence[str]) -> dict[str, int]:
    columns = {plain(name): column for column, name in enumerate(names)}
    if len(columns) < len(names):
        twice = next(n for column, n in enumerate(names) if columns[plain(n)] != column)
        raise ValueError(f"the {who}'s class {twice!r} stands twice in its list")
    return columns


def plain(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").replace("-", " ").split())


def boxes_by_image(boxes_xyxy: Tensor, image: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """N boxes (N, 4) of images (N,), in any order, as class_logits_at takes them: one tensor (N_b, 4) per image.

    Also row (N,): where each box stands among those of all images, so that class_logits_at(...)[row] is in the order
    of the input.
    """
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=batch_size).tolist()
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=order.device)
    return list(boxes_xyxy[order].split(counts)), row


def assigned_logits(class_logits: Tensor, gt_index: Tensor) -> tuple[Tensor, Tensor]:
    """The student's logits at the locations that learn an object, and the object of each.

    class_logits (B, A, K) and gt_index (B, A) int64, row of Targets or -1 -> logits (P, K), row (P,). With what the
    teacher says of the boxes of Targets, (N, K), the pair to compare is logits and said[row]. An object with many
    locations counts as often.
    """
    if class_logits.shape[:2] != gt_index.shape:
        raise ValueError(
            f"logits {tuple(class_logits.shape)} must be (B, A, K), gt_index {tuple(gt_index.shape)} (B, A)"
        )
    is_positive = gt_index >= 0
    return class_logits[is_positive], gt_index[is_positive]
