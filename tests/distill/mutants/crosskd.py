"""CrossKD: the checks of the cross-head logits, and wrong variants."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from distill.crosskd import CrossHead, cross_logits
from tests.distill.mutants.machinery import Edit, LossCase
from tests.distill.mutants.maps import maps
from tests.distill.properties import (
    Check,
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    minimum_at_teacher,
    only_student_learns,
    takes_inference_teacher,
    tensors,
    unchanged_by,
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
            np.testing.assert_allclose(got.numpy(), PLAIN_TAIL(rescaled), rtol=1e-8, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(
            cross(**tensors(given), t_tail=TAIL), cross(**tensors(given), t_tail=TAIL, rescale=True)
        )


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


LEVELS = [(2, 3, 4, 5), (2, 3, 2, 3), (2, 3, 1, 1)]
TAILS = [random_tail(seed=seed) for seed in range(3)]


def levels() -> dict:
    pairs = [tensors(maps(*shape, seed=seed)) for seed, shape in enumerate(LEVELS)]
    return dict(
        s_maps=[p["s_map"] for p in pairs], t_maps=[p["t_map"] for p in pairs], t_tails=[tail for _, tail in TAILS]
    )


def build_head(head_class, student_channels=(3, 3, 3), **others) -> nn.Module:
    torch.manual_seed(0)
    return head_class(student_channels=student_channels, teacher_channels=(3, 3, 3), **others).double()


def check_order_of_locations(head_class) -> None:
    for rescale in (True, False):
        got = build_head(head_class, rescale=rescale)(**levels())
        rows = []
        for (plain, _), s_map, t_map in zip(TAILS, levels()["s_maps"], levels()["t_maps"]):
            s_map, t_map = s_map.numpy(), t_map.numpy()
            out = plain(reference.like_teacher(s_map, t_map) if rescale else s_map)
            rows += [out[:, :, y, x] for y in range(out.shape[2]) for x in range(out.shape[3])]
        np.testing.assert_allclose(got.detach().numpy(), np.stack(rows, axis=1), rtol=1e-8, atol=1e-8)


def check_rescales_by_default(head_class) -> None:
    torch.testing.assert_close(build_head(head_class)(**levels()), build_head(head_class, rescale=True)(**levels()))


def check_equal_widths_need_no_alignment(head_class) -> None:
    assert not list(build_head(head_class).parameters())
    assert len(list(build_head(head_class, student_channels=(3, 5, 3)).parameters())) == 2


def check_alignment_learns(head_class) -> None:
    head = build_head(head_class, student_channels=(2, 4, 5))
    s_maps = [torch.randn(2, c, *shape[2:], dtype=torch.float64) for c, shape in zip((2, 4, 5), LEVELS)]
    for s_map in s_maps:
        s_map.requires_grad_()
    given = levels() | {"s_maps": s_maps}
    head(**given).square().sum().backward()
    weights = [p for name, p in head.named_parameters() if name.endswith("weight")]
    assert len(weights) == 3 and all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights)
    assert all(s_map.grad.abs().sum() > 0 for s_map in s_maps)
    assert all(p.grad is None for tail in given["t_tails"] for p in tail.parameters())


def check_refuses_missing_levels(head_class) -> None:
    for given in (levels() | {"t_tails": levels()["t_tails"][:2]}, levels() | {"s_maps": levels()["s_maps"][:2]}):
        try:
            build_head(head_class)(**given)
        except ValueError:
            continue
        raise AssertionError("left a level out")
    try:
        head_class(student_channels=(3, 3), teacher_channels=(3,))
    except ValueError as error:
        assert "2 levels" in str(error)
    else:
        raise AssertionError("left a level out")


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
            imitated(unchanged_by(lambda a: {"s_map": 7 * a["s_map"] + a["t_map"].mean((0, 2, 3), True)}, crossed())),
        ),
        mutants={
            "no rescaling": Edit("if rescale:", "if False:"),
            "always rescaled": Edit("if rescale:", "if True:"),
            "off by default": Edit("rescale: bool = True", "rescale: bool = False"),
            "mean only": Edit("s_unit * t_length + t_mean", "s_unit + t_mean", "like_teacher"),
            "no mean": Edit("s_unit * t_length + t_mean", "s_unit * t_length", "like_teacher"),
            "length about zero": Edit("(t_rows - t_mean).square()", "t_rows.square()", "like_teacher"),
            "sample deviation of one, biased of the other": Edit(
                ".square().sum(1, keepdim=True).sqrt()",
                ".square().sum(1, keepdim=True).sqrt() * ((count - 1) / count) ** 0.5",
                "like_teacher",
            ),
            "statistics of the student": Edit("t_rows = t_map", "t_rows = s_map", "like_teacher"),
            "statistics of the first image": Edit(
                "t_map.transpose(0, 1).flatten(1)",
                "t_map[:1].expand_as(t_map).transpose(0, 1).flatten(1)",
                "like_teacher",
            ),
            "teacher's own prediction": Edit("t_tail(s_map.to(dtype))", "t_tail(t_map.to(dtype)) + 0 * s_map.sum()"),
            "takes layers that learn": Edit("if parameter.requires_grad:", "if False:"),
            "takes layers in training": Edit("if any(module.training", "if False and any(module.training"),
            "autocast inside": Edit("enabled=False", "enabled=torch.is_autocast_enabled('cpu')"),
            "always float32": Edit("t_tail(s_map.to(dtype))", "t_tail.float()(s_map.float())"),
            "detached": Edit("t_tail(s_map.to(dtype))", "t_tail(s_map.detach().to(dtype).requires_grad_())"),
            "teacher learns": Edit("s_map, t_map = as_map_pair(s_map, t_map)", "as_map_pair(s_map, t_map)"),
        },
    ),
    LossCase(
        "cross_head",
        CrossHead,
        checks=(
            check_order_of_locations,
            check_rescales_by_default,
            check_equal_widths_need_no_alignment,
            check_alignment_learns,
            check_refuses_missing_levels,
        ),
        mutants={
            "levels from coarse to fine": Edit("torch.cat(rows, dim=1)", "torch.cat(rows[::-1], dim=1)"),
            "column by column": Edit("out.flatten(2)", "out.transpose(2, 3).flatten(2)"),
            "one tail for all": Edit("t_tail=t_tail", "t_tail=t_tails[0]"),
            "alignment of equal widths": Edit('"none" if s == t else "conv1x1"', '"conv1x1"'),
            "alignment does not learn": Edit("s_map=align(s_map)", "s_map=align(s_map).detach().requires_grad_()"),
            "rescaling not passed on": Edit(", rescale=self.rescale", ""),
            "off by default": Edit("rescale: bool = True", "rescale: bool = False"),
            "drops levels": Edit("t_tails, strict=True", "t_tails"),
            "takes unequal levels": Edit("if len(student_channels) != len(teacher_channels):", "if False:"),
        },
    ),
]
