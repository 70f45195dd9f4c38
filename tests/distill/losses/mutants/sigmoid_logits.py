"""Logit losses of sigmoid heads: their checks, and wrong variants of each."""

import numpy as np

from distill.losses.logits import (
    objectness_scaled,
    quality_focal,
    soft_class_targets,
)
from kernels.sigmoid_kl import sigmoid_kl_eager
from tests.distill.losses.mutants.logits import ROW_WEIGHTS, every_logit_loss, logits, rows
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
from tests.reference import distillation
from tests.reference import logit_distillation as reference


def outputs(*shape: int, scale: float = 1.0, classes: int = 3, **others) -> dict:
    """Box, objectness and class logits of one YOLOv5 output, for student and teacher."""
    shape = shape or (2, 5)
    return (
        random_pair("box_logits", (*shape, 4), scale=scale, seed=1)
        | random_pair("objectness_logits", shape, scale=scale, seed=2)
        | random_pair("class_logits", (*shape, classes), scale=scale, seed=3)
        | others
    )


CASES = [
    LossCase(
        "soft_class",
        soft_class_targets,
        checks=(
            matches_reference(
                distillation.soft_class_targets,
                {
                    "usual": logits(temperature=2.0, power=1.0),
                    "no temperature": logits(temperature=1.0, power=2.0),
                    "unweighted": logits(temperature=3.0, power=0.0),
                    "one": logits(1, 1, temperature=1.0, power=1.0),
                    "none": logits(0, 4, temperature=1.0, power=1.0),
                    "saturated": logits(scale=500.0, temperature=2.0, power=1.0),
                },
            ),
            zero_when_empty(logits(0, 4), logits(2, 0, 3)),
            minimum_at_teacher(logits(temperature=2.0)),
            only_student_learns(logits(temperature=2.0)),
            takes_inference_teacher(logits(temperature=2.0)),
            gradient_is_right(logits(temperature=2.0)),
            computes_in_float32(logits()),
            finite_when_saturated(logits(scale=1e4)),
            refuses(logits(5, 3) | {"t_logits": logits(5, 1)["t_logits"]}, "differ"),
        ),
        mutants={
            "no T^2": Edit("temperature**2", "1.0", sigmoid_kl_eager),
            "mean over classes": Edit(".sum(-1)", ".mean(-1)", sigmoid_kl_eager),
            "mean over locations": Edit("joint_normaliser(weight.sum(), weight)", "weight.numel()"),
            "normaliser not held above 1": Edit("joint_normaliser(weight.sum(), weight)", "weight.sum()"),
            "mean score as confidence": Edit("t_logits.amax(-1).to(dtype).sigmoid()", "t_logits.sigmoid().mean(-1)"),
            "student's confidence": Edit("t_logits.amax(-1)", "s_logits.amax(-1)"),
            "swapped roles": Edit(
                "bernoulli_kl(at_temperature(s, temperature), at_temperature(t, temperature))",
                "bernoulli_kl(at_temperature(t, temperature), at_temperature(s, temperature))",
                sigmoid_kl_eager,
            ),
            "no temperature": Edit("temperature=temperature, ", ""),
            "unweighted": Edit("weight=weight", "weight=None"),
            "cross-entropy": Edit(
                "softplus(s_logits) - softplus(t_logits) + t_logits.sigmoid() * (t_logits - s_logits)",
                "softplus(s_logits) - t_logits.sigmoid() * s_logits",
                "bernoulli_kl",
            ),
            "student's probability": Edit("t_logits.sigmoid()", "s_logits.sigmoid()", "bernoulli_kl"),
            "teacher learns": Edit("t_logits.detach()", "t_logits", sigmoid_kl_eager),
            "computes in half precision": Edit(
                "dtype = compute_dtype(s_logits, t_logits)", "dtype = s_logits.dtype", sigmoid_kl_eager
            ),
        },
    ),
    LossCase(
        "quality_focal",
        quality_focal,
        checks=(
            matches_reference(
                reference.quality_focal,
                {
                    "default": logits(),
                    "squared": logits(beta=2.0),
                    "plain": logits(beta=0.0),
                    "positives": logits(normaliser=np.array(3)),
                    "no positives": logits(normaliser=0.0),
                    "weighted": rows(weight=ROW_WEIGHTS, beta=1.5),
                    "one": logits(1, 1),
                    "none": logits(0, 4),
                    "background": logits() | {"t_logits": logits()["t_logits"] - 8},
                    "saturated": logits(scale=500.0),
                },
            ),
            refuses(logits(beta=0.5), "beta"),
            refuses(logits(beta=-1.0), "beta"),
            refuses(rows(weight=ROW_WEIGHTS[:1]), "weight"),
            only_student_learns(rows(normaliser=np.array(2.5)), also=("normaliser",)),
            *every_logit_loss(rows, empty=(rows(0), rows(k=0)), weight=ROW_WEIGHTS),
        ),
        mutants={
            "no factor": Edit("if beta:", "if False:"),
            "signed factor": Edit("(s_logits.sigmoid() - t_prob).abs()", "(t_prob - s_logits.sigmoid())"),
            "always beta 1": Edit(".abs() ** beta", ".abs()"),
            "detached factor": Edit("(s_logits.sigmoid() - t_prob)", "(s_logits.detach().sigmoid() - t_prob)"),
            "mean over classes": Edit("cross_entropy.sum(-1)", "cross_entropy.mean(-1)"),
            "mean over locations": Edit(
                "expected if normaliser is None else normaliser", "cross_entropy[..., 0].numel()"
            ),
            "normaliser not held above 1": Edit("joint_normaliser(total, values)", "total.detach()", "weighted_mean"),
            "normaliser ignored": Edit("expected if normaliser is None else normaliser", "expected"),
            "normaliser learns": Edit("joint_normaliser(total, values)", "total.clamp(min=1)", "weighted_mean"),
            "sum of the weights as normaliser": Edit("expected if normaliser is None else normaliser", "normaliser"),
            "student's confidence as normaliser": Edit("t_prob.amax(-1).sum()", "s_logits.sigmoid().amax(-1).sum()"),
            "unweighted": Edit("cross_entropy.sum(-1), weight", "cross_entropy.sum(-1), None"),
            "hard targets": Edit(
                "F.binary_cross_entropy_with_logits(s_logits, t_prob,",
                "F.binary_cross_entropy_with_logits(s_logits, t_prob.round(),",
            ),
            "swapped roles": Edit(
                "F.binary_cross_entropy_with_logits(s_logits, t_prob,",
                "F.binary_cross_entropy_with_logits(t_logits, s_logits.sigmoid(),",
            ),
            "teacher learns": Edit("t_logits.detach()", "t_logits", "as_logit_pair"),
        },
    ),
    LossCase(
        "objectness_scaled",
        objectness_scaled,
        checks=(
            matches_reference(
                reference.objectness_scaled,
                {
                    "default": outputs(),
                    "weighted": outputs(objectness_weight=0.3, class_weight=2.0, box_weight=5.0),
                    "one": outputs(1, 1, classes=1),
                    "no classes": outputs(classes=0),
                    "none": outputs(0, 5),
                    "background": outputs() | {"t_objectness_logits": outputs()["t_objectness_logits"] - 9},
                    "saturated": outputs(scale=500.0),
                },
            ),
            refuses(outputs() | random_pair("class_logits", (2, 4, 3)), "(..., K)"),
            refuses(outputs() | random_pair("box_logits", (2, 5, 5)), "(..., 4)"),
            *every_logit_loss(outputs, empty=(outputs(0, 5), outputs(2, 0)), class_weight=2.0),
        ),
        mutants={
            "student's objectness": Edit("t_object.sigmoid())", "s_object.sigmoid())"),
            "not scaled": Edit(
                "class_weight * class_kl + box_weight * box, t_object.sigmoid()",
                "class_weight * class_kl + box_weight * box, None",
            ),
            "classes not scaled": Edit(
                "return objectness_weight * objectness + scaled",
                "return objectness_weight * objectness + scaled + class_kl.mean() * 0.1",
            ),
            "objectness scaled too": Edit(
                "bernoulli_kl(s_object, t_object).sum()",
                "(t_object.sigmoid() * bernoulli_kl(s_object, t_object)).sum()",
            ),
            "no objectness part": Edit("objectness_weight * objectness + scaled", "scaled"),
            "mean over classes": Edit(
                "bernoulli_kl(s_class, t_class).sum(-1)", "bernoulli_kl(s_class, t_class).mean(-1)"
            ),
            "raw boxes": Edit("(2 * (s_box.sigmoid() - t_box.sigmoid()))", "(s_box - t_box)"),
            "boxes in sigmoids": Edit("2 * (s_box.sigmoid()", "(s_box.sigmoid()"),
            "absolute difference": Edit(".square()", ".abs()"),
            "swapped weights": Edit(
                "class_weight * class_kl + box_weight * box", "box_weight * class_kl + class_weight * box"
            ),
            "swapped roles": Edit("bernoulli_kl(s_class, t_class)", "bernoulli_kl(t_class, s_class)"),
            "sum over locations": Edit(".sum() / joint_normaliser(s_object.numel(), s_object)", ".sum()"),
            "teacher learns": Edit("t_logits.detach()", "t_logits", "as_logit_pair"),
        },
    ),
]
