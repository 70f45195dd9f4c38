"""Reads a model's output by name: its maps, and the levels of a dense head."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses.masks import make_anchor_sizes

ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width, where none are given


def named_map(output: Any, name: str) -> Tensor:
    """The tensor `name` of a model's output: of its `features`, or else an attribute. KeyError where there is none."""
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


def anchor_outputs(inputs: Any) -> dict[str, Tensor]:
    """s_ and t_ box, objectness and class logits of two heads. ValueError unless anchors and classes are equal."""
    if not all(hasattr(model, "anchors_pixels") for model in (inputs.student, inputs.teacher)):
        raise ValueError("both models must have objectness and anchors (YOLOv5, YOLOv7-tiny)")
    if not torch.equal(inputs.student.anchors_pixels().cpu(), inputs.teacher.anchors_pixels().cpu()):
        raise ValueError("the anchors of student and teacher differ: their locations predict different boxes")
    if inputs.classes is not None:
        raise ValueError("whole outputs can be compared where the class lists are equal")
    pairs = {"s": inputs.s_output, "t": inputs.t_output}
    names = ("box_logits", "objectness_logits", "class_logits")
    return {f"{key}_{name}": getattr(output, name) for key, output in pairs.items() for name in names}


def branch_tail(inputs: Any) -> nn.Module:
    """The layers that follow the teacher's map in its branch, frozen, in eval mode. ValueError where there are none."""
    if not hasattr(inputs.teacher, "tail"):
        raise ValueError(f"the teacher has no branch that goes on from {inputs.t_name}")
    try:
        return inputs.teacher.tail(inputs.t_name)
    except KeyError as error:
        raise ValueError(f"the teacher's branches: {error.args[0]}") from None


def own_anchors(inputs: Any, sizes: tuple[float, ...] | None, ratios: tuple[float, ...]) -> Tensor:
    """The anchors at the map of a pair, (n, 2) widths and heights in pixels of the student's images.

    They are those of the student's head at the stride of its map, or else those of the teacher's head. `sizes`, in
    strides of the map, replaces them: one anchor for each size and each of `ratios`, height / width. FGFI is not
    defined for two heads without anchors; sizes of 2 and 4 strides are used there. ValueError for ratios, other than
    the default, that the head's own anchors would replace.
    """
    pairs = ((inputs.student, inputs.s_name, inputs.s_output), (inputs.teacher, inputs.t_name, inputs.t_output))
    for model, name, output in pairs:
        if sizes is None and hasattr(model, "anchors_at"):
            try:
                anchors = model.anchors_at(name)
            except KeyError as error:
                raise ValueError(f"mask anchors: {error.args[0]}") from None
            if tuple(ratios) != ANCHOR_RATIOS:
                raise ValueError("anchor_ratios: the head has anchors of its own, expected anchor_sizes beside them")
            (height, width), (own_height, own_width) = inputs.image_size, output.image_size
            return anchors * anchors.new_tensor([width / own_width, height / own_height])
    stride = inputs.image_size[1] / inputs.s_map.shape[3]
    return make_anchor_sizes([size * stride for size in sizes or (2.0, 4.0)], list(ratios))


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
