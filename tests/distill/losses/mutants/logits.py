"""Logit losses of softmax heads: their checks, and wrong variants of each. Sigmoid heads: sigmoid_logits.py."""

import numpy as np
import torch
import torch.nn.functional as F

from distill.losses.logits import (
    decoupled_kl,
    image_kl,
    prediction_correlation,
    probability_correlation,
    softmax_kl,
)
from kernels.temperature_kl import temperature_kl, temperature_kl_eager
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
    unchanged_by,
    zero_when_empty,
)
from tests.reference import logit_distillation as reference

ROW_WEIGHTS = np.random.default_rng(3).random(6)
LABELS = np.array([0, 4, 2, 2, 1, 3])


def logits(*shape: int, **others) -> dict:
    return random_pair("logits", shape or (2, 6, 3), **others)


def rows(n: int = 6, k: int = 5, **others) -> dict:
    return logits(n, k, **others)


def probabilities(n: int = 6, k: int = 5) -> dict:
    return {name.replace("logits", "prob"): np.exp(z) for name, z in rows(n, k).items()}


def labelled(n: int = 6, k: int = 5, **others) -> dict:
    return rows(n, k, labels=LABELS[:n] % k, **others)


def same_row_constant(arguments: dict) -> dict:
    """A constant added to all logits of a row, in the student and in the teacher."""
    return {
        "s_logits": arguments["s_logits"] + arguments["t_logits"][..., :1],
        "t_logits": arguments["t_logits"] + 3 * arguments["s_logits"][..., 1:2],
    }


def other_scale_and_shift(arguments: dict) -> dict:
    """Each row of the student's probabilities scaled and shifted by its own numbers, and the teacher's by others."""
    s, t = arguments["s_prob"], arguments["t_prob"]
    return {"s_prob": (0.1 + t[:, :1] ** 2) * s - t[:, 1:2], "t_prob": 7 * t + s[:, 2:3]}


def with_constant_rows(arguments: dict) -> dict:
    """One row constant in the student only, one in the teacher only, one in both."""
    s, t = (arguments[k].copy() for k in ("s_prob", "t_prob"))
    s[0], t[1], s[2], t[2] = 0.1, 0.7, 0.3, 0.0
    return arguments | {"s_prob": s, "t_prob": t}


def decoupled_by_probabilities(*, s_logits, t_logits, labels, target_weight=1.0, other_weight=0.25, **others):
    """The logarithm of 1 - p_y, which is -inf for a saturated row."""
    temperature, index = others.get("temperature", 1.0), labels[:, None]
    p_s, p_t = ((z / temperature).softmax(1) for z in (s_logits, t_logits.detach()))
    b_s, b_t = (torch.cat((p.gather(1, index), 1 - p.gather(1, index)), 1) for p in (p_s, p_t))
    is_label = torch.zeros_like(p_s).scatter_(1, index, 1).bool()
    q_s, q_t = (p[~is_label].view(len(p), -1) / (1 - p.gather(1, index)) for p in (p_s, p_t))
    binary = (b_t * (b_t.log() - b_s.log())).sum(1)
    return temperature**2 * (target_weight * binary + other_weight * (q_t * (q_t.log() - q_s.log())).sum(1)).mean()


def cross_entropy_of_rows(*, s_logits, t_logits, weight=None, temperature=1.0):
    """Hinton's loss as written, without the teacher's entropy."""
    log_p_s = F.log_softmax(s_logits / temperature, -1)
    rows = -((t_logits.detach() / temperature).softmax(-1) * log_p_s).sum(-1)
    weight = torch.ones_like(rows) if weight is None else weight.detach()
    return temperature**2 * (weight * rows).sum() / weight.sum().clamp(min=1)


def every_logit_loss(make, *, empty: tuple[dict, ...], scale: float = 1e4, **others) -> tuple:
    """Checks that hold for every loss of one pair of logits; `make` is called as make(**others)."""
    return (
        zero_when_empty(*empty),
        minimum_at_teacher(make(**others)),
        only_student_learns(make(**others), also=("weight",) if "weight" in others else ()),
        takes_inference_teacher(make(**others)),
        gradient_is_right(make(**others)),
        computes_in_float32(make(**others)),
        finite_when_saturated(make(scale=scale)),
    )


CASES = [
    LossCase(
        "softmax_kl",
        softmax_kl,
        checks=(
            matches_reference(
                reference.softmax_kl,
                {
                    "usual": rows(temperature=2.0),
                    "default": rows(),
                    "weighted": rows(weight=ROW_WEIGHTS, temperature=3.0),
                    "hardly weighted": rows(weight=0.01 * ROW_WEIGHTS),
                    "weighted nowhere": rows(weight=0 * ROW_WEIGHTS),
                    "batch": logits(2, 3, 4, temperature=2.0),
                    "one class": rows(k=1),
                    "none": rows(0, temperature=2.0),
                    "saturated": rows(scale=1e3, temperature=2.0),
                },
            ),
            unchanged_by(same_row_constant, rows(temperature=2.0)),
            refuses(rows(weight=ROW_WEIGHTS[:1]), "weight"),
            refuses(rows(5, 3) | {"t_logits": rows(5, 1)["t_logits"]}, "differ"),
            *every_logit_loss(rows, empty=(rows(0), rows(weight=0 * ROW_WEIGHTS)), weight=ROW_WEIGHTS, temperature=2.0),
        ),
        mutants={
            "no T^2": Edit("temperature**2", "1.0", temperature_kl_eager),
            "T, not T^2": Edit("temperature**2", "temperature", temperature_kl_eager),
            "mean over classes": Edit(".sum(-1)", ".mean(-1)", temperature_kl_eager),
            "sum over rows": Edit("normaliser=normaliser", "normaliser=1.0"),
            "normaliser counts the rows": Edit("weight.sum()", "weight.new_full((), len(weight))"),
            "normaliser not held above 1": Edit("joint_normaliser(rows, s_logits)", "rows"),
            "unweighted": Edit("weight=weight", "weight=None"),
            "weights learn": Edit("weight.detach()", "weight", temperature_kl_eager),
            "broadcasts the weights": Edit("require_rows(s_logits, t_logits, weight)", "", temperature_kl),
            "softmax over rows": Edit("temperature), dim=-1)", "temperature), dim=0)", temperature_kl_eager),
            "swapped roles": Edit(
                "log_p_t.exp() * (log_p_t - log_p_s)", "log_p_s.exp() * (log_p_s - log_p_t)", temperature_kl_eager
            ),
            "cross-entropy": cross_entropy_of_rows,
            "log of a softmax": Edit(
                "F.log_softmax(at_temperature(z, temperature), dim=-1)",
                "at_temperature(z, temperature).softmax(-1).log()",
                temperature_kl_eager,
            ),
            "teacher learns": Edit("t_logits.detach()", "t_logits", temperature_kl_eager),
            "computes in half precision": Edit(
                "dtype = compute_dtype(s_logits, t_logits)", "dtype = s_logits.dtype", temperature_kl_eager
            ),
        },
    ),
    LossCase(
        "image_kl",
        image_kl,
        checks=(
            matches_reference(
                reference.softmax_kl,
                {
                    "usual": rows(temperature=2.0),
                    "default": rows(),
                    "scaled cosines": rows(scale=30.0, temperature=4.0),
                },
            ),
            unchanged_by(same_row_constant, rows(temperature=2.0)),
            refuses(logits(2, 3, 4), "one row per image"),
            *every_logit_loss(rows, empty=(rows(0),), temperature=2.0),
        ),
        mutants={
            "temperature not passed on": Edit(", temperature=temperature)", ")"),
            "no T^2": Edit("return softmax_kl(", "return temperature**-2 * softmax_kl("),
            "sum over images": Edit("return softmax_kl(", "return len(s_logits) * softmax_kl("),
            "swapped roles": Edit(
                "s_logits=s_logits, t_logits=t_logits", "s_logits=t_logits.detach(), t_logits=s_logits"
            ),
            "takes locations": Edit("s_logits.dim() != 2", "False"),
            "cross-entropy": cross_entropy_of_rows,
        },
    ),
    LossCase(
        "decoupled_kl",
        decoupled_kl,
        checks=(
            matches_reference(
                reference.decoupled_kl,
                {
                    "usual": labelled(temperature=2.0),
                    "default": labelled(),
                    "loud": labelled(target_weight=0.7, other_weight=8.0, temperature=4.0),
                    "weighted": labelled(weight=ROW_WEIGHTS),
                    "target only": labelled(other_weight=0.0),
                    "two classes": labelled(k=2),
                    "one class": labelled(k=1),
                    "none": labelled(0),
                    "saturated": labelled(scale=1e3, temperature=2.0),
                },
            ),
            unchanged_by(same_row_constant, labelled(temperature=2.0)),
            refuses(labelled() | {"labels": LABELS[:1]}, "labels"),
            *every_logit_loss(labelled, empty=(labelled(0), labelled(k=1)), weight=ROW_WEIGHTS, temperature=2.0),
        ),
        mutants={
            "no T^2": Edit("return temperature**2 * weighted", "return weighted"),
            "as Hinton couples them": Edit(
                "other_weight * other", "other_weight * (1 - (t_label - t_rest.logsumexp(1)).sigmoid()) * other"
            ),
            "swapped weights": Edit(
                "target_weight * target + other_weight * other", "other_weight * target + target_weight * other"
            ),
            "no target part": Edit("target_weight * target + ", ""),
            "mean over the other classes": Edit("(log_q_t - log_q_s)).sum(1)", "(log_q_t - log_q_s)).mean(1)"),
            "label among the others": Edit("others + (others >= labels[:, None])", "others.expand(len(labels), -1)"),
            "swapped roles": Edit("log_q_t.exp() * (log_q_t - log_q_s)", "log_q_s.exp() * (log_q_s - log_q_t)"),
            "student's log-odds by the largest": Edit("s_rest.logsumexp(1)", "s_rest.amax(1)"),
            "label without temperature": Edit(
                "z.gather(1, labels[:, None])[:, 0] / temperature", "z.gather(1, labels[:, None])[:, 0]"
            ),
            "log of 1 - p": decoupled_by_probabilities,
            "teacher learns": Edit("t_logits.detach()", "t_logits", "as_logit_pair"),
        },
    ),
    LossCase(
        "prediction_correlation",
        prediction_correlation,
        checks=(
            matches_reference(
                reference.prediction_correlation,
                {
                    "usual": rows(temperature=2.0),
                    "default": rows(),
                    "weighted": rows(class_weight=0.3, sample_weight=2.0, temperature=4.0),
                    "one row": rows(1),
                    "one class": rows(k=1),
                    "none": rows(0),
                    "saturated": rows(scale=1e3),
                },
            ),
            unchanged_by(same_row_constant, rows(temperature=2.0)),
            refuses(logits(2, 3, 4), "(N, K)"),
            *every_logit_loss(rows, empty=(rows(0),), temperature=2.0),
        ),
        mutants={
            "no T^2": Edit("temperature**2 * (class_weight", "(class_weight"),
            "classes only": Edit(" + sample_weight * over_samples", ""),
            "samples only": Edit("class_weight * over_classes + ", ""),
            "swapped weights": Edit(
                "class_weight * over_classes + sample_weight * over_samples",
                "sample_weight * over_classes + class_weight * over_samples",
            ),
            "logits, not probabilities": Edit("((z / temperature).softmax(1)", "(z / temperature"),
            "sigmoid": Edit("(z / temperature).softmax(1)", "(z / temperature).sigmoid()"),
            "softmax over samples": Edit(".softmax(1)", ".softmax(0)"),
            "no temperature": Edit("(z / temperature)", "z"),
            "teacher learns": Edit("t_logits.detach()", "t_logits", "as_logit_pair"),
        },
    ),
    LossCase(
        "probability_correlation",
        probability_correlation,
        checks=(
            matches_reference(
                reference.probability_correlation,
                {
                    "usual": probabilities(),
                    "constant rows": with_constant_rows(probabilities()),
                    "one column": probabilities(k=1),
                    "none": probabilities(0),
                },
            ),
            unchanged_by(other_scale_and_shift, probabilities()),
            zero_when_empty(probabilities(0), probabilities(6, 0)),
            minimum_at_teacher(probabilities()),
            only_student_learns(probabilities()),
            gradient_is_right(probabilities()),
            computes_in_float32(probabilities()),
            finite_when_saturated(with_constant_rows(probabilities())),
        ),
        mutants={
            "not halved": Edit("joint_normaliser(2 * len(s_unit), distance)", "max(len(s_unit), 1)"),
            "sum over rows": Edit("joint_normaliser(2 * len(s_unit), distance)", "2"),
            "mean over columns": Edit("joint_normaliser(2 * len(s_unit), distance)", "max(2 * s_unit.numel(), 1)"),
            "cosine": Edit("unit_deviations(p, joint=is_split)", "F.normalize(p)"),
            "covariance": Edit("unit_deviations(p, joint=is_split)", "p - p.mean(1, True)"),
            "only the student normalised": Edit(
                "unit_deviations(p, joint=is_split)", "p if p is t_prob else unit_deviations(p)"
            ),
            "teacher learns": Edit("t_logits.detach()", "t_logits", "as_logit_pair"),
        },
    ),
]
