"""The loss of the queries of a DETR: its checks, and wrong variants of it."""

import numpy as np

from distill.losses.queries import query_agreement
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.properties import (
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    matches_reference,
    minimum_at_teacher,
    only_student_learns,
    random_pair,
    refuses,
    takes_inference_teacher,
    zero_when_empty,
)
from tests.reference import query_distillation as reference


def queries(*shape: int, classes: int = 4, scale: float = 1.0, **others) -> dict:
    """Logits and boxes of student and teacher; the boxes of a pair overlap or not, and some leave the image."""
    shape = shape or (2, 3, 5)
    rng = np.random.default_rng(7)
    boxes = {f"{who}_boxes": np.concatenate((rng.random((*shape, 2)), 0.05 + 0.6 * rng.random((*shape, 2))), -1)
             for who in "st"}  # fmt: skip
    return random_pair("logits", (*shape, classes), scale=scale) | boxes | others


def thin(arguments: dict) -> dict:
    """Student and teacher alike, with every other box so small that its corners are equal in float32."""
    thinner = np.where(np.arange(5) % 2, 1.0, 1e-9)[:, None] ** [0, 0, 1, 1]
    return arguments | {f"{who}_boxes": arguments["t_boxes"] * thinner for who in "st"}


CASES = [
    LossCase(
        "query_agreement",
        query_agreement,
        checks=(
            matches_reference(
                reference.query_agreement,
                {
                    "usual": queries(),
                    "weights": queries(class_weight=0.3, l1_weight=2.0, giou_weight=7.0),
                    "classes alone": queries(l1_weight=0.0, giou_weight=0.0),
                    "repeated": queries(repeats=40),  # little enough in all that the sum of weights is below 1
                    "one": queries(1, classes=1),
                    "none": queries(2, 0),
                    "background": queries() | {"t_logits": queries()["t_logits"] - 9},
                    "saturated": queries(scale=300.0),
                },
            ),
            zero_when_empty(queries(0), queries(2, 0)),
            minimum_at_teacher(queries()),
            minimum_at_teacher(queries(class_weight=0.0)),
            only_student_learns(queries()),
            takes_inference_teacher(queries()),
            gradient_is_right(queries()),
            computes_in_float32(queries()),
            finite_when_saturated(queries(scale=1e4), thin(queries())),
            refuses(queries() | {"t_boxes": queries(2, 3, 4)["t_boxes"]}, "differ"),
            refuses(queries() | {"t_logits": queries(classes=1)["t_logits"]}, "differ"),
            refuses(queries() | {key: queries()[key][..., :1, :] for key in ("s_boxes", "t_boxes")}, "(..., 4)"),
        ),
        mutants={
            "mean over queries": Edit("t_logits.sigmoid().amax(-1) / repeats", "None"),
            "every repeat counts": Edit(" / repeats", ""),
            "the student's score as weight": Edit("t_logits.sigmoid().amax(-1)", "s_logits.sigmoid().amax(-1)"),
            "mean score as weight": Edit("t_logits.sigmoid().amax(-1)", "t_logits.sigmoid().mean(-1)"),
            "mean over classes": Edit(
                "bernoulli_kl(s_logits, t_logits).sum(-1)", "bernoulli_kl(s_logits, t_logits).mean(-1)"
            ),
            "swapped roles": Edit("bernoulli_kl(s_logits, t_logits)", "bernoulli_kl(t_logits, s_logits)"),
            "squared distance": Edit("(s_boxes - t_boxes).abs()", "(s_boxes - t_boxes).square()"),
            "mean over sides": Edit("(s_boxes - t_boxes).abs().sum(-1)", "(s_boxes - t_boxes).abs().mean(-1)"),
            "boxes by their corners": Edit(
                "(s_boxes - t_boxes).abs()", "(cxcywh_to_xyxy(s_boxes) - cxcywh_to_xyxy(t_boxes)).abs()"
            ),
            "centers taken for corners": Edit(
                "s_xyxy, t_xyxy = cxcywh_to_xyxy(s_boxes), cxcywh_to_xyxy(t_boxes)", "s_xyxy, t_xyxy = s_boxes, t_boxes"
            ),
            "no GIoU": Edit(" + giou_weight * (1 - giou)", ""),
            "GIoU, not its distance": Edit("giou_weight * (1 - giou)", "giou_weight * giou"),
            "eps in the GIoU": Edit("eps=0", "eps=1e-3"),
            "0 / 0 for thin boxes": Edit("> LEAST_AREA", ">= 0"),
            "swapped weights": Edit(
                "l1_weight * distance + giou_weight * (1 - giou)", "giou_weight * distance + l1_weight * (1 - giou)"
            ),
            "teacher's boxes learn": Edit(
                "s_boxes, t_boxes = as_logit_pair(s_boxes, t_boxes)",
                "s_boxes, t_boxes = s_boxes.to(s_logits.dtype), t_boxes.to(s_logits.dtype)",
            ),
            "half precision": Edit("s_boxes, t_boxes = as_logit_pair(s_boxes, t_boxes)", "t_boxes = t_boxes.detach()"),
        },
    ),
]
