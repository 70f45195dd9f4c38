"""ViT-Tiny and its simple feature pyramid: sizes, positions at other sizes, normalisations, arithmetic."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frcnn.pretrained import IMAGENET_NORMALIZATION
from frcnn.vit import SimpleFeaturePyramid, TokenEmbedding, VisionTransformer
from tests.reference.convolution import convolve


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer().eval()


@pytest.mark.parametrize("size", [(64, 96), (65, 33), (1, 1)], ids=str)
def test_maps_are_as_announced(backbone, size):
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, *size))
    assert {name: value.shape for name, value in maps.items()} == {
        "c4": (2, backbone.channels["c4"], -(-size[0] // 16), -(-size[1] // 16))
    }
    assert backbone.strides == {"c4": 16}


def test_place_in_the_map_is_place_in_the_image(backbone):
    """Tokens run row by row: without attention and positions, a changed patch changes its own place alone."""
    embedding = TokenEmbedding(8)
    nn.init.zeros_(embedding.positions)
    images = torch.zeros(1, 3, 48, 80)
    images[:, :, 16:32, 48:64] = 1.0
    with torch.no_grad():
        tokens = embedding(images)[:, 1:].unflatten(1, (3, 5))
    changed = tokens.abs().sum((0, 3)) > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]


def test_image_is_padded_with_zeros_right_and_below(backbone):
    image = torch.randn(1, 3, 40, 50)
    padded = F.pad(image, (0, 14, 0, 8))
    with torch.no_grad():
        assert torch.equal(backbone(image)["c4"], backbone(padded)["c4"])


def cubic_weights(n_out, n_in):
    """(n_out, n_in) float64: Keys' cubic (IEEE TASSP 1981) with a = -0.5, sampled at pixel centers, as wide as one
    input pixel, or as one output pixel where the grid shrinks; each row normalised to 1 inside the grid."""
    a, scale = -0.5, n_in / n_out
    width = max(scale, 1.0)
    x = np.abs((np.arange(n_in)[None] + 0.5) - (np.arange(n_out)[:, None] + 0.5) * scale) / width
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("grid", [(30, 20), (14, 14), (7, 9), (1, 40)], ids=str)
def test_positions_at_other_sizes_match_float64_reference(grid):
    torch.manual_seed(0)
    embedding = TokenEmbedding(4)
    nn.init.normal_(embedding.positions)
    nn.init.normal_(embedding.class_token)
    table = embedding.positions.detach().double().numpy()
    expected = np.einsum("yi,xj,ijc->yxc", cubic_weights(grid[0], 14), cubic_weights(grid[1], 14),
                         table[0, 1:].reshape(14, 14, 4))  # fmt: skip
    with torch.no_grad():
        tokens = embedding(torch.zeros(1, 3, 16 * grid[0], 16 * grid[1]))[0].double().numpy()
    np.testing.assert_allclose(tokens[1:].reshape(*grid, 4), expected, atol=1e-5)
    np.testing.assert_allclose(tokens[0], table[0, 0] + embedding.class_token[0, 0].detach().numpy(), atol=1e-6)


def test_positions_learn_at_other_sizes():
    embedding = TokenEmbedding(4)
    embedding(torch.zeros(2, 3, 320, 480)).square().sum().backward()
    assert (embedding.positions.grad != 0).all()


def test_adopted_normalization_gives_the_same_tokens(backbone):
    """Weights that saw ImageNet's mean and std compute, changed, the same of images normalised by 0.5 and 0.5."""
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET_NORMALIZATION)
    images = torch.rand(2, 3, 32, 48)
    torch.manual_seed(0)
    theirs = VisionTransformer().eval()
    with torch.no_grad():
        expected = theirs((images - mean) / std)["c4"]
        theirs.adopt_normalization(*IMAGENET_NORMALIZATION)
        half = (images - torch.tensor(theirs.mean)[:, None, None]) / torch.tensor(theirs.std)[:, None, None]
        got, unchanged = theirs(half)["c4"], backbone(half)["c4"]
    assert (got - expected).norm() < 1e-5 * expected.norm() < (unchanged - expected).norm()


def test_attention_map_of_tokens_reaches_everything(backbone):
    """Attention is global: every place of the map depends on every patch."""
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    backbone(images)["c4"][0, :, 3, 3].square().sum().backward()
    reach = images.grad.abs().sum(1)[0].unflatten(0, (4, 16)).unflatten(2, (4, 16)).sum((1, 3))
    assert (reach > 0).all()


@pytest.fixture(scope="module")
def pyramid():
    torch.manual_seed(0)
    module = SimpleFeaturePyramid({"c4": 8}, width=6).double()
    for name, parameter in module.named_parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
        if "output" in name and parameter.ndim == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def deconvolve(x, layer):
    """Every place becomes a 2x2 block: y[o, 2i + k, 2j + l] = sum_c x[c, i, j] w[c, o, k, l] + b[o]."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    y = np.einsum("bchw,cokl->bohkwl", x, weight)
    h, w = x.shape[-2:]
    return y.reshape(*y.shape[:2], 2 * h, 2 * w) + bias[:, None, None]


def normalise(x, layer):
    z = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return layer.weight.detach().numpy()[:, None, None] * z + layer.bias.detach().numpy()[:, None, None]


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)], ids=str)
def test_pyramid_matches_float64_reference(pyramid, grid):
    c4 = torch.randn(2, 8, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = pyramid({"c4": c4})
    x, h, w = c4.numpy(), *grid
    first, norm, _, second = pyramid.resize["p2"]
    gelu = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))
    padded = np.pad(x, ((0, 0), (0, 0), (0, h % 2), (0, w % 2)), constant_values=-np.inf)
    blocks = padded.reshape(2, 8, (h + 1) // 2, 2, (w + 1) // 2, 2)
    resized = {
        "p2": deconvolve(gelu(normalise(deconvolve(x, first), norm)), second),
        "p3": deconvolve(x, pyramid.resize["p3"]),
        "p4": x,
        "p5": blocks.max((3, 5)),
    }
    expected = {}
    for level, value in resized.items():
        reduce, norm1, mix, norm2 = pyramid.output[level]
        value = normalise(convolve(value, reduce.weight.detach().numpy()), norm1)
        expected[level] = normalise(convolve(value, mix.weight.detach().numpy()), norm2)
    expected["p6"] = expected["p5"][:, :, ::2, ::2]
    assert list(got) == list(expected) == list(pyramid.channels)
    for level, value in got.items():
        np.testing.assert_allclose(value.numpy(), expected[level], rtol=1e-8, atol=1e-10, err_msg=level)


def test_pyramid_strides_and_refusals():
    module = SimpleFeaturePyramid({"c4": 8}, width=6)
    assert module.level_strides({"c4": 16}) == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    for channels in ({"c5": 8}, {"c4": 8, "c5": 8}):
        with pytest.raises(ValueError, match="expected"):
            SimpleFeaturePyramid(channels)
