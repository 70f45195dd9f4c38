"""Regions of images and maps for CLIP: enlarge boxes, resample crops to one size, average maps over boxes.

Boxes are xyxy in pixels of the image, in continuous coordinates: pixel i covers i..i+1 and its center is i + 0.5.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def enlarge_boxes(boxes_xyxy: Tensor, image_size: tuple[int, int], context: float = 1.0) -> Tensor:
    """Boxes (N, 4) with `context` times their width and height about the same center, clipped to the image (H, W).

    Swapped corners are put in order. A side below one pixel after clipping becomes one pixel inside the image, so that
    every box has an area, even one that lies outside.
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
    """Keys' cubic convolution with a = -1/2 (IEEE Trans. ASSP 29, 1981), which image libraries call bicubic.

    3/2 |x|^3 - 5/2 |x|^2 + 1 below 1;  -1/2 |x|^3 + 5/2 |x|^2 - 4 |x| + 2 from 1 to 2;  0 beyond.
    """
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def sampling_weights(start: Tensor, stop: Tensor, length: int, size: int) -> Tensor:
    """The weight of each of `length` pixels in each of `size` samples of the interval start..stop: (N, size, length).

        w_nij = k((j + 1/2 - c_ni) / f_n) / sum_j,    c_ni = start_n + (i + 1/2) (stop_n - start_n) / size

    k is the cubic kernel, f_n = max(1, (stop_n - start_n) / size) widens it if the interval shrinks (antialiasing).
    The sum runs over the pixels of the image only, so that rows sum to 1. Pixels outside start..stop count too.
    """
    step = ((stop - start) / size)[:, None, None]  # (N, 1, 1)
    samples = torch.arange(size, dtype=start.dtype, device=start.device)[:, None] + 0.5
    pixels = torch.arange(length, dtype=start.dtype, device=start.device) + 0.5
    weights = cubic_kernel((pixels - start[:, None, None] - samples * step) / step.clamp(min=1))  # (N, size, length)
    return weights / weights.sum(-1, keepdim=True)


def resample_boxes(image: Tensor, boxes_xyxy: Tensor, size: int) -> Tensor:
    """image (C, H, W) in [0, 1], N boxes with an area (N, 4) -> crops (N, C, size, size), stretched to the square.

    Antialiased bicubic with centers at half pixels, as in CLIP's preprocessing; values are clamped to [0, 1]. The box
    of the whole image gives the resized image. N = 0 gives (0, C, size, size).
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

    Every batch but the last is full; without boxes there is none. Fewer than 2 * limit crops are in memory.
    """
    waiting = images.new_zeros(0, 3, size, size)
    for image, boxes_xyxy in zip(images, boxes_per_image, strict=True):
        for part in boxes_xyxy.split(limit):
            waiting = torch.cat((waiting, resample_boxes(image, part, size)))
            if len(waiting) >= limit:
                yield waiting[:limit]
                waiting = waiting[limit:]
    if len(waiting):
        yield waiting


def average_over_boxes(feature_map: Tensor, boxes_xyxy: Tensor, stride: int) -> Tensor:
    """Mean of a map (C, h, w), constant on cells of stride x stride pixels, over N boxes with an area: (N, C).

        out_n = sum_ij a_nij f_ij / sum_ij a_nij,    a_nij: the area of the intersection of box n and cell ij

    This is the exact integral over the box, without sampling points. N = 0 gives (0, C).
    """
    x1, y1, x2, y2 = boxes_xyxy.to(feature_map.dtype).unbind(1)
    rows = shared_length(y1, y2, feature_map.shape[1], stride)  # (N, h)
    columns = shared_length(x1, x2, feature_map.shape[2], stride)  # (N, w)
    area = rows.sum(1) * columns.sum(1)  # (N,)
    return torch.einsum("nh,chw,nw->nc", rows, feature_map, columns) / area[:, None]


def shared_length(start: Tensor, stop: Tensor, cells: int, stride: int) -> Tensor:
    """The length in pixels that each of N intervals start..stop shares with each cell: (N, cells)."""
    edges = torch.arange(cells + 1, dtype=start.dtype, device=start.device) * stride
    return (torch.minimum(stop[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])).clamp(min=0)
