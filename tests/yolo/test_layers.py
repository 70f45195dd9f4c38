"""ConvBNAct is applied in place where no gradient is recorded, and nobody can tell."""

import pytest
import torch

from yolo.layers import ConvBNAct


@pytest.mark.parametrize("is_folded", [False, True])
def test_in_place_is_the_same_and_leaves_its_input(is_folded):
    torch.manual_seed(0)
    layer = ConvBNAct(3, 5, 3).eval()
    if is_folded:
        layer.fold()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    kept = x.detach().clone()
    expected = layer(x)
    with torch.no_grad():
        found = layer(x)
    assert torch.equal(found, expected) and torch.equal(x.detach(), kept)
    expected.sum().backward()  # what it needs was not overwritten
    assert x.grad.abs().sum() > 0
