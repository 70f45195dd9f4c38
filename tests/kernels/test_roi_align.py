"""RoIAlign against loops in float64, recorded outputs of torchvision, its own identities, and awkward boxes."""

import numpy as np
import pytest
import torch

from kernels.roi_align import assign_levels, pixel_rows, roi_align, sparse_product
from tests.golden.recipe import uniform
from tests.reference import roi_align as reference

AWKWARD = torch.tensor(
    [
        [4.0, 6, 30, 25],  # usual
        [-9, -9, 12, 12],  # reaches out
        [-90, -90, 90, 90],  # reaches out on all sides, far
        [70, 70, 90, 90],  # outside
        [5, 5, 5, 5],  # empty
        [9, 9, 3, 2],  # inside out
        [31.9, 0, 32.1, 39.9],  # thin, on the edge
    ]
)


def single(x, boxes_xyxy, image, stride=4, **options):
    level = torch.zeros(len(boxes_xyxy), dtype=torch.int64)
    return roi_align([x], boxes_xyxy, image, level, strides=[stride], **options)


@pytest.mark.parametrize("case", ["stride4", "stride8", "three"])
def test_equals_torchvision(golden, case):
    arrays, meta = golden("roi_align_cases")
    stride, output_size, samples = meta["cases"][case]
    x = torch.tensor(uniform(f"{case}.map", (2, 5, 44 // stride, 56 // stride)), dtype=torch.float32)
    x.requires_grad_()
    boxes_xyxy, image = torch.tensor(arrays["boxes"]), torch.tensor(arrays["image"])
    pooled = single(x, boxes_xyxy, image, stride, output_size=output_size, samples=samples)
    np.testing.assert_allclose(pooled.detach().numpy(), arrays[f"{case}_pooled"], rtol=0, atol=2e-6)
    pooled.backward(torch.tensor(uniform(f"{case}.gradient", tuple(pooled.shape)), dtype=torch.float32))
    np.testing.assert_allclose(x.grad.numpy(), arrays[f"{case}_map_gradient"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pyramid_equals_torchvision(golden, channels_last):
    arrays, meta = golden("roi_align_cases")
    strides, size = meta["strides"], meta["image_size"]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    maps = [
        torch.tensor(uniform(f"pyramid{i}.map", (2, 3, size // s, size // s)), dtype=torch.float32)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for i, s in enumerate(strides)
    ]
    boxes_xyxy = torch.tensor(arrays["pyramid_boxes"])
    image = (torch.arange(len(boxes_xyxy)) >= meta["first_image"]).long()
    level = assign_levels(boxes_xyxy, strides)
    np.testing.assert_array_equal(level.numpy(), arrays["pyramid_levels"])
    pooled = roi_align(maps, boxes_xyxy, image, level, strides=strides)
    np.testing.assert_allclose(pooled.detach().numpy(), arrays["pyramid_pooled"], rtol=0, atol=5e-6)
    pooled.backward(torch.tensor(uniform("pyramid.gradient", tuple(pooled.shape)), dtype=torch.float32))
    for i, x in enumerate(maps):
        gradient = x.grad[:, :1] if i == 0 else x.grad
        np.testing.assert_allclose(gradient.numpy(), arrays[f"pyramid_map_gradient{i}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 4])
def test_matches_reference(stride, samples):
    rng = np.random.default_rng(samples)
    x = rng.normal(size=(2, 3, 40 // stride, 32 // stride))
    corner, side = rng.uniform(-6, 34, (6, 2)), np.exp(rng.uniform(-1, 4, (6, 2)))
    boxes_xyxy = torch.cat((AWKWARD.double(), torch.tensor(np.concatenate((corner, corner + side), 1))))
    image = torch.arange(len(boxes_xyxy)) % 2
    got = single(torch.tensor(x), boxes_xyxy, image, stride, output_size=3, samples=samples)
    for pooled, box, row in zip(got, boxes_xyxy, image):
        np.testing.assert_allclose(pooled.numpy(), reference.roi_align(x[row], box, stride, 3, samples), atol=1e-12)


def test_gradcheck_twice():
    maps = [torch.randn(2, 1, size, size, dtype=torch.float64, requires_grad=True) for size in (5, 3)]
    boxes_xyxy = AWKWARD.double()[[0, 1, 3, 4]]
    image, level = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1])
    pool = lambda *maps: roi_align(list(maps), boxes_xyxy, image, level, strides=[4, 8], output_size=2)
    assert torch.autograd.gradcheck(pool, maps)
    assert torch.autograd.gradgradcheck(pool, maps)


def test_a_constant_map_pools_to_the_constant_and_a_ramp_to_the_bin_centers():
    boxes_xyxy, image = torch.tensor([[8.0, 4, 36, 32]], dtype=torch.float64), torch.tensor([0])
    x = torch.arange(12, dtype=torch.float64)
    maps = torch.stack((torch.full((12, 12), 3.0, dtype=torch.float64), x.expand(12, 12), x[:, None].expand(12, 12)))
    constant, across, down = single(maps[None], boxes_xyxy, image)[0]
    centers = (torch.arange(7) + 0.5) * (28 / 7)
    torch.testing.assert_close(constant, torch.full((7, 7), 3.0, dtype=torch.float64))
    torch.testing.assert_close(across, ((8 + centers) / 4).expand(7, 7).double())
    torch.testing.assert_close(down, ((4 + centers) / 4)[:, None].expand(7, 7).double())


def test_every_level_and_image_is_its_own():
    """A box sees the map it was given: the same as pooling it there alone."""
    maps = [torch.randn(3, 2, size, size) for size in (16, 8, 8)]
    boxes_xyxy = torch.rand(20, 2).mul(30).repeat(1, 2) + torch.tensor([0.0, 0, 20, 15])
    image, level = torch.arange(20) % 3, torch.arange(20) % 3
    level = level.roll(1) * (torch.arange(20) % 2)
    pooled = roi_align(maps, boxes_xyxy, image, level, strides=[4, 8, 8])
    for n in range(20):
        stride = (4, 8, 8)[level[n]]
        alone = single(maps[level[n]][image[n], None], boxes_xyxy[n, None], torch.tensor([0]), stride)
        torch.testing.assert_close(pooled[n], alone[0])


def test_no_boxes():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    pooled = roi_align([x], torch.zeros(0, 4), none, none, strides=[4])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert assign_levels(torch.zeros(0, 4), [4, 8]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    x = torch.randn(1, 4, 12, 12, dtype=dtype, requires_grad=True)
    image = torch.zeros(len(AWKWARD), dtype=torch.int64)
    pooled = single(x, AWKWARD, image)
    assert pooled.dtype == dtype
    whole = x.detach().float().requires_grad_()
    exact = single(whole, AWKWARD, image)
    assert torch.equal(pooled, exact.to(dtype))
    pooled.float().sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(x.grad.float(), whole.grad, rtol=1e-2, atol=1e-2)


def test_boxes_that_are_not_finite_pool_to_zero():
    boxes_xyxy = torch.tensor([[torch.nan, 0, 10, 10], [0, 0, torch.inf, 10], [-torch.inf, 0, 10, 10], [0.0, 0, 9, 9]])
    level = assign_levels(boxes_xyxy, [4, 8])
    assert level.min() >= 0 and level.max() <= 1
    pooled = single(torch.ones(1, 1, 8, 8), boxes_xyxy, torch.zeros(4, dtype=torch.int64))
    assert pooled.isfinite().all() and pooled[0].abs().sum() == 0 and pooled[3].abs().sum() > 0


@pytest.mark.parametrize(
    "side, level", [(1, 2), (111.9, 2), (112, 3), (223.9, 3), (224, 4), (447, 4), (448, 5), (9e3, 5)]
)
def test_levels_change_at_powers_of_two(side, level):
    boxes_xyxy = torch.tensor([[3.0, 5, 3 + side, 5 + side], [0, 0, side / 2, side * 2]])
    assert assign_levels(boxes_xyxy, [4, 8, 16, 32]).tolist() == [level - 2] * 2
    assert reference.level_of([0, 0, side, side]) == level


def test_levels_of_equal_stride_are_one():
    """MobileNet's two maps at stride 32: the second stage reads the first."""
    boxes_xyxy = torch.tensor([[0.0, 0, 5, 5], [0, 0, 900, 900], [4, 4, 4, 4]])
    assert assign_levels(boxes_xyxy, [32, 32]).tolist() == [0, 0, 0]
    assert assign_levels(boxes_xyxy, [4, 8, 16, 32]).tolist() == [0, 3, 0]


def test_sparse_product_is_the_dense_one():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    dense = torch.where(dense > 0.6, dense, 0)
    dense[2] = 0
    row, column = dense.nonzero(as_tuple=True)
    offsets = torch.tensor([int((row < n).sum()) for n in range(7)])
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    got = sparse_product(column, offsets, dense[row, column], x)
    torch.testing.assert_close(got, dense @ x)
    gradient = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, x, gradient)[0], dense.T @ gradient)


def test_pixel_rows_run_level_by_level_image_by_image_row_by_row():
    maps = [torch.randn(2, 3, 2, 5), torch.randn(2, 3, 1, 2)]
    rows = pixel_rows(maps)
    assert rows.shape == (2 * 10 + 2 * 2, 3)
    torch.testing.assert_close(rows[10 + 5 + 3], maps[0][1, :, 1, 3])
    torch.testing.assert_close(rows[20 + 2 + 1], maps[1][1, :, 0, 1])


def test_a_side_rounded_below_the_boundary_is_still_on_it():
    """300.1 + 224 - 300.1 is less than 224 in float32; at (0, 0) it is not."""
    boxes_xyxy = torch.tensor([[300.1, 300.1, 524.1, 524.1], [0, 0, 224, 224]])
    assert boxes_xyxy[0, 2] - boxes_xyxy[0, 0] < 224
    assert assign_levels(boxes_xyxy, [4, 8, 16, 32]).tolist() == [2, 2]
