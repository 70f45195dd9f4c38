"""Choosing n of N real pictures: the baselines that a synthetic set is measured against.

Every function returns the n chosen rows, (n,) int64, distinct, in the order they were chosen; a smaller set is a prefix
of a larger one. Ties go to the lowest row, so that nothing but `random_rows` and `balanced_rows` draws a number.

    random_rows      any of them
    balanced_rows    about as many objects of each class
    herding          the mean of their features is the mean of all     Welling, ICML 2009
    k_center         no picture is far from a chosen one               Sener and Savarese, arXiv:1708.00489
    top_rows         the largest values: of a trained network's loss, of the number of objects
"""

import torch
from torch import Tensor


def check_count(count: int, total: int) -> None:
    """ValueError unless 1 <= count <= total."""
    if not 1 <= count <= total:
        raise ValueError(f"{count} pictures of {total}, expected 1 to {total}")


def random_rows(total: int, count: int, *, generator: torch.Generator) -> Tensor:
    """The first `count` of a random permutation of range(total)."""
    check_count(count, total)
    return torch.randperm(total, generator=generator)[:count]


def balanced_rows(class_counts: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Greedily, the picture that brings the classes' numbers of objects closest to one another.

        next = argmin_i sum_k (p_ik - 1 / K)^2,    p_ik = (c_k + n_ik) / sum_l (c_l + n_il)

    n_ik objects of class k are in picture i (N, K), c_k in the pictures chosen so far. Pictures that do equally well
    are taken in a random order; pictures without any object come last. Classes without objects anywhere do not count.
    """
    check_count(count, len(class_counts))
    counts = class_counts.double()[:, class_counts.sum(0) > 0]  # (N, K)
    order = torch.randperm(len(counts), generator=generator)
    chosen: list[int] = []
    have = counts.new_zeros(counts.shape[1])  # c
    is_left = torch.ones(len(counts), dtype=torch.bool)
    for _ in range(count):
        sums = have + counts  # (N, K)
        total = sums.sum(1, keepdim=True)
        share = sums / total.clamp(min=1)
        imbalance = (share - 1 / max(1, counts.shape[1])).square().sum(1)  # (N,)
        imbalance = imbalance.masked_fill(counts.sum(1) == 0, 2.0).masked_fill(~is_left, torch.inf)  # else below 1
        row = int(order[imbalance[order].argmin()])
        chosen.append(row)
        is_left[row] = False
        have = have + counts[row]
    return torch.tensor(chosen)


def herding(features: Tensor, count: int) -> Tensor:
    """Greedily, the picture that brings the mean of the chosen features closest to the mean of all.

        next = argmin_i || mu - (s + x_i) / (t + 1) ||^2,    mu = 1 / N sum_i x_i,    s the sum of the t chosen x

    features (N, D). Where all features have one length this is Welling's w' = w + mu - x, x = argmax <w, x>, w = mu at
    first. Deliberate difference from the moment-matching original: no picture is chosen twice.
    """
    check_count(count, len(features))
    x = features.double()
    mean, total = x.mean(0), torch.zeros_like(x[0])
    chosen: list[int] = []
    for number in range(1, count + 1):
        distance = (mean - (total + x) / number).square().sum(1)  # (N,)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + x[chosen[-1]]
    return torch.tensor(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """Farthest-point traversal: the largest distance of any picture to its nearest chosen one is at most twice the
    smallest possible (Gonzalez, 1985).

        next = argmax_i min_{j chosen} || x_i - x_j ||

    features (N, D). The first one is the picture nearest to the mean of all, so that the choice is deterministic.
    """
    check_count(count, len(features))
    x = features.double()
    chosen = [int((x - x.mean(0)).square().sum(1).argmin())]
    nearest = (x - x[chosen[0]]).square().sum(1)  # (N,) to the nearest chosen one
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1.0  # not again, not even among pictures that are all the same
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def top_rows(values: Tensor, count: int) -> Tensor:
    """The rows of the largest values (N,), largest first; of equal ones the lowest row."""
    check_count(count, len(values))
    return values.double().sort(descending=True, stable=True).indices[:count]
