"""Scores of channels against numpy, in float64, and against the definition of a derivative."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.pruning import scores
from layers.channel_groups import find_groups
from structures import Targets

pytestmark = pytest.mark.usefixtures("one_thread")


class Little(nn.Module):
    """A residual block and a plain one, with a loss like a detector's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.back, self.back_bn = nn.Conv2d(5, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.out = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor, gate: Tensor | None = None) -> Tensor:
        x = F.silu(self.stem_bn(self.stem(images)))
        y = F.silu(self.inner(x if gate is None else x * gate[:4, None, None]))
        y = y if gate is None else y * gate[4:, None, None]
        x = x + self.back_bn(self.back(y))
        x = x if gate is None else x * gate[:4, None, None]
        return self.out(torch.cat((x, x), 1))

    def losses(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        return {"a": output.square().mean(), "b": output.sigmoid().sum() * len(targets)}


@pytest.fixture
def little():
    torch.manual_seed(0)
    model = Little().double()
    for norm in (model.stem_bn, model.back_bn):
        nn.init.normal_(norm.weight)
        norm.running_var.uniform_(0.5, 2)
    groups = find_groups(model)
    assert groups.widths() == {"stem": 4, "inner": 5}
    return model, groups


def test_bn_gamma_by_hand(little):
    """A residual stream has two BatchNorms; the inner channels have none, and get their l2."""
    model, groups = little
    found = scores.bn_gamma(model.state_dict(), groups)
    gammas = (model.stem_bn.weight.abs() + model.back_bn.weight.abs()) / 2
    assert torch.allclose(found[groups.groups["stem"]], gammas.detach())
    assert torch.equal(found[groups.groups["inner"]], scores.l2(model.state_dict(), groups)[groups.groups["inner"]])


def test_l2_by_hand(little):
    model, groups = little
    found = scores.l2(model.state_dict(), groups)
    stem, back, inner, out = (
        layer.weight.detach().numpy() ** 2 for layer in (model.stem, model.back, model.inner, model.out)
    )
    stream = stem.sum((1, 2, 3)) + back.sum((1, 2, 3)) + inner.sum((0, 2, 3))
    stream += out[:, :4].sum((0, 2, 3)) + out[:, 4:].sum((0, 2, 3))  # read twice
    np.testing.assert_allclose(found[groups.groups["stem"]], np.sqrt(stream))
    np.testing.assert_allclose(found[groups.groups["inner"]], np.sqrt(inner.sum((1, 2, 3)) + back.sum((0, 2, 3))))


def some_targets(count: int) -> Targets:
    return Targets(torch.zeros(count, 4), *(torch.zeros(count, dtype=kind) for kind in (torch.int64,) * 2 + (bool,)))


def test_taylor_is_the_derivative_by_a_gate(little):
    """Central differences of the loss by the factor of each channel at all its readers; the mean over two batches."""
    model, groups = little
    model.train().requires_grad_(False)
    batches = [(torch.rand(2, 3, 5, 5, dtype=torch.float64), some_targets(count)) for count in (1, 3)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = scores.taylor(model, batches, groups)
    assert model.training and not any(value.requires_grad or value.grad is not None for value in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="channels"):
        scores.taylor(model, [(torch.rand(2, 4, 5, 5, dtype=torch.float64), some_targets(1))], groups)
    assert model.training and not any(value.requires_grad for value in model.parameters())
    model.eval()

    def loss(channel: int, step: float, images: Tensor, targets: Targets) -> float:
        gate = torch.ones(9, dtype=torch.float64)
        gate[channel] += step
        return float(sum(model.losses(model(images, gate), targets).values()))

    order = torch.cat((groups.groups["stem"], groups.groups["inner"]))
    expected = [
        np.mean([abs(loss(c, 1e-5, *batch) - loss(c, -1e-5, *batch)) / 2e-5 for batch in batches]) for c in range(9)
    ]
    np.testing.assert_allclose(found[order], expected, rtol=1e-6)


def test_random_scores_follow_their_generator(little):
    a, b, c = (scores.random(little[1], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (9,) and a.min() >= 0
