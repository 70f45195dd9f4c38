"""Choose the channels that a pruned model keeps."""

from collections.abc import Callable, Mapping

from torch import Tensor

from layers.channel_groups import ChannelGroups


def channels_to_keep(
    groups: ChannelGroups,
    scores: Tensor,
    *,
    flops: Callable[[Mapping[str, int]], float],
    limit: float,
    per_flops: bool,
    multiple: int = 8,
    floor: float = 0.25,
) -> Tensor:
    """(C,) bool: the channels that stay, so that the model costs at most `limit` FLOPs.

    The worst `multiple` channels of one group go at a time, so that every width becomes a multiple of `multiple`; a
    group of fewer channels stays whole. Of which group they go:

        per_flops        where  sum of s_c / FLOPs that they save  is least: for scores in one unit, as Taylor's
        not per_flops    where  mean of s_c / mean of all s of the group  is least: for scores that only rank a layer

    scores: s (C,), at least 0 (scores.py). flops: of the widths of the groups. floor: the share that a group keeps.
    ValueError, in one line, if the floor is reached before the limit.
    """
    widths, full = groups.widths(), groups.widths()
    ascending = {name: scores[own].sort(stable=True).values for name, own in groups.groups.items()}
    while (cost := flops(widths)) > limit:
        best_value, best_name = float("inf"), None
        for name, width in widths.items():
            count = width % multiple or multiple
            if width - count < max(multiple, floor * full[name]):
                continue
            removed = full[name] - width
            worst = float(ascending[name][removed : removed + count].sum())
            if per_flops:
                value = worst / (cost - flops(widths | {name: width - count}))
            else:
                value = worst / count / max(float(ascending[name].mean()), 1e-30)
            if value < best_value:
                best_value, best_name = value, name
        if best_name is None:
            raise ValueError(
                f"{cost / 1e9:.3f} GFLOPs are left where every group keeps {floor:g} of its channels, expected at most "
                f"{limit / 1e9:.3f}"
            )
        widths[best_name] -= widths[best_name] % multiple or multiple
    return groups.best(scores, widths)
