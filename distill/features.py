"""Feature distillation: the student's maps imitate the teacher's.

Every loss is a pure function of one pair of maps with equal shapes; an adapter (distill.adapters) has joined
different widths before. Computed in float32 for half-precision inputs, in float64 for float64. Student gradients
only: the teacher's map is detached. An empty map (B = 0, or no pixels) gives 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    s_map, t_map = _as_pair(s_map, t_map)
    return (s_map - t_map).square().sum() / max(s_map.numel(), 1)


def channel_wise_kl(*, s_map: Tensor, t_map: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation (CWD): where each channel looks, the student shall look.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", arXiv:2011.13256, sec. 3.2.

        L    = T^2 / (B C) * sum_bc KL(q^t_bc || q^s_bc)
        q_bc = softmax over the H*W pixels of channel c of image b, of map / T

    Invariant to a constant added to any channel of either map.

    Args:
        s_map, t_map: (B, C, H, W).
        temperature: T > 0; larger looks at wider regions.
    Returns:
        scalar ().
    """
    s_map, t_map = _as_pair(s_map, t_map)
    if s_map.numel() == 0:
        return s_map.sum()
    log_q_s = F.log_softmax(s_map.flatten(2) / temperature, dim=-1)  # (B, C, H*W)
    log_q_t = F.log_softmax(t_map.flatten(2) / temperature, dim=-1)  # (B, C, H*W)
    kl = (log_q_t.exp() * (log_q_t - log_q_s)).sum(-1)  # (B, C)
    return temperature**2 * kl.mean()


def _as_pair(s_map: Tensor, t_map: Tensor) -> tuple[Tensor, Tensor]:
    if s_map.shape != t_map.shape or s_map.dim() != 4:
        raise ValueError(
            f"student map {tuple(s_map.shape)} and teacher map {tuple(t_map.shape)} must be equal (B, C, H, W)"
        )
    dtype = s_map.dtype if s_map.dtype.itemsize >= 4 else torch.float32
    return s_map.to(dtype), t_map.detach().to(dtype)
