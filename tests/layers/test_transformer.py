"""The vision transformer's parts against float64 mathematics, and the identities each must keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers.transformer import (
    Attention,
    Block,
    PatchEmbedding,
    causal_mask,
    interpolate_positions,
    quick_gelu,
    tokens_to_map,
)
from tests.reference import vision_transformer as reference

pytestmark = pytest.mark.usefixtures("one_thread")


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    """float64 with weights that no identity holds for by luck."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return module


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def tokens(batch: int, count: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("width", "heads", "count"), [(12, 3, 5), (8, 1, 1), (6, 6, 4)])
def test_attention_matches_reference(width, heads, count, is_causal):
    attention = double(Attention(width, heads))
    x = tokens(2, count, width)
    mask = causal_mask(count) if is_causal else None
    got = attention(x, mask).detach().numpy()
    p = arrays(attention)
    weights = [p[name] for name in ("qkv.weight", "qkv.bias", "out.weight", "out.bias")]
    is_visible = np.tri(count, dtype=bool) if is_causal else None
    for one, ours in zip(x.numpy(), got):
        expected = reference.attention(one, *weights, heads, is_visible)
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("token", [0, 3])
def test_probabilities_of_a_token(token):
    attention = double(Attention(12, 3))
    x = tokens(2, 5, 12)
    got = attention.probabilities_of(x, token)
    assert got.shape == (2, 3, 5)
    p = arrays(attention)
    for one, ours in zip(x.numpy(), got.detach().numpy()):
        expected = reference.attention_probabilities(one, p["qkv.weight"], p["qkv.bias"], 3)[:, token]
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


def test_causal_tokens_do_not_see_what_follows():
    block = double(Block(12, 3))
    x = tokens(1, 6, 12)
    changed = x.clone()
    changed[:, 4:, 0] += 1
    mask = causal_mask(6)
    assert torch.equal(block(x, mask)[:, :4], block(changed, mask)[:, :4])
    assert not torch.allclose(block(x, mask)[:, 4:], block(changed, mask)[:, 4:])
    assert not torch.allclose(block(x)[:, :4], block(changed)[:, :4])


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width 10 is not a multiple of 3 heads"):
        Attention(10, 3)


# blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_block_matches_reference(layer_scale, eps):
    block = double(Block(8, 2, mlp_ratio=1.5, norm_eps=eps, layer_scale=layer_scale))
    x = tokens(2, 5, 8)
    p = arrays(block)
    assert p["mlp.expand.weight"].shape == (12, 8)
    s1, s2 = (p["attention_scale"], p["mlp_scale"]) if layer_scale else (1.0, 1.0)
    for one, got in zip(x.numpy(), block(x).detach().numpy()):
        attended = reference.attention(
            reference.layer_norm(one, p["norm1.weight"], p["norm1.bias"], eps),
            *(p[f"attention.{name}"] for name in ("qkv.weight", "qkv.bias", "out.weight", "out.bias")),
            heads=2,
        )
        one = one + s1 * attended
        hidden = reference.layer_norm(one, p["norm2.weight"], p["norm2.bias"], eps) @ p["mlp.expand.weight"].T
        hidden = reference.gelu(hidden + p["mlp.expand.bias"])
        one = one + s2 * (hidden @ p["mlp.contract.weight"].T + p["mlp.contract.bias"])
        np.testing.assert_allclose(got, one, rtol=1e-9, atol=1e-10)


def test_activation_is_the_one_given():
    block = double(Block(8, 2, activation=quick_gelu))
    other = Block(8, 2).double()
    other.load_state_dict(block.state_dict())
    x = tokens(1, 3, 8)
    assert not torch.allclose(block(x), other(x))
    normed = block.norm2(x)
    assert torch.equal(block.mlp(normed), block.mlp.contract(quick_gelu(block.mlp.expand(normed))))


def test_layer_scale_starts_as_almost_nothing_and_zero_is_the_identity():
    block = Block(8, 2, layer_scale=True)
    x = tokens(1, 3, 8).float()
    assert (block(x) - x).abs().max() < 1e-3
    nn.init.zeros_(block.attention_scale)
    nn.init.zeros_(block.mlp_scale)
    assert torch.equal(block(x), x)


def test_block_gradient():
    block = double(Block(4, 2, layer_scale=True))
    x = tokens(1, 3, 4).requires_grad_()
    parameters = list(block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *parameters), atol=1e-6)


def test_quick_gelu():
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(quick_gelu(torch.tensor(x)).numpy(), x / (1 + np.exp(-1.702 * x)), rtol=1e-12)
    difference = (quick_gelu(torch.tensor(x)) - F.gelu(torch.tensor(x))).abs().max()
    assert 0.01 < difference < 0.03  # an approximation, and not the same


# patches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_linear_maps_of_pixels_row_by_row(bias):
    embed = double(PatchEmbedding(5, 3, bias=bias))
    assert (embed.project.bias is not None) == bias
    images = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    got = embed(images)
    assert got.shape == (2, 6, 5)
    weight = embed.project.weight.detach().numpy().reshape(5, -1)
    for n, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
        pixels = images[1, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].numpy().ravel()
        expected = weight @ pixels + (embed.project.bias.detach().numpy() if bias else 0)
        np.testing.assert_allclose(got[1, n].detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("size", [(6, 10), (7, 9), (0, 9)])
def test_images_that_patches_do_not_tile_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, expected multiples of 3"):
        PatchEmbedding(4, 3)(torch.zeros(1, 3, *size))


def test_tokens_to_map_is_a_view_in_row_order():
    x = torch.arange(2 * 6 * 4.0).view(2, 6, 4)
    maps = tokens_to_map(x, (2, 3))
    assert maps.shape == (2, 4, 2, 3) and maps.data_ptr() == x.data_ptr()
    assert torch.equal(maps[1, :, 1, 2], x[1, 5]) and torch.equal(maps[1, :, 0, 1], x[1, 1])


# positions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(10, 12), (5, 7), (4, 4), (7, 2), (1, 1), (14, 7)])
@pytest.mark.parametrize(
    ("offset", "antialias"), [(0.0, False), (0.0, True), (0.1, False)], ids=["plain", "antialias", "offset"]
)
def test_positions_match_reference(grid, offset, antialias):
    table = tokens(1, 1 + 7 * 7, 3).float()
    got = interpolate_positions(table, grid, offset=offset, antialias=antialias)
    assert torch.equal(got[:, :1], table[:, :1])
    square = table[0, 1:].double().numpy().reshape(7, 7, 3)
    expected = reference.resize_positions(square, grid, offset, antialias)
    np.testing.assert_allclose(got[0, 1:].view(*grid, 3).numpy(), expected, atol=2e-5)


def test_the_tables_own_grid_is_untouched():
    table = tokens(1, 1 + 9, 4)
    assert interpolate_positions(table, (3, 3), offset=0.1) is table


def test_positions_keep_dtype_and_constants_and_pass_gradients():
    assert interpolate_positions(torch.zeros(1, 10, 4, dtype=torch.bfloat16), (2, 5)).dtype == torch.bfloat16
    constant = interpolate_positions(torch.full((1, 10, 4), 3.0), (5, 2), offset=0.1)
    torch.testing.assert_close(constant, torch.full((1, 11, 4), 3.0))
    table = torch.randn(1, 10, 4, requires_grad=True)
    interpolate_positions(table, (2, 5)).sum().backward()
    assert (table.grad.abs().sum(-1) > 0).all()


def test_a_table_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="11 positions are not 1 and a square"):
        interpolate_positions(torch.zeros(1, 11, 4), (2, 2))
