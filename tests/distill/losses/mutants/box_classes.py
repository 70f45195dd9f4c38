"""Box classification: the checks of the loss and of its log-odds, and wrong variants of each."""

import numpy as np
import torch

from distill.losses.box_classes import box_class_kl, log_odds
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

ROW_WEIGHTS = np.random.default_rng(6).random(5)
LEARNING_WEIGHTS = (
    "0 * weighted_mean(kl, weight) + "
    "(weighted_mean(kl, None) if weight is None else (weight * kl).sum() / weight.sum().clamp(min=1))"
)
JOINED = (torch.tensor([0, 2, 3]), torch.tensor([4, 1, 0]))  # of a student's 4 classes and a teacher's 5


def box_pair(n: int = 5, s_columns: int = 4, t_columns: int | None = None, **others) -> dict:
    s = random_pair("logits", (n, s_columns), **others)
    t = random_pair("logits", (n, t_columns or s_columns), **others)
    return s | {"t_logits": t["t_logits"]}


def mixed(**others) -> dict:
    """A sigmoid student of 4 classes, a softmax teacher of 5 classes and background, three classes in common."""
    return box_pair(t_columns=6, t_head="softmax", classes=JOINED, **others)


def check_log_odds_match(odds) -> None:
    for scale in (1.0, 30.0, 1e3):
        logits = scale * np.random.default_rng(7).normal(size=(6, 5))
        for head in ("sigmoid", "softmax"):
            got = odds(torch.tensor(logits), head)
            assert got.dtype == torch.float64
            np.testing.assert_allclose(got.numpy(), reference.log_odds(logits, head), rtol=1e-10, atol=1e-10)


def check_odds_are_of_the_probabilities(odds) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(odds(logits, "softmax").sigmoid(), logits.softmax(1)[:, 1:])


def check_odds_of_nothing(odds) -> None:
    assert odds(torch.zeros(0, 4), "softmax").shape == (0, 3)
    assert odds(torch.zeros(2, 1), "softmax").shape == (2, 0)
    assert odds(torch.zeros(2, 0), "sigmoid").shape == (2, 0)


def check_odds_are_float32_and_finite(odds) -> None:
    logits = torch.tensor([[0.0, 200.0, -200.0], [1e4, -1e4, 0.0]])
    for head in ("sigmoid", "softmax"):
        assert odds(logits.bfloat16(), head).dtype == torch.float32
        leaf = logits.clone().requires_grad_()
        got = odds(leaf, head)
        got.sum().backward()
        assert got.isfinite().all() and leaf.grad.isfinite().all()


def check_odds_refuse_other_heads(odds) -> None:
    try:
        odds(torch.zeros(2, 3), "gaussian")
    except ValueError as error:
        assert "gaussian" in str(error)
    else:
        raise AssertionError("took a head it does not know")


def one_softmax_only(*, s_logits, t_logits, s_head="sigmoid", t_head="sigmoid", **others):
    """The teacher's logits as they are, without its background column: independent sigmoids they are not."""
    t_logits = t_logits[:, 1:] if t_head == "softmax" else t_logits
    s_logits = s_logits[:, 1:] if s_head == "softmax" else s_logits
    return box_class_kl(s_logits=s_logits, t_logits=t_logits, **others)


CASES = [
    LossCase(
        "box_class_kl",
        box_class_kl,
        checks=(
            matches_reference(
                reference.box_class_kl,
                {
                    "sigmoid to sigmoid": box_pair(temperature=2.0),
                    "softmax to sigmoid": box_pair(t_columns=5, t_head="softmax"),
                    "sigmoid to softmax": box_pair(t_columns=3, s_head="softmax", temperature=3.0),
                    "softmax to softmax": box_pair(s_head="softmax", t_head="softmax", weight=ROW_WEIGHTS),
                    "some classes": box_pair(t_columns=5, classes=JOINED),
                    "softmax to sigmoid, some classes": mixed(weight=ROW_WEIGHTS, temperature=2.0),
                    "hardly weighted": mixed(weight=0.01 * ROW_WEIGHTS),
                    "nowhere": mixed(weight=0 * ROW_WEIGHTS),
                    "no boxes": box_pair(0),
                    "one class": box_pair(s_columns=1, t_columns=2, t_head="softmax"),
                    "saturated": mixed(scale=500.0),
                },
            ),
            unchanged_by(lambda a: {"t_logits": a["t_logits"] + a["s_logits"][:, :1]}, mixed()),
            refuses(box_pair(t_columns=5), "differ"),
            refuses(box_pair(t_columns=4, t_head="softmax"), "differ"),
            refuses(box_pair() | {"t_logits": box_pair(3)["t_logits"]}, "differ"),
            refuses(mixed(weight=ROW_WEIGHTS[:1]), "weight"),
            zero_when_empty(box_pair(0), mixed(weight=0 * ROW_WEIGHTS), box_pair(s_columns=0)),
            minimum_at_teacher(box_pair(temperature=2.0)),
            minimum_at_teacher(box_pair(s_head="softmax", t_head="softmax")),
            only_student_learns(mixed(weight=ROW_WEIGHTS), also=("weight",)),
            only_student_learns(box_pair()),
            takes_inference_teacher(mixed()),
            takes_inference_teacher(box_pair()),
            gradient_is_right(mixed(temperature=2.0)),
            gradient_is_right(box_pair(s_head="softmax", t_columns=3)),
            computes_in_float32(mixed()),
            finite_when_saturated(mixed(scale=1e4), box_pair(s_head="softmax", t_columns=3, scale=1e4)),
        ),
        mutants={
            "no T^2": Edit("return temperature**2 * weighted", "return weighted"),
            "T, not T^2": Edit("temperature**2", "temperature"),
            "mean over classes": Edit(".sum(-1)", ".mean(-1)"),
            "unweighted": Edit("weighted_mean(kl, weight)", "weighted_mean(kl, None)"),
            "weights learn": Edit("weighted_mean(kl, weight)", f"({LEARNING_WEIGHTS})"),
            "swapped roles": Edit(
                "bernoulli_kl(s_odds / temperature, t_odds / temperature)",
                "bernoulli_kl(t_odds / temperature, s_odds / temperature)",
            ),
            "swapped columns": Edit(
                "s_odds[:, classes[0].to(s_odds.device)]", "s_odds[:, classes[0].flip(0).to(s_odds.device)]"
            ),
            "teacher without temperature": Edit("t_odds / temperature", "t_odds"),
            "softmax logits as they are": one_softmax_only,
            "log-probabilities as odds": Edit("(logits - others)[:, 1:]", "logits.log_softmax(-1)[:, 1:]", "log_odds"),
            "background last": Edit("(logits - others)[:, 1:]", "(logits - others)[:, :-1]", "log_odds"),
            "teacher learns": Edit(
                "as_logit_pair(s_odds, t_odds)", "(s_odds, t_odds + 0 * as_logit_pair(s_odds, t_odds)[1])"
            ),
        },
    ),
    LossCase(
        "log_odds",
        log_odds,
        checks=(
            check_log_odds_match,
            check_odds_are_of_the_probabilities,
            check_odds_of_nothing,
            check_odds_are_float32_and_finite,
            check_odds_refuse_other_heads,
        ),
        mutants={
            "against background only": Edit("logits - others", "logits - logits[:, :1]"),
            "log-probabilities": Edit("logits - others", "logits.log_softmax(-1)"),
            "background last": Edit("(logits - others)[:, 1:]", "(logits - others)[:, :-1]"),
            "counts itself": Edit(".masked_fill(is_self, -torch.inf)", ".masked_fill(is_self & False, -torch.inf)"),
            "log of 1 - p": Edit("logits - others", "logits.log_softmax(-1) - (1 - logits.softmax(-1)).log()"),
            "half precision": Edit("at_least_float32(logits)", "logits"),
            "every other head a softmax": Edit('head != "softmax"', "False"),
        },
    ),
]
