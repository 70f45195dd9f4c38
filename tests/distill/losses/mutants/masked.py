"""Masked losses: their checks, and wrong variants of each."""

import numpy as np

from distill.losses.masked import decoupled_mse, masked_mse
from kernels.masked_mse import masked_squares, masked_squares_eager
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.mutants.maps import maps
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
from tests.reference import feature_distillation as reference

MARKED = np.random.default_rng(3).random((2, 1, 4, 5)) < 0.4
SOFT = np.random.default_rng(4).random((2, 1, 4, 5))


def cases(name: str, **others) -> dict[str, dict]:
    """Pairs of maps with their mask under `name`: usual, saturated, all, nothing and no pixel marked."""
    with_mask = lambda mask, *shape, **more: maps(*shape, **{name: mask}, **more, **others)
    return {
        "usual": with_mask(MARKED),
        "soft": with_mask(SOFT),
        "hardly": with_mask(0.001 * SOFT),
        "all": with_mask(np.ones_like(MARKED)),
        "nothing": with_mask(np.zeros_like(MARKED)),
        "saturated": with_mask(MARKED, scale=1e3),
        "no images": with_mask(MARKED[:0], 0, 3, 4, 5),
        "no pixels": with_mask(MARKED[:, :, :0], 2, 3, 0, 5),
    }


def outside_moved(arguments: dict) -> dict:
    """The student elsewhere than in the mask, changed."""
    return {"s_map": arguments["s_map"] + (~arguments["mask"]) * arguments["t_map"].abs()}


FGFI, DEFEAT = cases("mask"), cases("foreground")
CASES = [
    LossCase(
        "masked_mse",
        masked_mse,
        checks=(
            matches_reference(reference.masked_mse, FGFI),
            unchanged_by(outside_moved, FGFI["usual"]),
            zero_when_empty(FGFI["no images"], FGFI["no pixels"], FGFI["nothing"]),
            minimum_at_teacher(FGFI["usual"]),
            only_student_learns(FGFI["soft"], also=("mask",)),
            takes_inference_teacher(FGFI["soft"]),
            gradient_is_right(FGFI["usual"]),
            computes_in_float32(FGFI["soft"]),
            finite_when_saturated(FGFI["nothing"], FGFI["saturated"]),
            refuses(maps(mask=MARKED[:1]), "mask"),
            refuses(maps(mask=MARKED[:, 0]), "mask"),
        ),
        mutants={
            "no half": Edit("scale_of(0.5,", "scale_of(1.0,", masked_squares_eager),
            "mean over channels": Edit(".sum(1, keepdim=True)", ".mean(1, keepdim=True)", masked_squares_eager),
            "mean over all pixels": Edit("joint_normaliser(mask.sum(), mask)", "max(mask.numel(), 1)"),
            "nan where nothing is marked": Edit("joint_normaliser(mask.sum(), mask)", "mask.sum()"),
            "soft mask taken for a hard one": Edit("(mask * squares)", "squares", masked_squares_eager),
            "background": Edit("mask.detach()", "(1 - mask.detach())", masked_squares_eager),
            "mask squared": Edit("mask.detach()", "mask.detach().square()", masked_squares_eager),
            "mask learns": Edit("mask.detach()", "mask", masked_squares_eager),
            "broadcasts the mask": Edit(
                'require_shape("mask", mask, (s_map.shape[0], 1, *s_map.shape[2:]))', "", masked_squares
            ),
            "per image": Edit("* squares).sum()", "* squares).mean(0).sum()", masked_squares_eager),
        },
    ),
    LossCase(
        "decoupled_mse",
        decoupled_mse,
        checks=(
            matches_reference(
                reference.decoupled_mse,
                DEFEAT | {"weights": maps(foreground=MARKED, foreground_weight=3.0, background_weight=0.7)},
            ),
            zero_when_empty(DEFEAT["no images"], DEFEAT["no pixels"]),
            minimum_at_teacher(DEFEAT["usual"]),
            only_student_learns(DEFEAT["soft"], also=("foreground",)),
            takes_inference_teacher(DEFEAT["soft"]),
            gradient_is_right(DEFEAT["usual"]),
            computes_in_float32(DEFEAT["soft"]),
            finite_when_saturated(DEFEAT["nothing"], DEFEAT["all"]),
            refuses(maps(foreground=MARKED[:1]), "mask"),
        ),
        mutants={
            "swapped weights": Edit(
                "foreground_weight * near + background_weight * far",
                "background_weight * near + foreground_weight * far",
            ),
            "no half": Edit("2 * joint_normaliser(channels * mask.sum()", "joint_normaliser(channels * mask.sum()"),
            "one normaliser for both": Edit("channels * (1 - mask).sum()", "channels * mask.sum()"),
            "not divided by the width": Edit("channels = s_map.shape[1]", "channels = 1"),
            "no background": Edit("foreground_weight * near + background_weight * far", "foreground_weight * near"),
            "background everywhere": Edit("((1 - mask) * difference)", "difference"),
            "nan without background": Edit(
                "joint_normaliser(channels * (1 - mask).sum(), mask)", "(channels * (1 - mask).sum())"
            ),
            "teacher learns": lambda *, s_map, t_map, foreground, **w: (
                decoupled_mse(s_map=s_map, t_map=t_map, foreground=foreground, **w)
                + decoupled_mse(s_map=t_map, t_map=s_map, foreground=foreground, **w)
            ),
            "mask learns": Edit("mask.detach()", "mask", within="as_mask"),
        },
    ),
]
