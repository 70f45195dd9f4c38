"""Synaptic flow as a sum over paths, and the norm of the gradient as a slope."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import models
from engine.search.proxies import gradient_norm, synaptic_flows, synflow
from structures import Targets
from tests.layers.test_fusion import random_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """logits = W3 (x + W2 x), x = W1 image, every W a 1x1 convolution; between them what the score leaves out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images):
        x = self.first(images)
        logits = self.last(x + self.second(x))
        return SimpleNamespace(logits=lambda: (logits[:, :1], logits[:, 1:]))


def test_synflow_is_the_sum_over_paths_through_each_layer():
    torch.manual_seed(0)
    model = Residual()
    random_statistics(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    w1, w2, w3 = (
        np.abs(layer.weight.detach().double().numpy()[:, :, 0, 0])
        for layer in (model.first[0], model.second[0], model.last)
    )
    pixels = 4 * 4
    short = pixels * (w3 @ w1).sum()  # paths past W2
    long = pixels * (w3 @ w2 @ w1).sum()
    flows = synaptic_flows(model, 4)
    assert flows["first.0.weight"] == pytest.approx(short + long, rel=1e-12)
    assert flows["second.0.weight"] == pytest.approx(long, rel=1e-12)
    assert flows["last.weight"] == pytest.approx(short + long, rel=1e-12)
    assert synflow(model, 4) == pytest.approx(2 * short + 3 * long, rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_flow_is_conserved_in_a_detector():
    """Every path begins in the stem, and ends in one of the six layers that predict."""
    torch.manual_seed(0)
    flows = synaptic_flows(models.build("yolov8_narrow", 2), 64)
    ends = [flow for name, flow in flows.items() if name.startswith("head.") and name.endswith(".2.weight")]
    assert len(ends) == 6 and min(flows.values()) > 0
    assert sum(ends) == pytest.approx(flows["backbone.stem.conv.weight"], rel=1e-9)


def test_the_gradient_norm_is_the_slope_in_its_direction():
    torch.manual_seed(0)
    model = Quadratic()
    expected = np.sqrt(np.sum([(2 * value.detach().numpy()) ** 2 for value in model.parameters()]))
    images = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0).bool())
    assert gradient_norm(model, images, nothing) == pytest.approx(expected, rel=1e-12)
    assert all(value.grad is None for value in model.parameters())


class Quadratic(nn.Module):
    """L = sum of the squares of two parameters, in two terms; a third one has no part in it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (3.0, 4.0, 0.0))

    def forward(self, images):
        return images.sum() / 3

    def losses(self, output, targets):
        return {"one": output * self.a**2, "other": output * self.b**2}
