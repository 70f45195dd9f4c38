"""FGD: the checks of its parts and of the whole, and wrong variants of each."""

import numpy as np
import torch

from distill.losses.fgd import FGD, GlobalContext, fgd_attention, fgd_focal, fgd_global
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
    zero_when_empty,
)
from tests.reference import feature_distillation as reference

DENSITY = np.array([0, 0, 0.25, 0.25, 1, 0.1])[np.random.default_rng(5).integers(0, 6, (2, 1, 4, 5))]
LOUD = dict(foreground_weight=0.7, background_weight=1.3)


def focal(density=DENSITY, *shape, **others):
    return maps(*shape, foreground=density, **others)


# A context that any dtype and both libraries can compute; the two roles differ, as trained ones do.
def s_context(m):
    return m + 0.5 * (m * m).mean((2, 3), keepdims=True)


def t_context(m):
    return m - 0.25 * m.mean((2, 3), keepdims=True)


def both(context=t_context, *shape, **others):
    return maps(*shape, s_context=context, t_context=t_context, **others)


def random_context(seed: int, channels: int = 3) -> tuple[dict, dict]:
    """Parameters of a GlobalContext, by the names of the reference and by those of the module."""
    rng = np.random.default_rng(seed)
    hidden = max(channels // 2, 1)
    shapes = dict(
        key=(channels,), key_bias=(), first=(hidden, channels), first_bias=(hidden,), norm=(hidden,),
        norm_bias=(hidden,), second=(channels, hidden), second_bias=(channels,),
    )  # fmt: skip
    plain = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    names = dict(
        key="attend.weight", key_bias="attend.bias", first="transform.0.weight", first_bias="transform.0.bias",
        norm="transform.1.weight", norm_bias="transform.1.bias", second="transform.3.weight",
        second_bias="transform.3.bias",
    )  # fmt: skip
    state = {names[k]: torch.tensor(v) for k, v in plain.items()}
    state["attend.weight"] = state["attend.weight"].view(1, -1, 1, 1)
    state["attend.bias"] = state["attend.bias"].view(1)
    return plain, state


def check_context_matches(context_class) -> None:
    plain, state = random_context(0, channels=6)
    module = context_class(6).double()
    module.load_state_dict(state)
    feature_map = np.random.default_rng(1).normal(size=(2, 6, 3, 5))
    got = module(torch.tensor(feature_map)).detach().numpy()
    np.testing.assert_allclose(got, reference.global_context(feature_map, **plain), rtol=1e-10)


def check_context_starts_as_identity(context_class) -> None:
    feature_map = torch.randn(2, 4, 3, 5)
    assert torch.equal(context_class(4)(feature_map), feature_map)
    assert context_class(1)(feature_map[:, :1]).shape == (2, 1, 3, 5)


def check_whole_matches(fgd_class) -> None:
    """The weighted sum of the three parts, each context network with its own parameters."""
    weights = dict(
        temperature=0.8, foreground_weight=0.3, background_weight=0.2, attention_weight=0.5, global_weight=0.7
    )
    module = fgd_class(3, **weights).double()
    (s_plain, s_state), (t_plain, t_state) = random_context(1), random_context(2)
    module.s_context.load_state_dict(s_state)
    module.t_context.load_state_dict(t_state)
    given = focal()
    got = module(**{k: torch.tensor(v) for k, v in given.items()})
    s_map, t_map = given["s_map"], given["t_map"]
    expected = reference.fgd_focal(**given, temperature=0.8, foreground_weight=0.3, background_weight=0.2)
    expected += 0.5 * reference.fgd_attention(s_map, t_map, 0.8)
    s_related, t_related = reference.global_context(s_map, **s_plain), reference.global_context(t_map, **t_plain)
    expected += 0.7 * np.sum((t_related - s_related) ** 2) / 2
    np.testing.assert_allclose(got.item(), expected, rtol=1e-10)


def check_both_contexts_learn(fgd_class) -> None:
    torch.manual_seed(0)
    module = fgd_class(4)
    for context in (module.s_context, module.t_context):
        torch.nn.init.normal_(context.transform[-1].weight)
    s_map, t_map = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3, requires_grad=True)
    module(s_map=s_map, t_map=t_map, foreground=torch.zeros(2, 1, 3, 3)).backward()
    # A bias of w_k moves every pixel's logit alike, so its gradient is 0.
    learning = [p for n, p in module.named_parameters() if not n.endswith("attend.bias")]
    assert len(learning) == 14 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
    assert s_map.grad.abs().sum() > 0 and t_map.grad is None


def check_inference_teacher(fgd_class) -> None:
    """A trained layer looks at the teacher's map, which autograd cannot save as it comes from inference mode."""
    with torch.inference_mode():
        t_map = torch.randn(2, 4, 3, 3)
    s_map = torch.randn(2, 4, 3, 3, requires_grad=True)
    try:
        fgd_class(4)(s_map=s_map, t_map=t_map, foreground=torch.rand(2, 1, 3, 3)).backward()
    except RuntimeError as error:
        raise AssertionError(str(error)) from None
    assert s_map.grad.abs().sum() > 0


def check_published_weights(fgd_class) -> None:
    module = fgd_class(2)
    names = ("temperature", "foreground_weight", "background_weight", "attention_weight", "global_weight")
    assert [getattr(module, n) for n in names] == [0.5, 1e-3, 5e-4, 5e-4, 5e-6]


CASES = [
    LossCase(
        "fgd_focal",
        fgd_focal,
        checks=(
            matches_reference(
                reference.fgd_focal,
                {
                    "usual": focal(**LOUD),
                    "published": focal(),
                    "warm": focal(temperature=3.0),
                    "saturated": focal(scale=1e3),
                    "no objects": focal(0 * DENSITY, **LOUD),
                    "no background": focal(1 + DENSITY, **LOUD),
                    "no images": focal(DENSITY[:0], 0, 3, 4, 5),
                    "no pixels": focal(DENSITY[:, :, :0], 2, 3, 0, 5),
                },
            ),
            zero_when_empty(focal(DENSITY[:0], 0, 3, 4, 5), focal(DENSITY[:, :, :0], 2, 3, 0, 5)),
            minimum_at_teacher(focal(**LOUD)),
            only_student_learns(focal(**LOUD), also=("foreground",)),
            takes_inference_teacher(focal(**LOUD)),
            gradient_is_right(focal(**LOUD)),
            computes_in_float32(focal(**LOUD)),
            finite_when_saturated(focal(scale=1e3)),
            refuses(focal(DENSITY[:1]), "mask"),
        ),
        mutants={
            "student's attention": Edit("attention(t_map, temperature)", "attention(s_map, temperature)"),
            "no channel attention": Edit("(weight * channel *", "(weight *"),
            "no spatial attention": Edit("* far) * spatial", "* far)"),
            "background not averaged": Edit("far = far / far.sum((1, 2, 3), keepdim=True).clamp(min=1)", "pass"),
            "background over the batch": Edit("far.sum((1, 2, 3), keepdim=True)", "far.sum()"),
            "background everywhere": Edit("(near == 0)", "(near >= 0)"),
            "foreground by count, not area": Edit("foreground_weight * near", "foreground_weight * (near > 0)"),
            "swapped weights": Edit(
                "foreground_weight * near + background_weight * far",
                "background_weight * near + foreground_weight * far",
            ),
            "mean over pixels": Edit("joint_normaliser(len(s_map), s_map)", "max(s_map.numel(), 1)"),
            "attention sums to 1": Edit(".softmax(1) * (h * w)", ".softmax(1)", within="attention"),
            "signed strength": Edit("feature_map.abs()", "feature_map", within="attention"),
            "no temperature": Edit(".flatten(1).div(temperature)", ".flatten(1)", within="attention"),
        },
    ),
    LossCase(
        "fgd_attention",
        fgd_attention,
        checks=(
            matches_reference(reference.fgd_attention, shapes(temperature=2.0) | {"published": maps()}),
            *every_map_loss(),
        ),
        mutants={
            "squared": Edit("(t - s).abs()", "(t - s).square()"),
            "mean over pixels": Edit("(t - s).abs().sum()", "(t - s).abs().mean(1).sum()"),
            "sum over images": Edit(" / joint_normaliser(len(s_map), s_map)", ""),
            "pixels only": Edit("for s, t in pairs", "for s, t in [next(pairs)]"),
            "signed": Edit("(t - s).abs().sum()", "(t - s).sum()"),
            "no temperature": Edit("attention(s_map, temperature)", "attention(s_map, 1.0)"),
            "channel attention sums to 1": Edit(".softmax(1) * c", ".softmax(1)", within="attention"),
            "channel strength summed": Edit("temperature * max(h * w, 1)", "temperature", within="attention"),
            "teacher learns": lambda *, s_map, t_map, temperature=0.5: (
                (
                    fgd_attention(s_map=s_map, t_map=t_map, temperature=temperature)
                    + fgd_attention(s_map=t_map, t_map=s_map, temperature=temperature)
                )
                / 2
            ),
        },
    ),
    LossCase(
        "fgd_global",
        fgd_global,
        checks=(
            matches_reference(
                reference.fgd_global,
                {
                    "usual": both(s_context),
                    "odd": both(s_context, 3, 2, 5, 7),
                    "saturated": both(s_context, scale=1e2),
                    "no images": both(t_context, 0, 3, 4, 5),
                },
            ),
            zero_when_empty(both(t_context, 0, 3, 4, 5), both(t_context, 2, 3, 0, 5)),
            minimum_at_teacher(both()),
            only_student_learns(both(s_context)),
            takes_inference_teacher(both(s_context)),
            gradient_is_right(both(s_context)),
            computes_in_float32(both(torch.nn.Conv2d(3, 3, 1))),
            finite_when_saturated(both(s_context, scale=1e3)),
        ),
        mutants={
            "mean": Edit(" / count", " / s_map.numel()"),
            "sum over images": Edit(" / count", ""),
            "one context for both": Edit("t_context(t_map.clone())", "s_context(t_map)"),
            "no context": Edit("(t_related - s_context(s_map))", "(t_map - s_map)"),
            "swapped maps": Edit("(t_related - s_context(s_map))", "(t_context(s_map) - s_context(t_map))"),
            "absolute difference": Edit(".square()", ".abs()"),
            "autocast inside": Edit("enabled=False", "enabled=torch.is_autocast_enabled('cpu')"),
            "detached contexts": Edit("s_context(s_map)", "s_context(s_map).detach().requires_grad_()"),
        },
    ),
    LossCase(
        "global_context",
        GlobalContext,
        checks=(check_context_matches, check_context_starts_as_identity),
        mutants={
            "mean, not attention": Edit(".flatten(2).softmax(-1)", ".flatten(2).softmax(-1) * 0 + 1 / 15"),
            "softmax over the wrong dimension": Edit(".softmax(-1)", ".softmax(1)"),
            "no residual": Edit("return feature_map + self", "return 0 * feature_map + self"),
            "no normalisation": Edit("nn.LayerNorm(hidden)", "nn.LayerNorm(hidden, eps=1e3)"),
            "no rectifier": Edit("nn.ReLU()", "nn.Identity()"),
            "not the identity at first": Edit("*self.transform[-1].parameters()", "self.transform[-1].bias"),
        },
    ),
    LossCase(
        "fgd",
        FGD,
        checks=(check_whole_matches, check_both_contexts_learn, check_inference_teacher, check_published_weights),
        mutants={
            "the teacher's map as it came": Edit("t_map.clone()", "t_map", within="fgd_global"),
            "no global part": Edit("+ self.global_weight * related", ""),
            "no attention part": Edit("+ self.attention_weight * attended", ""),
            "attention not weighted": Edit("self.attention_weight * attended", "attended"),
            "swapped contexts": Edit(
                "s_context=self.s_context, t_context=self.t_context",
                "s_context=self.t_context, t_context=self.s_context",
            ),
            "teacher's context frozen": Edit(
                "t_context=self.t_context)", "t_context=lambda m: self.t_context(m).detach())"
            ),
            "temperature not passed on": Edit("t_map=t_map, temperature=self.temperature", "t_map=t_map"),
            "class default of the released code": Edit(
                "attention_weight: float = 5e-4", "attention_weight: float = 1e-3"
            ),
        },
    ),
]
