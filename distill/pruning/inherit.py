"""A student that begins as a selection of its teacher's channels (weight selection, arXiv:2311.18823).

    wide model ── in every group, the channels with the best scores ── narrow model

The paper takes every n-th channel of each layer by itself. Here the layers of a group take the same channels, so that
what a layer writes is what the next one was trained to read.
"""

from torch import Tensor, nn

from layers.channel_groups import ChannelGroups, find_groups


def inherited_state(narrow: nn.Module, wide: nn.Module, groups: ChannelGroups, scores: Tensor) -> dict[str, Tensor]:
    """The state dict of `narrow`, made of the channels of `wide` with the best scores; ties go to the first ones.

    A group of the same width in both is copied. groups, scores (C,): of `wide`, as find_groups gives them.
    ValueError, in one line, if the models differ in more than their widths, or `narrow` is wider somewhere.
    """
    own = find_groups(narrow)
    if own.groups.keys() != groups.groups.keys():
        first = next(name for name in [*own.groups, *groups.groups] if (name in own.groups) != (name in groups.groups))
        raise ValueError(f"only one of the two has {first!r}, expected models of one family and depth")
    widths = own.widths()
    for name, channels in groups.groups.items():
        if widths[name] > len(channels):
            raise ValueError(f"{name!r} has {widths[name]} channels, and {len(channels)} where it inherits from")
    state = groups.select(wide.state_dict(), groups.best(scores, widths))
    for name, value in narrow.state_dict().items():
        if name not in state or state[name].shape != value.shape:
            raise ValueError(f"{name!r} does not fit, expected models of one family and depth")
    return state
