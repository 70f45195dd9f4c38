"""Feature losses: their checks, and wrong variants of each."""

import torch.nn.functional as F

from distill.features import channel_wise_kl, feature_mse
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
    unchanged_by,
    zero_when_empty,
)
from tests.reference import distillation as reference


def maps(*shape: int, **others) -> dict:
    return random_pair("map", shape or (2, 3, 4, 5), **others)


def shapes(**others) -> dict[str, dict]:
    """The usual, odd, empty and saturated pairs of maps."""
    return {
        "usual": maps(**others),
        "one pixel": maps(1, 1, 1, 1, **others),
        "odd": maps(3, 2, 5, 7, **others),
        "no images": maps(0, 3, 4, 5, **others),
        "no pixels": maps(2, 3, 0, 5, **others),
        "saturated": maps(scale=1e3, **others),
    }


def every_map_loss(**others) -> tuple:
    """Checks that hold for every loss of one pair of maps."""
    return (
        zero_when_empty(maps(0, 3, 4, 5, **others), maps(2, 3, 0, 5, **others)),
        minimum_at_teacher(maps(**others)),
        only_student_learns(maps(**others)),
        gradient_is_right(maps(2, 3, 3, 3, **others)),
        computes_in_float32(maps(**others)),
        finite_when_saturated(maps(scale=1e3, **others)),
    )


def cross_entropy_over_pixels(*, s_map, t_map, temperature=1.0):
    """The KL without the teacher's entropy."""
    s, t = s_map.flatten(2) / temperature, t_map.detach().flatten(2) / temperature
    return -(temperature**2) * (t.softmax(-1) * F.log_softmax(s, -1)).sum(-1).mean()


CASES = [
    LossCase(
        "mse",
        feature_mse,
        checks=(
            matches_reference(reference.feature_mse, shapes()),
            *every_map_loss(),
            refuses(maps() | {"t_map": maps(2, 1, 4, 5)["t_map"]}, "equal"),
        ),
        mutants={
            "sum, not mean": Edit(" / max(s_map.numel(), 1)", ""),
            "half": Edit("(s_map - t_map).square().sum()", "(s_map - t_map).square().sum() / 2"),
            "absolute difference": Edit(".square()", ".abs()"),
            "mean over the batch only": Edit("s_map.numel()", "len(s_map)"),
            "nan when empty": Edit("max(s_map.numel(), 1)", "s_map.numel()"),
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "student detached": Edit("s_map.to(dtype)", "s_map.detach().to(dtype).requires_grad_()", within="as_map_pair"),
            "computes in half precision": Edit(
                "s_map.dtype if s_map.dtype.itemsize >= 4 else torch.float32", "s_map.dtype", within="as_map_pair"
            ),
            "broadcasts a narrow teacher": Edit("s_shape != t_shape or", "", within="as_map_pair"),
        },
    ),
    LossCase(
        "cwd",
        channel_wise_kl,
        checks=(
            matches_reference(reference.channel_wise_kl, shapes(temperature=2.0) | {"default": maps()}),
            unchanged_by(lambda a: {"s_map": a["s_map"] + a["t_map"].mean((2, 3), keepdim=True)}, maps()),
            *every_map_loss(temperature=2.0),
        ),
        mutants={
            "no T^2": Edit("temperature**2 * kl.mean()", "kl.mean()"),
            "T, not T^2": Edit("temperature**2 *", "temperature *"),
            "mean over pixels": Edit(".sum(-1)", ".mean(-1)"),
            "sum over channels": Edit("kl.mean()", "kl.sum(1).mean()"),
            "softmax over channels": Edit(
                "F.log_softmax(s_map.flatten(2) / temperature, dim=-1)",
                "F.log_softmax(s_map.flatten(2) / temperature, dim=1)",
            ),
            "student without temperature": Edit("s_map.flatten(2) / temperature", "s_map.flatten(2)"),
            "swapped roles": Edit("log_q_t.exp() * (log_q_t - log_q_s)", "log_q_s.exp() * (log_q_s - log_q_t)"),
            "cross-entropy": cross_entropy_over_pixels,
            "teacher learns": Edit("t_map.detach()", "t_map", within="as_map_pair"),
            "log of a softmax": Edit(
                "F.log_softmax(s_map.flatten(2) / temperature, dim=-1)",
                "(s_map.flatten(2) / temperature).softmax(-1).log()",
            ),
        },
    ),
]
