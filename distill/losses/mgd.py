"""Masked generative distillation (MGD): a small network rebuilds the teacher's map from a part of the student's.

Yang et al., "Masked Generative Distillation", arXiv:2205.01529.

Computed in float32 for half-precision inputs, in float64 for float64; the teacher's map is detached, and an empty map
gives 0. The network is trained with the student and discarded with the criterion.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.losses.features import as_map_pair
from distill.losses.keywords import by_keyword
from distill.losses.masked import as_mask
from layers.over_processes import joint_normaliser


@by_keyword
def masked_generation(*, s_map: Tensor, t_map: Tensor, keep: Tensor, generate: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared error between the teacher's map and the one generated from the pixels that the student keeps.

        L = 1/B sum_bcp (t_bcp - G(M * s)_bcp)^2

    Summed over channels and pixels, as published, so that the published weights apply (2e-5 for one-stage detectors
    with 256 channels, 5e-7 for two-stage ones). Not 0 for s = t: G has to learn to fill the holes.

    Args:
        s_map, t_map: (B, C, H, W).
        keep: M, (B, 1, H, W) bool; one mask for all channels, see random_mask.
        generate: G, (B, C, H, W) -> (B, C, H, W).
    Returns:
        scalar ().
    """
    s_map, t_map = as_map_pair(s_map, t_map)
    keep = as_mask(keep, s_map)
    count = joint_normaliser(len(s_map), s_map)
    if s_map.numel() == 0:
        return s_map.sum()
    with torch.autocast(s_map.device.type, enabled=False):  # the convolutions inside run in float32, too
        return (t_map - generate(keep * s_map)).square().sum() / count


def random_mask(feature_map: Tensor, *, drop: float, generator: torch.Generator) -> Tensor:
    """True with probability 1 - drop, independently for every pixel of (B, C, H, W): (B, 1, H, W) bool.

    Drawn on the generator's device, so a generator on the CPU gives the same mask on every device.
    """
    b, _, h, w = feature_map.shape
    draw = torch.rand((b, 1, h, w), generator=generator, device=generator.device)
    return (draw >= drop).to(feature_map.device)


class MGD(nn.Module):
    """MGD as one loss: the teacher's map, rebuilt from a part of the student's.

    It owns the generator G, 3x3 convolution, ReLU, 3x3 convolution, whose parameters join the optimizer.

    Args:
        channels: C of the maps (after the adapter).
        drop: probability that a pixel is hidden; published: 0.65 for one-stage detectors, 0.45 for two-stage ones.
    """

    def __init__(self, channels: int, *, drop: float = 0.65) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise ValueError(f"drop {drop} must be in [0, 1]")
        self.drop = drop
        self.generate = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    @by_keyword
    def forward(self, *, s_map: Tensor, t_map: Tensor, generator: torch.Generator) -> Tensor:
        """s_map, t_map (B, C, H, W) -> scalar (). generator: draws the mask; the caller seeds it for each step."""
        keep = random_mask(s_map, drop=self.drop, generator=generator)
        return masked_generation(s_map=s_map, t_map=t_map, keep=keep, generate=self.generate)
