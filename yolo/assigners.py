"""Which prediction learns which object.

- `task_aligned_assignment`: TOOD, arXiv:2108.07755, for the anchor-free heads (YOLOv8, YOLOv5u).
- `anchor_ratio_matches`: the shape-ratio rule of YOLOv5 (no paper), for the anchor head.
"""

import torch
from torch import Tensor


def make_points(
    grid_sizes: list[tuple[int, int]],
    strides: list[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Centers of all grid cells, in cells of their own level: points (A, 2) as x, y and strides (A, 1) in pixels.

    grid_sizes holds (h, w) per level. Levels follow one another, each row by row; A = sum of h * w. A center lies at
    x + 1/2, y + 1/2, so that points * strides are pixels.
    """
    points, steps = [], []
    for (h, w), stride in zip(grid_sizes, strides, strict=True):
        y = torch.arange(h, device=device, dtype=dtype) + 0.5
        x = torch.arange(w, device=device, dtype=dtype) + 0.5
        points.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), dim=-1).reshape(-1, 2))  # (h * w, 2)
        steps.append(torch.full((h * w, 1), float(stride), device=device, dtype=dtype))
    return torch.cat(points), torch.cat(steps)  # (A, 2), (A, 1)
