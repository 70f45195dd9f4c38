"""The layers that the YOLOs share.

Each layer maps (B, C_in, H, W) to (B, C_out, H', W') and keeps the memory format of its input: no map is copied from
channels_last to another layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.fusion import fold_batchnorm
from layers.int8 import Int8Conv, Int8Range

BATCHNORM_EPS = 1e-3  # the released weights were trained with these two values; a state dict does not hold them
BATCHNORM_MOMENTUM = 0.03


class ConvBNAct(nn.Module):
    """Convolution without bias, BatchNorm, SiLU (arXiv:1702.03118): y = silu(bn(conv(x))).

    Padding keeps H and W at stride 1: (kernel - 1) // 2 on every side (2 for the 6x6 stem of YOLOv5).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(c_out, eps=BATCHNORM_EPS, momentum=BATCHNORM_MOMENTUM)
        self.int8: Int8Conv | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.int8 is not None:
            return self.int8(x, self.conv, self.bn, F.silu)
        # In place only without gradients: the backward pass of silu needs its input, so autograd would clone it first.
        return F.silu(self.bn(self.conv(x)), inplace=not torch.is_grad_enabled())

    def fold(self) -> None:
        """Replace bn(conv(x)) by one convolution with a bias, for inference only. A second call does nothing."""
        if not isinstance(self.bn, nn.Identity):
            fold_batchnorm(self.conv, self.bn)
            self.bn = nn.Identity()

    def add_int8(self) -> None:
        self.int8 = Int8Conv(has_gate=True)


class Bottleneck(nn.Module):
    """Two convolutions and, with `shortcut`, the identity around them (ResNet, arXiv:1512.03385). C_out = C_in."""

    def __init__(self, channels: int, kernels: tuple[int, int], shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(channels, channels, kernels[0])
        self.conv2 = ConvBNAct(channels, channels, kernels[1])
        self.shortcut = shortcut
        self.int8: Int8Range | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        y = x + y if self.shortcut else y
        return y if self.int8 is None else self.int8(y)

    def add_int8(self) -> None:
        self.int8 = Int8Range() if self.shortcut else None


class SPPF(nn.Module):
    """Spatial pyramid pooling (arXiv:1406.4729) at one stride: max over 5x5, 9x9 and 13x13 windows, concatenated.

    Two 5x5 maxima in a row are one 9x9 maximum, three are one 13x13 maximum.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.reduce = ConvBNAct(c_in, c_in // 2)
        self.merge = ConvBNAct(4 * (c_in // 2), c_out)

    def forward(self, x: Tensor) -> Tensor:
        windows = [self.reduce(x)]
        for _ in range(3):
            windows.append(F.max_pool2d(windows[-1], 5, stride=1, padding=2))
        return self.merge(torch.cat(windows, 1))


def upsample(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): every pixel becomes a 2x2 block."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
