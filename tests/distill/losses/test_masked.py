"""Masked imitation by hand, and with the masks it is made for; checks and mutants are in test_mutants."""

import pytest
import torch

from distill.losses.features import feature_mse
from distill.losses.masked import decoupled_mse, masked_mse
from distill.losses.masks import box_mask
from structures import Targets


def test_half_the_squared_distance_of_marked_pixels():
    """Pixel 0 differs by (3, 4), pixel 1 by (1, 0); the mean of the marked ones' squared lengths, halved."""
    t_map, s_map = torch.zeros(1, 2, 1, 2), torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    for mask, expected in (([1, 0], 25 / 2), ([0, 1], 1 / 2), ([1, 1], 26 / 4), ([0, 0], 0)):
        got = masked_mse(s_map=s_map, t_map=t_map, mask=torch.tensor(mask, dtype=torch.bool).view(1, 1, 1, 2))
        assert got.item() == pytest.approx(expected)


def test_only_pixels_near_objects_learn():
    box = Targets(torch.tensor([[8.0, 8, 24, 16]]), torch.tensor([0]), torch.tensor([1]), torch.tensor([False]))
    mask = box_mask(box, batch_size=2, grid_size=(4, 4), image_size=(32, 32))
    s_map = torch.randn(2, 3, 4, 4, requires_grad=True)
    masked_mse(s_map=s_map, t_map=torch.randn(2, 3, 4, 4), mask=mask).backward()
    assert torch.equal(s_map.grad.abs().sum(1, keepdim=True) > 0, mask)


def test_background_weighs_the_same_however_large():
    """Foreground and background off by 1 everywhere: each contributes half its weight at every share of the two."""
    t_map = torch.zeros(1, 4, 6, 6)
    for marked in (1, 18, 35):
        foreground = (torch.arange(36) < marked).view(1, 1, 6, 6)
        got = decoupled_mse(
            s_map=t_map + 1, t_map=t_map, foreground=foreground, foreground_weight=3.0, background_weight=12.0
        )
        assert got.item() == pytest.approx((3 + 12) / 2)


def test_without_objects_the_background_is_the_whole_map():
    s_map, t_map = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    got = decoupled_mse(s_map=s_map, t_map=t_map, foreground=torch.zeros(2, 1, 4, 4), background_weight=2.0)
    torch.testing.assert_close(got, feature_mse(s_map=s_map, t_map=t_map))
