"""MobileNetV3: the shape of its maps, its activations and rounding, the arithmetic of a block, training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from frcnn.mobilenet import HS, RE, Bneck, InvertedResidual, MobileNetV3, SqueezeExcite, round_to_eight
from frcnn.norm import freeze_norms
from layers.fusion import fuse
from tests.reference.random_statistics import draw_statistics


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("pixels", [(64, 96), (65, 33), (1, 1)], ids=str)
def test_maps_are_as_announced(size, pixels):
    with torch.device("meta"), torch.no_grad():
        backbone = MobileNetV3(size).eval()
        maps = backbone(torch.zeros(2, 3, *pixels))
    assert list(maps) == list(backbone.strides) == list(backbone.channels) == ["c2", "c3", "c4", "c5_first", "c5"]
    for name, value in maps.items():
        stride = backbone.strides[name]
        assert value.shape == (2, backbone.channels[name], -(-pixels[0] // stride), -(-pixels[1] // stride))


def test_maps_come_from_the_blocks_the_paper_has_at_their_stride():
    """Table 1 and 2 of the paper: output channels of the last block at each resolution, and of the first at 1/32."""
    with torch.device("meta"):
        large, small = MobileNetV3("large"), MobileNetV3("small")
    assert large.channels == {"c2": 24, "c3": 40, "c4": 112, "c5_first": 160, "c5": 960}
    assert small.channels == {"c2": 16, "c3": 24, "c4": 48, "c5_first": 96, "c5": 576}
    assert large.taps == {2: "c2", 5: "c3", 11: "c4", 12: "c5_first"}  # rows of the tables, from 0
    assert small.taps == {0: "c2", 2: "c3", 7: "c4", 8: "c5_first"}


def test_squeezed_channels_are_multiples_of_eight_near_a_quarter():
    # of the paper's expanded sizes with a squeeze, as the released files' shapes have them
    released = {16: 8, 72: 24, 96: 24, 120: 32, 144: 40, 240: 64, 288: 72, 480: 120, 576: 144, 672: 168, 960: 240}
    assert {width: round_to_eight(width / 4) for width in released} == released
    for channels in np.linspace(0.5, 300, 700):
        assert round_to_eight(channels) % 8 == 0 and round_to_eight(channels) >= 0.9 * channels


def test_activations_are_the_papers():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    relu6 = np.clip(x.numpy() + 3, 0, 6)
    np.testing.assert_allclose(HS(x).numpy(), x.numpy() * relu6 / 6, atol=1e-15)
    np.testing.assert_allclose(RE(x).numpy(), np.maximum(x.numpy(), 0))


def test_squeeze_weights_whole_channels():
    torch.manual_seed(0)
    module = SqueezeExcite(6, 3).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    w1, b1 = module.reduce.weight.detach().numpy()[:, :, 0, 0], module.reduce.bias.detach().numpy()
    w2, b2 = module.expand.weight.detach().numpy()[:, :, 0, 0], module.expand.bias.detach().numpy()
    factor = np.clip(np.maximum(x.numpy().mean((2, 3)) @ w1.T + b1, 0) @ w2.T + b2 + 3, 0, 6) / 6  # (2, 6)
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), x.numpy() * factor[:, :, None, None], rtol=1e-12)


ROWS = {
    "residual, squeeze": (8, Bneck(5, 24, 8, True, HS, 1)),
    "strided": (8, Bneck(3, 24, 8, False, RE, 2)),
    "wider": (8, Bneck(3, 24, 12, False, HS, 1)),
    "no expansion": (8, Bneck(3, 8, 8, True, RE, 1)),
}


@pytest.mark.parametrize("c_in, row", ROWS.values(), ids=ROWS)
def test_block_is_expand_filter_squeeze_project(c_in, row):
    torch.manual_seed(0)
    block = draw_statistics(InvertedResidual(c_in, row).double()).eval()
    x = torch.randn(2, c_in, 7, 6, dtype=torch.float64)

    def layer(part, y, **options):
        bn, y = part.norm, F.conv2d(y, part.conv.weight, None, **options)
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    y = x if row.expanded == c_in else row.activation(layer(block.expand, x))
    y = layer(block.depthwise, y, stride=row.stride, padding=row.kernel // 2, groups=row.expanded)
    y = row.activation(y)
    y = layer(block.project, block.squeeze(y) if row.has_squeeze else y)
    y = x + y if row.stride == 1 and row.c_out == c_in else y
    with torch.no_grad():
        torch.testing.assert_close(block(x), y, rtol=1e-10, atol=1e-12)
    assert (block.expand is None) == (row.expanded == c_in) and (block.squeeze is not None) == row.has_squeeze


@pytest.mark.parametrize("is_frozen", [False, True])
def test_everything_that_may_learn_gets_a_gradient(is_frozen):
    torch.manual_seed(0)
    backbone = MobileNetV3("small")
    if is_frozen:
        freeze_norms(backbone)
    sum(value.square().mean() for value in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (not is_frozen or ".norm." not in name)
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_channels_last_stays_and_fusing_changes_nothing():
    torch.manual_seed(0)
    backbone = draw_statistics(MobileNetV3("large"), least_variance=1.0).eval().to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        maps, fused = backbone(x), fuse(backbone)(x)
        plain = backbone.to(memory_format=torch.contiguous_format)(x.contiguous())
    for name, value in maps.items():
        assert value.is_contiguous(memory_format=torch.channels_last), name
        for other in (fused[name], plain[name]):
            assert (other - value).norm() < 1e-5 * value.norm()
