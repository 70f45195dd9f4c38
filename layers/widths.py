"""Give the layers of a network other widths than its architecture has: the shapes that pruning leaves, or fresh ones.

The groups of layers that share channels (layers/channel_groups.py) have one width each. `set_widths` gives every layer
the shape that follows, and draws all parameters anew; `widths_of_shapes` goes the other way, from a state dict.

A module whose initial values are not those of PyTorch's layers has a method `reset_parameters()`, as these layers have;
nn.Module.apply calls those of the parts before that of the whole.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from layers.channel_groups import STAYS, ChannelGroups, find_groups
from layers.eval_mode import in_eval_mode

Shapes = Mapping[str, tuple[int, ...]]  # of each entry of a state dict


def set_widths(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Change a detector in place: every group of channels gets its width, every parameter a fresh value.

    widths: name -> number of channels, for each group of find_groups. It may be larger than before.
    `model.channels` follows. ValueError, in one line, for a name that is missing or not known, and a width below 1.
    """
    groups = find_groups(model)
    for name in [*groups.groups, *widths]:
        if name not in widths or name not in groups.groups:
            found = "is missing" if name not in widths else "is not a group of channels of this model"
            raise ValueError(f"{name!r} {found}, expected a width for each of its {len(groups.groups)} groups")
        if type(widths[name]) is not int or widths[name] < 1:
            raise ValueError(f"{name!r}: found a width of {widths[name]!r}, expected a whole number, at least 1")
    for entry, shape in shapes_of_widths(model.state_dict(), groups, widths).items():
        path, _, key = entry.rpartition(".")
        resize(model.get_submodule(path), key, shape)
    model.apply(reset)
    channels = cast(dict[str, int], model.channels)  # structures.Detector declares it
    with torch.no_grad(), in_eval_mode(model):
        features = model(torch.zeros(1, 3, 64, 64)).features
    channels.update({name: features[name].shape[1] for name in channels})


def shapes_of_widths(
    state: Mapping[str, Tensor], groups: ChannelGroups, widths: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shape of every entry that has channels, where the groups have these widths."""
    shapes = {entry: list(state[entry].shape) for entry, _ in groups.axes}
    for (entry, dim), parts in axis_parts(groups).items():
        stays = int((groups.axes[entry, dim] == STAYS).sum())
        shapes[entry][dim] = stays + sum(times * widths[name] for name, times in parts.items())
    return {entry: tuple(shape) for entry, shape in shapes.items()}


def widths_of_shapes(groups: ChannelGroups, shapes: Shapes) -> dict[str, int] | None:
    """The widths with which the groups have these shapes; None if there are none. Inverse of shapes_of_widths.

    Where the rows or columns of a layer are of several groups, all but one are known from other layers.
    """
    widths: dict[str, int] = {}
    axes = axis_parts(groups)
    while len(widths) < len(groups.groups):
        known = len(widths)
        for (entry, dim), parts in axes.items():
            unknown = [name for name in parts if name not in widths]
            if len(unknown) != 1 or entry not in shapes or len(shapes[entry]) <= dim:
                continue
            rest = shapes[entry][dim] - int((groups.axes[entry, dim] == STAYS).sum())
            rest -= sum(times * widths[name] for name, times in parts.items() if name in widths)
            widths[unknown[0]] = rest // parts[unknown[0]]
        if len(widths) == known:
            return None
    return {name: widths[name] for name in groups.groups} if min(widths.values()) > 0 else None


def axis_parts(groups: ChannelGroups) -> dict[tuple[str, int], dict[str, int]]:
    """For each axis the groups that it holds, and how often it holds each channel of them."""
    names = list(groups.groups)
    group_of = torch.cat([torch.full((len(own),), i) for i, own in enumerate(groups.groups.values())])
    parts = {}
    for place, channels in groups.axes.items():
        counts = group_of[channels[channels != STAYS]].bincount(minlength=len(names)).tolist()
        parts[place] = {name: n // len(groups.groups[name]) for name, n in zip(names, counts) if n}
    return parts


def resize(module: nn.Module, key: str, shape: tuple[int, ...]) -> None:
    """Give a parameter or buffer a shape; its values are undefined afterwards. The module's numbers follow."""
    value = cast(Tensor, getattr(module, key))
    empty = torch.empty(shape, dtype=value.dtype, device=value.device)
    if isinstance(value, nn.Parameter):
        setattr(module, key, nn.Parameter(empty, requires_grad=value.requires_grad))
    else:
        module.register_buffer(key, empty)
    if isinstance(module, nn.Conv2d) and key == "weight":
        is_depthwise = module.groups > 1
        module.out_channels, module.groups = shape[0], shape[0] if is_depthwise else 1
        module.in_channels = shape[1] * module.groups
    elif isinstance(module, nn.Linear) and key == "weight":
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = shape[0]


def reset(module: nn.Module) -> None:
    reset_parameters: Any = getattr(module, "reset_parameters", None)
    if reset_parameters is not None:
        reset_parameters()
