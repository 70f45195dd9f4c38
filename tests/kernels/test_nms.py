"""kernels.nms against the greedy definition, one pair at a time, and against recorded torchvision results."""

import numpy as np
import pytest
import torch

from kernels.nms import BLOCK, batched_nms


def reference_nms(boxes, scores, labels, iou_threshold: float, max_detections: int) -> list[int]:
    """The definition, one candidate at a time, on numpy float32 scalars; shares no code with the function under test."""
    f32 = np.float32
    boxes = np.asarray(boxes, dtype=f32)
    usable = [i for i in range(len(scores)) if np.isfinite(boxes[i]).all() and np.isfinite(scores[i])]
    kept: list[int] = []
    for i in sorted(usable, key=lambda i: (-float(scores[i]), i)):
        if len(kept) == max_detections:
            break
        for j in kept:
            if labels[i] != labels[j]:
                continue
            (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = boxes[j], boxes[i]
            width = max(f32(0), min(ax2, bx2) - max(ax1, bx1))
            height = max(f32(0), min(ay2, by2) - max(ay1, by1))
            intersection = width * height
            union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
            with np.errstate(invalid="ignore", divide="ignore"):
                if float(intersection / union) > iou_threshold:
                    break
        else:
            kept.append(i)
    return kept


def random_boxes(rng: np.random.Generator, count: int, *, size: float = 60.0, spread: float = 200.0) -> np.ndarray:
    corner = rng.uniform(0, spread, (count, 2))
    return np.concatenate((corner, corner + rng.uniform(1, size, (count, 2))), 1).astype(np.float32)


@pytest.mark.parametrize("count", [0, 1, 2, 37, BLOCK, BLOCK + 1, 1300])
@pytest.mark.parametrize("num_classes", [1, 7])
@pytest.mark.parametrize("iou_threshold", [0.0, 0.45, 0.6, 1.0])
def test_matches_the_definition(count, num_classes, iou_threshold):
    rng = np.random.default_rng(count)
    boxes, labels = random_boxes(rng, count), rng.integers(0, num_classes, count)
    scores = rng.integers(1, 50, count).astype(np.float32) / 64  # many ties
    for limit in (10, count + 1):
        got = batched_nms(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), iou_threshold, limit)
        assert got.tolist() == reference_nms(boxes, scores, labels, iou_threshold, limit)
