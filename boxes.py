"""Box formats and the IoU family, as pure functions of tensors.

Boxes are in the last dimension, of size 4; the others broadcast. The dtype is kept, and inputs may be empty.
Coordinates are continuous: the width of a box is x2 - x1, without "+1 pixel" (metrics.voc has its own functions).
"""

import math

import torch
from torch import Tensor


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) center x, center y, width, height."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) center x, center y, width, height -> (..., 4) corners. Inverse of xyxy_to_cxcywh."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) left, top, width, height (the format of COCO files)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), dim=-1)


def distances_to_xyxy(points: Tensor, ltrb: Tensor) -> Tensor:
    """points (..., 2) and distances left, top, right, bottom (..., 4), in one unit -> corners (..., 4)."""
    left_top, right_bottom = ltrb.chunk(2, dim=-1)  # (..., 2) each
    return torch.cat((points - left_top, points + right_bottom), dim=-1)


def xyxy_to_distances(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Inverse of distances_to_xyxy: points (..., 2), corners (..., 4) -> ltrb (..., 4), negative outside the box."""
    top_left, bottom_right = boxes_xyxy.chunk(2, dim=-1)  # (..., 2) each
    return torch.cat((points - top_left, bottom_right - points), dim=-1)


def clip_boxes(boxes_xyxy: Tensor, height: float, width: float) -> Tensor:
    """Clamp corners to the image 0..width, 0..height."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)  # a tensor of limits would make the host wait for its copy to the device
    return torch.stack((x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (...): width times height; 0 if either is negative."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(-1)


def paired_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Overlap area of broadcast pairs: (..., 4), (..., 4) -> (...)."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    return (bottom_right - top_left).clamp(min=0).prod(-1)


def paired_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU of broadcast pairs, intersection / (union + eps): (..., 4), (..., 4) -> (...); 0 for two empty boxes."""
    intersection = paired_intersection(a, b)
    return intersection / (box_area(a) + box_area(b) - intersection + eps)


def box_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU of every pair: (..., N, 4), (..., M, 4) -> (..., N, M)."""
    return paired_iou(a[..., :, None, :], b[..., None, :, :], eps)


def paired_giou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Generalized IoU of broadcast pairs: (..., 4), (..., 4) -> (...), in (-1, 1].

    Rezatofighi et al., "Generalized Intersection over Union", arXiv:1902.09630.

        GIoU = IoU - (hull - union) / hull        hull: the area of the smallest box around both

    eps is added to both denominators; with 0, one box of each pair must have an area.
    """
    intersection = paired_intersection(a, b)
    union = box_area(a) + box_area(b) - intersection
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def paired_ciou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of broadcast pairs: (..., 4), (..., 4) -> (...), in (-1.5, 1].

    Zheng et al., "Distance-IoU Loss", arXiv:1911.08287.

        CIoU = IoU - rho^2 / c^2 - alpha v
        v = 4 / pi^2 (atan(w_b / h_b) - atan(w_a / h_a))^2,    alpha = v / (1 - IoU + v)

    rho is the distance of the centers, c the diagonal of the smallest box around both; no gradient flows through alpha.
    eps is added to each height and to the union, as in public YOLO code; the result for a one-pixel box depends on it.
    Widths and heights are not clamped: the corners of a and b must be in order.
    """
    w_a, h_a = a[..., 2] - a[..., 0], a[..., 3] - a[..., 1] + eps
    w_b, h_b = b[..., 2] - b[..., 0], b[..., 3] - b[..., 1] + eps
    intersection = paired_intersection(a, b)
    iou = intersection / (w_a * h_a + w_b * h_b - intersection + eps)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    diagonal = hull.square().sum(-1) + eps  # c^2
    distance = (b[..., :2] + b[..., 2:] - a[..., :2] - a[..., 2:]).square().sum(-1) / 4  # rho^2
    v = (4 / math.pi**2) * (torch.atan(w_b / h_b) - torch.atan(w_a / h_a)).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance / diagonal + v * alpha)
