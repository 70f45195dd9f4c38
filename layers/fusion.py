"""Folding of BatchNorm into the convolution before it, for models that only infer: predict.py, and frozen teachers.

It knows no architecture. A module that holds such pairs offers a method `fold()` that folds them by fold_batchnorm, as
yolo.layers.ConvBNAct does.
"""

import copy

import torch
from torch import nn


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode in which every module that has a method `fold` has folded; `model` is unchanged.

    The copy computes the same to rounding, with fewer passes over memory. It is for inference alone: its state dict
    has other keys. Parameters are frozen or not as those of `model` are. Of a model without such modules it is just
    a copy in eval mode.
    """
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if hasattr(module, "fold"):
            module.fold()
    return fused


@torch.no_grad()
def fold_batchnorm(conv: nn.Conv2d, bn: nn.Module) -> None:
    """Give `conv` the weight and bias with which it computes bn(conv(x)) as eval mode has it; the caller drops `bn`.

        w' = w * gamma / sqrt(var + eps),    b' = beta + (b - mean) * gamma / sqrt(var + eps)

    bn: BatchNorm2d, or any module with its weight, bias, running_mean, running_var and eps. Its statistics must be
    final: the result cannot be trained on. Computed in float64, stored in the dtype of conv.weight; a new bias is
    frozen where conv.weight is.
    """
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()  # (C_out,)
    mean = bn.running_mean.double() if conv.bias is None else bn.running_mean.double() - conv.bias.double()
    bias = bn.bias.double() - mean * scale
    conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
