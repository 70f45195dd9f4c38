"""MGD: the checks of the loss, its mask and its module, and wrong variants of each."""

import numpy as np
import torch

from distill.losses.mgd import MGD, masked_generation, random_mask
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.mutants.maps import maps
from tests.distill.losses.properties import (
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    minimum_at_teacher,
    only_student_learns,
    refuses,
    takes_inference_teacher,
    tensors,
    zero_when_empty,
)
from tests.reference import feature_distillation as reference

KEEP = np.random.default_rng(6).random((2, 1, 4, 5)) < 0.6
FIRST, LAST = (0.3 * np.random.default_rng(s).normal(size=(3, 3, 3, 3)) for s in (7, 8))
BIAS = np.random.default_rng(9).normal(size=(2, 3))


def plain_generator(image_map: np.ndarray) -> np.ndarray:
    hidden = np.maximum(reference.convolve3x3(image_map, FIRST, BIAS[0]), 0)
    return reference.convolve3x3(hidden, LAST, BIAS[1])


def generator_state() -> dict[str, torch.Tensor]:
    arrays = {"0.weight": FIRST, "0.bias": BIAS[0], "2.weight": LAST, "2.bias": BIAS[1]}
    return {k: torch.tensor(v) for k, v in arrays.items()}


def generate(features: torch.Tensor) -> torch.Tensor:
    """The same network in any dtype."""
    weights = {k: v.to(features.dtype) for k, v in generator_state().items()}
    hidden = torch.conv2d(features, weights["0.weight"], weights["0.bias"], padding=1).relu()
    return torch.conv2d(hidden, weights["2.weight"], weights["2.bias"], padding=1)


def masked(keep=KEEP, *shape, generate=generate, **others) -> dict:
    return maps(*shape, keep=keep, generate=generate, **others)


def check_generation(loss) -> None:
    for given in (masked(), masked(~KEEP), masked(0 * KEEP > 0), masked(scale=1e3)):
        plain = {k: v for k, v in given.items() if k != "generate"}
        expected = reference.masked_generation(**plain, generate=plain_generator)
        got = loss(**tensors(given))
        assert got.dtype == torch.float64 and got.shape == ()
        np.testing.assert_allclose(got.item(), expected, rtol=1e-10)


def check_hidden_pixels_do_not_matter(loss) -> None:
    given = tensors(masked())
    moved = given["s_map"] + 5 * ~given["keep"]
    torch.testing.assert_close(loss(**given), loss(**given | {"s_map": moved}))


def check_mask(draw) -> None:
    """One mask for all channels, one draw per pixel and image, at the rate asked, from the generator alone."""
    features = torch.zeros(3, 7, 40, 50)
    seeded = lambda seed: torch.Generator().manual_seed(seed)
    keep = draw(features, drop=0.3, generator=seeded(0))
    assert keep.shape == (3, 1, 40, 50) and keep.dtype == torch.bool
    assert abs(keep.double().mean() - 0.7) < 0.02  # standard error 0.006
    assert not torch.equal(keep[0], keep[1])
    assert abs(keep.double().mean(2).std() - (0.21 / 40) ** 0.5) < 0.02  # pixels are independent along a column
    assert torch.equal(keep, draw(features.bfloat16(), drop=0.3, generator=seeded(0)))
    assert not torch.equal(keep, draw(features, drop=0.3, generator=seeded(1)))
    assert (
        draw(features, drop=0.0, generator=seeded(0)).all() and not draw(features, drop=1.0, generator=seeded(0)).any()
    )
    before = torch.random.get_rng_state()
    draw(features, drop=0.5, generator=seeded(0))
    assert torch.equal(before, torch.random.get_rng_state()), "drawn from the global state"


def check_module(mgd_class) -> None:
    """The loss of a random mask under the module's own network; every parameter learns, the teacher does not."""
    module = mgd_class(3, drop=0.5).double()
    module.generate.load_state_dict(generator_state())
    given = maps()
    s_map, t_map = (torch.tensor(given[k], requires_grad=True) for k in ("s_map", "t_map"))
    loss = module(s_map=s_map, t_map=t_map, generator=torch.Generator().manual_seed(3))
    keep = random_mask(s_map, drop=0.5, generator=torch.Generator().manual_seed(3)).numpy()
    expected = reference.masked_generation(given["s_map"], given["t_map"], keep, plain_generator)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-10)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert s_map.grad.abs().sum() > 0
    assert t_map.grad is None and mgd_class(2).drop == 0.65


def check_odd_drop_is_refused(mgd_class) -> None:
    try:
        mgd_class(2, drop=1.5)
    except ValueError:
        return
    raise AssertionError("took drop = 1.5")


IDENTITY = dict(generate=lambda features: features)
CASES = [
    LossCase(
        "mgd_generation",
        masked_generation,
        checks=(
            check_generation,
            check_hidden_pixels_do_not_matter,
            zero_when_empty(masked(KEEP[:0], 0, 3, 4, 5), masked(KEEP[:, :, :0], 2, 3, 0, 5)),
            minimum_at_teacher(masked(KEEP | True, **IDENTITY)),
            only_student_learns(masked(KEEP.astype(float)), also=("keep",)),
            takes_inference_teacher(masked(KEEP.astype(float))),
            gradient_is_right(masked()),
            computes_in_float32(masked()),
            finite_when_saturated(masked(scale=1e3)),
            refuses(masked(KEEP[:1]), "mask"),
        ),
        mutants={
            "mean": Edit(" / count", " / s_map.numel()"),
            "sum over images": Edit(" / count", ""),
            "no mask": Edit("generate(keep * s_map)", "generate(s_map)"),
            "mask turned": Edit("generate(keep * s_map)", "generate((1 - keep) * s_map)"),
            "mask after the network": Edit("generate(keep * s_map)", "keep * generate(s_map)"),
            "hidden pixels only": Edit(
                "(t_map - generate(keep * s_map))", "(1 - keep) * (t_map - generate(keep * s_map))"
            ),
            "teacher masked too": Edit("(t_map - ", "(keep * t_map - "),
            "teacher through the network": Edit("(t_map - ", "(generate(t_map) - "),
            "autocast inside": Edit("enabled=False", "enabled=torch.is_autocast_enabled('cpu')"),
            "absolute difference": Edit(".square()", ".abs()"),
        },
    ),
    LossCase(
        "mgd_mask",
        random_mask,
        checks=(check_mask,),
        mutants={
            "drop is the share kept": Edit("(draw >= drop)", "(draw < drop)"),
            "one mask for all images": Edit("torch.rand((b, 1, h, w), ", "torch.rand((1, 1, h, w), "),
            "one draw per column": Edit(
                "torch.rand((b, 1, h, w), ", "torch.ones(b, 1, h, w) * torch.rand((b, 1, 1, w), "
            ),
            "global state": Edit("generator=generator, device=generator.device", "device=feature_map.device"),
        },
    ),
    LossCase(
        "mgd",
        MGD,
        checks=(check_module, check_odd_drop_is_refused),
        mutants={
            "default of two-stage detectors": Edit("drop: float = 0.65", "drop: float = 0.45"),
            "no rectifier": Edit("nn.ReLU()", "nn.Identity()"),
            "generator frozen": Edit(
                "generate=self.generate)", "generate=lambda m: self.generate.requires_grad_(False)(m))"
            ),
            "roles swapped": Edit("s_map=s_map, t_map=t_map, keep", "s_map=t_map, t_map=s_map, keep"),
            "drop not passed on": Edit("drop=self.drop", "drop=0.65"),
            "any drop": Edit("not 0 <= drop <= 1", "False"),
        },
    ),
]
