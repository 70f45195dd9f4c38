"""Anchors as they were recorded and by hand; offsets against plain numbers, and as each other's inverse."""

import numpy as np
import pytest
import torch

from frcnn.anchors import ROI_WEIGHTS, RPN_WEIGHTS, anchor_shapes, decode_boxes, encode_boxes, place_anchors
from tests.reference import faster_rcnn as reference

both_weights = pytest.mark.parametrize("weights", [RPN_WEIGHTS, ROI_WEIGHTS], ids=["rpn", "roi"])


def random_boxes(rng, count):
    corner, side = rng.uniform(-50, 200, (count, 2)), np.exp(rng.uniform(0, 5.5, (count, 2)))
    return np.concatenate((corner, corner + side), 1)


def test_shapes_by_hand():
    """Size 32 at height / width = 1/2, 1, 2: 45.25 x 22.63, 32 x 32, 22.63 x 45.25, rounded half sides."""
    shapes = anchor_shapes((32,), (0.5, 1.0, 2.0))
    assert shapes.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    two = anchor_shapes((32, 64), (0.5, 1.0))  # ratio by ratio, in each size by size
    assert two[:, 2].tolist() == [23, 45, 16, 32]


def test_places_by_hand():
    shapes = [torch.tensor([[-1.0, -2, 1, 2], [-3, -3, 3, 3]]), torch.tensor([[-5.0, -5, 5, 5]])]
    anchors = place_anchors(shapes, [(2, 3), (1, 2)], (64, 96))
    assert anchors.shape == (2 * 2 * 3 + 2, 4)
    assert anchors[0].tolist() == [-1, -2, 1, 2] and anchors[1].tolist() == [-3, -3, 3, 3]
    assert anchors[2].tolist() == [31, -2, 33, 2]  # one cell to the right: 96 // 3
    assert anchors[6].tolist() == [-1, 30, 1, 34]  # one down: 64 // 2
    assert anchors[13].tolist() == [43, -5, 53, 5]
    rounded_up = place_anchors(shapes[1:], [(8, 8)], (480, 480))  # stride 64, but 480 // 8 = 60
    assert rounded_up[1].tolist() == [55, -5, 65, 5]


def test_equals_the_recorded_anchors(golden):
    arrays, meta = golden("loss_fasterrcnn")
    shapes = anchor_shapes((meta["anchor_sizes"][2],), tuple(meta["aspect_ratios"]))
    anchors = place_anchors([shapes], [(8, 10)], (meta["height"], meta["width"]))
    np.testing.assert_array_equal(anchors.numpy(), arrays["anchors_level2"])


@both_weights
def test_offsets_match_reference(weights):
    rng = np.random.default_rng(0)
    boxes, anchors = random_boxes(rng, 40), random_boxes(rng, 40)
    deltas = encode_boxes(torch.tensor(boxes), torch.tensor(anchors), weights)
    expected = [reference.encode(b, r, weights) for b, r in zip(boxes, anchors)]
    np.testing.assert_allclose(deltas.numpy(), expected, rtol=1e-9, atol=1e-9)
    given = rng.normal(size=(40, 4)) * 3
    decoded = decode_boxes(torch.tensor(given), torch.tensor(anchors), weights)
    expected = [reference.decode(d, r, weights) for d, r in zip(given, anchors)]
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-9, atol=1e-9)


@both_weights
def test_decoding_inverts_encoding(weights):
    rng = np.random.default_rng(1)
    boxes, anchors = (torch.tensor(random_boxes(rng, 30)) for _ in range(2))
    is_near = (boxes[:, 2:] - boxes[:, :2] < 60 * (anchors[:, 2:] - anchors[:, :2])).all(1)
    boxes, anchors = boxes[is_near], anchors[is_near]
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors, weights), anchors, weights), boxes)
    zeros = torch.zeros_like(anchors)
    torch.testing.assert_close(encode_boxes(anchors, anchors, weights), zeros)
    torch.testing.assert_close(decode_boxes(zeros, anchors, weights), anchors)


def test_huge_log_ratios_stay_finite_and_shapes_broadcast():
    box = decode_boxes(torch.tensor([0.0, 0, 1e4, 1e4]), torch.tensor([0.0, 0, 16, 16]), RPN_WEIGHTS)
    torch.testing.assert_close(box, torch.tensor([-492.0, -492, 508, 508]))
    per_class = decode_boxes(torch.zeros(5, 3, 4), torch.rand(5, 1, 4), ROI_WEIGHTS)
    assert per_class.shape == (5, 3, 4)
    assert decode_boxes(torch.zeros(0, 4), torch.zeros(0, 4), RPN_WEIGHTS).shape == (0, 4)
    assert encode_boxes(torch.zeros(0, 4), torch.zeros(0, 4), RPN_WEIGHTS).shape == (0, 4)
