"""The precision that losses and decoding compute in."""

import pytest
import torch

from layers.precision import at_least_float32, compute_dtype

HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
X = torch.tensor([1 / 3, -2.0, 0.0], dtype=DOUBLE)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [((HALF, torch.bfloat16), SINGLE), ((SINGLE, HALF), SINGLE), ((HALF, DOUBLE), DOUBLE), ((DOUBLE, SINGLE), DOUBLE)],
)
def test_the_widest_of_several_and_no_less_than_float32(dtypes, expected):
    assert compute_dtype(*(X.to(dtype) for dtype in dtypes)) == expected


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, SINGLE, DOUBLE])
def test_at_least_float32_keeps_values_and_gradients(dtype):
    x = X.to(dtype).requires_grad_()
    got = at_least_float32(x)
    assert got.dtype == (DOUBLE if dtype == DOUBLE else SINGLE) and torch.equal(got.to(dtype), x)
    got.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert (got is x) == (dtype in (SINGLE, DOUBLE))  # nothing is copied
