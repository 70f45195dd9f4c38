"""Feature losses on maps small enough to work out by hand; their checks and mutants are in test_mutants."""

import itertools

import pytest
import torch

from distill.losses.features import (
    attention_transfer,
    channel_correlation,
    channel_wise_kl,
    cosine_distance,
    feature_mse,
    score_weighted_l2,
    unit_deviations,
)
from tests.reference import distillation as reference


def row(*channels) -> torch.Tensor:
    """One image of one row: a list of pixels for each channel."""
    return torch.tensor(channels, dtype=torch.float64)[None, :, None, :]


def test_cosine_is_0_1_2_for_equal_orthogonal_and_opposite_vectors():
    t_map = row([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    s_map = row([5.0, 0.0, -2.0], [0.0, 3.0, 0.0])
    assert cosine_distance(s_map=s_map, t_map=t_map).item() == pytest.approx((0 + 1 + 2) / 3)


def test_correlation_is_0_for_the_teacher_scaled_and_shifted_and_2_for_its_opposite():
    t_map = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert channel_correlation(s_map=7 * t_map - 3, t_map=t_map).abs() < 1e-12
    assert channel_correlation(s_map=-t_map, t_map=t_map).item() == pytest.approx(2)


def test_correlation_runs_over_the_whole_batch():
    """Two images that are constant each, but differ, still correlate: statistics of one image would see nothing."""
    t_map = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    assert channel_correlation(s_map=5 + 2 * t_map, t_map=t_map).item() == pytest.approx(0, abs=1e-6)
    assert channel_correlation(s_map=-t_map, t_map=t_map).item() == pytest.approx(2)


def test_a_channel_constant_up_to_rounding_is_constant():
    """In float32 the mean of a large constant is not exact: what is left is no signal to correlate with."""
    rows = torch.full((4, 10_007), 0.1) * torch.tensor([[1.0], [3.0], [1e3], [1e6]])
    assert not unit_deviations(rows).any()
    signal = rows + 1e-3 * rows * torch.randn(4, 10_007)
    torch.testing.assert_close(unit_deviations(signal).square().sum(1), torch.ones(4))


def test_attention_transfer_sees_where_not_how_strong():
    """The teacher looks at pixel 0; a student that looks there through another channel, more weakly, agrees."""
    t_map = row([3.0, 0.0], [0.0, 0.0])
    assert attention_transfer(s_map=row([0.0, 0.0], [-0.01, 0.0]), t_map=t_map).abs() < 1e-12
    assert attention_transfer(s_map=row([0.0, 1.0], [0.0, 0.0]), t_map=t_map).item() == pytest.approx(1)


def test_score_weights_choose_the_pixel():
    s_map, t_map = row([1.0, 0.0], [0.0, 0.0]), row([0.0, 10.0], [0.0, 0.0])
    only_first = torch.tensor([[[0.3, 0.0]]], dtype=torch.float64)
    assert score_weighted_l2(s_map=s_map, t_map=t_map, weight=only_first).item() == pytest.approx(1 / 2)


def test_uniform_weights_are_the_mean_squared_error():
    s_map, t_map = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    weighted = score_weighted_l2(s_map=s_map, t_map=t_map, weight=torch.full((2, 4, 5), 0.2))
    torch.testing.assert_close(weighted, feature_mse(s_map=s_map, t_map=t_map))


def test_cwd_of_two_pixels():
    """Log-odds 0 against log 3: KL((3/4, 1/4) || (1/2, 1/2))."""
    t_map = row([torch.log(torch.tensor(3.0)).item(), 0.0])
    expected = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    assert channel_wise_kl(s_map=row([0.0, 0.0]), t_map=t_map).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_cwd_of_maps_in_any_layout(temperature):
    """channels_last maps take a way of their own; a mixed pair does too."""
    s_map, t_map = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    expected = reference.channel_wise_kl(s_map.numpy(), t_map.numpy(), temperature)
    slopes = []
    for s_format, t_format in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        s = s_map.contiguous(memory_format=s_format).requires_grad_()
        loss = channel_wise_kl(s_map=s, t_map=t_map.contiguous(memory_format=t_format), temperature=temperature)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        slopes.append(torch.autograd.grad(loss, s)[0])
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0])


@pytest.mark.parametrize("loss", [feature_mse, cosine_distance, channel_wise_kl, channel_correlation])
def test_maps_of_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match="equal"):
        loss(s_map=torch.zeros(1, 2, 3, 3), t_map=torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="equal"):
        loss(s_map=torch.zeros(1, 3, 3), t_map=torch.zeros(1, 3, 3))


def test_descent_reaches_the_teacher():
    """Each loss, minimised from far away, ends where it says its minimum is."""
    torch.manual_seed(0)
    t_map = torch.randn(2, 2, 3, 3)
    for loss in (feature_mse, cosine_distance, channel_wise_kl, channel_correlation, attention_transfer):
        s_map = torch.randn(2, 2, 3, 3, requires_grad=True)
        optimizer = torch.optim.Adam([s_map], lr=0.1)
        start = loss(s_map=s_map, t_map=t_map).item()
        for _ in range(150):
            optimizer.zero_grad()
            loss(s_map=s_map, t_map=t_map).backward()
            optimizer.step()
        assert loss(s_map=s_map, t_map=t_map).item() < 0.02 * start, loss.__name__
