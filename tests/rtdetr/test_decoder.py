"""The decoder's anchors, query selection, point placement and refinement, each against its formula."""

import math

import numpy as np
import pytest
import torch

from rtdetr.decoder import Decoder, DeformableAttention, inverse_sigmoid, make_anchors
from tests.reference.deformable_attention import deformable_attention_reference


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    made = Decoder(in_channels=6, num_classes=5, num_layers=2, num_queries=7, width=16, heads=2, hidden=32).eval()
    for parameter in made.parameters():  # away from the start, at which boxes stay where they are
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def detections(decoder, maps):
    """The boxes and class logits of the last layer."""
    decoded = decoder(maps)
    return decoded.boxes[:, -1], decoded.logits[:, -1]


def make_maps(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, h, w, generator=generator, dtype=dtype) for h, w in [(4, 8), (2, 4), (1, 2)]]


def test_anchors_are_their_formula():
    anchors, is_candidate = make_anchors([(2, 60), (1, 3)], "cpu")
    assert anchors.shape == (123, 4) and is_candidate.shape == (123, 1)
    expected = [((j + 0.5) / 60, (i + 0.5) / 2, 0.05, 0.05) for i in range(2) for j in range(60)]
    expected += [((j + 0.5) / 3, 0.5, 0.1, 0.1) for j in range(3)]
    np.testing.assert_allclose(anchors, expected, rtol=1e-6)
    inside = [all(0.01 < value < 0.99 for value in anchor) for anchor in expected]
    assert is_candidate.flatten().tolist() == inside and inside.count(False) == 4  # both ends of the two long rows


def test_inverse_sigmoid_inverts_and_is_finite():
    p = torch.linspace(1e-4, 1 - 1e-4, 101, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(p).sigmoid(), p)
    edge = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64))
    limit = math.log(1e5)
    assert edge.tolist() == pytest.approx([-limit, -limit, limit, limit])


def test_queries_are_the_cells_with_the_highest_class_logit(decoder):
    memory = torch.randn(2, 42, 16, generator=torch.Generator().manual_seed(2))
    sizes = [(4, 8), (2, 4), (1, 2)]
    with torch.no_grad():
        queries, boxes = decoder.select(memory, sizes)
        cells = decoder.candidate(memory)  # every anchor of these sizes is a candidate
        best = decoder.candidate_class(cells).amax(-1).argsort(dim=1, descending=True)[:, :7]
        for b in range(2):
            torch.testing.assert_close(queries[b], cells[b, best[b]])
            anchors = make_anchors(sizes, "cpu")[0][best[b]].double()
            logit = (anchors / (1 - anchors)).log() + decoder.candidate_box(cells[b, best[b]])
            torch.testing.assert_close(boxes[b].double(), logit.sigmoid(), rtol=1e-4, atol=1e-5)


def test_an_anchor_beyond_the_margin_gives_a_finite_box(decoder):
    """The outer cells of a map more than 50 wide are no candidates; chosen for want of others they stay finite."""
    with torch.no_grad():
        decoder.num_queries = 120
        boxes, logits = detections(
            decoder, [torch.randn(1, 6, 1, 104), torch.randn(1, 6, 1, 8), torch.randn(1, 6, 1, 4)]
        )
        memory, sizes = torch.randn(1, 116, 16), [(1, 104), (1, 8), (1, 4)]
        queries, start = decoder.select(memory, sizes)
        memory[0, [0, 103]] = 100.0
        again = decoder.select(memory, sizes)
        decoder.num_queries = 7
    assert torch.equal(again[0], queries) and torch.equal(again[1], start)  # what such a cell holds does not matter
    assert boxes.shape == (1, 116, 4) and boxes.isfinite().all() and logits.isfinite().all()
    assert (start == 1).all(-1).sum() == 2  # the first and last of 104


def test_points_are_placed_within_the_box_and_weighted_by_a_softmax():
    torch.manual_seed(4)
    module = DeformableAttention(8, heads=2, levels=2, points=3).double()
    sizes = [(3, 4), (2, 2)]
    queries, memory = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 16, 8, dtype=torch.float64)
    boxes = 0.2 + 0.6 * torch.rand(2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        got = module(queries, boxes, memory, sizes)
        value = module.value(memory).reshape(2, 16, 2, 4).numpy()
        offsets = module.offsets(queries).reshape(2, 5, 2, 2, 3, 2).numpy()
        logits = module.logits(queries).reshape(2, 5, 2, 6).numpy()
    prob = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).reshape(2, 5, 2, 2, 3)
    points = np.empty_like(offsets)
    for index in np.ndindex(offsets.shape[:-1]):
        cx, cy, w, h = boxes[index[:2]].numpy()
        dx, dy = offsets[index]
        points[index] = cx + dx / 3 * w / 2, cy + dy / 3 * h / 2
    read = deformable_attention_reference(value, sizes, points, prob).reshape(2, 5, 8)
    weight, bias = module.output.weight.detach().numpy(), module.output.bias.detach().numpy()
    np.testing.assert_allclose(got.numpy(), read @ weight.T + bias, rtol=1e-10, atol=1e-12)


def test_box_heads_that_say_zero_leave_the_selected_boxes(decoder):
    maps = make_maps()
    boxes, logits = detections(decoder, maps)
    assert boxes.shape == (2, 7, 4) and logits.shape == (2, 7, 5)
    before = {name: value.clone() for name, value in decoder.box_heads.state_dict().items()}
    with torch.no_grad():
        for head in decoder.box_heads:
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.zero_()
        still, _ = detections(decoder, maps)
        memory = torch.cat([f(x).flatten(2) for f, x in zip(decoder.enter, maps)], dim=2).transpose(1, 2)
        selected = decoder.select(memory, [(4, 8), (2, 4), (1, 2)])[1]
        # A head that adds d in each of the two layers moves every coordinate by 2 d in logit space.
        for head in decoder.box_heads:
            head.layers[-1].bias.fill_(0.25)
        moved, _ = detections(decoder, maps)
    decoder.box_heads.load_state_dict(before)
    torch.testing.assert_close(still, selected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.logit(), selected.logit() + 0.5, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(boxes, selected, atol=1e-2)


def test_images_of_a_batch_do_not_meet(decoder):
    maps = make_maps(dtype=torch.float32)
    with torch.no_grad():
        both, alone = detections(decoder, maps), [detections(decoder, [x[b : b + 1] for x in maps]) for b in range(2)]
    for part in (0, 1):
        torch.testing.assert_close(both[part], torch.cat([a[part] for a in alone]), rtol=1e-4, atol=1e-5)
