"""ResNet: the shape of its maps, the paper's arithmetic of a block, training, memory format."""

import pytest
import torch
import torch.nn.functional as F

from frcnn.norm import BatchNorm, ConvNorm, freeze_norms
from frcnn.resnet import BasicBlock, Bottleneck, ResNet
from layers.fusion import fuse
from tests.reference.random_statistics import draw_statistics


@pytest.fixture(scope="module")
def resnets():
    """Of each depth, without values."""
    with torch.device("meta"):
        return {depth: ResNet(depth).eval() for depth in (18, 34, 50)}


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("size", [(64, 96), (65, 33), (1, 1)], ids=str)
def test_maps_are_as_announced(resnets, depth, size):
    backbone = resnets[depth]
    with torch.no_grad():
        maps = backbone(torch.zeros(2, 3, *size, device="meta"))
    assert list(maps) == list(backbone.strides) == list(backbone.channels) == ["c2", "c3", "c4", "c5"]
    for name, value in maps.items():
        stride = backbone.strides[name]
        assert value.shape == (2, backbone.channels[name], -(-size[0] // stride), -(-size[1] // stride))


def test_layers_are_as_many_as_the_name_says(resnets):
    """The paper counts convolutions on the longest path and the classifier: 18, 34, 50."""
    for depth, backbone in resnets.items():
        layers = [name for name, part in backbone.named_modules() if isinstance(part, ConvNorm)]
        assert sum("shortcut" not in name for name in layers) + 1 == depth


@pytest.mark.parametrize("stride, c_in", [(1, 8), (2, 8), (1, 4)], ids=["identity", "strided", "wider"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_block_is_relu_of_branch_plus_shortcut(kind, stride, c_in):
    """In float64 from torch's own convolutions; the stride is in the 3x3 convolution of a bottleneck."""
    torch.manual_seed(0)
    width = 8 if kind is BasicBlock else 2
    block = draw_statistics(kind(c_in, width, stride).double()).eval()
    x = torch.randn(2, c_in, 6, 5, dtype=torch.float64)

    def layer(part, y, stride, padding):
        y = F.conv2d(y, part.conv.weight, None, stride, padding)
        bn = part.norm
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    if kind is BasicBlock:
        y = layer(block.conv2, layer(block.conv1, x, stride, 1).relu(), 1, 1)
    else:
        y = layer(block.conv2, layer(block.conv1, x, 1, 0).relu(), stride, 1).relu()
        y = layer(block.conv3, y, 1, 0)
    is_identity = stride == 1 and c_in == 8
    y = y + (x if is_identity else layer(block.shortcut, x, stride, 0))
    with torch.no_grad():
        torch.testing.assert_close(block(x), y.relu(), rtol=1e-10, atol=1e-12)
    assert is_identity == isinstance(block.shortcut, torch.nn.Identity)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_everything_that_may_learn_gets_a_gradient(is_frozen):
    torch.manual_seed(0)
    backbone = ResNet(18)
    if is_frozen:
        freeze_norms(backbone)
    x = torch.rand(2, 3, 64, 64)
    sum(value.square().mean() for value in backbone(x).values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (not is_frozen or ".norm." not in name)
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    counters = {int(part.num_batches_tracked) for part in backbone.modules() if isinstance(part, BatchNorm)}
    assert counters == {0 if is_frozen else 1}


def test_channels_last_stays_and_fusing_changes_nothing():
    torch.manual_seed(0)
    backbone = draw_statistics(ResNet(18), least_variance=1.0).eval().to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        maps, fused = backbone(x), fuse(backbone)(x)
        plain = backbone.to(memory_format=torch.contiguous_format)(x.contiguous())
    for name, value in maps.items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        for other in (fused[name], plain[name]):
            assert (other - value).norm() < 1e-5 * value.norm()
