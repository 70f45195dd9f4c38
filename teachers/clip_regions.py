"""Regions of pictures and maps for CLIP: boxes made larger, crops resampled to one size, maps averaged over boxes.

Boxes are xyxy in pixels of the image, continuous, as everywhere; pixel i covers i..i+1 and its centre is i + 0.5.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def enlarge_boxes(boxes_xyxy: Tensor, image_size: tuple[int, int], context: float = 1.0) -> Tensor:
    """Boxes (N, 4) with `context` times their width and height about the same centre, clipped to the image (H, W).

    Corners in the wrong order are put right. What is left of a side below one pixel becomes one pixel, moved inside the
    image: every box then has an area, also one that lies outside.
    """
    height, width = image_size
    limit = boxes_xyxy.new_tensor([width, height])
    low = torch.minimum(boxes_xyxy[:, :2], boxes_xyxy[:, 2:])
    high = torch.maximum(boxes_xyxy[:, :2], boxes_xyxy[:, 2:])
    center, half = (low + high) / 2, (high - low) * (context / 2)
    low, high = (center - half).clamp(min=0).minimum(limit), (center + half).clamp(min=0).minimum(limit)
    is_thin = high - low < 1
    low = torch.where(is_thin, ((low + high) / 2 - 0.5).clamp(min=0).minimum(limit - 1), low)
    return torch.cat((low, torch.where(is_thin, low + 1, high)), dim=1)


def cubic_kernel(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2 (IEEE Trans. ASSP 29, 1981), what picture libraries call bicubic.

    3/2 |x|^3 - 5/2 |x|^2 + 1 below 1;  -1/2 |x|^3 + 5/2 |x|^2 - 4 |x| + 2 from 1 to 2;  0 beyond.
    """
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def sampling_weights(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """How much each of `length` pixels counts in each of `size` samples of the stretch start..stop: (N, size, length).

        w_nij = k((j + 1/2 - c_ni) / f_n) / sum_j,    c_ni = start_n + (i + 1/2) (stop_n - start_n) / size

    k the cubic kernel, f_n = max(1, (stop_n - start_n) / size): widened where it shrinks (antialiasing). Rows sum to 1;
    what the kernel would see beyond the picture's edge is left out of the sum. Pixels beyond start..stop count.
    """
    step = ((stop - start) / size)[:, None, None]  # (N, 1, 1)
    samples = torch.arange(size, dtype=start.dtype, device=start.device)[:, None] + 0.5
    pixels = torch.arange(length, dtype=start.dtype, device=start.device) + 0.5
    weights = cubic_kernel((pixels - start[:, None, None] - samples * step) / step.clamp(min=1))  # (N, size, length)
    return weights / weights.sum(-1, keepdim=True)


def resample_boxes(image: Tensor, boxes_xyxy: Tensor, size: int) -> Tensor:
    """image (C, H, W) in [0, 1], N boxes with an area (N, 4) -> crops (N, C, size, size), stretched to the square.

    Antialiased bicubic with centres at half pixels, as CLIP's own preprocessing resizes; overshoot is cut off at 0 and
    1. The box of the whole image is that image resized. N = 0 gives (0, C, size, size).
    """
    height, width = image.shape[1:]
    x1, y1, x2, y2 = boxes_xyxy.to(image.dtype).unbind(1)
    rows = sampling_weights(y1, y2, height, size)  # (N, size, H)
    columns = sampling_weights(x1, x2, width, size)  # (N, size, W)
    with torch.autocast(image.device.type, enabled=False):
        crops = rows[:, None] @ image[None] @ columns[:, None].transpose(-2, -1)  # (N, C, size, size)
    return crops.clamp(0, 1)


def crop_batches(images: Tensor, boxes_per_image: list[Tensor], size: int, limit: int) -> Iterator[Tensor]:
    """Crops of B images (B, 3, H, W) at B tensors (N_b, 4) of boxes, in their order: (n, 3, size, size), n <= limit.

    All are full but the last; no boxes give no batch. Less than 2 * limit crops are in memory at once.
    """
    waiting = images.new_zeros(0, 3, size, size)
    for image, boxes_xyxy in zip(images, boxes_per_image, strict=True):
        for some in boxes_xyxy.split(limit):
            waiting = torch.cat((waiting, resample_boxes(image, some, size)))
            if len(waiting) >= limit:
                yield waiting[:limit]
                waiting = waiting[limit:]
    if len(waiting):
        yield waiting


def average_over_boxes(feature_map: Tensor, boxes_xyxy: Tensor, stride: int) -> Tensor:
    """Mean of a map (C, h, w), constant on cells of stride x stride pixels, over N boxes with an area: (N, C).

        out_n = sum_ij a_nij f_ij / sum_ij a_nij,    a_nij the area that box n and cell ij share

    The exact integral over the box, however small, without sampling points. N = 0 gives (0, C).
    """
    x1, y1, x2, y2 = boxes_xyxy.to(feature_map.dtype).unbind(1)
    rows = shared_length(y1, y2, feature_map.shape[1], stride)  # (N, h)
    columns = shared_length(x1, x2, feature_map.shape[2], stride)  # (N, w)
    area = rows.sum(1) * columns.sum(1)  # (N,)
    return torch.einsum("nh,chw,nw->nc", rows, feature_map, columns) / area[:, None]


def shared_length(start: Tensor, stop: Tensor, cells: int, stride: int) -> Tensor:
    """Pixels that each of N stretches start..stop shares with each cell of `stride` pixels: (N, cells)."""
    edges = torch.arange(cells + 1, dtype=start.dtype, device=start.device) * stride
    return (torch.minimum(stop[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])).clamp(min=0)
