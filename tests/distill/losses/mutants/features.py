"""Feature losses: their checks, and wrong variants of each."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from distill.losses.features import (
    attention_transfer,
    channel_correlation,
    channel_wise_kl,
    cosine_distance,
    feature_mse,
    score_weighted_l2,
)
from kernels.channel_wise_kl import channel_kl_eager, log_softmax_over_pixels
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.mutants.maps import every_map_loss, maps, shapes
from tests.distill.losses.properties import (
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    matches_reference,
    minimum_at_teacher,
    only_student_learns,
    refuses,
    takes_inference_teacher,
    unchanged_by,
    zero_when_empty,
)
from tests.reference import distillation
from tests.reference import feature_distillation as reference

SCORES = np.random.default_rng(1).random((2, 4, 5))


def zeroed(arguments: dict) -> dict:
    """The student's first image, and the second image of both, without any feature."""
    s, t = (arguments[k].copy() for k in ("s_map", "t_map"))
    s[0], s[1:], t[1:] = 0, 0, 0
    return arguments | {"s_map": s, "t_map": t}


def constant_channel(arguments: dict) -> dict:
    """One channel constant in the student only, one in the teacher only, one in both."""
    s, t = (arguments[k].copy() for k in ("s_map", "t_map"))
    s[:, 0], t[:, 1], s[:, 2], t[:, 2] = 0.1, 0.7, 3.0, 0.0
    return arguments | {"s_map": s, "t_map": t}


def scales(like: Tensor) -> Tensor:
    """A scale above 0 for each channel."""
    return 0.5 + like.square().mean((0, 2, 3), keepdim=True)


def other_width(*, seed: int = 2) -> dict:
    """A student of 3 channels and a teacher of 5."""
    return maps(seed=seed) | {"t_map": maps(2, 5, 4, 5, seed=seed)["t_map"]}


def cross_entropy_over_pixels(*, s_map, t_map, temperature=1.0):
    """The KL without the teacher's entropy."""
    s, t = s_map.flatten(2) / temperature, t_map.detach().flatten(2) / temperature
    return -(temperature**2) * (t.softmax(-1) * F.log_softmax(s, -1)).sum(-1).mean()


CASES = [
    LossCase(
        "mse",
        feature_mse,
        checks=(
            matches_reference(distillation.feature_mse, shapes()),
            *every_map_loss(),
            refuses(maps() | {"t_map": maps(2, 1, 4, 5)["t_map"]}, "equal"),
        ),
        mutants={
            "sum, not mean": Edit(" / joint_normaliser(s_map.numel(), s_map)", ""),
            "half": Edit("(s_map - t_map).square().sum()", "(s_map - t_map).square().sum() / 2"),
            "absolute difference": Edit(".square()", ".abs()"),
            "mean over the batch only": Edit("s_map.numel()", "len(s_map)"),
            "nan when empty": Edit("joint_normaliser(s_map.numel(), s_map)", "s_map.numel()"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "student detached": Edit(
                "s_map.to(dtype)", "s_map.detach().to(dtype).requires_grad_()", within="as_map_pair"
            ),
            "computes in half precision": Edit("compute_dtype(s_map)", "s_map.dtype", within="as_map_pair"),
            "broadcasts a narrow teacher": Edit("s_shape != t_shape or", "", within="require_map_pair"),
        },
    ),
    LossCase(
        "cwd",
        channel_wise_kl,
        checks=(
            matches_reference(distillation.channel_wise_kl, shapes(temperature=2.0) | {"default": maps()}),
            unchanged_by(lambda a: {"s_map": a["s_map"] + a["t_map"].mean((2, 3), keepdim=True)}, maps()),
            *every_map_loss(temperature=2.0),
        ),
        mutants={
            "no T^2": Edit("temperature**2 * kl.mean()", "kl.mean()", channel_kl_eager),
            "T, not T^2": Edit("temperature**2 *", "temperature *", channel_kl_eager),
            "mean over pixels": Edit(".sum(-1)", ".mean(-1)", channel_kl_eager),
            "sum over channels": Edit("kl.mean()", "kl.sum(1).mean()", channel_kl_eager),
            "softmax over channels": Edit(
                "F.log_softmax(logits.flatten(2), dim=-1)",
                "F.log_softmax(logits.flatten(2), dim=1)",
                log_softmax_over_pixels,
            ),
            "student without temperature": Edit(
                "in (s_map, t_map)", "in (temperature * s_map, t_map)", channel_kl_eager
            ),
            "swapped roles": Edit(
                "log_q_t.exp() * (log_q_t - log_q_s)", "log_q_s.exp() * (log_q_s - log_q_t)", channel_kl_eager
            ),
            "cross-entropy": cross_entropy_over_pixels,
            "teacher learns": Edit("t_map.detach()", "t_map", channel_kl_eager),
            "log of a softmax": Edit(
                "F.log_softmax(logits.flatten(2), dim=-1)",
                "logits.flatten(2).softmax(-1).log()",
                log_softmax_over_pixels,
            ),
        },
    ),
    LossCase(
        "cosine",
        cosine_distance,
        checks=(
            matches_reference(reference.cosine_distance, shapes() | {"no direction": zeroed(maps())}),
            unchanged_by(lambda a: {"s_map": a["s_map"] * (1 + a["t_map"].abs().sum(1, keepdim=True))}, maps()),
            *every_map_loss(),
            finite_when_saturated(zeroed(maps())),
        ),
        mutants={
            "similarity, not distance": Edit("(1 - cosine).sum()", "cosine.sum()"),
            "over pixels, not channels": Edit("unit_vectors(s_map, dim=1)", "unit_vectors(s_map, dim=2)"),
            "teacher not normalised": Edit("unit_vectors(t_map, dim=1)", "t_map"),
            "sum over pixels": Edit("joint_normaliser(cosine.numel(), cosine)", "len(cosine)"),
            "sum, not mean": Edit(" / joint_normaliser(cosine.numel(), cosine)", ""),
            "squared": Edit("(1 - cosine).sum()", "(1 - cosine).square().sum()"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "nan without direction": Edit(
                "torch.where(square > TINY, square.clamp(min=TINY).rsqrt(), 0)", "square.rsqrt()", within="unit_vectors"
            ),
        },
    ),
    LossCase(
        "pkd",
        channel_correlation,
        checks=(
            matches_reference(
                reference.channel_correlation,
                shapes() | {"constant": constant_channel(maps()), "offset": maps() | {"s_map": 50 + maps()["s_map"]}},
            ),
            unchanged_by(
                lambda a: {"s_map": a["s_map"] * scales(a["t_map"]) + a["t_map"].amax((0, 2, 3), True)}, maps()
            ),
            unchanged_by(lambda a: {"t_map": 3 * a["t_map"] - 7}, maps()),
            *every_map_loss(),
            finite_when_saturated(constant_channel(maps())),
        ),
        mutants={
            "no half": Edit("max(2 * len(s_unit), 1)", "max(len(s_unit), 1)"),
            "sum over channels": Edit(" / max(2 * len(s_unit), 1)", " / 2"),
            "per image": Edit("m.transpose(0, 1).flatten(1)", "m.flatten(0, 1).flatten(1)"),
            "over channels": Edit("m.transpose(0, 1).flatten(1)", "m.flatten(2).transpose(1, 2).flatten(0, 1)"),
            "cosine, mean not removed": Edit("rows - mean", "rows", within="row_moments"),
            "covariance, not divided by the spread": Edit(
                "deviations * torch.where(varies, torch.where(varies, square, 1).rsqrt(), 0)",
                "deviations / max(rows.shape[1], 1) ** 0.5",
                within="unit_deviations",
            ),
            "r squared": Edit("(s_unit - t_unit).square().sum()", "2 * (1 - (s_unit * t_unit).sum(1).square()).sum()"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "nan for a constant channel": Edit(
                "torch.where(varies, torch.where(varies, square, 1).rsqrt(), 0)",
                "square.rsqrt()",
                within="unit_deviations",
            ),
        },
    ),
    LossCase(
        "at",
        attention_transfer,
        checks=(
            matches_reference(
                reference.attention_transfer, shapes() | {"cubes": maps(power=3.0), "other width": other_width()}
            ),
            unchanged_by(lambda a: {"s_map": -3 * a["s_map"].flip(1), "t_map": a["t_map"] / 7}, maps()),
            *every_map_loss(),
            only_student_learns(other_width()),
            refuses(maps() | {"t_map": maps(2, 3, 4, 4)["t_map"]}, "equal"),
        ),
        mutants={
            "no half": Edit("2 * len(s_unit)", "len(s_unit)"),
            "sum over images": Edit(" / joint_normaliser(2 * len(s_unit), s_unit)", " / 2"),
            "mean over pixels": Edit(".square().sum()", ".square().mean(1).sum()"),
            "maximum over channels": Edit(".pow(power).sum(1)", ".pow(power).amax(1)"),
            "always squares": Edit(".pow(power)", ".pow(2)"),
            "not normalised": Edit(
                "unit_vectors(m.abs().pow(power).sum(1).flatten(1), dim=1)", "m.abs().pow(power).sum(1).flatten(1)"
            ),
            "signs count": Edit("m.abs().pow(power)", "m"),
            "length not squared": Edit("(s_unit - t_unit).square().sum()", "(s_unit - t_unit).norm(dim=1).sum()"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
        },
    ),
    LossCase(
        "sl2",
        score_weighted_l2,
        checks=(
            matches_reference(
                reference.score_weighted_l2,
                {
                    "usual": maps(weight=SCORES),
                    "saturated": maps(scale=1e3, weight=SCORES),
                    "hardly confident": maps(weight=0.01 * SCORES),
                    "confident nowhere": maps(weight=0 * SCORES),
                }
                | {
                    "no images": maps(0, 3, 4, 5, weight=SCORES[:0]),
                    "no pixels": maps(2, 3, 0, 5, weight=SCORES[:, :0]),
                },
            ),
            unchanged_by(lambda a: {"weight": 5 * a["weight"]}, maps(weight=SCORES)),
            zero_when_empty(maps(0, 3, 4, 5, weight=SCORES[:0]), maps(weight=0 * SCORES)),
            minimum_at_teacher(maps(weight=SCORES)),
            only_student_learns(maps(weight=SCORES), also=("weight",)),
            takes_inference_teacher(maps(weight=SCORES)),
            gradient_is_right(maps(weight=SCORES)),
            computes_in_float32(maps(weight=SCORES)),
            finite_when_saturated(maps(scale=1e3, weight=0 * SCORES)),
            refuses(maps(weight=SCORES[:1]), "weight"),
        ),
        mutants={
            "mean over pixels": Edit(
                "s_map.shape[1] * joint_normaliser(weight.sum(), weight, at_least=0)", "s_map.numel()"
            ),
            "not divided by the width": Edit("s_map.shape[1] * joint", "joint"),
            "normaliser held above 1": Edit("at_least=0", "at_least=1"),
            "unweighted": Edit("(weight * difference).sum()", "difference.sum()"),
            "weights squared": Edit("(weight * difference)", "(weight**2 * difference)"),
            "nan where nothing is confident": Edit("at_least=0) + 1e-9)", "at_least=0))"),
            "absolute difference": Edit("(s_map - t_map).square()", "(s_map - t_map).abs()"),
            "weights learn": Edit("weight.detach()", "weight"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "broadcasts the weights": Edit("weight.shape != (len(s_map), *s_map.shape[2:])", "False"),
        },
    ),
]
