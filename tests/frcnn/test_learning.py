"""Faster R-CNN learns two pictures: in make test that its losses fall, in make test-weekly that it finds every box."""

import pytest
import torch
from torch import Tensor

from boxes import paired_iou
from frcnn import faster_rcnn, heads
from frcnn.faster_rcnn import FasterRCNN
from frcnn.norm import BatchNorm
from structures import Targets
from tests.frcnn.test_faster_rcnn import build, calibrated


def learn_two_pictures(steps: int) -> tuple[FasterRCNN, Tensor, Targets, Tensor]:
    """The model, its images and targets, and at each step the losses of objectness and of classes.

    Three coloured boxes on noise. BatchNorm's statistics are fixed first: two pictures are too few for live ones.
    """
    torch.manual_seed(0)
    boxes_xyxy = 1.5 * torch.tensor([[6.0, 8, 30, 36], [34, 30, 60, 58], [20, 10, 56, 40]])
    labels, image = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    images = 0.4 + 0.2 * torch.rand(2, 3, 96, 96)
    for (x1, y1, x2, y2), label, row in zip(boxes_xyxy.int().tolist(), labels, image):
        images[row, :, y1:y2, x1:x2] = 0.1 + 0.9 * torch.eye(3)[label, :, None, None]
    targets = Targets(boxes_xyxy, labels, image, torch.zeros(3, dtype=torch.bool))
    model = calibrated(build("fasterrcnn_mobilenet_v3_small", 3), images)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.freeze()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    history = []
    for _ in range(steps):
        terms = model.losses(model(images), targets)
        history.append([terms["rpn_objectness"].item(), terms["roi_class"].item()])
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return model, images, targets, torch.tensor(history)


def test_two_pictures_begin_to_be_learnt(monkeypatch):
    monkeypatch.setattr(heads, "HIDDEN", 128)
    monkeypatch.setattr(faster_rcnn, "ROI_SAMPLES", 64)
    history = learn_two_pictures(15)[-1]
    (objectness, classes), (first_objectness, first_classes) = history[-5:].median(0).values, history[0]
    assert objectness < 0.5 * first_objectness and classes < 0.7 * first_classes


@pytest.mark.slow
@pytest.mark.weekly
def test_learns_two_pictures():
    model, images, targets, history = learn_two_pictures(45)
    objectness, classes = history[-15:].mean(0)  # each step samples other regions
    assert objectness < 0.1 and classes < 0.5
    with torch.no_grad():
        found = model.eval().detect(model(images), score_threshold=0.05, iou_threshold=0.5, max_detections=10)
    every = [(score.item(), row, label, box) for row, d in enumerate(found) for box, score, label in d]
    for box_xyxy, label, row in zip(targets.boxes_xyxy, targets.labels, targets.image):
        # AP50 is 1: the best of each class is right
        score, best_row, _, best_box = max((one for one in every if one[2] == label), key=lambda one: one[0])
        assert score > 0.3 and best_row == row and paired_iou(best_box, box_xyxy) > 0.5
