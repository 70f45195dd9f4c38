"""Choose the channels that a pruned model keeps."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layers.channel_groups import ChannelGroups


def channels_to_keep(
    groups: ChannelGroups,
    scores: Tensor,
    *,
    flops: Callable[[Mapping[str, int]], float],
    limit: float,
    multiple: int = 8,
    floor: float = 0.25,
) -> Tensor:
    """(C,) bool: the channels that stay, so that the model costs at most `limit` FLOPs.

    The worst `multiple` channels of one group go at a time: of the group where they have the least score, as a share of
    the group's mean score. So groups of different layers are compared, and every width becomes a multiple of
    `multiple`; a group with fewer channels stays whole.

    scores: (C,), at least 0 (scores.py). flops: of the widths of the groups. floor: the share that a group keeps.
    ValueError, in one line, if the floor is reached before the limit.
    """
    shares = {name: scores[own] / scores[own].mean().clamp(min=1e-30) for name, own in groups.groups.items()}
    ascending = {name: share.sort(stable=True).values for name, share in shares.items()}
    widths = groups.widths()
    full = dict(widths)

    def next_step(name: str) -> tuple[float, int]:
        """The mean share of the next channels to go and their number; infinite at the floor."""
        width = widths[name]
        count = width % multiple or multiple
        if width - count < max(multiple, floor * full[name]):
            return float("inf"), 0
        removed = full[name] - width
        return float(ascending[name][removed : removed + count].mean()), count

    steps = {name: next_step(name) for name in widths}
    while (cost := flops(widths)) > limit:
        name = min(steps, key=lambda name: steps[name])
        if not steps[name][1]:
            raise ValueError(
                f"{cost / 1e9:.3f} GFLOPs are left where every group keeps {floor:g} of its channels, expected at most "
                f"{limit / 1e9:.3f}"
            )
        widths[name] -= steps[name][1]
        steps[name] = next_step(name)
    is_kept = torch.zeros(groups.count, dtype=torch.bool)
    for name, own in groups.groups.items():
        best = shares[name].argsort(descending=True, stable=True)[: widths[name]]
        is_kept[own[best]] = True
    return is_kept
