"""Adapters: small trained layers that bring a student's map to the teacher's width.

They belong to the criterion and learn with the student. They are saved for --resume, but not with an exported student.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.over_processes import process_count, sum_over_processes
from layers.precision import at_least_float32

EPSILON = 1e-5


class ChannelNorm(nn.Module):
    """Each channel at mean 0 and variance 1 over the batch and the pixels: (B, C, H, W) -> (B, C, H, W).

        y_bcp = (x_bcp - mean_c) / sqrt(var_c + 1e-5)

    BatchNorm without parameters and without running statistics: it uses the statistics of its input in eval mode, too.
    In training they are those of all processes together, in eval mode those of one process. A channel with one value
    becomes 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or process_count() == 1:
            return torch.batch_norm(x, None, None, None, None, True, 0.0, EPSILON, torch.backends.cudnn.enabled)
        values = at_least_float32(x)
        count = sum_over_processes(values.new_full((), x.numel() / max(x.shape[1], 1)))
        mean = sum_over_processes(values.sum((0, 2, 3), keepdim=True)) / count  # (1, C, 1, 1)
        deviations = values - mean
        variance = sum_over_processes(deviations.square().sum((0, 2, 3), keepdim=True)) / count
        return (deviations * (variance + EPSILON).rsqrt()).to(x.dtype)


def build_adapter(kind: str, student_channels: int, teacher_channels: int) -> nn.Module:
    """(B, student_channels, H, W) -> (B, teacher_channels, H, W).

    none          the map unchanged; needs equal widths
    conv1x1       one 1x1 convolution
    conv1x1_norm  1x1 convolution, then ChannelNorm. The teacher's map is normalised as well (like_adapted), as in the
                  published recipes of RTMDet and DAMO-YOLO
    conv3x3       3x3 convolution and ReLU (FGFI, arXiv:1906.03609)
    mlp           1x1 convolution, ReLU, 1x1 convolution; hidden width teacher_channels

    Raises ValueError for an unknown kind, or for `none` between different widths.
    """
    if kind == "none":
        if student_channels != teacher_channels:
            raise ValueError(
                f"widths differ ({student_channels} and {teacher_channels} channels): an adapter must join them"
            )
        return nn.Identity()
    if kind == "conv1x1":
        return nn.Conv2d(student_channels, teacher_channels, 1)
    if kind == "conv1x1_norm":
        convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        return nn.Sequential(convolution, ChannelNorm())
    if kind == "conv3x3":
        return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 3, padding=1), nn.ReLU())
    if kind == "mlp":
        hidden = nn.Conv2d(student_channels, teacher_channels, 1)
        return nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(teacher_channels, teacher_channels, 1))
    raise ValueError(f"unknown adapter {kind!r}")


def normalises(adapter: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether an adapter of build_adapter ends in a ChannelNorm."""
    return isinstance(adapter, nn.Sequential) and isinstance(adapter[-1], ChannelNorm)


def like_adapted(adapter: nn.Module, t_map: Tensor) -> Tensor:
    """The teacher's map (B, C, H, W), normalised if the adapter normalises the student's.

    A student whose convolution reproduces the teacher's map then has a loss of 0.
    """
    return adapter[-1](t_map) if normalises(adapter) else t_map


def resize_like(t_map: Tensor, s_map: Tensor) -> Tensor:
    """The teacher's map (B, C, H', W') resized to the student's height and width: bilinear, half-pixel centers.

    Both grids cover the whole image, so every point stays in place between grids of different strides (patch 14 against
    8, 16, 32). Shrinking averages (antialias), so no teacher pixel is skipped.
    """
    return resize_to(t_map, (s_map.shape[-2], s_map.shape[-1]))


def resize_to(t_map: Tensor, size: tuple[int, int]) -> Tensor:
    """resize_like with the height and width as numbers."""
    if t_map.shape[-2:] == size:
        return t_map
    return F.interpolate(t_map.float(), size=size, mode="bilinear", align_corners=False, antialias=True)


def resize_shown(t_map: Tensor, shown: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """resize_to of the pixels where `shown` (B, 1, H', W') is True alone: what the others hold has no effect.

        out_p = sum_q w_pq m_q t_q / sum_q w_pq m_q,    w the weights of resize_to, m = shown

    Also returns where any shown pixel counts, (B, 1, *size) bool; elsewhere the map is 0.
    """
    seen = t_map.masked_fill(~shown, 0)
    if t_map.shape[-2:] == size:
        return seen, shown
    share = resize_to(shown.float(), size)
    is_reached = share > 0
    return resize_to(seen, size) / share.where(is_reached, 1), is_reached
