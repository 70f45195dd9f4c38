"""CrossKD: the checks of the cross-head logits, and wrong variants."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from distill.losses.crosskd import cross_logits, crosskd_classes, crosskd_edges
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.mutants.maps import maps
from tests.distill.losses.properties import (
    Check,
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    matches_reference,
    minimum_at_teacher,
    only_student_learns,
    refuses,
    takes_inference_teacher,
    tensors,
    unchanged_by,
    zero_when_empty,
)
from tests.reference import logit_distillation as reference


def random_tail(channels: int = 3, out: int = 2, *, seed: int = 0) -> tuple[Callable, nn.Module]:
    """3x3 convolution, SiLU, 1x1 convolution with the same numbers, in numpy and as a frozen module in float64."""
    rng = np.random.default_rng(seed)
    plain = dict(
        weight3=rng.normal(size=(4, channels, 3, 3)), bias3=rng.normal(size=4),
        weight1=rng.normal(size=(out, 4)), bias1=rng.normal(size=out),
    )  # fmt: skip
    module = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, out, 1)).double()
    state = {
        "0.weight": plain["weight3"], "0.bias": plain["bias3"],
        "2.weight": plain["weight1"][:, :, None, None], "2.bias": plain["bias1"],
    }  # fmt: skip
    module.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    return lambda m: reference.tail(m, **plain), module.eval().requires_grad_(False)


PLAIN_TAIL, TAIL = random_tail()
FLOAT_TAIL = random_tail()[1].float()


def crossed(*shape: int, tail: nn.Module = TAIL, **others) -> dict:
    return maps(*shape, t_tail=tail, **others)


def imitated(check: Check) -> Check:
    """A check of a scalar loss, made for the mean squared difference of the logits from the teacher's own."""

    def check_imitation(cross: Callable) -> None:
        def loss(*, t_map: Tensor, t_tail: nn.Module, **others) -> Tensor:
            dtype = next(t_tail.parameters()).dtype
            with torch.autocast("cpu", enabled=False):
                own = t_tail(t_map.detach().to(dtype))
            return (cross(t_map=t_map, t_tail=t_tail, **others) - own).square().mean()

        check(loss)

    check_imitation.__name__ = check.__name__
    return check_imitation


def check_matches_reference(cross) -> None:
    cases = {
        "usual": maps(),
        "one pixel": maps(1, 3, 1, 1),
        "odd": maps(3, 3, 5, 2),
        "large": maps(scale=1e3),
        "no images": maps(0, 3, 4, 5),
    }
    constant = maps(seed=1)
    constant["s_map"][:, 0], constant["t_map"][:, 1] = 0.3, -2.0
    moved = maps(seed=2)
    moved["s_map"] = 5 * moved["s_map"] - 3
    for name, given in (cases | {"constant channels": constant, "moved": moved}).items():
        for rescale in (True, False):
            rescaled = reference.like_teacher(**given) if rescale else given["s_map"]
            got = cross(**tensors(given), t_tail=TAIL, rescale=rescale)
            assert got.dtype == torch.float64
            np.testing.assert_allclose(got.detach().numpy(), PLAIN_TAIL(rescaled), rtol=1e-8, atol=1e-8, err_msg=name)
        default, rescaled = cross(**tensors(given), t_tail=TAIL), cross(**tensors(given), t_tail=TAIL, rescale=True)
        torch.testing.assert_close(default, rescaled)


def check_refuses_layers_that_learn(cross) -> None:
    unfrozen = random_tail()[1]
    unfrozen[2].bias.requires_grad_()
    counting = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).double().requires_grad_(False)
    for tail, match in ((unfrozen, "frozen, 2.bias"), (counting, "eval mode")):
        try:
            cross(**tensors(crossed(tail=tail)))
        except ValueError as error:
            assert match in str(error)
        else:
            raise AssertionError(f"took a tail that is not in {match}")


def check_tail_keeps_its_precision(cross) -> None:
    half = random_tail()[1].bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        assert cross(**tensors(crossed(tail=half), torch.float32)).dtype == torch.bfloat16
    assert cross(**tensors(crossed(tail=half), torch.bfloat16)).dtype == torch.bfloat16


def as_numpy_tail(module: nn.Module) -> Callable:
    """The same tail for the reference."""
    return PLAIN_EDGES if module is EDGE_TAIL else PLAIN_TAIL


def with_plain_tail(loss: Callable) -> Callable:
    return lambda *, t_tail, **others: loss(**others, t_tail=as_numpy_tail(t_tail))


PLAIN_EDGES, EDGE_TAIL = random_tail(out=12, seed=1)
FLOAT_EDGES = random_tail(out=12, seed=1)[1].float()
SCORES = np.random.default_rng(2).random((2, 4, 5))


def edges(*shape: int, tail: nn.Module = EDGE_TAIL, weight: np.ndarray = SCORES, **others) -> dict:
    return crossed(*shape, tail=tail, weight=weight, **others)


def moved_channels(arguments: dict) -> dict:
    return {"s_map": 7 * arguments["s_map"] + arguments["t_map"].mean((0, 2, 3), True)}


CASES = [
    LossCase(
        "cross_logits",
        cross_logits,
        checks=(
            check_matches_reference,
            check_refuses_layers_that_learn,
            check_tail_keeps_its_precision,
            imitated(minimum_at_teacher(crossed())),
            imitated(only_student_learns(crossed())),
            imitated(takes_inference_teacher(crossed(tail=FLOAT_TAIL))),
            imitated(gradient_is_right(crossed(2, 3, 3, 2))),
            imitated(computes_in_float32(crossed(tail=FLOAT_TAIL))),
            imitated(finite_when_saturated(crossed(tail=FLOAT_TAIL, scale=1e4))),
            imitated(unchanged_by(moved_channels, crossed())),
        ),
        mutants={
            "no rescaling": Edit("like_teacher(s_map, t_map) if rescale else s_map", "s_map"),
            "always rescaled": Edit("like_teacher(s_map, t_map) if rescale else s_map", "like_teacher(s_map, t_map)"),
            "off by default": Edit("rescale: bool = True", "rescale: bool = False"),
            "mean only": Edit("s_unit * t_square.sqrt() + t_mean", "s_unit + t_mean", "like_teacher"),
            "no mean": Edit("s_unit * t_square.sqrt() + t_mean", "s_unit * t_square.sqrt()", "like_teacher"),
            "length about zero": Edit(
                "t_square.sqrt()", "(t_square + b * h * w * t_mean.square()).sqrt()", "like_teacher"
            ),
            "sample deviation of one, biased of the other": Edit(
                "t_square.sqrt()",
                "(t_square * (1 - 1 / (b * h * w))).sqrt()",
                "like_teacher",
            ),
            "statistics of the student": Edit("row_moments(t_map", "row_moments(s_map", "like_teacher"),
            "statistics of the first image": Edit(
                "t_map.transpose(0, 1).flatten(1)",
                "t_map[:1].expand_as(t_map).transpose(0, 1).flatten(1)",
                "like_teacher",
            ),
            "teacher's own prediction": Edit(
                "return run_tail(t_tail, ", "return run_tail(t_tail, t_map) + 0 * run_tail(t_tail, "
            ),
            "takes layers that learn": Edit("if parameter.requires_grad:", "if False:"),
            "takes layers in training": Edit("if any(module.training", "if False and any(module.training"),
            "autocast inside": Edit("enabled=False", "enabled=torch.is_autocast_enabled('cpu')", "run_tail"),
            "always float32": Edit("feature_map.to(dtype))", "feature_map.to(dtype)).float()", "run_tail"),
            "detached": Edit("feature_map.to(dtype))", "feature_map.detach().to(dtype).requires_grad_())", "run_tail"),
            "teacher learns": Edit("s_map, t_map = as_map_pair(s_map, t_map)", "as_map_pair(s_map, t_map)"),
        },
    ),
    LossCase(
        "crosskd_classes",
        crosskd_classes,
        checks=(
            matches_reference(
                with_plain_tail(reference.crosskd_classes),
                {
                    "default": crossed(),
                    "squared": crossed(beta=2.0),
                    "positives": crossed(normaliser=np.array(3)),
                    "not rescaled": crossed(rescale=False),
                    "large": crossed(scale=1e2),
                    "no images": crossed(0, 3, 4, 5),
                },
                rtol=1e-8,
            ),
            zero_when_empty(crossed(0, 3, 4, 5, tail=FLOAT_TAIL)),
            unchanged_by(moved_channels, crossed()),
            minimum_at_teacher(crossed(beta=2.0)),
            only_student_learns(crossed(normaliser=np.array(2.5)), also=("normaliser",)),
            takes_inference_teacher(crossed(tail=FLOAT_TAIL)),
            gradient_is_right(crossed(2, 3, 3, 2)),
            computes_in_float32(crossed(tail=FLOAT_TAIL)),
            finite_when_saturated(crossed(tail=FLOAT_TAIL, scale=1e4)),
        ),
        mutants={
            "the student's own map as the target": Edit(
                "teacher_logits(t_map, t_tail)", "teacher_logits(s_map, t_tail)"
            ),
            "swapped maps": Edit(
                "cross_logits(s_map=s_map, t_map=t_map, t_tail=t_tail, rescale=rescale)",
                "cross_logits(s_map=t_map.clone(), t_map=s_map, t_tail=t_tail, rescale=rescale) + 0 * s_map.sum()",
            ),
            "rescaling not passed on": Edit(", rescale=rescale", ""),
            "off by default": Edit("rescale: bool = True", "rescale: bool = False"),
            "beta not passed on": Edit(", beta=beta", ""),
            "normaliser not passed on": Edit(", normaliser=normaliser", ""),
            "classes last but one": Edit("t_logits.permute(0, 2, 3, 1)", "t_logits.permute(0, 2, 3, 1).flip(3)"),
            "rows of the other layout": Edit("cross.permute(0, 2, 3, 1)", "cross.permute(0, 2, 3, 1).flip(2)"),
        },
    ),
    LossCase(
        "crosskd_edges",
        crosskd_edges,
        checks=(
            matches_reference(
                with_plain_tail(reference.crosskd_edges),
                {
                    "default": edges(),
                    "warm": edges(temperature=3.0),
                    "all levels": edges(normaliser=np.array(40.0)),
                    "hardly confident": edges(weight=0.01 * SCORES),
                    "not rescaled": edges(rescale=False),
                    "no images": edges(0, 3, 4, 5, weight=SCORES[:0]),
                },
                rtol=1e-8,
            ),
            zero_when_empty(
                edges(0, 3, 4, 5, weight=SCORES[:0], tail=FLOAT_EDGES), edges(weight=0 * SCORES, tail=FLOAT_EDGES)
            ),
            refuses(edges(weight=SCORES[:1]), "weight"),
            unchanged_by(moved_channels, edges()),
            minimum_at_teacher(edges()),
            only_student_learns(edges(normaliser=np.array(40.0)), also=("weight", "normaliser")),
            takes_inference_teacher(edges(tail=FLOAT_EDGES)),
            gradient_is_right(edges(2, 3, 3, 2, weight=SCORES[:, :3, :2])),
            computes_in_float32(edges(tail=FLOAT_EDGES)),
            finite_when_saturated(edges(tail=FLOAT_EDGES, scale=1e4)),
        ),
        mutants={
            "bin by bin": Edit(
                "(4, -1)) for z in (cross, t_logits)", "(-1, 4)).transpose(3, 4) for z in (cross, t_logits)"
            ),
            "the student's own map as the target": Edit(
                "teacher_logits(t_map, t_tail)", "teacher_logits(s_map, t_tail)"
            ),
            "unweighted": Edit("weight=weight", "weight=torch.ones_like(weight)"),
            "temperature not passed on": Edit(", temperature=temperature", ", temperature=1.0"),
            "temperature of LD": Edit(", temperature=temperature", ""),
            "normaliser not passed on": Edit(", normaliser=normaliser", ""),
            "rescaling not passed on": Edit(", rescale=rescale", ""),
            "off by default": Edit("rescale: bool = True", "rescale: bool = False"),
        },
    ),
]
