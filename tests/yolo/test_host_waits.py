"""YOLOv8's losses on an asynchronous device, imitated on a CPU: the same values, and the host never waits."""

from dataclasses import replace

import pytest
import torch

from benchmarks.host_waits import host_waits
from tests.yolo.test_losses import A8, POINTS, K, scene, targets_of, v8, v8_logits, values
from yolo import assigners


@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("has_scores", [False, True])
def test_an_asynchronous_device_gives_the_same_losses_and_never_waits(count, has_scores, monkeypatch):
    targets, make = scene(21, count=count, ignored=0.2)
    targets = replace(targets, class_scores=make(count, K)) if has_scores else targets
    leaves = [*v8_logits(make), *([targets.class_scores] if has_scores else [])]

    def terms_and_slopes():
        terms = v8(*leaves[:2], targets)
        slopes = torch.autograd.grad(sum(terms.values()), leaves, create_graph=True)
        return *terms.values(), *slopes, *torch.autograd.grad(sum(x.square().sum() for x in slopes), leaves[:2])

    expected = terms_and_slopes()
    monkeypatch.setattr(assigners, "is_asynchronous", lambda device: True)
    with host_waits(POINTS.device) as waits:
        got = terms_and_slopes()
    assert not waits
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_fills_up_the_positives_reaches_no_loss_and_no_gradient(monkeypatch):
    """Locations of the upper rows fill up, with the first object; here they predict nan."""
    targets = targets_of([[0, 0, 0, 0], [30, 30, 62, 62.0]], [0, 1], [0, 0])
    leaves = [torch.zeros(1, A8, 4, 16), torch.zeros(1, A8, K)]
    leaves[0][:, :20] = -torch.inf  # all of them: softmax is nan
    leaves = [x.requires_grad_() for x in leaves]
    expected = v8(*leaves, targets)
    monkeypatch.setattr(assigners, "is_asynchronous", lambda device: True)
    terms = v8(*leaves, targets)
    assert values(terms) == pytest.approx(values(expected), rel=1e-6) and all(x.isfinite() for x in terms.values())
    sum(terms.values()).backward()
    assert all(x.grad.isfinite().all() for x in leaves) and (leaves[0].grad[:, :20] == 0).all()
