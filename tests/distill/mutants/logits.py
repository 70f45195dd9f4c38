"""Logit losses: their checks, and wrong variants of each."""

from distill.logits import soft_class_targets
from tests.distill.mutants.machinery import Edit, LossCase
from tests.distill.properties import (
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    matches_reference,
    minimum_at_teacher,
    only_student_learns,
    random_pair,
    refuses,
    zero_when_empty,
)
from tests.reference import distillation as reference


def logits(*shape: int, **others) -> dict:
    return random_pair("logits", shape or (2, 6, 3), **others)


CASES = [
    LossCase(
        "soft_class",
        soft_class_targets,
        checks=(
            matches_reference(
                reference.soft_class_targets,
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
            gradient_is_right(logits(temperature=2.0)),
            computes_in_float32(logits()),
            finite_when_saturated(logits(scale=1e4)),
            refuses(logits(5, 3) | {"t_logits": logits(5, 1)["t_logits"]}, "differ"),
        ),
        mutants={
            "no T^2": Edit("return temperature**2 * (weight", "return (weight"),
            "mean over classes": Edit(".sum(-1)", ".mean(-1)"),
            "mean over locations": Edit("weight.sum().clamp(min=1)", "weight.numel()"),
            "normaliser not held above 1": Edit(".clamp(min=1)", ""),
            "mean score as confidence": Edit("t_logits.amax(-1).sigmoid()", "t_logits.sigmoid().mean(-1)"),
            "student's confidence": Edit("t_logits.amax(-1)", "s_logits.amax(-1)"),
            "swapped roles": Edit(
                "bernoulli_kl(s_logits / temperature, t_logits / temperature)",
                "bernoulli_kl(t_logits / temperature, s_logits / temperature)",
            ),
            "cross-entropy": Edit(
                "F.logsigmoid(t_logits) - F.logsigmoid(s_logits)", "-F.logsigmoid(s_logits)", "bernoulli_kl"
            ),
            "positive half only": Edit("p * positive + (1 - p) * negative", "p * positive", "bernoulli_kl"),
            "teacher learns": Edit("t_logits.detach()", "t_logits"),
        },
    ),
]
