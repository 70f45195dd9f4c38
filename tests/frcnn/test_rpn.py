"""The region proposal network: its answers at single anchors, its gradients, and which proposals it selects."""

import numpy as np
import pytest
import torch

from frcnn.anchors import anchor_shapes, place_anchors
from frcnn.rpn import RPNHead, select_proposals
from tests.reference import faster_rcnn as reference

SIZES = [(6, 5), (3, 3), (1, 2)]


def head_and_maps(depth, dtype=torch.float64, B=2, channels=4, anchors=3):
    torch.manual_seed(depth)
    head = RPNHead(channels, anchors, depth).to(dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head, [torch.randn(B, channels, h, w, dtype=dtype, requires_grad=True) for h, w in SIZES]


def test_shapes_and_order():
    """Anchor n of cell (i, j) of a level reads channel n of its map there."""
    head, maps = head_and_maps(1)
    logits, deltas = head(maps)
    A = 3 * sum(h * w for h, w in SIZES)
    assert logits.shape == (2, A) and deltas.shape == (2, A, 4)
    x = torch.relu(head.convs[0](maps[1]))
    row = 3 * 30 + 3 * (2 * 3 + 1) + 2  # after level 0: cell (2, 1), anchor 2
    torch.testing.assert_close(logits[1, row], head.objectness(x)[1, 2, 2, 1])
    torch.testing.assert_close(deltas[1, row], head.deltas(x)[1, 8:12, 2, 1])


@pytest.mark.parametrize("depth", [1, 2])
def test_at_single_anchors_equals_forward_in_values_and_gradients(depth):
    """Every anchor of both images, edges and corners among them; then a few, some of them twice."""
    head, maps = head_and_maps(depth)
    logits, deltas = head(maps)
    A = logits.shape[1]
    image, anchor = torch.arange(2).repeat_interleave(A), torch.arange(A).repeat(2)
    few = torch.randint(0, 2 * A, (17,), generator=torch.Generator().manual_seed(0))
    few = torch.cat((few, few[:3]))
    leaves = [*maps, *head.parameters()]
    for chosen in (torch.arange(2 * A), few, few[:0]):
        at_logits, at_deltas = head.at(maps, image[chosen], anchor[chosen])
        torch.testing.assert_close(at_logits, logits.flatten()[chosen])
        torch.testing.assert_close(at_deltas, deltas.flatten(0, 1)[chosen])
        loss = lambda z, d: z.sin().sum() + (d**3).sum()
        ours = torch.autograd.grad(loss(at_logits, at_deltas), leaves)
        dense = loss(logits.flatten()[chosen], deltas.flatten(0, 1)[chosen])
        for got, expected in zip(ours, torch.autograd.grad(dense, leaves, retain_graph=True)):
            torch.testing.assert_close(got, expected)


def random_predictions(seed, grids=((8, 8), (4, 4), (2, 2)), image_size=(64, 64)):
    rng = np.random.default_rng(seed)
    shapes = [anchor_shapes((size,), (0.5, 1.0, 2.0)).double() for size in (16, 32, 48)]
    anchors = place_anchors(shapes, list(grids), image_size)
    counts = [3 * h * w for h, w in grids]
    logits = torch.tensor(rng.normal(size=(2, len(anchors))) * 2)
    deltas = torch.tensor(rng.normal(size=(2, len(anchors), 4)) * 0.4)
    return logits, deltas, anchors, dict(level_counts=counts, image_size=image_size)


@pytest.mark.parametrize(
    "candidates, proposals, min_score", [(1000, 1000, 0.0), (20, 1000, 0.0), (20, 12, 0.0), (50, 1000, 0.6)]
)
def test_selection_matches_reference(candidates, proposals, min_score):
    logits, deltas, anchors, sizes = random_predictions(candidates)
    logits = logits.float().double()  # suppression compares float32
    selected = select_proposals(
        logits, deltas, anchors, **sizes, candidates=candidates, proposals=proposals, min_score=min_score
    )
    for image, got in enumerate(selected):
        expected = reference.proposals(
            logits[image].tolist(), deltas[image].tolist(), anchors.tolist(), sizes["level_counts"],
            *sizes["image_size"], candidates, proposals, min_score,
        )  # fmt: skip
        assert 0 < len(expected) <= proposals
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-9)


def test_levels_do_not_suppress_each_other_and_slivers_go():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [90, 90, 99, 99]])
    logits = torch.tensor([[3.0, 2, 1, 9]])
    select = lambda counts, **options: select_proposals(
        logits, torch.zeros(1, 4, 4), anchors, level_counts=counts, image_size=(64, 64), candidates=9, proposals=9
    )[0].tolist()
    assert select([1, 3]) == [[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]]  # outside: clipped to nothing
    assert select([2, 2]) == [[0, 0, 10, 10], [20, 20, 30, 30]]


def test_selection_has_no_gradient_and_drops_what_is_not_finite():
    logits, deltas, anchors, sizes = random_predictions(0)
    logits[0, 5], deltas[0, 7, 2] = torch.nan, torch.nan
    found = select_proposals(logits.requires_grad_(), deltas, anchors, **sizes, candidates=500, proposals=500)
    assert all(boxes.isfinite().all() and not boxes.requires_grad for boxes in found)
    empty = select_proposals(
        torch.full_like(logits, -9.0), deltas, anchors, **sizes, candidates=500, proposals=500, min_score=0.5
    )
    assert [boxes.shape for boxes in empty] == [(0, 4), (0, 4)]
