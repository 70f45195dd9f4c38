"""Deformable attention against loops over its points in float64, and the properties that follow from its formula."""

import numpy as np
import pytest
import torch

from kernels.deformable_attention import deformable_attention
from tests.reference.deformable_attention import deformable_attention_reference

SHAPES = {  # B, Q, M, D, P, levels
    "one": (1, 1, 1, 1, 1, [(1, 1)]),
    "usual": (2, 5, 4, 3, 4, [(8, 8), (4, 4), (2, 2)]),
    "odd": (1, 7, 3, 5, 2, [(7, 3), (1, 5), (4, 1)]),
    "no queries": (2, 0, 2, 3, 2, [(2, 2)]),
    "no images": (0, 4, 2, 3, 2, [(2, 2)]),
}


def make_case(name, seed=0):
    """float64 arrays: value, level sizes, points between -1/2 and 3/2, weights that sum to 1."""
    B, Q, M, D, P, levels = SHAPES[name]
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(B, sum(h * w for h, w in levels), M, D))
    points = rng.uniform(-0.5, 1.5, size=(B, Q, M, len(levels), P, 2))
    weights = rng.random((B, Q, M, len(levels), P))
    return value, levels, points, weights / weights.sum((3, 4), keepdims=True)


def call(value, levels, points, weights, dtype=torch.float64):
    value, points, weights = (torch.as_tensor(a).to(dtype) for a in (value, points, weights))
    return deformable_attention(value, levels, points, weights)


@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_float64_reference(name):
    case = make_case(name)
    np.testing.assert_allclose(call(*case).numpy(), deformable_attention_reference(*case), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(call(*case, torch.float32), deformable_attention_reference(*case), atol=2e-5)


def test_uniform_attention_of_equal_points_is_the_mean_of_the_levels_reads():
    """Zero offsets: every point is the reference point, so the P points of a level count as one."""
    value, levels, points, weights = make_case("usual")
    points = np.broadcast_to(points[:, :, :, :1, :1], points.shape).copy()
    got = call(value, levels, points, np.full_like(weights, 1 / weights[0, 0, 0].size))
    single = np.full((*weights.shape[:4], 1), 1 / len(levels))
    np.testing.assert_allclose(got, deformable_attention_reference(value, levels, points[..., :1, :], single))


def test_reads_a_cell_exactly_at_its_center_and_nothing_beyond_the_border():
    value = torch.arange(12.0).reshape(1, 12, 1, 1)  # 3 rows of 4 cells
    centers = [((j + 0.5) / 4, (i + 0.5) / 3) for i in range(3) for j in range(4)]
    points = torch.tensor(centers).reshape(1, 12, 1, 1, 1, 2)
    got = deformable_attention(value, [(3, 4)], points, torch.ones(1, 12, 1, 1, 1))
    torch.testing.assert_close(got.flatten(), torch.arange(12.0), rtol=1e-5, atol=1e-5)
    far = torch.tensor([[-0.2, 0.5], [0.5, 1.2], [1e6, 0.5], [0.5, -1e6]]).reshape(1, 4, 1, 1, 1, 2)
    assert not deformable_attention(value, [(3, 4)], far, torch.ones(1, 4, 1, 1, 1)).any()


def test_one_in_every_cell_reads_one_inside():
    """Points at least half a cell from the border of the coarsest map: the weights of a read sum to 1."""
    value, levels, points, weights = make_case("usual")
    got = call(np.ones_like(value), levels, 0.25 + 0.5 * (points + 0.5) / 2, weights)
    torch.testing.assert_close(got, torch.ones_like(got))


def test_is_linear_in_value_and_in_the_weights_and_keeps_heads_and_images_apart():
    value, levels, points, weights = make_case("odd")
    other = np.random.default_rng(1).normal(size=value.shape)
    torch.testing.assert_close(
        call(value + 2 * other, levels, points, weights),
        call(value, levels, points, weights) + 2 * call(other, levels, points, weights),
    )
    torch.testing.assert_close(call(value, levels, points, 3 * weights), 3 * call(value, levels, points, weights))
    value, levels, points, weights = make_case("usual")
    expected = call(value, levels, points, weights)
    value[1, :, 2] = 0
    changed = call(value, levels, points, weights) != expected
    assert changed[1, :, 2].any() and changed.sum() == changed[1, :, 2].sum()


def test_gradients_of_all_three_inputs():
    """Away from the lines between cells, where bilinear reading has no derivative in the point."""
    value, levels, points, weights = make_case("odd")
    for level, (height, width) in enumerate(levels):
        scale = np.array([width, height])
        cell = points[:, :, :, level] * scale - 0.5
        cell = np.floor(cell) + np.clip(cell - np.floor(cell), 0.1, 0.9)
        points[:, :, :, level] = (cell + 0.5) / scale
    inputs = [torch.tensor(a[:, :2] if a is not value else a, requires_grad=True) for a in (value, points, weights)]
    assert torch.autograd.gradcheck(lambda v, p, w: deformable_attention(v, levels, p, w), inputs)


def test_computes_in_the_widest_dtype_and_returns_the_one_of_value():
    value, levels, points, weights = make_case("usual")
    narrow = torch.tensor(value).bfloat16()
    got = deformable_attention(narrow, levels, torch.tensor(points).float(), torch.tensor(weights).bfloat16())
    assert got.dtype == torch.bfloat16
    expected = deformable_attention(
        narrow.float(), levels, torch.tensor(points).float(), torch.tensor(weights).bfloat16().float()
    )
    torch.testing.assert_close(got, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("levels", [[(8, 8), (4, 4), (2, 1)], [(8, 8), (4, 5)]])
def test_refuses_levels_that_do_not_fit(levels):
    value, _, points, weights = make_case("usual")
    with pytest.raises(ValueError, match="84 cells and points on 3 levels"):
        call(value, levels, points, weights)
