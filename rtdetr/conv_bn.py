"""Convolution and BatchNorm, the layer of both backbones and the encoder of RT-DETR."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layers.fusion import fold_batchnorm


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm and, if given, an activation: y = activation(bn(conv(x))).

    Padding is (kernel - 1) // 2 on every side: an odd kernel at stride 1 keeps H and W, an even one loses a pixel
    unless its caller pads.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(c_out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if y.requires_grad and y.shape[0] == 1:  # len() would fix the batch size of an exported graph
            # For one image, torch 2.13's BatchNorm on the CPU computes a wrong gradient from one with other strides,
            # which is what comes back from attention.
            y.register_hook(torch.Tensor.contiguous)
        return y if self.activation is None else self.activation(y)

    def fold(self) -> None:
        """Replace bn(conv(x)) by one convolution with a bias, for inference only. A second call does nothing."""
        if not isinstance(self.bn, nn.Identity):
            fold_batchnorm(self.conv, self.bn)
            self.bn = nn.Identity()
