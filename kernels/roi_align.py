"""RoIAlign (He et al., "Mask R-CNN", arXiv:1703.06870) over the levels of a pyramid, as one sparse weighted gather.

A bin's value is the mean of S x S bilinear samples, so it is a fixed weighted sum of a few pixels. All bins of all
boxes are rows of one sparse matrix W over the pixels of all levels, and

    pooled = W x,    x_bar = W^T pooled_bar

with x (P, C) the maps' pixels, channels last. Both products are `embedding_bag`, which runs on all cores and reads the
C channels of an entry as one row; the backward of the public CPU kernel adds number to number on one core. Samples that
share pixels share entries: a bin of two by two pixels has 9 of them and not 16.

One axis at a time: a sample at p (pixels of the map, centers at integers) weighs pixel r with the tent

    w(r) = max(0, 1 - |clamp(p, 0, H - 1) - r|)  where -1 <= p <= H, else 0

and an entry of W is the product of the weights of its row and column, each a mean over S samples.

As the public detectors with `aligned=False` (torchvision's Faster R-CNN): a box's corner x1 / stride is the place of a
pixel's center, half a pixel off the true one, and boxes narrower than one pixel of their map are widened to one.

On a CUDA device kernels.roi_align_triton makes the same sums without the matrix, see kernels.backend.
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
    """boxes (N, 4), pixels -> (N,) int64: which of the maps, by its place in `strides`, each box is pooled from.

        k = floor(4 + log2(sqrt(w h) / 224))

    kept within the levels there are (FPN, arXiv:1612.03144, eq. 1). strides are powers of two, finest first, each twice
    the one before or equal to it; of maps of equal stride the first is taken. Boxes without area, or with
    a nan in place of it, take the finest.
    """
    lowest, highest = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    # 1e-6 as in the public code: a box exactly on a boundary belongs to the coarser level in spite of rounding.
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
        boxes_xyxy: (N, 4), pixels of the image; constants. They may reach out of it; what lies outside counts 0.
        image, level: (N,) int64, the row 0..B-1 and the map each box is pooled from.
        samples: S, per bin and axis.
    Sums are float32 for maps of half precision, and the result has the maps' dtype. N may be 0. Boxes of no or negative
    size are pooled as boxes of one pixel of their map; non-finite ones give 0.
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
    """W x of a sparse matrix W (N, P) in compressed rows and x (P, C), with a gradient for x: (N, C).

    Row n holds the entries weights[e] in columns[e] for offsets[n] <= e < offsets[n + 1]. columns (E,) and offsets
    (N + 1,) are of one integer dtype, weights (E,) of that of x.
    """
    return _SparseProduct.apply(x, columns, offsets, weights)


@torch.no_grad()
def _pooling_matrix(
    shapes: list[torch.Size], boxes: Tensor, image: Tensor, level: Tensor, strides: list[int], bins: int, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """W in compressed rows, a row for each bin: pixels (E,), where a bin's begin (N * bins^2 + 1,), weights (E,)."""
    table = []  # stride, height, width, pixels of the levels before it
    first = 0
    for (B, _, H, W), stride in zip(shapes, strides):
        table.append([stride, H, W, first])
        first += B * H * W
    # 32-bit numbers: half the memory to sort, and the maps of a batch hold fewer than 2^31 pixels.
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
    """Along one axis, in pixels of the map: which pixels (N, bins, T) each bin reads, and with what weight.

    start, end (N,): edges of the boxes; size (N,): of their maps. The T pixels of a bin are distinct where the weight
    is not 0. T = 2 S, two for each sample.
    """
    bin_size = (end - start).clamp(min=1) / bins  # (N,)
    bin_index = torch.arange(bins, device=start.device, dtype=start.dtype)
    steps = (torch.arange(samples, device=start.device, dtype=start.dtype) + 0.5) / samples  # in bins
    # In this order the places round as torchvision's do; a map may be steep there.
    bin_start = start[:, None] + bin_index * bin_size[:, None]  # (N, bins)
    place = (bin_start[:, :, None] + (steps * bin_size[:, None])[:, None]).flatten(1)  # (N, bins * S)
    size = size[:, None].to(place.dtype)
    is_inside = (place >= -1) & (place <= size)  # nan is not
    place = torch.where(is_inside, place, 0).clamp(min=0).minimum(size - 1)
    low = place.floor()
    high_weight = (place - low) * is_inside / samples
    low_weight = (is_inside.to(place.dtype) / samples) - high_weight
    pixel = torch.stack((low, (low + 1).minimum(size - 1)), -1).int().unflatten(1, (bins, samples)).flatten(2)
    weight = torch.stack((low_weight, high_weight), -1).unflatten(1, (bins, samples)).flatten(2)  # (N, bins, 2 S)
    # The first of equal pixels takes the weight of all.
    is_same = pixel[..., :, None] == pixel[..., None, :]  # (N, bins, T, T)
    is_first = ~is_same.tril(-1).any(-1)
    return pixel, (is_same * weight[..., None, :]).sum(-1) * is_first


class _SparseProduct(torch.autograd.Function):
    """W x for a sparse matrix W in compressed rows and a dense x (P, C); the backward is the same with W^T.

    `embedding_bag` has a backward of its own, which adds row to row for each entry; this one gathers, as the forward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, columns: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(columns, offsets, weights)
        ctx.num_columns = len(x)
        return F.embedding_bag(columns, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        transposed = _transpose(*ctx.saved_tensors, ctx.num_columns)
        return _SparseProduct.apply(gradient.contiguous(), *transposed), None, None, None


@torch.no_grad()
def _transpose(columns: Tensor, offsets: Tensor, weights: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed matrix in compressed rows."""
    rows = torch.repeat_interleave(offsets.diff()).int()  # (E,): 0, 0, 1, 1, 1, ...
    _, order = columns.sort(stable=True)
    counts = columns.bincount(minlength=num_columns)
    return rows[order], F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)), weights[order]
