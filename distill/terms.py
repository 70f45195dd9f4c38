"""The losses a config can name, and what each is given besides a student's and a teacher's map.

`LOSSES` is the whole list. A loss is a pure function, or a module where it has something to train (FGD's context
networks, MGD's generator). What a loss wants beyond the two maps (a mask, a weight, a generator) comes from a function
of the Scene here; the options of that function and the keyword arguments of the loss are the term's `parameters`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.features import (
    attention_transfer,
    channel_correlation,
    channel_wise_kl,
    cosine_distance,
    feature_mse,
    score_weighted_l2,
)
from distill.fgd import FGD
from distill.localization import localization_kl
from distill.logits import quality_focal, soft_class_targets
from distill.masked import decoupled_mse, masked_mse
from distill.masks import anchor_mask, box_density, box_mask, make_anchor_sizes, objects, score_maps
from distill.mgd import MGD
from distill.relations import instance_distance, location_similarity, pool_boxes
from structures import Targets


@dataclass(frozen=True)
class Scene:
    """What is known of a batch beyond the maps that are compared.

    targets: its objects, in pixels of images of image_size (H, W). t_output: all that the teacher said.
    seed: of this step and pair of maps, for losses that draw.
    """

    targets: Targets
    image_size: tuple[int, int]
    t_output: Any
    seed: int


def imitation_mask(
    scene: Scene,
    s_map: Tensor,
    *,
    mask: Literal["boxes", "anchors"] = "boxes",
    psi: float = 0.5,
    anchor_sizes: tuple[float, ...] = (2.0, 4.0),
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
) -> Tensor:
    """Where to imitate, (B, 1, H, W): inside the boxes, or near them as FGFI publishes it.

    anchor_sizes are in strides of the map: the anchors of each level of YOLOv5 and of Faster R-CNN lie around them.
    """
    grid = dict(batch_size=len(s_map), grid_size=tuple(s_map.shape[2:]), image_size=scene.image_size)
    if mask == "boxes":
        return box_mask(scene.targets, **grid)
    if mask != "anchors":
        raise ValueError(f"mask: found {mask!r}, expected boxes or anchors")
    stride = scene.image_size[1] / s_map.shape[3]
    sizes = make_anchor_sizes([size * stride for size in anchor_sizes], list(anchor_ratios))
    return anchor_mask(scene.targets, **grid, anchor_sizes=sizes, psi=psi)


def foreground_mask(scene: Scene, s_map: Tensor) -> Tensor:
    """Inside the boxes: (B, 1, H, W)."""
    return imitation_mask(scene, s_map)


def foreground_density(scene: Scene, s_map: Tensor) -> Tensor:
    """One over the area of the box around each pixel, 0 outside: (B, 1, H, W)."""
    grid_size = tuple(s_map.shape[2:])
    return box_density(scene.targets, batch_size=len(s_map), grid_size=grid_size, image_size=scene.image_size)


def teacher_scores(scene: Scene, s_map: Tensor) -> Tensor:
    """The dense teacher's best class score at each pixel of the level that has this map's grid: (B, H, W)."""
    logits = getattr(scene.t_output, "class_logits", None)
    if logits is None:
        raise ValueError("the teacher has no class_logits to weight the map with")
    grids = [tuple(m.shape[2:]) for name, m in scene.t_output.features.items() if name.startswith("p")]
    anchors = logits.shape[1] // max(sum(h * w for h, w in grids), 1)
    objectness = getattr(scene.t_output, "objectness_logits", None)
    levels = score_maps(logits, grid_sizes=grids, anchors_per_pixel=anchors, t_objectness_logits=objectness)
    if tuple(s_map.shape[2:]) not in grids:
        raise ValueError(f"the teacher has no head on a grid of {tuple(s_map.shape[2:])}, only on {grids}")
    return levels[grids.index(tuple(s_map.shape[2:]))]


def location_scores(scene: Scene, s_logits: Tensor) -> Tensor:
    """The dense teacher's best class score at each location, (B, A): where it sees something."""
    logits = getattr(scene.t_output, "class_logits", None)
    if logits is None:
        raise ValueError("the teacher has no class_logits to weight its locations with")
    return logits.detach().float().amax(-1).sigmoid()


def score_sum(scene: Scene, s_logits: Tensor) -> Tensor:
    """Their sum, (): about the number of locations where the teacher sees something."""
    return location_scores(scene, s_logits).sum()


def step_generator(scene: Scene, s_map: Tensor) -> torch.Generator:
    """One for each step and pair of maps; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(scene.seed)


def scene_itself(scene: Scene, s_map: Tensor) -> Scene:
    return scene


def _related_objects(*, s_map: Tensor, t_map: Tensor, scene: Scene) -> Tensor:
    """relations.instance_distance between the batch's objects, each as the maps have it inside its box."""
    rows = objects(scene.targets)
    where = dict(boxes_xyxy=rows.boxes_xyxy, image=rows.image, image_size=scene.image_size)
    s_features, t_features = pool_boxes(s_map, **where), pool_boxes(t_map, **where)
    return instance_distance(s_features=s_features, t_features=t_features, image=rows.image)


@dataclass(frozen=True)
class LossEntry:
    """What a name in a config stands for.

    loss: called as loss(s_<argument>=..., t_<argument>=..., **extras, **parameters). A module is built first, with the
    channels of the maps and the parameters, and called without them.
    extras: keyword of the loss -> function(scene, student map, **options) that makes its value.
    same_width: the maps need equal channels.
    """

    loss: Callable[..., Any]
    argument: Literal["map", "logits"] = "map"
    extras: dict[str, Callable[..., Any]] = field(default_factory=dict)
    same_width: bool = True


LOSSES = {
    "mse": LossEntry(feature_mse),
    "cosine": LossEntry(cosine_distance),
    "cwd": LossEntry(channel_wise_kl),
    "pkd": LossEntry(channel_correlation),
    "attention": LossEntry(attention_transfer, same_width=False),
    "score_weighted_l2": LossEntry(score_weighted_l2, extras={"weight": teacher_scores}),
    "masked_mse": LossEntry(masked_mse, extras={"mask": imitation_mask}),
    "decoupled_mse": LossEntry(decoupled_mse, extras={"foreground": foreground_mask}),
    "fgd": LossEntry(FGD, extras={"foreground": foreground_density}),
    "mgd": LossEntry(MGD, extras={"generator": step_generator}),
    "location_similarity": LossEntry(location_similarity, same_width=False),
    "instance_distance": LossEntry(_related_objects, extras={"scene": scene_itself}, same_width=False),
    "soft_class": LossEntry(soft_class_targets, "logits"),
    "quality_focal": LossEntry(quality_focal, "logits", extras={"normaliser": score_sum}),
    "localization": LossEntry(localization_kl, "logits", extras={"weight": location_scores}),
}


def options_of(function: Callable[..., Any]) -> set[str]:
    """The names of a function's keyword-only arguments."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def parameters_of(entry: LossEntry) -> set[str]:
    """The names a term of this loss may give in `parameters`."""
    given = {f"s_{entry.argument}", f"t_{entry.argument}", *entry.extras}
    return (options_of(entry.loss) - given).union(*map(options_of, entry.extras.values()))


class TermLoss(nn.Module):
    """One loss for one pair of maps, with its parameters bound and its trained parts made."""

    def __init__(self, entry: LossEntry, channels: int, parameters: dict[str, Any]) -> None:
        super().__init__()
        self.argument = entry.argument
        self.extras = {}
        taken = set()
        for name, function in entry.extras.items():
            options = {key: parameters[key] for key in options_of(function) & parameters.keys()}
            self.extras[name] = (function, options)
            taken |= options.keys()
        rest = {key: value for key, value in parameters.items() if key not in taken}
        is_module = isinstance(entry.loss, type) and issubclass(entry.loss, nn.Module)
        self.loss, self.parameters_of_loss = (entry.loss(channels, **rest), {}) if is_module else (entry.loss, rest)

    def forward(self, s: Tensor, t: Tensor, scene: Scene) -> Tensor:
        """Student and teacher tensors of one pair -> scalar ()."""
        extras = {name: function(scene, s, **options) for name, (function, options) in self.extras.items()}
        pair = {f"s_{self.argument}": s, f"t_{self.argument}": t}
        return self.loss(**pair, **extras, **self.parameters_of_loss)
