"""The losses a config can name: a function for each, and `LOSSES`, the table of them.

A term `{loss: localization, parameters: {region: main}}` calls `localization(inputs, region="main")` in each step: its
parameters are the function's keyword-only arguments. The function takes what it needs from the inputs and calls the
loss, a pure function of tensors in distill/losses/. A loss that trains something (MGD's generator) is a module: it is
built once, with the parameters, and passed to the function in each step.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.decoder_queries import earlier_and_last_layer, of_objects
from distill.given_boxes import At, Boxes, classify_boxes, given_boxes, softmax_logits
from distill.losses import crosskd, features, logits, masked, relations
from distill.losses.box_classes import box_class_kl
from distill.losses.fgd import FGD
from distill.losses.localization import localization_kl, valuable_region
from distill.losses.masks import anchor_mask, box_density, box_mask
from distill.losses.mgd import MGD
from distill.losses.queries import query_agreement
from distill.term_inputs import ANCHOR_RATIOS, TermInputs


def mse(inputs: TermInputs) -> Tensor:
    return features.feature_mse(**inputs.maps())


def cosine(inputs: TermInputs) -> Tensor:
    return features.cosine_distance(**inputs.maps())


def cwd(inputs: TermInputs, *, temperature: float = 1.0) -> Tensor:
    return features.channel_wise_kl(**inputs.maps(), temperature=temperature)


def pkd(inputs: TermInputs) -> Tensor:
    return features.channel_correlation(**inputs.maps())


def attention(inputs: TermInputs, *, power: float = 2.0) -> Tensor:
    return features.attention_transfer(**inputs.maps(), power=power)


def score_weighted_l2(inputs: TermInputs) -> Tensor:
    return features.score_weighted_l2(**inputs.maps(), weight=inputs.teacher_score_map())


def masked_mse(
    inputs: TermInputs, *, mask: Literal["boxes", "anchors", "positives"] = "boxes", psi: float = 0.5,
    anchor_sizes: tuple[float, ...] | None = None, anchor_ratios: tuple[float, ...] = ANCHOR_RATIOS,
) -> Tensor:  # fmt: skip
    """mask: boxes, inside them; anchors, near them as FGFI publishes it; positives, where the student learns an object.

    anchor_sizes, anchor_ratios: for mask anchors; sizes in strides of the map. None: the detector's own.
    """
    if mask == "boxes":
        where = box_mask(inputs.targets, **inputs.grid())
    elif mask == "positives":
        where = inputs.positive_mask()
    elif mask == "anchors":
        anchors = inputs.anchors(anchor_sizes, anchor_ratios)
        where = anchor_mask(inputs.targets, **inputs.grid(), anchor_sizes=anchors, psi=psi)
    else:
        raise ValueError(f"mask: found {mask!r}, expected boxes, anchors or positives")
    return masked.masked_mse(**inputs.maps(), mask=where)


def decoupled_mse(inputs: TermInputs, *, foreground_weight: float = 1.0, background_weight: float = 4.0) -> Tensor:
    mask = box_mask(inputs.targets, **inputs.grid())
    return masked.decoupled_mse(
        **inputs.maps(), foreground=mask, foreground_weight=foreground_weight, background_weight=background_weight
    )


def fgd(inputs: TermInputs, module: FGD) -> Tensor:
    return module(**inputs.maps(), foreground=box_density(inputs.targets, **inputs.grid()))


def mgd(inputs: TermInputs, module: MGD) -> Tensor:
    return module(**inputs.maps(), generator=torch.default_generator)


def location_similarity(inputs: TermInputs, *, nodes: int = 16) -> Tensor:
    return relations.location_similarity(**inputs.maps(), nodes=nodes)


def instance_distance(inputs: TermInputs, *, size: int = 3) -> Tensor:
    """size: points per side in each object. With GID's 7 x 7, crowded images cost more than the models."""
    rows, image_size = inputs.targets.learnt(), inputs.image_size
    s, t = (
        relations.pool_boxes(m, boxes_xyxy=rows.boxes_xyxy, image=rows.image, image_size=image_size, size=size)
        for m in inputs.maps().values()
    )
    return relations.instance_distance(s_features=s, t_features=t, image=rows.image)


def crosskd_classes(inputs: TermInputs, *, beta: float = 1.0, rescale: bool = True) -> Tensor:
    tail, total = inputs.teacher_tail(), inputs.teacher_score_sum()
    columns = None if inputs.classes is None else inputs.classes.teacher
    return crosskd.crosskd_classes(
        **inputs.maps(), t_tail=tail, normaliser=total, columns=columns, beta=beta, rescale=rescale
    )


def crosskd_edges(inputs: TermInputs, *, temperature: float = 1.0, rescale: bool = True) -> Tensor:
    tail, weight, total = inputs.teacher_tail(), inputs.teacher_score_map(), inputs.teacher_score_sum()
    return crosskd.crosskd_edges(
        **inputs.maps(), t_tail=tail, weight=weight, normaliser=total, temperature=temperature, rescale=rescale
    )


def soft_class(inputs: TermInputs, *, temperature: float = 1.0, power: float = 1.0) -> Tensor:
    score = inputs.teacher_scores()
    return logits.soft_class_targets(**inputs.logits(), score=score, temperature=temperature, power=power)


def quality_focal(inputs: TermInputs, *, beta: float = 1.0) -> Tensor:
    """With objectness, the teacher's scores weigh the locations: its class logits mean nothing on the background."""
    scores = inputs.teacher_scores()
    weight = scores if hasattr(inputs.t_output, "objectness_logits") else None
    return logits.quality_focal(**inputs.logits(), weight=weight, normaliser=scores.sum(), beta=beta)


def localization(
    inputs: TermInputs, *, region: Literal["scores", "main", "valuable"] = "scores", gamma: float = 0.25,
    temperature: float = 10.0,
) -> Tensor:  # fmt: skip
    """region: scores, every location by the teacher's score; main, the locations where the student learns an object;
    valuable, main and the valuable localization region around it (localization.valuable_region, with gamma).
    """
    if region not in ("scores", "main", "valuable"):
        raise ValueError(f"region: found {region!r}, expected scores, main or valuable")
    weight = inputs.teacher_scores() if region == "scores" else inputs.positives() >= 0
    if region == "valuable":
        if not hasattr(inputs.student, "in_ignored_boxes"):
            raise ValueError("region valuable needs a student with a method in_ignored_boxes; a YOLOv8 has one")
        t_boxes = inputs.teacher.decode(inputs.t_output)[0].detach()  # they fit from the first epoch on
        is_ignored = inputs.student.in_ignored_boxes(inputs.s_output, inputs.targets)
        weight |= valuable_region(
            boxes_xyxy=t_boxes, gt_index=inputs.positives(), targets=inputs.targets, is_ignored=is_ignored, gamma=gamma
        )
    return localization_kl(**inputs.logits(), weight=weight, temperature=temperature)


def objectness_scaled(
    inputs: TermInputs, *, objectness_weight: float = 1.0, class_weight: float = 1.0, box_weight: float = 1.0
) -> Tensor:
    return logits.objectness_scaled(
        **inputs.anchor_outputs(), objectness_weight=objectness_weight, class_weight=class_weight, box_weight=box_weight
    )


def box_classes(
    inputs: TermInputs, *, boxes: Boxes = "targets", at: At = "boxes", score_threshold: float = 0.3,
    max_boxes: int = 100, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    pair = classify_boxes(inputs, given_boxes(inputs, boxes, score_threshold, max_boxes), at)
    s_head, t_head = inputs.student.class_activation, inputs.teacher.class_activation
    return box_class_kl(**pair, s_head=s_head, t_head=t_head, classes=inputs.classes, temperature=temperature)


def softmax_kl(
    inputs: TermInputs, *, boxes: Boxes = "targets", score_threshold: float = 0.3, max_boxes: int = 100,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    pair, _ = softmax_logits(inputs, boxes, score_threshold, max_boxes)
    return logits.softmax_kl(**pair, temperature=temperature)


def decoupled_kl(
    inputs: TermInputs, *, boxes: Boxes = "targets", score_threshold: float = 0.3, max_boxes: int = 100,
    target_weight: float = 1.0, other_weight: float = 0.25, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    pair, chosen = softmax_logits(inputs, boxes, score_threshold, max_boxes)
    return logits.decoupled_kl(
        **pair, labels=chosen.labels + 1, weight=~chosen.ignore,  # column 0 is the background
        target_weight=target_weight, other_weight=other_weight, temperature=temperature,
    )  # fmt: skip


def prediction_correlation(
    inputs: TermInputs, *, boxes: Boxes = "targets", score_threshold: float = 0.3, max_boxes: int = 100,
    class_weight: float = 1.0, sample_weight: float = 1.0, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    pair, _ = softmax_logits(inputs, boxes, score_threshold, max_boxes)
    return logits.prediction_correlation(
        **pair, class_weight=class_weight, sample_weight=sample_weight, temperature=temperature
    )


def image_kl(inputs: TermInputs, module: logits.TaughtImageHead) -> Tensor:
    return module(s_map=inputs.s_map, t_logits=inputs.t_logits())


def last_layer(
    inputs: TermInputs, *, class_weight: float = 1.0, l1_weight: float = 5.0, giou_weight: float = 2.0
) -> Tensor:
    """The last decoder layer teaches the earlier ones of the same student."""
    return query_agreement(
        **earlier_and_last_layer(inputs), class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight
    )


def object_queries(
    inputs: TermInputs, *, class_weight: float = 1.0, l1_weight: float = 5.0, giou_weight: float = 2.0
) -> Tensor:
    """Two decoders answer the same queries, made from the labelled objects."""
    return query_agreement(
        **of_objects(inputs), class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight
    )


OnlyWith = dict[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Term:
    """A row of the table.

    compares: map, two maps, the student's after its adapter; logits, outputs of equal locations; boxes, class logits of
        given boxes; image, a map with the teacher's image logits; outputs, raw outputs of YOLOv5 heads; layers, the
        student's own decoder layers, without a teacher; queries, what both decoders make of given queries.
    only_with: parameters that act only beside certain values of another one: {"psi": ("mask", ("anchors",))} says that
        psi acts with mask anchors; check_parameters refuses it beside another mask.
    """

    compute: Callable[..., Tensor]  # the function of the term
    loss: Callable[..., Any]  # the loss that it calls, which has a section in docs/losses
    compares: Literal["map", "logits", "boxes", "image", "outputs", "layers", "queries"] = "map"
    module: type[nn.Module] | None = None  # a loss that trains something, built with the widths of the maps
    same_width: bool = True  # the maps need equal channels
    reads_scores: bool = False  # needs the class scores of a dense teacher as well
    runs_teacher_layers: bool = False  # on both maps: so t_map must not be normalised
    only_output: str | None = None  # its name, for a loss of logits that compares no other one
    other_branch: str | None = None  # how the names of maps begin that lie on a branch which the loss is not for
    only_with: OnlyWith = field(default_factory=dict)

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The allowed `parameters` of a term: the keyword-only arguments of the module, or else of the function."""
        arguments = inspect.signature(self.module or self.compute).parameters
        return {name: argument for name, argument in arguments.items() if argument.kind is argument.KEYWORD_ONLY}


OF_ANCHORS: OnlyWith = dict.fromkeys(("psi", "anchor_sizes", "anchor_ratios"), ("mask", ("anchors",)))
OF_BOXES: OnlyWith = {
    "score_threshold": ("boxes", ("teacher",)),
    "max_boxes": ("boxes", ("teacher", "proposals")),
}
LOSSES = {
    "mse": Term(mse, features.feature_mse),
    "cosine": Term(cosine, features.cosine_distance),
    "cwd": Term(cwd, features.channel_wise_kl),
    "pkd": Term(pkd, features.channel_correlation),
    "attention": Term(attention, features.attention_transfer, same_width=False),
    "score_weighted_l2": Term(score_weighted_l2, features.score_weighted_l2, reads_scores=True),
    "masked_mse": Term(masked_mse, masked.masked_mse, only_with=OF_ANCHORS),
    "decoupled_mse": Term(decoupled_mse, masked.decoupled_mse),
    "fgd": Term(fgd, FGD, module=FGD),
    "mgd": Term(mgd, MGD, module=MGD),
    "location_similarity": Term(location_similarity, relations.location_similarity, same_width=False),
    "instance_distance": Term(instance_distance, relations.instance_distance, same_width=False),
    "crosskd_classes": Term(
        crosskd_classes, crosskd.crosskd_classes, reads_scores=True, runs_teacher_layers=True, other_branch="box"
    ),
    "crosskd_edges": Term(
        crosskd_edges, crosskd.crosskd_edges, reads_scores=True, runs_teacher_layers=True, other_branch="cls"
    ),
    "soft_class": Term(soft_class, logits.soft_class_targets, "logits", reads_scores=True, only_output="class_logits"),
    "quality_focal": Term(quality_focal, logits.quality_focal, "logits", reads_scores=True, only_output="class_logits"),
    "localization": Term(
        localization,
        localization_kl,
        "logits",
        reads_scores=True,
        only_output="box_logits",
        only_with={"gamma": ("region", ("valuable",))},
    ),
    "objectness_scaled": Term(objectness_scaled, logits.objectness_scaled, "outputs"),
    "box_classes": Term(box_classes, box_class_kl, "boxes", only_with=OF_BOXES | {"boxes": ("at", ("boxes",))}),
    "softmax_kl": Term(softmax_kl, logits.softmax_kl, "boxes", only_with=OF_BOXES),
    "decoupled_kl": Term(decoupled_kl, logits.decoupled_kl, "boxes", only_with=OF_BOXES),
    "prediction_correlation": Term(prediction_correlation, logits.prediction_correlation, "boxes", only_with=OF_BOXES),
    "image_kl": Term(image_kl, logits.image_kl, "image", logits.TaughtImageHead),
    "last_layer": Term(last_layer, query_agreement, "layers"),
    "object_queries": Term(object_queries, query_agreement, "queries"),
}
