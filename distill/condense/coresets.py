"""Choosing n of N real images: the baselines for a synthetic set.

Every function returns the n chosen rows, (n,) int64, distinct, in the order of the choice; a smaller set is a prefix of
a larger one. Ties go to the lowest row, so only the first three draw random numbers.

    random_rows      at random
    rows_in_turn     an image of each class in turn
    balanced_rows    about as many objects of each class
    herding          the mean of the chosen features is close to that of all     Welling, ICML 2009
    k_center         no image is far from a chosen one                           Sener and Savarese, arXiv:1708.00489
    region_cover     objects of each class are similar to those of a chosen image      Lee et al., arXiv:2404.09161
    top_rows         the largest values, such as a trained network's loss or the number of objects
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_count(count: int, total: int) -> None:
    """ValueError unless 1 <= count <= total."""
    if not 1 <= count <= total:
        raise ValueError(f"{count} pictures of {total}, expected 1 to {total}")


def random_rows(total: int, count: int, *, generator: torch.Generator) -> Tensor:
    """The first `count` of a random permutation of range(total)."""
    check_count(count, total)
    return torch.randperm(total, generator=generator)[:count]


def rows_in_turn(class_counts: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """At random an image with an object of class 0, one with class 1, and so on, in turn; no image twice.

    class_counts (N, K): the number of objects of each class in each image. A class whose images are used up is skipped;
    when all are, the images without objects follow.
    """
    check_count(count, len(class_counts))
    order = torch.randperm(len(class_counts), generator=generator)
    left = order.tolist()
    has_class = (class_counts > 0).tolist()
    chosen: list[int] = []
    while len(chosen) < count:
        before = len(chosen)
        for k in range(class_counts.shape[1]):
            row = next((row for row in left if has_class[row][k]), None)
            if row is not None:
                chosen.append(row)
                left.remove(row)
        if len(chosen) == before:
            chosen += left
    return torch.tensor(chosen[:count])


def balanced_rows(class_counts: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Greedily, the image that brings the classes' numbers of objects closest to one another.

        next = argmin_i sum_k (p_ik - 1 / K)^2,    p_ik = (c_k + n_ik) / sum_l (c_l + n_il)

    n_ik: the number of objects of class k in image i (N, K). c_k: that number in the images chosen so far. Equal images
    are taken in a random order; images without objects come last. Classes without any object do not count.
    """
    check_count(count, len(class_counts))
    counts = class_counts.double()[:, class_counts.sum(0) > 0]  # (N, K)
    order = torch.randperm(len(counts), generator=generator)
    chosen: list[int] = []
    chosen_counts = counts.new_zeros(counts.shape[1])  # c
    is_left = torch.ones(len(counts), dtype=torch.bool)
    for _ in range(count):
        sums = chosen_counts + counts  # (N, K)
        total = sums.sum(1, keepdim=True)
        share = sums / total.clamp(min=1)
        imbalance = (share - 1 / max(1, counts.shape[1])).square().sum(1)  # (N,)
        imbalance = imbalance.masked_fill(counts.sum(1) == 0, 2.0).masked_fill(~is_left, torch.inf)  # others: below 1
        row = int(order[imbalance[order].argmin()])
        chosen.append(row)
        is_left[row] = False
        chosen_counts = chosen_counts + counts[row]
    return torch.tensor(chosen)


def herding(features: Tensor, count: int) -> Tensor:
    """Greedily, the image that brings the mean of the chosen features closest to the mean of all.

        next = argmin_i || mu - (s + x_i) / (t + 1) ||^2,    mu = 1 / N sum_i x_i,    s the sum of the t chosen x

    features (N, D). For features of equal length this is Welling's rule: x = argmax <w, x>, then w <- w + mu - x, from
    w = mu. Deliberate difference from the original: no image is chosen twice.
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
    """Farthest-point traversal: always the image that is farthest from all chosen ones.

        next = argmax_i min_{j chosen} || x_i - x_j ||

    features (N, D). The largest distance of any image to its nearest chosen one is at most twice the smallest possible
    (Gonzalez, 1985). The first image is the one nearest to the mean of all, so the choice is deterministic.
    """
    check_count(count, len(features))
    x = features.double()
    chosen = [int((x - x.mean(0)).square().sum(1).argmin())]
    nearest = (x - x[chosen[0]]).square().sum(1)  # (N,) to the nearest chosen one
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1.0  # never again, even if all images are equal
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def region_cover(features: Tensor, rows: Tensor, labels: Tensor, count: int, total: int) -> Tensor:
    """Greedily, the image that raises most the similarity of each class's objects to their nearest chosen image.

        f_ik = mean of the features of image i's objects of class k, less the mean of all objects
        cover(S) = sum_k 1 / n_k sum_{j has k} max_{i in S has k} (1 + cos(f_ik, f_jk)) / 2
        next = argmax_i cover(S + i)

    n_k: the number of images with class k. The cover is submodular, so the greedy choice reaches at least 1 - 1/e of
    the best. features (M, D), rows (M,), labels (M,): of every object, the row of its image, and its class. total: N,
    with the images without objects, which come last.

    After CSOD (arXiv:2404.09161), which describes an image in the same way, by one mean for each of its classes.
    Deliberate difference: CSOD takes the classes in turn, and for one at a time the image whose similarity to all
    others, less that to the chosen ones, is largest; this sum of covers needs no factor between the two, and sees all
    classes.
    """
    check_count(count, total)
    centered = features.double() - features.double().mean(0)
    images, similarity = [], []  # of each class: the n images with it (n,); (1 + cos) / 2 / n of each pair (n, n)
    for label in labels.unique():
        is_own = labels == label
        own, place = rows[is_own].unique(return_inverse=True)
        sums = centered.new_zeros(len(own), centered.shape[1]).index_add_(0, place, centered[is_own])
        units = F.normalize(sums, dim=1)  # the length of f_ik does not matter, so sums serve as means
        images.append(own)
        similarity.append((1 + units @ units.T) / 2 / len(own))
    covered = [pairs.new_zeros(len(pairs)) for pairs in similarity]  # of each class: to the nearest chosen image (n,)
    chosen: list[int] = []
    for _ in range(count):
        gain = centered.new_zeros(total)
        for own, pairs, best in zip(images, similarity, covered):
            gain[own] += (pairs - best).clamp(min=0).sum(1)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        covered = [
            torch.cat((best[None], pairs[own == chosen[-1]])).amax(0)
            for own, pairs, best in zip(images, similarity, covered)
        ]
    return torch.tensor(chosen)


def top_rows(values: Tensor, count: int) -> Tensor:
    """The rows of the largest values (N,), largest first; equal values in the order of their rows."""
    check_count(count, len(values))
    return values.double().sort(descending=True, stable=True).indices[:count]
