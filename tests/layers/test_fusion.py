"""Folding BatchNorm away: its algebra in float64, and whole detectors that compute the same afterwards."""

import pytest
import torch
from torch import nn

from layers.fusion import fold_batchnorm, fuse
from models import build
from tests.reference.golden_models import relative_error
from yolo.layers import ConvBNAct

DETECTORS = ["yolov8n", "yolov5n", "yolov5nu", "yolov7_tiny"]


def random_statistics(model):
    """Running statistics and affine parameters that no fold can get right by luck."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ]:
                tensor.uniform_(low, high, generator=generator)


def build_with_statistics(arch):
    torch.manual_seed(0)
    model = build(arch, 4)
    random_statistics(model)
    return model.eval()


@pytest.mark.parametrize("has_bias", [False, True])
def test_fold_is_exact_algebra(has_bias):
    """In float64 the folded convolution equals convolution, then normalisation, written out."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 5, 3, stride=2, bias=has_bias).double(), nn.BatchNorm2d(5, eps=1e-3).double()
    random_statistics(bn)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        y = conv(x)
        shape = (1, -1, 1, 1)
        normal = (y - bn.running_mean.view(shape)) / (bn.running_var + 1e-3).sqrt().view(shape)
        expected = normal * bn.weight.view(shape) + bn.bias.view(shape)
        fold_batchnorm(conv, bn)
        torch.testing.assert_close(conv(x), expected, rtol=1e-10, atol=1e-12)


def test_a_layer_folds_once():
    torch.manual_seed(0)
    layer = ConvBNAct(3, 5, 3).eval()
    random_statistics(layer)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        layer.fold()
        once = layer(x)
        layer.fold()
    torch.testing.assert_close(once, expected)
    assert torch.equal(layer(x), once) and not any(isinstance(m, nn.BatchNorm2d) for m in layer.modules())


@pytest.mark.parametrize("arch", DETECTORS)
def test_fused_inference_equals_unfused(arch):
    """All that a detector says, maps within the head included."""
    model = build_with_statistics(arch)
    images = torch.rand(2, 3, 64, 96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    with torch.no_grad():
        expected, got = model(images), fused(images)
    assert list(got.features) == list(expected.features)
    for name, value in expected.features.items():
        assert relative_error(got.features[name], value.numpy()) < 1e-5, name
    assert relative_error(got.box_logits, expected.box_logits.numpy()) < 1e-5
    assert relative_error(got.class_logits, expected.class_logits.numpy()) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not fused.training and before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch", DETECTORS)
def test_fused_twice_is_fused_once(arch):
    once = fuse(build_with_statistics(arch))
    twice = fuse(once).state_dict()
    assert twice.keys() == once.state_dict().keys()
    assert all(torch.equal(value, twice[name]) for name, value in once.state_dict().items())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_was_frozen_stays_frozen(is_frozen):
    """The new biases too, so that a frozen teacher may be fused before or after it is frozen."""
    fused = fuse(build("yolov5n", 2).requires_grad_(not is_frozen))
    assert {p.requires_grad for p in fused.parameters()} == {not is_frozen}
    assert not any(p.requires_grad for p in fused.requires_grad_(False).parameters())


def test_precision_and_memory_format_stay():
    model = build("yolov8n", 2).bfloat16().to(memory_format=torch.channels_last)
    fused = fuse(model)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    assert fused.neck.down3.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_without_pairs_is_copied_in_eval_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fused = fuse(model)
    assert model.training and not fused.training
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, fused.state_dict()[name]) for name, value in model.state_dict().items())
    assert fused[0].weight is not model[0].weight
