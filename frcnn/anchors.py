"""Anchors, and boxes as offsets from them (Ren et al., "Faster R-CNN", arXiv:1506.01497, sec. 3.1).

The offsets t of a box from a reference box r (an anchor or a proposal), by their centers and sizes:

    t = w * ((x - x_r) / w_r, (y - y_r) / h_r, log(width / w_r), log(height / h_r))

(R-CNN, arXiv:1311.2524, app. C). The weights w bring the offsets to about unit variance. They are (1, 1, 1, 1) for
anchors and (10, 10, 5, 5) for proposals, which are closer to their boxes, as in the authors' code.
"""

import math

import torch
from torch import Tensor

Weights = tuple[float, float, float, float]

RPN_WEIGHTS: Weights = (1.0, 1.0, 1.0, 1.0)
ROI_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_RATIO = math.log(1000 / 16)  # a decoded side is at most 62.5 times its reference's, so exp stays finite


def anchor_shapes(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """Anchors about the origin: (len(ratios) * len(sizes), 4) xyxy, ratio by ratio and, within a ratio, size by size.

    A size is the square root of the area, a ratio is height / width. Corners are rounded to whole pixels, as in the
    public code that trained the released weights.
    """
    size = torch.tensor(sizes, dtype=torch.float32)
    height_factor = torch.tensor(ratios, dtype=torch.float32).sqrt()
    width = ((1 / height_factor)[:, None] * size).flatten()
    height = (height_factor[:, None] * size).flatten()
    return (torch.stack((-width, -height, width, height), 1) / 2).round()


def place_anchors(shapes: list[Tensor], grid_sizes: list[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
    """Anchors (A, 4) xyxy in pixels, ordered by level, row, cell and, within a cell, as in `shapes`.

    shapes: for each level the anchors of one cell, about the origin. grid_sizes: (h, w) of each level's map.
    The anchors of cell (i, j) are centered at (j * (W // w), i * (H // h)): at the cell's corner, not at its center,
    and in steps of whole pixels. The grid of the coarsest level is rounded up, so its step is shorter than its stride.
    The released weights were trained with exactly these positions. Anchors may reach outside the image; none is
    dropped or clipped.
    """
    height, width = image_size
    placed = []
    for cell, (h, w) in zip(shapes, grid_sizes):
        y = torch.arange(h, dtype=cell.dtype, device=cell.device) * (height // h)
        x = torch.arange(w, dtype=cell.dtype, device=cell.device) * (width // w)
        y, x = torch.meshgrid(y, x, indexing="ij")
        corners = torch.stack((x, y, x, y), -1)  # (h, w, 4)
        placed.append((corners[:, :, None] + cell).flatten(0, 2))
    return torch.cat(placed)


def encode_boxes(boxes_xyxy: Tensor, references_xyxy: Tensor, weights: Weights) -> Tensor:
    """Boxes (N, 4) and references (N, 4), both with a positive area -> offsets (N, 4): the equation above."""
    center, size = _center_and_size(boxes_xyxy)
    reference_center, reference_size = _center_and_size(references_xyxy)
    shift = (center - reference_center) / reference_size
    return torch.cat((shift, torch.log(size / reference_size)), -1) * boxes_xyxy.new_tensor(weights)


def decode_boxes(deltas: Tensor, references_xyxy: Tensor, weights: Weights) -> Tensor:
    """Offsets (..., 4) from references (..., 4), broadcast -> boxes (..., 4) xyxy: inverse of encode_boxes.

    Log ratios of the sizes are clamped to at most MAX_LOG_RATIO.
    """
    shift, log_ratio = (deltas / deltas.new_tensor(weights)).chunk(2, -1)
    center, size = _center_and_size(references_xyxy)
    center = center + shift * size
    half = 0.5 * size * log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    return torch.cat((center - half, center + half), -1)


def _center_and_size(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    top_left, bottom_right = boxes_xyxy.chunk(2, -1)  # (..., 2) each
    size = bottom_right - top_left
    return top_left + 0.5 * size, size
