"""The second stage's parts: shapes, the order in which a region is flattened, and which boxes are detections."""

import numpy as np
import pytest
import torch

from frcnn.heads import HIDDEN, BoxHead, BoxPredictor, ConvBoxHead, select_boxes
from tests.reference import faster_rcnn as reference


@pytest.mark.parametrize("build", [BoxHead, ConvBoxHead])
@pytest.mark.parametrize("N", [0, 3])
def test_heads_map_regions_to_vectors(build, N):
    head = build(4).eval()
    x = head(torch.randn(N, 4, 7, 7))
    assert x.shape == (N, HIDDEN) and (x >= 0).all()
    class_logits, box_deltas = BoxPredictor(5)(x)
    assert class_logits.shape == (N, 6) and box_deltas.shape == (N, 6, 4)


def test_memory_format_does_not_matter():
    pooled = torch.randn(3, 4, 7, 7)
    head = BoxHead(4)
    torch.testing.assert_close(head(pooled), head(pooled.contiguous(memory_format=torch.channels_last)))
    by_hand = torch.relu(pooled.reshape(3, -1) @ head.fc6.weight.T + head.fc6.bias)
    torch.testing.assert_close(head(pooled), torch.relu(by_hand @ head.fc7.weight.T + head.fc7.bias))


def test_deltas_belong_to_their_class():
    predictor = BoxPredictor(2)
    x = torch.randn(1, HIDDEN)
    with torch.no_grad():
        predictor.regress.weight[4:8] = 0  # the rows of the first class
        predictor.regress.bias[4:8] = torch.tensor([1.0, 2, 3, 4])
    assert predictor(x)[1][0, 1].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("score_threshold, max_detections", [(0.0, 1000), (0.15, 1000), (0.15, 5), (0.999, 10)])
@pytest.mark.parametrize("N", [0, 1, 25])
def test_selection_matches_reference(N, score_threshold, max_detections):
    rng = np.random.default_rng(N)
    corner, side = rng.uniform(0, 50, (N, 2)), np.exp(rng.uniform(1.5, 4, (N, 2)))
    boxes = np.concatenate((corner, corner + side), 1)
    logits = rng.normal(size=(N, 4)).astype(np.float32).astype(np.float64) * 2
    deltas = rng.normal(size=(N, 4, 4)) * 2
    found = select_boxes(
        torch.tensor(logits), torch.tensor(deltas), torch.tensor(boxes), image_size=(48, 64),
        score_threshold=score_threshold, iou_threshold=0.5, max_detections=max_detections,
    )  # fmt: skip
    expected = reference.detections(logits, deltas, boxes.tolist(), 48, 64, score_threshold, 0.5, max_detections)
    assert len(found) == len(expected) <= max_detections
    assert found.labels.tolist() == [label for _, _, label in expected]
    np.testing.assert_allclose(found.scores.numpy(), [score for _, score, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(
        found.boxes_xyxy.numpy(), np.reshape([box for box, _, _ in expected], (-1, 4)), atol=1e-9
    )


def test_the_background_is_never_a_detection():
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1)
    options = dict(image_size=(32, 32), score_threshold=0.5, iou_threshold=0.5, max_detections=10)
    found = select_boxes(logits, torch.zeros(3, 3, 4), boxes, **options)
    assert found.labels.tolist() == [0, 1]  # columns 1 and 2
    slivers = select_boxes(logits, torch.zeros(3, 3, 4), torch.tensor([[40.0, 0, 50, 10]]).repeat(3, 1), **options)
    assert len(slivers) == 0  # clipped to nothing
