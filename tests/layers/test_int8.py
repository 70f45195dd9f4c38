"""Rounding to 8 bits against float64 numpy, its gradient, its ranges, and the layers that round."""

import numpy as np
import pytest
import torch
from torch import nn

import models
from layers.int8 import (
    SMALLEST_SCALE,
    Int8Range,
    Int8Weight,
    add_int8,
    has_int8,
    observe_ranges,
    percentiles,
    ranges_of,
    remove_int8,
    weight_scales,
    without_ranges,
)
from yolo.layers import ConvBNAct
from yolo.yolov7 import ConvBNLeaky


def rounding(low, high):
    made = Int8Range()
    made.low.fill_(low), made.high.fill_(high)
    return made


def reference(x, low, high):
    """The file's equation in float64."""
    s = (high - low) / 255 if high > low else 1.0
    z = np.clip(np.rint(-low / s), 0, 255)
    return s * (np.clip(np.rint(x / s) + z, 0, 255) - z)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 1.0), (-2.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (4, 5, 6)])
def test_activations_match_float64(low, high, shape):
    x = np.random.default_rng(0).normal(0, 4, shape)
    found = rounding(low, high)(torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), reference(x, low, high), atol=1e-5)


def test_zero_is_exact_and_a_second_rounding_changes_nothing():
    made = rounding(-0.7, 1.9)
    once = made(torch.linspace(-2, 3, 1001))
    assert made(torch.zeros(1)).item() == 0 and torch.equal(made(once), once) and len(once.unique()) == 256


def test_the_gradient_is_that_of_the_identity_within_the_range_and_0_beyond():
    x = torch.tensor([-3.0, -0.9, 0.0, 0.33, 1.9, 4.0], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])
    rounding(-1.0, 2.0)(x).backward(upstream)
    assert x.grad.tolist() == [0.0, -2.0, 3.0, 4.0, 5.0, 0.0]


def test_weights_have_a_scale_per_channel():
    w = np.random.default_rng(0).normal(size=(4, 3, 2, 2)) * np.array([1, 1e-3, 100, 0]).reshape(4, 1, 1, 1)
    weight = torch.tensor(w, dtype=torch.float32, requires_grad=True)
    s = np.abs(w).max((1, 2, 3)) / 127
    np.testing.assert_allclose(weight_scales(weight)[:3], s[:3], rtol=1e-6)
    assert weight_scales(weight)[3] == np.float32(SMALLEST_SCALE)
    found = Int8Weight()(weight)
    expected = np.rint(w[:3] / s[:3, None, None, None]) * s[:3, None, None, None]
    np.testing.assert_allclose(found.detach()[:3], expected, rtol=1e-5, atol=1e-9)
    assert not found[3].any()
    found.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))  # straight through, the largest included


def test_percentiles_match_numpy():
    x = torch.tensor(np.random.default_rng(0).normal(size=(2, 5, 100)), dtype=torch.float32)
    low, high = percentiles(x, 99.0)
    ordered = np.sort(x.numpy().ravel())
    assert low == ordered[10] and high == ordered[989]
    assert percentiles(x, 100) == (x.min(), x.max())


def test_a_range_is_the_mean_of_what_it_saw_and_holds_0():
    made = Int8Range(floor=-8.0)
    made.observed_percentile = 100
    for x in ([1.0, 3.0], [-20.0, 5.0], []):
        made(torch.tensor(x))
    assert made.seen == 2 and made.low == -4.0 and made.high == 4.0  # (0 + -8) / 2, (3 + 5) / 2
    made.observed_percentile = None
    made(torch.tensor([100.0]))
    assert made.high == 4.0


@pytest.mark.parametrize("layer", [ConvBNAct, ConvBNLeaky])
def test_a_layer_folds_its_norm_and_rounds(layer):
    """With ranges of its own picture, what a layer says differs from float32 by a few steps; running means stay."""
    torch.manual_seed(0)
    made = layer(3, 8, 3)
    (
        nn.init.normal_(made.bn.running_mean),
        nn.init.uniform_(made.bn.running_var, 0.5, 2),
        nn.init.uniform_(made.bn.weight),
    )
    x, means = torch.rand(2, 3, 16, 16), made.bn.running_mean.clone()
    expected = made.eval()(x)
    add_int8(made)
    observe_ranges(made.train(), 100)
    made(x)
    observe_ranges(made, None)
    found = made(x)
    step = (made.int8.output.high - made.int8.output.low) / 255
    assert 0 < (found - expected).abs().max() < 6 * step and torch.equal(made.bn.running_mean, means)
    found.sum().backward()
    assert made.conv.weight.grad.any() and made.bn.weight.grad.any() and made.bn.bias.grad.any()
    remove_int8(made)
    assert torch.equal(made.eval()(x), expected)


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n", "yolov7_tiny"])
def test_every_convolution_but_the_last_reads_rounded_numbers(arch):
    model = models.build(arch, 2).eval()
    before = model.state_dict()
    add_int8(model)
    assert has_int8(model) and without_ranges(model.state_dict()).keys() == before.keys()
    observe_ranges(model, 100)
    images = torch.rand(1, 3, 64, 64)
    model(images)
    observe_ranges(model, None)
    levels = []
    for module in model.modules():
        if isinstance(module, ConvBNAct | ConvBNLeaky):
            read = lambda m, inputs, made=module: levels.append(
                (inputs[0] if made.int8.input is None else made.int8.input(inputs[0])).unique().numel()
            )
            module.register_forward_pre_hook(read)
    with torch.no_grad():
        model(images)
    assert len(levels) > 40 and max(levels) <= 256
    assert all(made.seen == 1 and made.high > made.low for made in ranges_of(model))


def test_a_family_without_rounding_is_refused():
    with pytest.raises(ValueError, match="do not round to 8 bits"):
        add_int8(nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize("arch", ["yolov8_narrow", "yolov7_tiny"])
def test_under_autocast_the_maps_are_those_of_float32(arch):
    """A teacher that rounds to 8 bits may be run in bfloat16; so may an evaluation. Its ranges are the same, too."""
    torch.manual_seed(0)
    model = models.build(arch, 2).eval()
    add_int8(model)
    images = torch.rand(2, 3, 64, 64).bfloat16().float()  # which bfloat16 holds as they are
    found, ranges = [], []
    for is_bfloat16 in (False, True):
        observe_ranges(model, 99.9)
        for own in ranges_of(model):
            own.seen.zero_()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            model(images)
            observe_ranges(model, None)
            found.append(model(images.bfloat16() if is_bfloat16 else images).features)
        ranges.append(torch.stack([torch.stack((own.low, own.high)) for own in ranges_of(model)]))
    assert torch.equal(*ranges) and ranges[0].abs().sum() > 0
    for name in ("c3", "c5", "p3", "p5"):
        assert found[1][name].dtype == torch.float32 and torch.equal(found[0][name], found[1][name]), name
