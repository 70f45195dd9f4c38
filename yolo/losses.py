"""Losses of the YOLO heads. `decode_distances` turns the anchor-free head's logits into boxes (detection uses it too).

Returned scalars are weighted, float32 (float64 for float64 inputs), and not multiplied by the batch size.
"""

import torch
from torch import Tensor

from boxes import distances_to_xyxy
from structures import Targets


def decode_distances(box_logits: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """box_logits (..., A, 4, R) in ltrb order, points (A, 2) in cells, strides (A, 1) -> xyxy pixels (..., A, 4).

    An edge distance is the expectation over the bins (Generalized Focal Loss, arXiv:2006.04388):
    d = sum_r r * softmax(z)_r, in units of the level's stride.
    """
    bins = torch.arange(box_logits.shape[-1], dtype=box_logits.dtype, device=box_logits.device)
    ltrb = (box_logits.softmax(-1) * bins).sum(-1)  # (..., A, 4)
    return distances_to_xyxy(points, ltrb) * strides


def yolov8_losses(
    *,
    box_logits: Tensor,
    class_logits: Tensor,
    points: Tensor,
    strides: Tensor,
    targets: Targets,
    box_gain: float = 7.5,
    cls_gain: float = 0.5,
    dfl_gain: float = 1.5,
) -> dict[str, Tensor]:
    """{"box", "cls", "dfl"} of box_logits (B, A, 4, R), class_logits (B, A, K), points (A, 2), strides (A, 1)."""
    raise NotImplementedError


def yolov5_losses(
    *,
    box_logits: Tensor,
    objectness_logits: Tensor,
    class_logits: Tensor,
    grid_sizes: list[tuple[int, int]],
    strides: list[int],
    anchors: Tensor,
    targets: Targets,
    box_gain: float = 0.05,
    obj_gain: float = 1.0,
    cls_gain: float = 0.5,
) -> dict[str, Tensor]:
    """{"box", "obj", "cls"} of box_logits (B, A, 4), objectness_logits (B, A), class_logits (B, A, K)."""
    raise NotImplementedError
