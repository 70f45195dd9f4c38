"""Feature distillation: the student's maps imitate the teacher's.

Every loss is a pure function of two maps of equal shape: the criterion has passed the student's map through an adapter
(distill.adapters) and resized the teacher's map to the student's grid. Computed in float32 for half-precision inputs,
in float64 for float64. Student gradients only: the teacher's map is detached. An empty map (B = 0, or no pixels)
gives 0.

The grey padding of an image takes part like the rest, as in public toolboxes. A term with `content_only: true` leaves
it out: before and after the adapter both maps are set to 0 there, the teacher's before it is resized as well
(adapters.resize_shown), so what they hold in the padding has neither effect nor gradient. Its pixels still count, as
zeros, in a mean, in a softmax over pixels (CWD, FGD) and in a standard deviation (PKD); a context or generator network
(FGD, MGD) works there too.
"""

import torch
from torch import Tensor

from distill.losses.keywords import by_keyword
from kernels.channel_wise_kl import channel_kl
from layers.over_processes import joint_mean, joint_normaliser, process_count, sum_over_processes
from layers.precision import compute_dtype

TINY = 1e-24  # a vector no longer than 1e-12 has no direction
CONSTANT = 1e-10  # a row whose variance is below this share of its mean square is constant, up to float32 rounding


@by_keyword
def feature_mse(*, s_map: Tensor, t_map: Tensor) -> Tensor:
    """Mean squared difference of two maps.

    Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, eq. 3.

        L = 1 / (B C H W) * sum_{bchw} (s - t)^2

    Args:
        s_map, t_map: (B, C, H, W).
    Returns:
        scalar ().
    Differs from the paper: the mean, not half the sum, so that a weight means the same at every map size.
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    return (s_map - t_map).square().sum() / joint_normaliser(s_map.numel(), s_map)


@by_keyword
def cosine_distance(*, s_map: Tensor, t_map: Tensor) -> Tensor:
    """One minus the cosine of the two feature vectors of each pixel, on average.

    Liao et al., "RT-DETRv4", arXiv:2510.25257, where a foundation model teaches the deepest map of a detector.

        L = 1 / (B H W) * sum_bp (1 - cos(s_bp, t_bp)),    s_bp in R^C

    Invariant to the length of every feature vector. A pixel costs 0 for equal directions, 1 for orthogonal and 2 for
    opposite ones.

    Args:
        s_map, t_map: (B, C, H, W).
    Returns:
        scalar (). A vector of zeros is equal to another one and orthogonal to all others; it gets no gradient.
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    cosine = (unit_vectors(s_map, dim=1) * unit_vectors(t_map, dim=1)).sum(1)  # (B, H, W)
    cosine = torch.where(s_map.any(1) | t_map.any(1), cosine, 1)
    return (1 - cosine).sum() / joint_normaliser(cosine.numel(), cosine)


@by_keyword
def channel_wise_kl(*, s_map: Tensor, t_map: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation (CWD): match the spatial attention of each channel.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", arXiv:2011.13256, sec. 3.2.

        L    = T^2 / (B C) * sum_bc KL(q^t_bc || q^s_bc)
        q_bc = softmax over the H*W pixels of channel c of image b, of map / T

    Invariant to a constant added to any channel of either map.

    Args:
        s_map, t_map: (B, C, H, W).
        temperature: T > 0; a larger one spreads the attention over wider regions.
    Returns:
        scalar ().
    """
    require_map_pair(s_map, t_map)
    return joint_mean(channel_kl(s_map, t_map, temperature=temperature), len(s_map))


@by_keyword
def channel_correlation(*, s_map: Tensor, t_map: Tensor) -> Tensor:
    """Pearson distillation (PKD): correlate each channel of the student with the teacher's.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    arXiv:2207.02039.

        L = 1 / C * sum_c (1 - r_c) = 1/2 mean_{bchw} (n(s) - n(t))^2

    n(.) brings each channel to zero mean and unit standard deviation over the batch and the pixels together (B H W
    values), and r_c is the Pearson correlation of channel c. Invariant to any scale above 0 and any shift of each
    channel of either map, so that no level and no channel outweighs the others.

    Args:
        s_map, t_map: (B, C, H, W).
    Returns:
        scalar (), in [0, 2].
    Differs from the released code: the standard deviation is the biased one, which makes the second equality exact.
    The code adds 1e-6 to it. Here a channel whose spread is below 1e-5 of its root mean square (constant, up to
    rounding) has no correlation instead: it gets no gradient, and costs 1/2 if the other model's channel varies.
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    s_unit, t_unit = (unit_deviations(m.transpose(0, 1).flatten(1), joint=True) for m in (s_map, t_map))  # (C, B*H*W)
    return sum_over_processes((s_unit - t_unit).square().sum()) / max(2 * len(s_unit), 1)


@by_keyword
def attention_transfer(*, s_map: Tensor, t_map: Tensor, power: float = 2.0) -> Tensor:
    """Attention transfer: match the spatial attention of all channels together.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", arXiv:1612.03928, sec. 3.1, activation-based.

        L   = 1 / (2 B) * sum_b |Q^s_b - Q^t_b|^2,    Q_b = a_b / |a_b|,    a_bp = sum_c |map_bcp|^power

    With |.| the Euclidean length over the H*W pixels, so L = mean_b (1 - cos(a^s_b, a^t_b)). Invariant to the scale of
    either map, to the signs and to the order of the channels. The widths of the two maps may differ: no adapter.

    Args:
        s_map (B, C_s, H, W), t_map (B, C_t, H, W).
        power: at least 1; a larger one emphasises the strongest pixels.
    Returns:
        scalar (), in [0, 1].
    Differs from the paper, which does not square the length: the square has gradient 0 at the teacher. The released
    code squares too, and averages over pixels: its loss is ours * 2 / (H W).
    """
    if power < 1:
        raise ValueError(f"power {power} must be at least 1")
    s_map, t_map = as_map_pair(s_map, t_map, same_width=False)
    s_unit, t_unit = (unit_vectors(m.abs().pow(power).sum(1).flatten(1), dim=1) for m in (s_map, t_map))  # (B, H*W)
    return (s_unit - t_unit).square().sum() / joint_normaliser(2 * len(s_unit), s_unit)


@by_keyword
def score_weighted_l2(*, s_map: Tensor, t_map: Tensor, weight: Tensor) -> Tensor:
    """Squared difference of two maps, weighted by the teacher's confidence: the loss that Ultralytics distils with.

        L    = sum_bcp w_bp (s_bcp - t_bcp)^2 / (C sum_bp w_bp + 1e-9)
        w_bp = max_k sigmoid(class logit k of the teacher at pixel p)

    Args:
        s_map, t_map: (B, C, H, W).
        weight: (B, H, W), w >= 0, see masks.score_maps. Detached.
    Returns:
        scalar (); 0 where no pixel has weight.
    Differs from theirs: this is one map, unweighted. They sum over maps, and multiply by 6 and by the batch size.
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    if weight.shape != (len(s_map), *s_map.shape[2:]):
        raise ValueError(f"weight {tuple(weight.shape)} must be (B, H, W) of the map {tuple(s_map.shape)}")
    weight = weight.detach().to(s_map.dtype)
    difference = (s_map - t_map).square().sum(1)  # (B, H, W)
    return (weight * difference).sum() / (s_map.shape[1] * joint_normaliser(weight.sum(), weight, at_least=0) + 1e-9)


def as_map_pair(s_map: Tensor, t_map: Tensor, *, same_width: bool = True) -> tuple[Tensor, Tensor]:
    """Both maps in float32 (float64 stays), the teacher's detached.

    Raises ValueError unless they are (B, C, H, W) of equal shapes; with same_width=False, C may differ.
    """
    require_map_pair(s_map, t_map, same_width=same_width)
    dtype = compute_dtype(s_map)
    return s_map.to(dtype), t_map.detach().to(dtype)


def require_map_pair(s_map: Tensor, t_map: Tensor, *, same_width: bool = True) -> None:
    """Raises ValueError as as_map_pair does."""
    s_shape, t_shape = list(s_map.shape), list(t_map.shape)
    if not same_width:
        s_shape[1:2] = t_shape[1:2] = []
    if s_shape != t_shape or s_map.dim() != 4 or t_map.dim() != 4:
        raise ValueError(
            f"student map {tuple(s_map.shape)} and teacher map {tuple(t_map.shape)} must be equal (B, C, H, W)"
        )


def unit_vectors(values: Tensor, dim: int) -> Tensor:
    """values / |values| along dim; 0, with gradient 0, where |values| <= 1e-12 and there is no direction."""
    square = values.square().sum(dim, keepdim=True)
    return values * torch.where(square > TINY, square.clamp(min=TINY).rsqrt(), 0)


def unit_deviations(rows: Tensor, *, joint: bool = False) -> Tensor:
    """Each row of (N, D) minus its mean, scaled to length 1; 0 for a row that is constant up to rounding.

    joint: each process holds a part of N longer rows; mean and length are those of the whole rows.
    """
    _, deviations, square = row_moments(rows, joint=joint)
    varies = square > CONSTANT * row_sums(rows.detach().square(), joint=joint)
    return deviations * torch.where(varies, torch.where(varies, square, 1).rsqrt(), 0)


def row_moments(rows: Tensor, *, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N, 1) of each row of (N, D), deviations from it (N, D), the sum of their squares (N, 1); joint as above."""
    count = joint_normaliser(rows.shape[1], rows) * process_count() if joint else max(rows.shape[1], 1)
    mean = row_sums(rows, joint=joint) / count
    deviations = rows - mean
    return mean, deviations, row_sums(deviations.square(), joint=joint)


def row_sums(rows: Tensor, *, joint: bool) -> Tensor:
    total = rows.sum(1, keepdim=True)  # (N, 1)
    return sum_over_processes(total) if joint else total
