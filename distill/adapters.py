"""Adapters: small trained layers that carry a student's map into the teacher's width.

They belong to the criterion, learn with the student, are saved for resume, and never leave with an exported student.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def build_adapter(kind: str, student_channels: int, teacher_channels: int) -> nn.Module:
    """(B, student_channels, H, W) -> (B, teacher_channels, H, W).

    none          the map as it is; needs equal widths
    conv1x1       one 1x1 convolution
    conv1x1_norm  1x1 convolution, then BatchNorm without affine parameters (batch statistics while training): the
                  student's map arrives with zero mean and unit variance per channel
    conv3x3       3x3 convolution and ReLU (FGFI, arXiv:1906.03609)
    mlp           1x1 - ReLU - 1x1, hidden width teacher_channels

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
        return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels, affine=False))
    if kind == "conv3x3":
        return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 3, padding=1), nn.ReLU())
    if kind == "mlp":
        hidden = nn.Conv2d(student_channels, teacher_channels, 1)
        return nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(teacher_channels, teacher_channels, 1))
    raise ValueError(f"unknown adapter {kind!r}")


def resize_like(t_map: Tensor, s_map: Tensor) -> Tensor:
    """The teacher's map (B, C, H', W') at the student's height and width, bilinear, half-pixel centers.

    Between grids of different strides (patch 14 against 8, 16, 32) this keeps every picture point in place, because
    both grids cover the whole image. Shrinking averages (antialias), so no teacher pixel is skipped.
    """
    size = s_map.shape[-2:]
    if t_map.shape[-2:] == size:
        return t_map
    return F.interpolate(t_map.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
