"""The distances of gradients against float64 numpy sums that share no code, and their identities."""

import numpy as np
import pytest
import torch

from distill.condense.gradient_distance import DISTANCES, gradient_distance

SHAPES = [(4, 3, 3, 3), (5,), (2, 6), (3, 2, 1, 1), (3, 2)]


def gradients(seed: int, requires_grad: bool = False) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=shape), requires_grad=requires_grad) for shape in SHAPES]


def reference(s_gradients, r_gradients, kind: str) -> float:
    total = 0.0
    for s, r in zip(s_gradients, r_gradients):
        s, r = s.detach().numpy(), r.detach().numpy()
        if s.ndim == 1:
            continue
        for row in range(s.shape[0]):
            a, b = s[row].ravel(), r[row].ravel()
            if kind == "cosine":
                lengths = np.sqrt(np.dot(a, a)) * np.sqrt(np.dot(b, b))
                total += 1 - (np.dot(a, b) / lengths if lengths > 1e-12 else 0)
            elif kind == "mse":
                total += sum((x - y) ** 2 for x, y in zip(a, b))
            else:
                total += sum(abs(x - y) for x, y in zip(a, b))
    return total


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("seed", range(3))
def test_matches_the_reference(kind, seed):
    s, r = gradients(seed), gradients(seed + 10)
    assert gradient_distance(s, r, kind).item() == pytest.approx(reference(s, r, kind), rel=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
def test_gradcheck_on_both_sides(kind):
    s, r = gradients(0, requires_grad=True), gradients(1, requires_grad=True)
    count = len(SHAPES)
    assert torch.autograd.gradcheck(lambda *x: gradient_distance(x[:count], x[count:], kind), (*s, *r))


@pytest.mark.parametrize("kind", DISTANCES)
def test_zero_for_equal_gradients_and_symmetric(kind):
    s, r = gradients(0), gradients(1)
    assert gradient_distance(s, s, kind).item() == pytest.approx(0, abs=1e-12)
    assert gradient_distance(s, r, kind).item() == pytest.approx(gradient_distance(r, s, kind).item(), rel=1e-12)


def test_cosine_is_of_directions_and_counts_channels():
    s = [x for x in gradients(0) if x.dim() > 1]
    channels = sum(len(x) for x in s)
    longer = [x * torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype).add(0.1) for x in s]
    assert gradient_distance(longer, s, "cosine").item() == pytest.approx(0, abs=1e-12)
    assert gradient_distance([-x for x in s], s, "cosine").item() == pytest.approx(2 * channels)


def test_a_row_of_zeros_counts_one_and_has_no_slope():
    s, r = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 3)
    s[1] = 0
    s.requires_grad_()
    distance = gradient_distance([s], [r], "cosine")
    distance.backward()
    assert distance.item() == pytest.approx(reference([s], [r], "cosine"), rel=1e-5)
    assert s.grad.isfinite().all() and not s.grad[1].any() and s.grad[0].any()


def test_what_cannot_be_compared_is_refused():
    s = gradients(0)
    with pytest.raises(ValueError, match="expected one of cosine, mse, l1"):
        gradient_distance(s, s, "euclid")
    with pytest.raises(ValueError, match="shapes differ"):
        gradient_distance(s, s[:-1], "mse")
    with pytest.raises(ValueError, match="no parameter of two"):
        gradient_distance([s[1]], [s[1]], "cosine")
