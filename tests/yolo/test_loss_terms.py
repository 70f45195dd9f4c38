"""Each term of the YOLO losses, and the decoders, against float64 numbers, differences and identities."""

import numpy as np
import pytest
import torch

from boxes import distances_to_xyxy
from structures import Targets
from tests.reference import boxes as box_reference
from tests.reference import yolo_losses as reference
from yolo import losses
from yolo.assigners import anchor_ratio_matches, make_anchors, make_points

GRIDS, STRIDES = [(8, 8), (4, 4), (2, 2)], [8, 16, 32]  # 64 x 64 pixels
A8, A5 = 84, 252
POINTS, STEPS = make_points(GRIDS, STRIDES, dtype=torch.float64)
ANCHORS = torch.tensor([[[5, 6], [8, 14], [15, 11]], [[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]]])
ANCHORS = ANCHORS.double()


def test_decode_distances():
    logits = torch.full((1, 2, 4, 16), -50.0).double()
    for edge, bin_index in enumerate((1, 2, 3, 4)):
        logits[0, :, edge, bin_index] = 50
    points = torch.tensor([[4.5, 6.5], [4.5, 6.5]]).double()
    got = losses.decode_distances(logits, points, torch.tensor([[8.0], [16.0]]).double())
    torch.testing.assert_close(got[0, 0], torch.tensor([3.5, 4.5, 7.5, 10.5]).double() * 8)
    torch.testing.assert_close(got[0, 1], torch.tensor([3.5, 4.5, 7.5, 10.5]).double() * 16)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, A8, 4, 16))
    expected = [[reference.decode(z[b, a], POINTS[a].numpy(), STEPS[a].item()) for a in range(A8)] for b in range(3)]
    np.testing.assert_allclose(losses.decode_distances(torch.tensor(z), POINTS, STEPS), expected, rtol=1e-10)


def test_decode_anchor_offsets():
    points, strides, sizes = make_anchors(GRIDS, STRIDES, ANCHORS)
    middle = losses.decode_anchor_offsets(torch.zeros(1, A5, 4).double(), points, strides, sizes)[0]
    torch.testing.assert_close((middle[:, :2] + middle[:, 2:]) / 2, points * strides)  # sigmoid(0): the cell's center
    torch.testing.assert_close(middle[:, 2:] - middle[:, :2], sizes)  # and the anchor's size
    far = losses.decode_anchor_offsets(torch.full((1, A5, 4), 60.0).double(), points, strides, sizes)[0]
    torch.testing.assert_close((far[:, :2] + far[:, 2:]) / 2, (points + 1) * strides)
    torch.testing.assert_close(far[:, 2:] - far[:, :2], 4 * sizes)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3], ids=["usual", "large", "saturated"])
def test_classification_loss_matches_reference(scale):
    rng = np.random.default_rng(2)
    z, t = scale * rng.normal(size=(5, 7)), rng.random((5, 7)) * rng.integers(0, 2, (5, 7))
    skip = rng.random(5) < 0.4
    pairwise = np.vectorize(reference.cross_entropy)(z, t)
    got = losses.classification_loss(torch.tensor(z), torch.tensor(t))
    assert got.item() == pytest.approx(pairwise.sum(), rel=1e-12)
    got = losses.classification_loss(torch.tensor(z), torch.tensor(t), torch.tensor(skip))
    assert got.item() == pytest.approx(pairwise[~skip].sum(), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["usual", "saturated"])
@pytest.mark.parametrize("bins", [2, 16])
def test_distribution_focal_loss_matches_reference(scale, bins):
    rng = np.random.default_rng(3)
    z, d = scale * rng.normal(size=(20, 4, bins)), rng.uniform(-2, bins + 2, (20, 4))  # beyond both ends as well
    d[0] = [0, 1, bins - 1, bins - 1.01]  # on the bins
    expected = [np.mean([reference.focal_distribution(z[n, e], d[n, e]) for e in range(4)]) for n in range(20)]
    got = losses.distribution_focal_loss(torch.tensor(z), torch.tensor(d))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)


def test_distribution_focal_loss_is_least_at_the_two_bins_of_the_target():
    d = torch.tensor([[0.25, 3.0, 7.5, 13.9]]).double()
    low = d.floor().long()
    p = torch.zeros(1, 4, 16).double()
    p.scatter_(-1, low[..., None], (low + 1 - d)[..., None])
    p.scatter_add_(-1, low[..., None] + 1, (d - low)[..., None])
    logits = p.clamp(min=1e-30).log().requires_grad_()
    loss = losses.distribution_focal_loss(logits, d)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean(-1)
    torch.testing.assert_close(loss, entropy)  # the cross-entropy's lower bound
    loss.sum().backward()
    assert logits.grad.abs().max() < 1e-12
    point = torch.zeros(1, 2).double()
    decoded = losses.decode_distances(logits, point, torch.ones(1, 1).double())
    torch.testing.assert_close(
        decoded, distances_to_xyxy(point, d)
    )  # and what minimises the loss decodes to the target


def test_ciou_loss_of_a_perfect_box_is_zero():
    boxes = torch.tensor([[1.0, 2.0, 30.0, 60.0], [5.0, 5.0, 6.0, 6.0]]).double()
    assert losses.ciou_loss(boxes, boxes).abs().max() < 1e-6
    expected = 1 - box_reference.ciou([1, 2, 30, 60], [5, 5, 6, 6])
    assert losses.ciou_loss(boxes[0], boxes[1]).item() == pytest.approx(expected, rel=1e-9)


def test_objectness_loss_weighs_levels_and_leaves_out_marked_locations():
    rng = np.random.default_rng(4)
    z, o = rng.normal(size=(2, 9)), rng.random((2, 9))
    o[0, 1] = o[1, 8] = -1
    bce = np.where(o < 0, 0, np.vectorize(reference.cross_entropy)(z, np.maximum(o, 0)))
    expected = 4 * bce[:, :6].sum() / 12 + 0.5 * bce[:, 6:].sum() / 6
    got = losses.objectness_loss(torch.tensor(z), torch.tensor(o), [6, 3], [4.0, 0.5])
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_the_terms():
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()
    rng = torch.Generator().manual_seed(0)
    d = 4 * torch.rand(3, 4, generator=rng, dtype=torch.float64) + 0.1
    t = torch.rand(3, 5, generator=rng, dtype=torch.float64)
    skip = torch.tensor([True, False, False])
    points, strides = torch.tensor([[0.5, 1.5], [2.5, 0.5]]).double(), torch.tensor([[8.0], [16.0]]).double()
    check = torch.autograd.gradcheck
    assert check(lambda z: losses.distribution_focal_loss(z, d), make(3, 4, 6))
    assert check(lambda z: losses.classification_loss(z, t, skip), make(3, 5))
    assert check(lambda z: losses.objectness_loss(z, t, [2, 3], [4.0, 1.0]), make(3, 5))
    assert check(lambda z: losses.decode_distances(z, points, strides), make(1, 2, 4, 5))
    assert check(lambda z: losses.decode_anchor_offsets(z, points, strides, 10 * points), make(1, 2, 4))


def test_gradient_of_the_v5_box_term_with_alpha_fixed():
    """One object, one match per level: the chain from logits through decoding and CIoU, against differences."""
    box = np.array([20.3, 18.1, 33.0, 30.9])
    zero = torch.zeros(1, dtype=torch.int64)
    targets = Targets(torch.tensor(box)[None], zero, zero, zero.bool())
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(1, A5, 4, generator=rng, dtype=torch.float64).requires_grad_()
    grid = dict(grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets)
    matches = anchor_ratio_matches(**grid)
    losses.matched_ciou(matches, z, **grid).sum().backward()
    points, strides, sizes = make_anchors(GRIDS, STRIDES, ANCHORS)
    assert len(matches.gt_index) >= 9
    for location in matches.location.tolist():
        x, y = (points[location] - 0.5).tolist()
        s, (aw, ah) = strides[location].item(), sizes[location].tolist()

        def decode(v, x=x, y=y, s=s, aw=aw, ah=ah):
            u = [2 * reference.sigmoid(c) for c in v]
            cx, cy, w, h = x + u[0] - 0.5, y + u[1] - 0.5, u[2] ** 2 * aw / s, u[3] ** 2 * ah / s
            return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]

        logits = z[0, location].tolist()
        alpha, _ = box_reference.ciou_alpha(decode(logits), box / s)
        expected = box_reference.numeric_gradient(
            lambda v, d=decode, s=s, alpha=alpha: box_reference.ciou(d(v), box / s, alpha=alpha), logits
        )
        np.testing.assert_allclose(z.grad[0, location].numpy(), expected, rtol=1e-5, atol=1e-8)
