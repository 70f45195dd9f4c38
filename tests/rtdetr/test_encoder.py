"""The hybrid encoder's position embedding and the folding of its RepVGG convolutions."""

import math

import pytest
import torch
from torch import nn

from rtdetr.attention import MultiHeadAttention
from rtdetr.encoder import FusionBlock, HybridEncoder, RepVGG, embed_positions


@pytest.mark.parametrize("height, width, channels", [(1, 1, 4), (3, 5, 12), (4, 2, 256)])
def test_position_embedding_is_its_formula(height, width, channels):
    got = embed_positions(height, width, channels)
    assert got.shape == (height * width, channels)
    count = channels // 4
    for i in range(height):
        for j in range(width):
            angles = [(n, 10_000.0 ** (-f / count)) for n in (i, j) for f in range(count)]
            rows, columns = angles[:count], angles[count:]
            expected = [g(n * w) for part in (rows, columns) for g in (math.sin, math.cos) for n, w in part]
            assert got[i * width + j].tolist() == pytest.approx(expected, abs=1e-12)


def test_position_embedding_tells_every_cell_apart():
    vectors = embed_positions(20, 13, 64)
    assert torch.cdist(vectors, vectors).fill_diagonal_(1).min() > 0.1
    with pytest.raises(ValueError, match="a multiple of 4"):
        embed_positions(2, 2, 6)


def randomize(module):
    generator = torch.Generator().manual_seed(3)
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_mean.uniform_(-0.3, 0.3, generator=generator)
            bn.running_var.uniform_(0.5, 2.0, generator=generator)
            bn.weight.data.uniform_(0.5, 1.5, generator=generator)
            bn.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return module.double().eval()


def test_repvgg_folds_into_one_convolution_exactly():
    torch.manual_seed(0)
    block = randomize(RepVGG(6))
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        block.fold()
        block.fold()  # a second call does nothing
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)
    assert [tuple(p.shape) for p in block.parameters()] == [(6, 6, 3, 3), (6,)]


@pytest.mark.parametrize("hidden", [4, 8])
def test_fusion_block_widens_only_where_it_is_narrow(hidden):
    block = randomize(FusionBlock(16, 8, hidden))
    assert isinstance(block.leave, nn.Identity) == (hidden == 8)
    x = torch.randn(1, 16, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        mixed = block.blocks(block.enter(x)) + block.bypass(x)
        torch.testing.assert_close(block(x), mixed if hidden == 8 else block.leave(mixed))


def test_every_map_feels_every_other():
    """Information runs down and up again: one changed cell of any input map reaches all three outputs."""
    torch.manual_seed(0)
    encoder = HybridEncoder((4, 6, 8), width=8, hidden=8, feedforward=16, heads=2).double().eval()
    c = {
        name: torch.randn(1, k, s, 2 * s, dtype=torch.float64)
        for name, k, s in [("c3", 4, 8), ("c4", 6, 4), ("c5", 8, 2)]
    }
    with torch.no_grad():
        before = encoder(c)
        assert {name: tuple(p.shape) for name, p in before.items()} == {
            "p3": (1, 8, 8, 16), "p4": (1, 8, 4, 8), "p5": (1, 8, 2, 4),
        }  # fmt: skip
        for name in c:
            changed = c | {name: c[name].clone()}
            changed[name][0, 0, 0, 0] += 1
            after = encoder(changed)
            assert all((after[p] - before[p]).abs().max() > 1e-9 for p in before), name


@pytest.mark.parametrize("count", [1, 2])
def test_gradient_of_each_image_is_its_slope(count):
    """Of one image too, for which BatchNorm alone would return another one (conv_bn)."""
    torch.manual_seed(0)
    encoder = HybridEncoder((8, 8, 8), width=16, hidden=8, feedforward=16).double().eval()
    maps = {name: torch.randn(count, 8, side, side).double() for name, side in (("c3", 8), ("c4", 4), ("c5", 2))}
    weight = torch.randn(count, 16, 2, 2).double()
    value = lambda c5: (encoder({**maps, "c5": c5})["p5"] * weight).sum()
    c5, direction, step = maps["c5"].clone().requires_grad_(), torch.randn(count, 8, 2, 2).double(), 1e-6
    (gradient,) = torch.autograd.grad(value(c5), c5)
    with torch.no_grad():
        slope = (value(c5 + step * direction) - value(c5 - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 4).double()
    nn.init.normal_(attention.in_proj_bias)
    own = nn.MultiheadAttention(16, 4, batch_first=True).double()
    own.load_state_dict(attention.state_dict())
    queries, keys, values = (torch.rand(2, count, 16, dtype=torch.float64) for count in (5, 7, 7))
    is_hidden = torch.rand(2, 5, 7) < 0.4
    is_hidden[:, :, 0] = False
    for hidden, mask in ((None, None), (is_hidden, is_hidden.repeat_interleave(4, 0))):
        expected, _ = own(queries, keys, values, attn_mask=mask, need_weights=False)
        torch.testing.assert_close(attention(queries, keys, values, hidden), expected)
