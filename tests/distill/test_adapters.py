"""What stands between a student's map and its teacher's: widths, norms and grids that differ."""

import pytest
import torch

from distill.adapters import ChannelNorm, build_adapter, resize_like


@pytest.mark.parametrize("kind", ["conv1x1", "conv1x1_norm", "conv3x3", "mlp"])
def test_adapters_carry_widths_and_learn(kind):
    adapter = build_adapter(kind, 3, 5)
    out = adapter(torch.randn(2, 3, 4, 6))
    assert out.shape == (2, 5, 4, 6)
    out.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    if kind == "conv1x1_norm":
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
        assert not [n for n, _ in adapter.named_parameters() if n.startswith("1.")]


def test_channel_norm_is_that_of_the_batch_in_train_and_eval_mode():
    x = 3 + 2 * torch.randn(4, 5, 6, 7, dtype=torch.float64)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    for norm in (ChannelNorm().train(), ChannelNorm().eval()):
        assert not norm.state_dict()
        torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt())
    assert norm(x[:1, :, :1, :1]).abs().max() == 0  # one value is its own mean


def test_resizing_keeps_points_in_place():
    """A linear ramp over the picture is the same ramp on every grid, away from the border."""
    ramp = lambda n: (torch.arange(n) + 0.5) / n
    small, large = ramp(8).expand(1, 1, 8, 8), ramp(20).expand(1, 1, 20, 20)
    up, down = resize_like(small, large), resize_like(large, small)
    torch.testing.assert_close(up[..., 2:-2], large[..., 2:-2])
    torch.testing.assert_close(down[..., 1:-1], small[..., 1:-1], atol=2e-3, rtol=0)
    assert resize_like(small, small) is small
