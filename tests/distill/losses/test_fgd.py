"""FGD by hand and as a module; the checks of its parts against references, and the mutants, are in test_mutants."""

import copy

import pytest
import torch

from distill.losses.fgd import FGD, attention, fgd_attention, fgd_focal
from distill.losses.masks import box_density
from structures import Targets


def test_attention_is_one_on_average_and_follows_strength():
    feature_map = torch.randn(2, 5, 3, 4)
    feature_map[0, 2] *= 10
    feature_map[1, :, 1, 2] *= 10
    spatial, channel = attention(feature_map, 0.5)
    torch.testing.assert_close(spatial.mean((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(channel.mean((1, 2, 3)), torch.ones(2))
    assert channel[0].argmax() == 2 and spatial[1].argmax() == 1 * 4 + 2


def test_every_object_weighs_the_same():
    """A uniform teacher attends evenly; off by 1 in one channel, each object costs its weight, whatever its size."""
    t_map = torch.ones(1, 2, 8, 8)
    s_map = t_map.clone()
    s_map[:, 0] += 1
    for boxes in ([[0.0, 0, 8, 8]], [[0.0, 0, 8, 8], [16.0, 16, 64, 64]]):
        count = len(boxes)
        targets = Targets(torch.tensor(boxes), *torch.zeros(2, count, dtype=torch.int64), torch.zeros(count).bool())
        foreground = box_density(targets, batch_size=1, grid_size=(8, 8), image_size=(64, 64))
        got = fgd_focal(s_map=s_map, t_map=t_map, foreground=foreground, foreground_weight=2.0, background_weight=3.0)
        assert got.item() == pytest.approx(2 * count + 3)


def test_attention_loss_ignores_signs():
    t_map = torch.randn(2, 3, 4, 4)
    assert fgd_attention(s_map=-t_map, t_map=t_map) == 0


def test_a_new_module_is_zero_at_the_teacher_and_learns_what_differs_per_image():
    """Both context networks start as the identity; trained, they take out an offset that the maps have throughout."""
    torch.manual_seed(0)
    module, t_map, none = FGD(4, global_weight=1.0), torch.randn(2, 4, 3, 3), torch.zeros(2, 1, 3, 3)
    assert module(s_map=t_map, t_map=t_map, foreground=none).abs() < 1e-6
    s_map = t_map + torch.tensor([1.0, -1.0, 2.0, 0.5]).view(1, 4, 1, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    start = module(s_map=s_map, t_map=t_map, foreground=none).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(s_map=s_map, t_map=t_map, foreground=none)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * start


def test_state_survives_a_round_trip():
    torch.manual_seed(1)
    module = FGD(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    other = FGD(4)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    s_map, t_map, foreground = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.rand(2, 1, 3, 3)
    assert torch.equal(*(m(s_map=s_map, t_map=t_map, foreground=foreground) for m in (module, other)))


def test_empty_maps_give_zero():
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        empty = torch.zeros(shape, requires_grad=True)
        loss = FGD(4)(s_map=empty, t_map=torch.zeros(shape), foreground=torch.zeros(shape)[:, :1])
        loss.backward()
        assert loss == 0
