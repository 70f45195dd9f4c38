"""MGD as a module; its checks against references, and the mutants, are in test_mutants."""

import torch

from distill.losses.mgd import MGD, masked_generation


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_gives_the_same_loss():
    module, s_map, t_map = MGD(3), torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    first, again, other = (module(s_map=s_map, t_map=t_map, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_generator_learns_to_fill_the_holes():
    """On a teacher whose neighbours agree, hidden pixels can be rebuilt: the loss falls far below that of a blank."""
    torch.manual_seed(0)
    ramp = torch.linspace(0.5, 1.5, 8).expand(1, 1, 8, 8)
    t_map = torch.cat((ramp, ramp.transpose(2, 3)), dim=1)
    module, generator = MGD(2, drop=0.3), seeded(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = module(s_map=t_map, t_map=t_map, generator=generator)
        loss.backward()
        optimizer.step()
    assert loss < 0.15 * t_map.square().sum()


def test_nothing_dropped_and_a_perfect_network_is_zero():
    maps = torch.randn(2, 3, 4, 4)
    loss = masked_generation(s_map=maps, t_map=2 * maps, keep=torch.ones(2, 1, 4, 4).bool(), generate=lambda m: 2 * m)
    assert loss == 0


def test_empty_maps_give_zero():
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = MGD(3)(s_map=empty, t_map=torch.zeros(0, 3, 4, 4), generator=seeded(0))
    loss.backward()
    assert loss == 0
