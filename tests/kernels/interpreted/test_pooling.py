"""RoIAlign and deformable attention against their specifications: values, and the gradient of the former."""

import numpy as np
import pytest
import torch
from torch import Tensor

from errors import UserError
from kernels.backend import IS_INTERPRETED
from kernels.deformable_attention import deformable_attention
from kernels.roi_align import assign_levels, roi_align
from tests.golden.recipe import uniform
from tests.kernels.test_deformable_attention import SHAPES, make_case
from tests.kernels.test_roi_align import AWKWARD

STRIDES = [4, 8, 16]
SIZE, COUNT = ((20, 28), 3) if IS_INTERPRETED else ((40, 44), 12)  # of images, in pixels; of boxes


@pytest.fixture
def eager(monkeypatch):
    """Calls a function with the specifications."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setenv("KERNELS", "eager")
            return function()

    return call


def pyramid(device, channels: int = 5, size: tuple[int, int] = SIZE, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, channels, -(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def boxes(device, count: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    """boxes_xyxy, image, level: the awkward ones and random ones, in images and on levels without order."""
    generator = torch.Generator().manual_seed(1)
    corner = 60 * torch.rand(count, 2, generator=generator) - 8
    boxes_xyxy = torch.cat((corner, corner + 60 * torch.rand(count, 2, generator=generator) ** 2), 1)
    boxes_xyxy = torch.cat((AWKWARD, boxes_xyxy, torch.tensor([[torch.nan, 1, 9, 9], [1, 1, torch.inf, 9]])))
    image, level = (torch.randint(0, n, (len(boxes_xyxy),), generator=generator) for n in (2, 3))
    return boxes_xyxy.to(device), image.to(device), level.to(device)


def few_boxes(device) -> tuple[Tensor, Tensor, Tensor]:
    """One on each level, within an image of 20 x 28 pixels or across its edge, and two that are not finite: where the
    boxes are not what a test is about.
    """
    within = torch.tensor([[2.5, 1.2, 17.9, 14.3], [-3.0, 4.0, 9.5, 26.0], [12.2, 6.1, 30.0, 19.7]])
    boxes_xyxy = torch.cat((within, torch.tensor([[torch.nan, 1, 9, 9], [1, 1, torch.inf, 9]])))
    image, level = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([0, 1, 2, 1, 0])
    return boxes_xyxy.to(device), image.to(device), level.to(device)


def pool(maps: list[Tensor], where: tuple[Tensor, ...], **options) -> tuple[Tensor, list[Tensor]]:
    """The pooled boxes, and the gradient of some sum of them with respect to the maps."""
    pooled = roi_align(maps, *where, strides=STRIDES, **options)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2)).to(pooled)
    assert not len(where[0]) or pooled.any()  # zeros would be equal whatever the kernel does
    return pooled.detach(), list(torch.autograd.grad((pooled * weight).sum(), maps))


@pytest.mark.parametrize(("bins", "samples"), [(7, 2), (1, 1), (2, 3)])
def test_roi_align_is_its_specification(bins, samples, device, eager):
    maps, where = pyramid(device), few_boxes(device) if samples == 3 and IS_INTERPRETED else boxes(device)
    found = pool(maps, where, output_size=bins, samples=samples)
    expected = eager(lambda: pool(maps, where, output_size=bins, samples=samples))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 65])
@pytest.mark.parametrize("channels_last", [False, True])
def test_roi_align_of_any_width_and_layout(channels_last, channels, device, eager):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [m.detach().contiguous(memory_format=layout).requires_grad_() for m in pyramid(device, channels, (20, 28))]
    where = few_boxes(device)
    torch.testing.assert_close(pool(maps, where), eager(lambda: pool(maps, where)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roi_align_in_half_precision(dtype, device, eager):
    maps, where = pyramid(device, size=(20, 28), dtype=dtype), few_boxes(device)
    (pooled, gradients), (expected, expected_gradients) = pool(maps, where), eager(lambda: pool(maps, where))
    assert pooled.dtype == dtype and all(g.dtype == dtype for g in gradients)
    tolerance = torch.finfo(dtype).eps * 2
    torch.testing.assert_close(pooled, expected, rtol=tolerance, atol=1e-3)
    torch.testing.assert_close(gradients, expected_gradients, rtol=tolerance, atol=0.05)


def test_roi_align_on_the_edge_of_what_counts(device, eager):
    """Samples exactly one pixel outside still count, those beyond do not: a place rounded otherwise would show."""
    maps = [torch.rand(1, 1, 6, 6, device=device, requires_grad=True)]
    start = torch.tensor([-1.5, -1.25, -1.0, 5.25, 5.5, 5.75, -2.0], device=device)
    boxes_xyxy = torch.stack((start, start, start + 1, start + 1), 1)
    index = torch.zeros(len(start), dtype=torch.int64, device=device)
    run = lambda: roi_align(maps, boxes_xyxy, index, index, strides=[1], output_size=1, samples=2)
    torch.testing.assert_close(run(), eager(run), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["stride8"] if IS_INTERPRETED else ["stride4", "stride8", "three"])
def test_roi_align_equals_torchvision(case, golden, device):
    arrays, meta = golden("roi_align_cases")
    stride, output_size, samples = meta["cases"][case]
    x = torch.tensor(uniform(f"{case}.map", (2, 5, 44 // stride, 56 // stride)), dtype=torch.float32, device=device)
    boxes_xyxy, image = (torch.tensor(arrays[name]).to(device) for name in ("boxes", "image"))
    options = dict(strides=[stride], output_size=output_size, samples=samples)
    pooled = roi_align([x.requires_grad_()], boxes_xyxy, image, torch.zeros_like(image), **options)
    np.testing.assert_allclose(pooled.detach().cpu().numpy(), arrays[f"{case}_pooled"], rtol=0, atol=2e-6)
    gradient = torch.tensor(uniform(f"{case}.gradient", tuple(pooled.shape)), dtype=torch.float32)
    pooled.backward(gradient.to(device))
    np.testing.assert_allclose(x.grad.cpu().numpy(), arrays[f"{case}_map_gradient"], rtol=1e-5, atol=1e-5)


def test_roi_align_the_same_twice(device):
    maps, where = pyramid(device, size=(20, 28)), few_boxes(device)
    (pooled, gradients), (again, gradients_again) = (pool(maps, where) for _ in range(2))
    assert torch.equal(pooled, again) and all(map(torch.equal, gradients, gradients_again))


def test_roi_align_of_nothing(device):
    maps, where = pyramid(device, size=(20, 28)), boxes(device)
    pooled, gradients = pool(maps, tuple(x[:0] for x in where))
    assert pooled.shape == (0, 5, 7, 7) and not any(g.any() for g in gradients)


def test_roi_align_says_what_it_does_not_take(device):
    maps = [m.detach().double() for m in pyramid(device)]
    with pytest.raises(UserError, match="roi_align: the maps are float64"):
        roi_align(maps, *boxes(device), strides=STRIDES)


def test_roi_align_has_no_second_derivative(device):
    maps = pyramid(device, size=(20, 28))
    pooled = roi_align(maps, *few_boxes(device), strides=STRIDES)
    with pytest.raises(RuntimeError, match=r"roi_align: .* KERNELS=eager"):
        torch.autograd.grad(pooled.sum(), maps, create_graph=True)


def test_a_pyramid_as_in_training(device, eager):
    maps, (boxes_xyxy, image, _) = pyramid(device, size=(20, 28)), boxes(device, 3)
    where = (boxes_xyxy, image, assign_levels(boxes_xyxy, STRIDES))
    torch.testing.assert_close(pool(maps, where), eager(lambda: pool(maps, where)), rtol=1e-5, atol=1e-5)


def attention_case(name: str, device, dtype) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    value, levels, points, weights = make_case(name)
    value, points, weights = (torch.as_tensor(a).to(device, dtype) for a in (value, points, weights))
    return value, levels, points, weights


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_deformable_attention_is_its_specification(dtype, name, device, eager):
    case = attention_case(name, device, dtype)
    found, expected = deformable_attention(*case), eager(lambda: deformable_attention(*case))
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_deformable_attention_sums_half_precision_in_float32(dtype, device, eager):
    value, levels, points, weights = attention_case("odd" if IS_INTERPRETED else "usual", device, dtype)
    exact = eager(lambda: deformable_attention(value.double(), levels, points.double(), weights.double()))
    found = deformable_attention(value, levels, points, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    mixed = deformable_attention(value, levels, points.float(), weights.float())
    torch.testing.assert_close(mixed, found, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_deformable_attention_of_more_queries_than_a_program_makes(device, eager):
    generator = torch.Generator().manual_seed(3)
    levels = [(6, 5), (3, 3)]
    value = torch.randn(2, 39, 2, 32, generator=generator).to(device)
    points = torch.rand(2, 45, 2, 2, 4, 2, generator=generator).to(device)
    prob = torch.rand(2, 45, 2, 2, 4, generator=generator).to(device)
    case = (value.transpose(1, 2).contiguous().transpose(1, 2), levels, points.flip(0), prob)  # strided, too
    torch.testing.assert_close(deformable_attention(*case), eager(lambda: deformable_attention(*case)))


def test_deformable_attention_reads_nothing_beyond_the_border(device):
    value = torch.full((1, 12, 1, 1), torch.inf, device=device)
    far = torch.tensor([[-0.2, 0.5], [0.5, 1.2], [1e30, 0.5], [0.5, -1e30], [-3e9, 3e9]], device=device)
    points = far.reshape(1, -1, 1, 1, 1, 2)
    found = deformable_attention(value, [(3, 4)], points, torch.ones(points.shape[:-1], device=device))
    assert not found.any()


def test_deformable_attention_has_no_gradient(device):
    value, levels, points, weights = attention_case("odd", device, torch.float32)
    with pytest.raises(UserError, match="deformable_attention: the kernel computes no gradient"):
        deformable_attention(value.requires_grad_(), levels, points, weights)
    with torch.no_grad():
        assert not deformable_attention(value, levels, points, weights).requires_grad
    with pytest.raises(ValueError, match="expected levels"):
        deformable_attention(value.detach(), levels[:-1], points, weights)
