"""The distance between the gradients of a synthetic set and of real images, layer by layer.

    cosine    Zhao et al., "Dataset Condensation with Gradient Matching", arXiv:2006.05929, sec. 3
    mse, l1   as in Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", arXiv:2205.14959

The weight of a layer is a matrix with one row for each output channel: a convolution (out, in, k, k) becomes
(out, in k k). Parameters with one dimension (biases, the scales of a normalisation) are skipped.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST_PRODUCT = 1e-12  # of two lengths; below, a row has no direction


def gradient_distance(s_gradients: Sequence[Tensor], r_gradients: Sequence[Tensor], kind: str) -> Tensor:
    """D(s, r), a scalar, over L pairs of gradients of equal shapes; kind is a key of DISTANCES.

        cosine   D = sum_l sum_o 1 - <s_lo, r_lo> / (|s_lo| |r_lo|)
        mse      D = sum_l |s_l - r_l|^2
        l1       D = sum_l |s_l - r_l|_1

    s_lo is row o of layer l. Sums, not means: a layer counts by its output channels (cosine) or by its entries. The
    gradient flows into both sides. Rows whose lengths have a product of 1e-12 or less cost 1 in the cosine and get no
    gradient, which would be unbounded near 0.
    ValueError for an unknown kind, for shapes that differ, and where no parameter has two dimensions or more.
    Differs from the public code of the first paper: it adds 1e-6 to the product of the lengths, but a detector's rows
    are often that short.
    """
    if kind not in DISTANCES:
        raise ValueError(f"distance {kind!r}: expected one of {', '.join(DISTANCES)}")
    if [s.shape for s in s_gradients] != [r.shape for r in r_gradients]:
        raise ValueError("the two sides are gradients of different parameters: their shapes differ")
    pairs = [(s.flatten(1), r.flatten(1)) for s, r in zip(s_gradients, r_gradients) if s.dim() > 1]
    if not pairs:
        raise ValueError("no parameter of two or more dimensions to compare")
    return sum((DISTANCES[kind](s, r) for s, r in pairs), pairs[0][0].new_zeros(()))


def cosine_distance(s: Tensor, r: Tensor) -> Tensor:
    """sum_o 1 - cos(s_o, r_o) of two matrices (out, n): 0 for equal directions, 2 out for opposite ones."""
    product = s.square().sum(1) * r.square().sum(1)  # (out,)
    has_direction = ~(product <= SMALLEST_PRODUCT**2)  # True for nan, so that the distance becomes nan
    lengths = torch.where(has_direction, product, 1).sqrt()  # the root's gradient at 0 is infinite, so choose before it
    return (1 - torch.where(has_direction, (s * r).sum(1) / lengths, 0)).sum()


def squared_distance(s: Tensor, r: Tensor) -> Tensor:
    """sum (s - r)^2."""
    return (s - r).square().sum()


def absolute_distance(s: Tensor, r: Tensor) -> Tensor:
    """sum |s - r|."""
    return (s - r).abs().sum()


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "mse": squared_distance,
    "l1": absolute_distance,
}
