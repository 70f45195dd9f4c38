"""BatchNorm live and frozen, its folding into convolutions, epsilons of other files, and norms over channels."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frcnn.norm import BatchNorm, ChannelNorm, ConvNorm, freeze_norms, rescale_for_epsilon
from layers.fusion import fuse
from tests.reference.random_statistics import draw_statistics


def reference(x, bn, mean, var):
    """The equation of norm.py, term by term in float64 numpy."""
    gamma, beta = bn.weight.detach().double().numpy(), bn.bias.detach().double().numpy()
    c = (slice(None), None, None)
    return gamma[c] * (x - mean[c]) / np.sqrt(var[c] + bn.eps) + beta[c]


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("kind", ["live train", "live eval", "frozen train", "frozen eval"])
def test_normalises_by_the_statistics_it_should(kind, eps):
    bn = draw_statistics(BatchNorm(5).double()).train("train" in kind)
    bn.eps = eps
    if "frozen" in kind:
        bn.freeze()
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, var = bn.running_mean.numpy().copy(), bn.running_var.numpy().copy()
    got = bn(x).detach().numpy()
    if kind == "live train":
        mean, var = x.numpy().mean((0, 2, 3)), x.numpy().var((0, 2, 3))
        assert not np.allclose(bn.running_mean, 0.0) and bn.num_batches_tracked == 1
    else:
        np.testing.assert_array_equal(bn.running_mean.numpy(), mean)
        np.testing.assert_array_equal(bn.running_var.numpy(), var)
        assert bn.num_batches_tracked == 0
    np.testing.assert_allclose(got, reference(x.numpy(), bn, mean, var), rtol=1e-10, atol=1e-12)


def test_frozen_and_live_exchange_weights_and_only_live_learns():
    live, frozen = draw_statistics(BatchNorm(3)), BatchNorm(3)
    frozen.freeze()
    frozen.load_state_dict(live.state_dict())
    live.load_state_dict(frozen.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(frozen.train()(x), live.eval()(x))
    assert all(p.requires_grad for p in live.parameters()) and not any(p.requires_grad for p in frozen.parameters())
    live.freeze()
    assert not any(p.requires_grad for p in live.parameters()) and live.train().is_fixed


def test_freeze_norms_freezes_norms_alone():
    model = nn.Sequential(ConvNorm(2, 3), nn.Sequential(ConvNorm(3, 3), BatchNorm(3), nn.Conv2d(3, 3, 1)))
    freeze_norms(model[1][0])
    freeze_norms(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.conv.weight", "1.0.conv.weight", "1.2.weight", "1.2.bias"}
    assert all(part.is_frozen for part in model.modules() if isinstance(part, BatchNorm))


CONVOLUTIONS = {
    "3x3 stride 2": dict(c_in=4, c_out=6, kernel=3, stride=2),
    "1x1": dict(c_in=4, c_out=6),
    "depthwise 5x5": dict(c_in=4, c_out=4, kernel=5, groups=4),
}


@pytest.mark.parametrize("kind", ["frozen train", "live eval", "live train"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv_norm_is_norm_of_conv_in_value_and_gradients(options, kind):
    """However it computes it. In float64, against torch's convolution and the plain BatchNorm one after the other."""
    torch.manual_seed(0)
    layer = draw_statistics(ConvNorm(**options).double()).train("train" in kind)
    if "frozen" in kind:
        freeze_norms(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    conv, bn = twin.conv, twin.norm
    y = F.conv2d(x2, conv.weight, None, conv.stride, conv.padding, 1, conv.groups)
    if kind == "live train":
        expected = F.batch_norm(y, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
    else:
        mean, var, gamma, beta = (v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
        expected = gamma * (y - mean) / (var + bn.eps).sqrt() + beta
    got = layer(x1)
    assert got.shape[-2:] == (-(-7 // conv.stride[0]), -(-9 // conv.stride[0]))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(expected)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-10, atol=1e-12)
    for (name, ours), theirs in zip(layer.named_parameters(), twin.parameters()):
        assert ours.requires_grad == (name == "conv.weight" or "live" in kind)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_fused_layers_compute_the_same_and_have_no_norm():
    torch.manual_seed(0)
    model = draw_statistics(nn.Sequential(ConvNorm(3, 8, 3, 2), nn.ReLU(), ConvNorm(8, 5)))
    freeze_norms(model[2])
    x = torch.randn(2, 3, 9, 9)
    fused = fuse(fuse(model))  # folding twice is folding once
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())


@pytest.mark.parametrize("file_epsilon, epsilon", [(0.0, 1e-5), (1e-3, 1e-5), (1e-5, 1e-3)])
@pytest.mark.parametrize("least_variance", [0.5, 1e-9], ids=["usual", "tiny variances"])
def test_rescaled_state_computes_the_same_with_another_epsilon(file_epsilon, epsilon, least_variance):
    torch.manual_seed(0)
    theirs = draw_statistics(nn.Sequential(ConvNorm(3, 64), ConvNorm(64, 8)), least_variance=0)
    for layer in theirs:
        layer.norm.eps = file_epsilon
        layer.norm.running_var.mul_(least_variance).add_(least_variance)
    state = {f"any.{name}": value for name, value in theirs.state_dict().items()} | {"head.weight": torch.ones(2, 2)}
    before = {name: value.clone() for name, value in state.items()}
    rescaled = rescale_for_epsilon(state, file_epsilon=file_epsilon, epsilon=epsilon)
    assert rescaled.keys() == state.keys() and all(torch.equal(state[name], before[name]) for name in state)
    changed = {name for name in state if not torch.equal(rescaled[name], state[name])}
    assert changed == {"any.0.norm.weight", "any.1.norm.weight"}
    ours = nn.Sequential(ConvNorm(3, 64), ConvNorm(64, 8))
    for layer in ours:
        layer.norm.eps = epsilon
    ours.load_state_dict({name.removeprefix("any."): value for name, value in rescaled.items() if name[0] == "a"})
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = theirs.double().eval()(x.double())
        error = (ours.eval()(x).double() - expected).norm() / expected.norm()
    assert error < 1e-6


def test_rescaled_live_norms_agree_where_the_batch_has_the_running_variance():
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    theirs = draw_statistics(BatchNorm(3).double())
    theirs.eps = 0.5
    theirs.running_var.copy_(x.var((0, 2, 3), correction=0))
    ours = BatchNorm(3).double()
    ours.load_state_dict(rescale_for_epsilon(theirs.state_dict(), file_epsilon=0.5, epsilon=1e-5))
    torch.testing.assert_close(ours.train()(x), theirs.train()(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_norm_normalises_every_place(memory_format):
    norm = ChannelNorm(6, eps=1e-6).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64).to(memory_format=memory_format)
    got = norm(x)
    z = x.numpy()
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-6)
    c = (slice(None), None, None)
    np.testing.assert_allclose(
        got.detach().numpy(), norm.weight.detach().numpy()[c] * z + norm.bias.detach().numpy()[c]
    )
    assert got.is_contiguous(memory_format=torch.channels_last)
