"""Reads a model's output by name: its maps, and the levels of a dense head."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def named_map(output: Any, name: str) -> Tensor:
    """The tensor `name` of a model's output: of its `features`, or else an attribute. KeyError if there is none."""
    if name in output.features:
        return output.features[name]
    value = getattr(output, name, None)
    if not isinstance(value, Tensor):
        tensors = [f.name for f in dataclasses.fields(output) if isinstance(getattr(output, f.name), Tensor)]
        raise KeyError(f"{name!r} is not among {', '.join([*output.features, *tensors])}")
    return value


def head_levels(map_names: Iterable[str]) -> list[str]:
    """The maps that the head of a dense detector reads, p3, p4, ..., in the order of its locations."""
    return [name for name in map_names if name[0] == "p" and name[1:].isdigit()]


def level_layout(output: Any, values: Tensor) -> dict[str, Any]:
    """grid_sizes (one for each of head_levels) and anchors_per_pixel of a dense head, from its values (B, A, ...)."""
    grids = [tuple(output.features[name].shape[2:]) for name in head_levels(output.features)]
    return dict(grid_sizes=grids, anchors_per_pixel=values.shape[1] // max(sum(h * w for h, w in grids), 1))


def head_level(model: Any, output: Any, name: str) -> int:
    """The index in head_levels of the level that a map belongs to: the level of that name, or else of its stride."""
    levels, strides = head_levels(output.features), getattr(model, "strides", {})
    for row, level in enumerate(levels):
        if name == level or (name not in levels and name in strides and strides[name] == strides[level]):
            return row
    raise ValueError(f"map {name!r}: the head has no level of its stride, only {', '.join(levels) or 'none'}")


def content_at(content: Tensor, feature_map: Tensor) -> Tensor:
    """The content (B, 1, H, W) bool of images at the grid of a map, (B, 1, h, w) bool: cells that are half content.

    If no cell of an image is half content, the cells with the largest share are taken.
    """
    _, _, height, width = feature_map.shape
    share = nn.functional.adaptive_avg_pool2d(content.float(), (height, width))
    return share >= share.amax((2, 3), keepdim=True).clamp(max=0.5)


def only_at(shown: Tensor | None, feature_map: Tensor) -> Tensor:
    """A map (B, C, h, w), 0 where `shown` (B, 1, h, w) is False; None: unchanged."""
    return feature_map if shown is None else feature_map.masked_fill(~shown, 0)


def any_map(output: Any) -> Tensor:
    """The first of the output's maps."""
    return next(iter(output.features.values()))
