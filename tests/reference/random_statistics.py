"""BatchNorm statistics that a wrong formula cannot cancel."""

import torch
from torch import nn

from frcnn.norm import BatchNorm


def draw_statistics(module: nn.Module, seed: int = 0, least_variance: float = 0.5) -> nn.Module:
    """The module, every BatchNorm in it with random statistics, gamma and beta."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.running_mean.uniform_(-0.5, 0.5, generator=generator)
            part.running_var.uniform_(least_variance, 2.0, generator=generator)
            part.weight.data.uniform_(-1.5, 1.5, generator=generator)
            part.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return module
