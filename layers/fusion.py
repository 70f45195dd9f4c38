"""Fold BatchNorm into the convolution before it, for inference: predict.py and frozen teachers.

It works for every architecture: a module with such a pair has a method `fold()` that calls fold_batchnorm, as
yolo.layers.ConvBNAct does.
"""

import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Foldable(Protocol):
    """A module that can fold its BatchNorms into its convolutions."""

    def fold(self) -> None: ...


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, with `fold()` called on every module that has it. `model` stays unchanged.

    The copy computes the same to rounding, with fewer passes over memory. It is for inference only: its state dict has
    other keys. A parameter of the copy requires grad if that of `model` does.
    """
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, Foldable):
            module.fold()
    return fused


@torch.no_grad()
def fold_batchnorm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Change weight and bias of `conv` to those of `folded`. The caller drops `bn`.

    The statistics of `bn` must be final: the result cannot be trained. The new bias requires grad if conv.weight does.
    """
    weight, bias = folded(conv, bn)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias (C_out,) of the convolution that computes bn(conv(x)) of eval mode. Gradient flows.

        w' = w * gamma / sqrt(var + eps),    b' = beta + (b - mean) * gamma / sqrt(var + eps)

    Computed in float64, returned in the dtype of conv.weight.
    """
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()  # (C_out,)
    mean = bn.running_mean.double() if conv.bias is None else bn.running_mean.double() - conv.bias.double()
    bias = bn.bias.double() - mean * scale
    return (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype), bias.to(conv.weight.dtype)
