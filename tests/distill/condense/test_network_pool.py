"""The pool of matching networks: who is visited when, how far it is trained, and the statistics of its BatchNorms."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import models
from distill.condense.network_pool import (
    NetworkPool,
    PoolSettings,
    replace_batchnorms,
    reproducible,
    set_statistics,
)
from errors import UserError
from frcnn.norm import BatchNorm
from tests.distill.tiny_detector import build_tiny, tiny_scene


def pool_of(build=build_tiny, seed: int = 0, **settings) -> NetworkPool:
    pictures, targets = tiny_scene(6)
    return NetworkPool(
        build,
        settings=PoolSettings(**{"first_steps": 0} | settings),
        draw_real=lambda generator: (pictures + 0.01 * torch.rand(1, generator=generator), targets),
        draw_augmentation=None,
        seed=seed,
    )


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_networks_take_turns_and_start_anew_at_different_times():
    pool = pool_of(networks=2, first_steps=1, steps_between=2, last_steps=6)
    visits = [pool.visit(step)[1:] for step in range(14)]
    assert [number for number, _ in visits] == [0, 1] * 7
    assert [trained for number, trained in visits if number == 0] == [1, 3, 5, 1, 3, 5, 1]
    assert [trained for number, trained in visits if number == 1] == [1, 3, 1, 3, 5, 1, 3]


def test_a_network_learns_between_visits_and_every_life_is_another():
    pool = pool_of(networks=1, steps_between=3, last_steps=3)
    states = [weights(pool.visit(step)[0]).clone() for step in range(4)]
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    again = pool_of(networks=1, steps_between=3, last_steps=3)
    assert all(torch.equal(state, weights(again.visit(step)[0])) for step, state in enumerate(states))
    assert not torch.equal(weights(pool_of(seed=1).visit(0)[0]), weights(pool_of(seed=0).visit(0)[0]))


def test_training_lowers_the_loss_and_leaves_the_network_in_eval_mode():
    pictures, targets = tiny_scene(6)
    losses = []
    for steps in (0, 40):
        network, _, trained = pool_of(first_steps=steps).visit(0)
        assert trained == steps and not network.training
        set_statistics(network, pictures)
        losses.append(sum(network.losses(network(pictures), targets).values()).item())
    assert losses[1] < 0.8 * losses[0]


def test_without_training_every_visit_is_a_fresh_network():
    pool = pool_of(networks=1, steps_between=0)
    first, second = (copy.deepcopy(pool.visit(step)[0]) for step in range(2))
    assert not torch.equal(weights(first), weights(second)) and pool.visit(2)[2] == 0


def test_a_pool_goes_on_from_its_state():
    options = dict(networks=2, first_steps=1, steps_between=1, last_steps=4)
    whole, first, second = (pool_of(**options) for _ in range(3))
    for step in range(3):
        whole.visit(step)
        first.visit(step)
    second.load_state_dict(first.state_dict())
    for step in range(3, 12):
        a, b = whole.visit(step), second.visit(step)
        assert a[1:] == b[1:] and torch.equal(weights(a[0]), weights(b[0]))
    with pytest.raises(ValueError, match="a pool of 2 networks, expected 3"):
        pool_of(networks=3).load_state_dict(first.state_dict())


def test_the_global_generator_is_not_touched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pool = pool_of(first_steps=2)
    pool.visit(0)
    with reproducible(3):
        first = torch.rand(2)
    with reproducible(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_learn_is_refused():
    def differentiable_once(seed: int) -> nn.Module:
        network = build_tiny(seed)
        network.is_twice_differentiable = False
        return network

    with pytest.raises(UserError, match="cannot be matched: its attention has no second derivative"):
        pool_of(build=differentiable_once).visit(0)
    with pytest.raises(ValueError, match="at least one network"):
        pool_of(networks=0)
    for settings in ({"learning_rate": -0.1}, {"momentum": 1.0}, {"gradient_clip": 0.0}):
        with pytest.raises(ValueError, match="expected a learning_rate of 0 or more, momentum in"):
            pool_of(**settings)

    def broken(seed: int) -> nn.Module:
        network = build_tiny(seed)
        nn.init.constant_(network.head.bias, float("inf"))
        return network

    with pytest.raises(UserError, match="network 0 of the pool: its loss is nan after 0 steps on real pictures") as e:
        pool_of(build=broken, first_steps=1).visit(0)
    assert e.value.exit_code == 3


def test_statistics_are_those_of_the_batch_and_stay():
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=0.03), nn.Conv2d(3, 3, 1), BatchNorm(3))
    network[2].freeze()
    frozen = copy.deepcopy(network[2].state_dict())
    images = torch.rand(5, 3, 4, 6)
    set_statistics(network, images)
    x = images.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(network[0].running_mean.numpy(), x.mean(1), rtol=1e-5)
    np.testing.assert_allclose(network[0].running_var.numpy(), x.var(1, ddof=1), rtol=1e-5)
    assert all(torch.equal(frozen[name], value) for name, value in network[2].state_dict().items())
    assert network[0].momentum == 0.03 and not network.training
    kept = network[0].running_mean.clone()
    network(torch.rand(2, 3, 4, 6) + 1)
    assert torch.equal(network[0].running_mean, kept)


def test_groups_take_the_place_of_batches():
    network = models.build("yolov8_narrow", 3).eval()
    norms = {name: copy.deepcopy(m) for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        nn.init.uniform_(norm.weight)
    network.load_state_dict({f"{name}.weight": norm.weight for name, norm in norms.items()}, strict=False)
    images = torch.rand(3, 3, 32, 32)
    before = network(images).class_logits
    replace_batchnorms(network)
    groups = {name: m for name, m in network.named_modules() if isinstance(m, nn.GroupNorm)}
    assert groups.keys() == norms.keys() and not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    for name, group in groups.items():
        assert torch.equal(group.weight, norms[name].weight) and group.eps == norms[name].eps
        assert group.num_channels % group.num_groups == 0 and group.num_channels // group.num_groups in (4, 8)
    after = network(images).class_logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(network.train()(images[1:2]).class_logits, after[1:2], atol=1e-4, rtol=1e-4)
    pool = pool_of(lambda seed: models.build("yolov8_narrow", 2), normalization="group")
    assert any(isinstance(m, nn.GroupNorm) for m in pool._create(0, 0).network.modules())


def test_a_batchnorm_that_is_part_of_another_layer_stays():
    build = lambda seed: models.build("fasterrcnn_mobilenet_v3_small", 2)
    with pytest.raises(UserError, match=r"pool\.normalization: found 'group', expected 'batch': .* FasterRCNN"):
        pool_of(build).visit(0)
    assert isinstance(pool_of(build, normalization="batch").visit(0)[0], nn.Module)
    with pytest.raises(UserError, match=r"pool\.normalization: found 'layer', expected batch or group"):
        pool_of(normalization="layer")
