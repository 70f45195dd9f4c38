"""RoIAlign (He et al., "Mask R-CNN", arXiv:1703.06870) over the levels of a pyramid, as one sparse weighted gather.

The value of a bin is the mean of S x S bilinear samples, so it is a fixed weighted sum of a few pixels. The bins of all
boxes are the rows of one sparse matrix W over the pixels of all levels:

    pooled = W x,    x_bar = W^T pooled_bar

x (P, C) are the pixels of the maps, channels last. Both products are `embedding_bag`, which runs on all cores and reads
the C channels of an entry as one row; the backward pass of the public CPU kernel adds single numbers on one core.
Samples that share pixels share entries: a bin of two by two pixels has 9 entries, not 16.

Along one axis, a sample at p (in pixels of the map, with centers at integers) gives pixel r the weight

    w(r) = max(0, 1 - |clamp(p, 0, H - 1) - r|)  if -1 <= p <= H, else 0

An entry of W is the product of the weights of its row and its column, each a mean over S samples.

As in the public detectors with `aligned=False` (torchvision's Faster R-CNN), the corner x1 / stride is used as a
position where pixel centers are integers, half a pixel off the true one; boxes narrower than one pixel of their map are
widened to one.

On a CUDA device kernels.roi_align_triton computes the same sums without the matrix (kernels.backend).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.roi_align_triton import roi_align_triton
from layers.precision import at_least_float32

CANONICAL_LEVEL, CANONICAL_SIZE = 4, 224  # a box of 224 x 224 pixels is pooled from p4, at stride 2^4


def assign_levels(boxes_xyxy: Tensor, strides: list[int]) -> Tensor:
    """boxes (N, 4), pixels -> (N,) int64: the index in `strides` of the map from which each box is pooled.

        k = floor(4 + log2(sqrt(w h) / 224))

    clamped to the levels that exist (FPN, arXiv:1612.03144, eq. 1). strides are powers of two, finest first, each twice
    or equal to the one before; of maps with the same stride the first is used. Boxes with area 0 or nan use the finest.
    """
    lowest, highest = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    # 1e-6 as in the public code: a box exactly on a boundary gets the coarser level in spite of rounding.
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=0).prod(1).nan_to_num()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(area.sqrt() / CANONICAL_SIZE) + 1e-6)
    return level.clamp(lowest, highest).long() - lowest


def roi_align(
    maps: list[Tensor],
    boxes_xyxy: Tensor,
    image: Tensor,
    level: Tensor,
    *,
    strides: list[int],
    output_size: int = 7,
    samples: int = 2,
) -> Tensor:
    """The maps under N boxes, resampled to one size: (N, C, output_size, output_size), channels last in memory.

    Args:
        maps: (B, C, H_l, W_l) for each level; gradients flow into them. strides: pixels of the image per pixel of each.
        boxes_xyxy: (N, 4), pixels of the image; without gradient. Samples outside the image are 0.
        image, level: (N,) int64, the row 0..B-1 of the batch and the map of each box.
        samples: S, per bin and axis.
    Sums are at least float32, and the result has the dtype of the maps. N may be 0. A side below one pixel of the map
    counts as one pixel; non-finite boxes give 0.
    """
    unsupported = "the maps are float64, expected float32 or narrower" if maps[0].dtype == torch.float64 else None
    if use_triton("roi_align", *maps, boxes_xyxy, image, level, unsupported=unsupported):
        if len(boxes_xyxy) and all(m.numel() for m in maps):
            return roi_align_triton(maps, boxes_xyxy, image, level, strides, output_size, samples)
    rows = pixel_rows(maps)
    matrix = _pooling_matrix(
        [m.shape for m in maps], boxes_xyxy.to(rows.dtype), image, level, strides, output_size, samples
    )
    pooled = sparse_product(*matrix, rows)  # (N * output_size^2, C)
    shape = (len(boxes_xyxy), output_size, output_size, rows.shape[1])
    return pooled.view(shape).permute(0, 3, 1, 2).to(maps[0].dtype)


def pixel_rows(maps: list[Tensor]) -> Tensor:
    """maps (B, C, H_l, W_l) -> their pixels (P, C), level by level, image by image, row by row; at least float32."""
    return at_least_float32(torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]))


def sparse_product(columns: Tensor, offsets: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """W x for a sparse matrix W (N, P) in compressed rows and x (P, C): (N, C), with a gradient for x.

    Row n has the entries weights[e] in columns[e] for offsets[n] <= e < offsets[n + 1]. columns (E,) and offsets
    (N + 1,) have one integer dtype, weights (E,) has that of x.
    """
    return _SparseProduct.apply(x, columns, offsets, weights)


@torch.no_grad()
def _pooling_matrix(
    shapes: list[torch.Size], boxes: Tensor, image: Tensor, level: Tensor, strides: list[int], bins: int, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """W in compressed rows, one per bin: pixels (E,), offsets of the bins (N * bins^2 + 1,), weights (E,)."""
    table = []  # stride, height, width, number of pixels of the levels before
    start = 0
    for (B, _, height, width), level_stride in zip(shapes, strides):
        table.append([level_stride, height, width, start])
        start += B * height * width
    # 32-bit integers: half the memory to sort, and the maps of a batch hold fewer than 2^31 pixels.
    stride, H, W, first = torch.tensor(table, dtype=torch.int32, device=boxes.device)[level].unbind(1)  # (N,) each
    boxes = boxes / stride[:, None]
    y, y_weight = _axis_weights(boxes[:, 1], boxes[:, 3], H, bins, samples)  # (N, bins, T)
    x, x_weight = _axis_weights(boxes[:, 0], boxes[:, 2], W, bins, samples)
    y = (first + image.int() * H * W)[:, None, None] + y * W[:, None, None]
    pixel = y[:, :, None, :, None] + x[:, None, :, None, :]  # (N, bins, bins, T, T)
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    is_used = weight > 0
    counts = is_used.flatten(0, 2).sum((1, 2))  # (N * bins^2,)
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return pixel[is_used], offsets, weight[is_used]


def _axis_weights(start: Tensor, end: Tensor, size: Tensor, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis, in pixels of the map: the pixels (N, bins, T) that each bin reads, and their weights.

    start, end (N,): edges of the boxes; size (N,): lengths of their maps. T = 2 S, two per sample. The pixels of a bin
    with a weight above 0 are distinct.
    """
    bin_size = (end - start).clamp(min=1) / bins  # (N,)
    bin_index = torch.arange(bins, device=start.device, dtype=start.dtype)
    steps = (torch.arange(samples, device=start.device, dtype=start.dtype) + 0.5) / samples  # in bins
    # In this order the positions are rounded as in torchvision.
    bin_start = start[:, None] + bin_index * bin_size[:, None]  # (N, bins)
    place = (bin_start[:, :, None] + (steps * bin_size[:, None])[:, None]).flatten(1)  # (N, bins * S)
    size = size[:, None].to(place.dtype)
    is_inside = (place >= -1) & (place <= size)  # False for nan
    place = torch.where(is_inside, place, 0).clamp(min=0).minimum(size - 1)
    low = place.floor()
    high_weight = (place - low) * is_inside / samples
    low_weight = (is_inside.to(place.dtype) / samples) - high_weight
    pixel = torch.stack((low, (low + 1).minimum(size - 1)), -1).int().unflatten(1, (bins, samples)).flatten(2)
    weight = torch.stack((low_weight, high_weight), -1).unflatten(1, (bins, samples)).flatten(2)  # (N, bins, 2 S)
    # The first of equal pixels gets their total weight.
    is_same = pixel[..., :, None] == pixel[..., None, :]  # (N, bins, T, T)
    is_first = ~is_same.tril(-1).any(-1)
    return pixel, (is_same * weight[..., None, :]).sum(-1) * is_first


class _SparseProduct(torch.autograd.Function):
    """W x for a sparse matrix W in compressed rows and a dense x (P, C). The backward pass is the same with W^T.

    The backward pass of `embedding_bag` scatters entry by entry; this one gathers, like the forward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, columns: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(columns, offsets, weights)
        ctx.num_columns = len(x)
        return F.embedding_bag(columns, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        columns, offsets, weights = ctx.saved_tensors
        transposed = _transpose(columns, offsets, weights, ctx.num_columns)
        return _SparseProduct.apply(gradient.contiguous(), *transposed), None, None, None


@torch.no_grad()
def _transpose(columns: Tensor, offsets: Tensor, weights: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed matrix in compressed rows."""
    rows = torch.repeat_interleave(offsets.diff()).int()  # (E,): 0, 0, 1, 1, 1, ...
    _, order = columns.sort(stable=True)
    counts = columns.bincount(minlength=num_columns)
    return rows[order], F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)), weights[order]
