"""The losses a config can name, and what each is given: `LOSSES` is the whole list.

A loss is a pure function, or a module where it has something to train (FGD's context networks, MGD's generator, an
image head). distill/readings.py gets the two tensors that it compares; what it wants besides (a mask, a weight, a
generator) comes from a function of distill/scene.py. The options of that function, of the reading, and the keyword
arguments of the loss are the term's `parameters`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill import readings, scene
from distill.adapters import like_adapted, normalises
from distill.beliefs import box_class_kl
from distill.crosskd import crosskd_classes, crosskd_edges
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
from distill.logits import (
    ImageHead,
    decoupled_kl,
    image_kl,
    objectness_scaled,
    prediction_correlation,
    quality_focal,
    soft_class_targets,
    softmax_kl,
)
from distill.masked import decoupled_mse, masked_mse
from distill.masks import objects
from distill.mgd import MGD
from distill.relations import instance_distance, location_similarity, pool_boxes
from distill.scene import Scene

READINGS = {
    "map": readings.read_maps,
    "logits": readings.read_logits,
    "boxes": readings.read_boxes,
    "image": readings.read_image,
    "outputs": readings.read_outputs,
}


def _related_objects(*, s_map: Tensor, t_map: Tensor, scene: Scene, size: int = 3) -> Tensor:
    """relations.instance_distance between the batch's objects, as the maps have them at size x size points.

    With GID's 7 x 7 points, crowded pictures cost more than the models.
    """
    rows = objects(scene.targets)
    where = dict(boxes_xyxy=rows.boxes_xyxy, image=rows.image, image_size=scene.image_size, size=size)
    s_features, t_features = pool_boxes(s_map, **where), pool_boxes(t_map, **where)
    return instance_distance(s_features=s_features, t_features=t_features, image=rows.image)


class TaughtImageHead(nn.Module):
    """logits.image_kl between an image head on the student's map, which is trained along, and the teacher."""

    def __init__(self, channels: int, num_classes: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.head = ImageHead(channels, num_classes)
        self.temperature = temperature

    def forward(self, *, s_map: Tensor, t_logits: Tensor) -> Tensor:
        return image_kl(s_logits=self.head(s_map.float()), t_logits=t_logits, temperature=self.temperature)


@dataclass(frozen=True)
class LossEntry:
    """What a name in a config stands for.

    loss: called with what the reading returns, the extras and the parameters. A module is built first, with the widths
    (the teacher's channels; for an image head the student's, and the number of classes) and the parameters.
    reads: a key of READINGS.
    extras: keyword of the loss -> function(scene, student tensor, **options) that makes its value.
    same_width: the maps need equal channels. is_softmax: both heads must be softmax, with equal class lists.
    reads_scores: looks at the dense teacher's class scores besides what the reading reads.
    finishes_maps: gives maps to the teacher's own layers, which expect the teacher's as it is.
    """

    loss: Callable[..., Any]
    reads: Literal["map", "logits", "boxes", "image", "outputs"] = "map"
    extras: dict[str, Callable[..., Any]] = field(default_factory=dict)
    same_width: bool = True
    is_softmax: bool = False
    reads_scores: bool = False
    finishes_maps: bool = False


# fmt: off
LOSSES = {
    "mse": LossEntry(feature_mse),
    "cosine": LossEntry(cosine_distance),
    "cwd": LossEntry(channel_wise_kl),
    "pkd": LossEntry(channel_correlation),
    "attention": LossEntry(attention_transfer, same_width=False),
    "score_weighted_l2": LossEntry(score_weighted_l2, extras={"weight": scene.teacher_scores}, reads_scores=True),
    "masked_mse": LossEntry(masked_mse, extras={"mask": scene.imitation_mask}),
    "decoupled_mse": LossEntry(decoupled_mse, extras={"foreground": scene.foreground_mask}),
    "fgd": LossEntry(FGD, extras={"foreground": scene.foreground_density}),
    "mgd": LossEntry(MGD, extras={"generator": scene.step_generator}),
    "location_similarity": LossEntry(location_similarity, same_width=False),
    "instance_distance": LossEntry(_related_objects, extras={"scene": scene.scene_itself}, same_width=False),
    "crosskd_classes": LossEntry(
        crosskd_classes, extras={"t_tail": scene.teacher_tail, "normaliser": scene.score_sum}, reads_scores=True,
        finishes_maps=True),
    "crosskd_edges": LossEntry(
        crosskd_edges, reads_scores=True, finishes_maps=True,
        extras={"t_tail": scene.teacher_tail, "weight": scene.teacher_scores, "normaliser": scene.score_sum}),
    "soft_class": LossEntry(soft_class_targets, "logits"),
    "quality_focal": LossEntry(quality_focal, "logits", {"normaliser": scene.score_sum}, reads_scores=True),
    "localization": LossEntry(localization_kl, "logits", {"weight": scene.location_weight}, reads_scores=True),
    "objectness_scaled": LossEntry(objectness_scaled, "outputs"),
    "box_beliefs": LossEntry(
        box_class_kl, "boxes",
        {"s_head": scene.student_head, "t_head": scene.teacher_head, "classes": scene.joined_classes}),
    "softmax_kl": LossEntry(softmax_kl, "boxes", is_softmax=True),
    "decoupled_kl": LossEntry(decoupled_kl, "boxes", {"labels": scene.box_columns}, is_softmax=True),
    "prediction_correlation": LossEntry(prediction_correlation, "boxes", is_softmax=True),
    "image_kl": LossEntry(TaughtImageHead, "image"),
}
# fmt: on


def options_of(function: Callable[..., Any]) -> set[str]:
    """The keyword-only arguments of a function that a config can give: neither s_ nor t_, and nothing with tensors."""
    made_here = ("Tensor", "Scene", "Generator", "Module")
    return {
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
        and not p.name.startswith(("s_", "t_"))
        and not any(kind in str(p.annotation) for kind in made_here)
    }


def sources_of(entry: LossEntry) -> dict[str, Callable[..., Any]]:
    """Every function besides the loss that takes options of a term, by the keyword its value has."""
    boxes = {"boxes": readings.given_boxes} if entry.reads == "boxes" else {}
    return {"reading": READINGS[entry.reads], **boxes, **entry.extras}


def parameters_of(entry: LossEntry) -> set[str]:
    """The names a term of this loss may give in `parameters`."""
    return (options_of(entry.loss) - entry.extras.keys()).union(*map(options_of, sources_of(entry).values()))


class TermLoss(nn.Module):
    """One loss for one pair of tensors, with its parameters bound and its trained parts made.

    widths: positional arguments of a loss that is a module.
    """

    def __init__(self, entry: LossEntry, widths: tuple[int, ...], parameters: dict[str, Any]) -> None:
        super().__init__()
        self.entry = entry
        self.sources = {}
        taken = set()
        for name, function in sources_of(entry).items():
            options = {key: parameters[key] for key in options_of(function) & parameters.keys()}
            self.sources[name] = (function, options)
            taken |= options.keys()
        rest = {key: value for key, value in parameters.items() if key not in taken}
        is_module = isinstance(entry.loss, type) and issubclass(entry.loss, nn.Module)
        self.loss, self.parameters_of_loss = (entry.loss(*widths, **rest), {}) if is_module else (entry.loss, rest)

    def forward(self, scene: Scene, adapter: nn.Module) -> Tensor:
        """The pair that the scene names -> scalar (). The loss itself is computed in float32."""
        if self.entry.is_softmax:
            check_softmax(scene)
        if "boxes" in self.sources:
            function, options = self.sources["boxes"]
            scene = dataclasses.replace(scene, boxes=function(scene, **options))
        function, options = self.sources["reading"]
        pair = function(scene, adapter, **options)
        if self.entry.reads == "map" and normalises(adapter):
            if not self.entry.finishes_maps:
                pair["t_map"] = like_adapted(adapter, pair["t_map"])
            elif not self.parameters_of_loss.get("rescale", True):
                raise ValueError("the teacher's layers cannot read a normalised map: expected rescale: true")
        s = next(iter(pair.values()))
        with torch.autocast(s.device.type, enabled=False):
            extras = {name: self.sources[name] for name in self.entry.extras}
            made = {name: function(scene, s, **options) for name, (function, options) in extras.items()}
            return self.loss(**pair, **made, **self.parameters_of_loss)


def check_softmax(scene: Scene) -> None:
    """ValueError where one of the heads is not a softmax, or the columns are not the same classes."""
    for who, model in (("student", scene.student), ("teacher", scene.teacher)):
        found = getattr(model, "class_activation", "no")
        if found != "softmax":
            raise ValueError(f"the {who} has a {found} head, this loss is for softmax heads; see box_beliefs")
    if scene.classes is not None:
        raise ValueError("softmax heads of different class lists cannot be compared; see box_beliefs")
