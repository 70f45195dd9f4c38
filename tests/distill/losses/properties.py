"""What every distillation loss must satisfy, as makers of checks: functions of one loss that raise AssertionError.

Each maker takes the keyword arguments to call the loss with, arrays in float64 numpy; a student's argument starts with
s_, the teacher's of the same rest with t_. Checks are run on the losses themselves and on their mutants.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arguments = dict[str, Any]
Check = Callable[[Callable], None]


def tensors(arguments: Arguments, dtype: torch.dtype = torch.float64) -> Arguments:
    """The arguments with arrays as tensors, floating ones in `dtype`; others as they are."""
    convert = lambda v: torch.tensor(v, dtype=dtype if np.issubdtype(v.dtype, np.floating) else None)
    return {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def roles(arguments: Arguments) -> tuple[list[str], list[str]]:
    """Names of the student's arrays, and of the teacher's of the same rest."""
    students = [k for k in arguments if k.startswith("s_") and isinstance(arguments[k], np.ndarray)]
    return students, ["t_" + k[2:] for k in students]


def random_pair(argument: str, shape: tuple[int, ...], *, scale: float = 1.0, seed: int = 0, **others) -> Arguments:
    """s_<argument> and t_<argument> of normal numbers, and other arguments as given."""
    rng = np.random.default_rng(seed)
    return {f"{who}_{argument}": scale * rng.normal(size=shape) for who in "st"} | others


def matches_reference(
    reference: Callable[..., float], cases: dict[str, Arguments], *, rtol: float = 1e-10, atol: float = 1e-12
) -> Check:
    """The loss equals reference(**arguments), float64 numpy, on every case."""
    expected = {name: reference(**arguments) for name, arguments in cases.items()}

    def check_reference(loss: Callable) -> None:
        for name, arguments in cases.items():
            got = loss(**tensors(arguments))
            assert got.shape == () and got.dtype == torch.float64, name
            np.testing.assert_allclose(
                got.item(), expected[name], rtol=rtol, atol=atol, equal_nan=False, err_msg=name
            )  # fmt: skip

    return check_reference


def minimum_at_teacher(arguments: Arguments, *, tolerance: float = 1e-12) -> Check:
    """0 with gradient 0 where the student equals the teacher, above 0 elsewhere. A cross-entropy is not."""
    students, teachers = roles(arguments)

    def check_minimum(loss: Callable) -> None:
        given = tensors(arguments)
        assert loss(**given) > 0
        equal = given | {s: given[t].clone().requires_grad_() for s, t in zip(students, teachers)}
        value = loss(**equal)
        assert abs(value.item()) < tolerance, f"{value.item()} at the teacher"
        value.backward()
        for s in students:
            assert equal[s].grad is not None and equal[s].grad.abs().max() < tolerance, "a gradient at the teacher"

    return check_minimum


def only_student_learns(arguments: Arguments, *, also: tuple[str, ...] = ()) -> Check:
    """Gradient reaches every student array; none reaches the teacher's, nor the arguments named in `also`."""
    students, teachers = roles(arguments)

    def check_gradients(loss: Callable) -> None:
        given = tensors(arguments)
        for name in (*students, *teachers, *also):
            given[name].requires_grad_()
        loss(**given).backward()
        assert all(given[s].grad is not None and given[s].grad.abs().sum() > 0 for s in students)
        for name in (*teachers, *also):
            assert given[name].grad is None or not given[name].grad.any(), f"{name} received a gradient"

    return check_gradients


def takes_inference_teacher(arguments: Arguments) -> Check:
    """A teacher that ran under torch.inference_mode, whose tensors autograd may not save, gives the same result."""
    students, teachers = roles(arguments)

    def check_inference_teacher(loss: Callable) -> None:
        given = tensors(arguments, torch.float32)
        with torch.inference_mode():
            frozen = {t: given[t].clone() for t in teachers}
        gradients = []
        for case in (given, given | frozen):
            leaves = {s: given[s].clone().requires_grad_() for s in students}
            try:
                loss(**case | leaves).backward()
            except RuntimeError as error:
                raise AssertionError(str(error)) from None
            gradients.append([leaf.grad for leaf in leaves.values()])
        torch.testing.assert_close(gradients[0], gradients[1])

    return check_inference_teacher


def gradient_is_right(arguments: Arguments) -> Check:
    """The gradient in float64 equals finite differences."""
    students, _ = roles(arguments)

    def check_gradcheck(loss: Callable) -> None:
        given = tensors(arguments)

        def of_students(*values: Tensor) -> Tensor:
            return loss(**given | dict(zip(students, values)))

        leaves = [given[s].clone().requires_grad_() for s in students]
        assert torch.autograd.gradcheck(of_students, leaves, raise_exception=False), "the gradient is wrong"

    return check_gradcheck


def computes_in_float32(arguments: Arguments) -> Check:
    """bfloat16 inputs under autocast give the float32 result of the same numbers; float32 stays float32."""

    def check_precision(loss: Callable) -> None:
        half = tensors(arguments, torch.bfloat16)
        exact = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in half.items()}
        expected = loss(**exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for name, given in (("bfloat16", half), ("float32", exact)):
                got = loss(**given)
                assert got.dtype == expected.dtype == torch.float32, name
                torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")

    return check_precision


def with_gradients(loss: Callable, arguments: Arguments) -> tuple[Tensor, list[Tensor | None]]:
    """The loss in float32, and its gradients by the student's tensors."""
    given = tensors(arguments, torch.float32)
    students, _ = roles(arguments)
    for s in students:
        given[s].requires_grad_()
    value = loss(**given)
    value.backward()
    return value, [given[s].grad for s in students]


def zero_when_empty(*cases: Arguments) -> Check:
    """0, not nan, and still differentiable."""

    def check_empty(loss: Callable) -> None:
        for arguments in cases:
            value, gradients = with_gradients(loss, arguments)
            assert value.shape == () and value == 0, f"{value} for nothing"
            assert all(gradient is None or not gradient.any() for gradient in gradients)

    return check_empty


def finite_when_saturated(*cases: Arguments) -> Check:
    """Value and gradient are finite in float32."""

    def check_saturated(loss: Callable) -> None:
        for arguments in cases:
            value, gradients = with_gradients(loss, arguments)
            assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)

    return check_saturated


def unchanged_by(change: Callable[[Arguments], Arguments], arguments: Arguments, *, rtol: float = 1e-9) -> Check:
    """The loss is the same before and after `change`, a function from tensors by name to changed tensors by name."""

    def check_invariance(loss: Callable) -> None:
        given = tensors(arguments)
        before, after = loss(**given), loss(**given | change(given))
        torch.testing.assert_close(after, before, rtol=rtol, atol=1e-12)

    return check_invariance


def refuses(arguments: Arguments, match: str) -> Check:
    """ValueError, with `match` in its message."""

    def check_refusal(loss: Callable) -> None:
        try:
            loss(**tensors(arguments))
        except ValueError as error:
            assert match in str(error)
        else:
            raise AssertionError(f"took { ({k: getattr(v, 'shape', v) for k, v in arguments.items()}) }")

    return check_refusal


def is_loss(value: Any) -> bool:
    """A public function with keyword-only student and teacher arguments."""
    if not inspect.isfunction(value) or value.__name__.startswith("_"):
        return False
    names = [p.name for p in inspect.signature(value).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return any(n.startswith("s_") for n in names) and any(n.startswith("t_") for n in names)
