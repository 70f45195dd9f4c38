"""How much each channel of a model matters: the lowest scores are removed first.

C channels in groups (layers/channel_groups.py); a channel has a row in every layer that writes it and a column, or
several, in every layer that reads it. Scores are compared within a group. All functions return (C,) float64, >= 0.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from layers.channel_groups import STAYS, ChannelGroups
from layers.eval_mode import in_eval_mode
from structures import Detector, Targets


def bn_gamma(state: dict[str, Tensor], groups: ChannelGroups) -> Tensor:
    """The mean of |gamma| over the BatchNorms of a channel (network slimming, arXiv:1708.06519).

    Channels without a BatchNorm, such as those of a plain pyramid, get their `l2`.
    """
    gammas = [(f"{norm}.weight", 0) for norm in groups.norms]
    total = sum_over_places(groups, gammas, {entry: state[entry].abs() for entry, _ in gammas})
    count = sum_over_places(groups, gammas, {entry: torch.ones_like(state[entry]) for entry, _ in gammas})
    return torch.where(count > 0, total / count.clamp(min=1), l2(state, groups))


def l2(state: dict[str, Tensor], groups: ChannelGroups) -> Tensor:
    """The norm of all weights of a channel, its rows and its columns (DepGraph, arXiv:2301.12900, without the norms).

        s_c = sqrt(sum over layers and weights w of c of w^2)

    Weights of convolutions and linear layers count, biases and BatchNorms do not.
    """
    places = [place for place in groups.axes if state[place[0]].dim() >= 2]
    return sum_over_places(groups, places, {entry: state[entry].double().square() for entry, _ in places}).sqrt()


def taylor(model: nn.Module, batches: Iterable[tuple[Tensor, Targets]], groups: ChannelGroups) -> Tensor:
    """How much the detection loss would change without the channel, to first order (arXiv:1611.06440, sec. 2.2).

        s_c = mean over batches of |sum over layers that read c, and over their columns w of c, of w dL/dw|

    Scaling the columns of a channel is scaling the channel, so the inner sum is the derivative of the loss by a gate on
    it; the paper writes the same as z dL/dz with the channel's map z. L is the sum of model.losses in eval mode, in
    which a pruned model is used.

    batches: images (B, 3, H, W) and targets, at least one; small ones, because effects of opposite sign cancel within a
    batch. The model stays as it was, also after an error.
    """
    weights = {name: value for name, value in model.named_parameters() if value.dim() >= 2}
    places = [place for place in groups.axes if place[1] == 1 and place[0] in weights]
    entries = list(dict.fromkeys(entry for entry, _ in places))
    total, count = torch.zeros(groups.count, dtype=torch.float64), 0
    detector = cast(Detector, model)
    frozen = [value for value in weights.values() if not value.requires_grad]
    for value in frozen:
        value.requires_grad_(True)
    try:
        with in_eval_mode(model):
            for images, targets in batches:
                loss = torch.stack(list(detector.losses(detector(images), targets).values())).sum()
                gradients = torch.autograd.grad(loss, [weights[entry] for entry in entries])
                products = {entry: weights[entry].detach() * gradient for entry, gradient in zip(entries, gradients)}
                total += sum_over_places(groups, places, products).abs()
                count += 1
    finally:
        for value in frozen:
            value.requires_grad_(False)
    return total / count


def random(groups: ChannelGroups, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): the row that every other score has to beat."""
    return torch.rand(groups.count, dtype=torch.float64, generator=generator)


def sum_over_places(groups: ChannelGroups, places: Iterable[tuple[str, int]], values: dict[str, Tensor]) -> Tensor:
    """For each channel the sum of the values of its rows and columns: (C,) float64.

    places: (entry, dimension). values: of each entry, in the shape that it has in the state dict.
    """
    total = torch.zeros(groups.count, dtype=torch.float64)
    for entry, dim in places:
        channels, value = groups.axes[entry, dim], values[entry].detach().double().cpu()
        own = value.movedim(dim, 0).flatten(1).sum(1) if value.dim() > 1 else value  # (size,)
        total.index_add_(0, channels[channels != STAYS], own[channels != STAYS])
    return total
