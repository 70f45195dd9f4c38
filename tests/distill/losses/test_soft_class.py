"""Logit losses against float64 numpy, their identities, their gradient, and their edges."""

import numpy as np
import pytest
import torch

from distill.losses.logits import soft_class_targets
from kernels.sigmoid_kl import bernoulli_kl
from tests.reference import distillation as reference


def pair(shape, scale, seed=0):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=shape), scale * rng.normal(size=shape)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (2, 7, 3)], ids=["empty", "one", "batch"])
@pytest.mark.parametrize("scale", [1.0, 500.0], ids=["usual", "saturated"])
def test_soft_class_targets_match_reference(shape, scale, power, temperature):
    s, t = pair(shape, scale)
    got = soft_class_targets(s_logits=torch.tensor(s), t_logits=torch.tensor(t), temperature=temperature, power=power)
    expected = reference.soft_class_targets(s, t, temperature, power)
    np.testing.assert_allclose(got.item(), expected, rtol=1e-10, atol=1e-12)


CALLS = {
    "soft_class": (lambda s, t: soft_class_targets(s_logits=s, t_logits=t, temperature=2.0), (2, 6, 3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_identities(name):
    loss, shape = CALLS[name]
    s = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    t = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert loss(t, t).abs() < 1e-12  # a cross-entropy would leave the teacher's entropy
    assert loss(s, t) > 0
    loss(s, t).backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None  # the teacher never learns
    at_teacher = t.detach().clone().requires_grad_()
    loss(at_teacher, t).backward()
    assert at_teacher.grad.abs().max() < 1e-12  # the teacher is a minimum
    assert torch.autograd.gradcheck(lambda x: loss(x, t.detach()), s.detach().requires_grad_())


@pytest.mark.parametrize("name", CALLS)
def test_half_precision_computes_in_float32(name):
    loss, shape = CALLS[name]
    s, t = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(s, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(s.float(), t.float()))


def test_gradient_size_hardly_depends_on_temperature():
    """T^2 keeps the gradient of close, small logits the same at every T; without it, it would shrink 100-fold."""
    t = 0.01 * torch.randn(4, 5, dtype=torch.float64)
    grads = []
    for temperature in (1.0, 10.0):
        s = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        soft_class_targets(s_logits=s, t_logits=t, temperature=temperature, power=0.0).backward()
        grads.append(s.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-9)


def test_confident_locations_weigh_more():
    """Equal disagreement at a confident and at a background location: the confident one gets the larger gradient."""
    t = torch.tensor([[4.0, -6.0], [-5.0, -6.0]])
    s = (t + 1).requires_grad_()
    soft_class_targets(s_logits=s, t_logits=t).backward()
    uniform = (t + 1).requires_grad_()
    soft_class_targets(s_logits=uniform, t_logits=t, power=0.0).backward()
    ratio = s.grad.abs().sum(1) / uniform.grad.abs().sum(1)
    expected = t.amax(1).sigmoid()
    torch.testing.assert_close(ratio[0] / ratio[1], expected[0] / expected[1])


def test_saturated_logits_stay_finite():
    s = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = soft_class_targets(s_logits=s, t_logits=torch.tensor([[-1e4, 1e4]]))
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
    assert bernoulli_kl(torch.tensor([1e4]), torch.tensor([1e4])) == 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ"):
        soft_class_targets(s_logits=torch.zeros(5, 3), t_logits=torch.zeros(5, 1))
