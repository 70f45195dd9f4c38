"""The training loop's SGD and AdamW against the classes of torch.optim: equal weights and states, to the last bit."""

import pytest
import torch
from torch import nn

from engine.training.optimizers import AdamW, Sgd

CASES = {
    "momentum": (Sgd, torch.optim.SGD, {"momentum": 0.9}),
    "plain": (Sgd, torch.optim.SGD, {"momentum": 0.0}),
    "adamw": (AdamW, torch.optim.AdamW, {"betas": (0.8, 0.999)}),
}


def model() -> nn.Sequential:
    """With a weight in channels_last, as the training loop has them."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    return layers.to(memory_format=torch.channels_last)


def groups(layers: nn.Sequential) -> list[dict]:
    return [
        {"name": "weights", "params": [layers[0].weight, layers[2].weight], "weight_decay": 0.1},
        {"name": "rest", "params": [layers[0].bias, *layers[1].parameters()], "weight_decay": 0.0},
    ]


def walk(layers, optimizer, steps: range, late=()) -> None:
    """Steps along seeded gradients, with rates that change. The parameters `late` have no gradient at the first."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in layers.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            is_late = step == 0 and any(parameter is other for other in late)
            parameter.grad = None if is_late else torch.empty_like(parameter).copy_(gradient)  # in its memory format
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
            if group.get("momentum"):
                group["momentum"] = 0.5 + 0.1 * step
        optimizer.step()


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("case", CASES)
def test_it_is_that_of_torch(case):
    own, theirs, settings = CASES[case]
    ends = []
    for make in (lambda g: own(g, lr=1.0, **settings), lambda g: torch_made(theirs, g, settings)):
        layers = model()
        optimizer = make(groups(layers))
        walk(layers, optimizer, range(4))
        ends.append((layers.state_dict(), optimizer.state_dict()))
    assert_same(ends[0][0], ends[1][0])
    if case != "plain":  # torch's SGD has no state then
        assert ends[0][1]["state"].keys() == ends[1][1]["state"].keys() == set(range(5))
        for number, state in ends[0][1]["state"].items():
            assert_same(state, ends[1][1]["state"][number])
    fresh = model().state_dict()
    assert not any(torch.equal(value, fresh[name]) for name, value in ends[0][0].items() if name.endswith("weight"))


def torch_made(theirs, rows, settings):
    nesterov = {"nesterov": settings["momentum"] > 0} if "momentum" in settings else {}
    return theirs(rows, lr=1.0, fused=True, **settings, **nesterov)


@pytest.mark.parametrize("case", ["momentum", "adamw"])
@pytest.mark.parametrize("saved_by", ["ours", "torch"])
def test_a_saved_state_goes_on(case, saved_by):
    """Also one that the class of torch.optim wrote, as checkpoints of earlier versions have it."""
    own, theirs, settings = CASES[case]
    whole = model()
    walk(whole, own(groups(whole), lr=1.0, **settings), range(4))
    first, second = model(), model()
    rows = groups(first)
    begun = own(rows, lr=1.0, **settings) if saved_by == "ours" else torch_made(theirs, rows, settings)
    walk(first, begun, range(2))
    second.load_state_dict(first.state_dict())
    resumed = own(groups(second), lr=7.0, **settings)
    resumed.load_state_dict(begun.state_dict())
    assert [group["lr"] for group in resumed.param_groups] == [7.0, 7.0]  # its own
    walk(second, resumed, range(2, 4))
    assert_same(second.state_dict(), whole.state_dict())


def test_a_state_of_other_groups_is_refused():
    layers = model()
    optimizer = Sgd(groups(layers), lr=1.0, momentum=0.9)
    other = Sgd(groups(layers)[:1], lr=1.0, momentum=0.9)
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, expected \[2, 3\]"):
        optimizer.load_state_dict(other.state_dict())
    walk(layers, optimizer, range(1))
    with pytest.raises(ValueError, match="holds momentum_buffer, expected step, exp_avg, exp_avg_sq"):
        AdamW(groups(layers), lr=1.0, betas=(0.8, 0.999)).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_a_parameter_whose_first_gradient_comes_late(case):
    """It stays until then, and its first step is a first step: as an optimizer of its own."""
    own, _, settings = CASES[case]
    layers, alone = model(), model()
    late = layers[0].weight
    before = late.detach().clone()
    optimizer = own(groups(layers), lr=1.0, **settings)
    walk(layers, optimizer, range(1), late=[late])
    assert torch.equal(late, before) and 0 not in optimizer.state_dict()["state"]
    walk(layers, optimizer, range(1, 2))
    walk(alone, own([groups(alone)[0] | {"params": [alone[0].weight]}], lr=1.0, **settings), range(1, 2))
    assert torch.equal(late, alone[0].weight) and not torch.equal(late, before)


def test_zero_grad():
    layers = model()
    optimizer = Sgd(groups(layers), lr=1.0, momentum=0.9)
    walk(layers, optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layers.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in layers.parameters())
