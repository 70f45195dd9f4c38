"""RoIAlign on a GPU, forward and backward: the sums of kernels.roi_align without its matrix, deterministic.

    pooled[n, i, j] = sum_{y, x} v_ni(y) w_nj(x) map[y, x]
    map_bar[y, x]   = sum_{n, i, j} v_ni(y) w_nj(x) pooled_bar[n, i, j]

v and w are the weights of a bin's samples along each axis. In the forward pass a program computes all bins of one box.
In the backward pass a program owns a tile of pixels and adds the boxes of its image and level in their order. No two
programs write to one number, so the result does not depend on their order. Positions of samples are rounded as in the
specification.
"""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON, refuse_second_derivative

SIDE = 8  # of a tile of pixels

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _sample(start, bin_size, bin_index, step, size):
        # The position of a sample on an axis of `size` pixels, clamped, and its weight: 1, or 0 if it is outside.
        place = (start + bin_index * bin_size) + step * bin_size
        is_inside = (place >= -1) & (place <= size)  # False for nan
        place = tl.minimum(tl.maximum(tl.where(is_inside, place, 0.0), 0.0), size - 1)
        return place, is_inside.to(tl.float32)

    @triton.jit
    def _pool_kernel(
        rows_ptr, geometry_ptr, cells_ptr, pooled_ptr, n_channels,
        BINS: tl.constexpr, PADDED_BINS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0).to(tl.int64)
        bin_index = tl.arange(0, PADDED_BINS)  # of BINS * BINS
        i = (bin_index // BINS).to(tl.float32)
        j = (bin_index % BINS).to(tl.float32)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        is_stored = (bin_index < BINS * BINS)[:, None] & (channel < n_channels)[None, :]
        y_start = tl.load(geometry_ptr + 4 * n)
        y_size = tl.load(geometry_ptr + 4 * n + 1)
        x_start = tl.load(geometry_ptr + 4 * n + 2)
        x_size = tl.load(geometry_ptr + 4 * n + 3)
        height = tl.load(cells_ptr + 3 * n)
        width = tl.load(cells_ptr + 3 * n + 1)
        first = tl.load(cells_ptr + 3 * n + 2).to(tl.int64)
        pooled = tl.zeros((PADDED_BINS, CHANNELS), tl.float32)
        for sample in tl.static_range(SAMPLES * SAMPLES):
            y, y_counts = _sample(y_start, y_size, i, (sample // SAMPLES + 0.5) / SAMPLES, height.to(tl.float32))
            x, x_counts = _sample(x_start, x_size, j, (sample % SAMPLES + 0.5) / SAMPLES, width.to(tl.float32))
            low_y = tl.floor(y)
            low_x = tl.floor(x)
            for corner in tl.static_range(4):
                y_weight = y_counts * (y - low_y if corner // 2 else 1.0 - (y - low_y)) * (1.0 / SAMPLES)
                x_weight = x_counts * (x - low_x if corner % 2 else 1.0 - (x - low_x)) * (1.0 / SAMPLES)
                weight = y_weight * x_weight
                # Behind the last pixel the weight is 0, so nothing is read there.
                pixel = first + (low_y.to(tl.int32) + corner // 2) * width + low_x.to(tl.int32) + corner % 2
                value = tl.load(
                    rows_ptr + pixel[:, None] * n_channels + channel[None, :],
                    mask=is_stored & (weight > 0)[:, None],
                    other=0.0,
                )
                pooled += weight[:, None] * value.to(tl.float32)
        where = (n * (BINS * BINS) + bin_index)[:, None] * n_channels + channel[None, :]
        tl.store(pooled_ptr + where, pooled.to(pooled_ptr.dtype.element_ty), mask=is_stored)

    @triton.jit
    def _spread_kernel(
        pooled_ptr, geometry_ptr, order_ptr, begin_ptr, rows_ptr, n_channels, height, width, first, first_segment,
        BINS: tl.constexpr, PADDED_BINS: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr,
        SIDE: tl.constexpr,
    ):  # fmt: skip
        tiles_across = tl.cdiv(width, SIDE)
        tiles = tiles_across * tl.cdiv(height, SIDE)
        image = tl.program_id(0) // tiles
        tile_y = ((tl.program_id(0) % tiles) // tiles_across) * SIDE
        tile_x = (tl.program_id(0) % tiles_across) * SIDE
        y = tile_y + tl.arange(0, SIDE * SIDE) // SIDE
        x = tile_x + tl.arange(0, SIDE * SIDE) % SIDE
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        bin_index = tl.arange(0, PADDED_BINS)  # of BINS * BINS
        i = (bin_index // BINS).to(tl.float32)
        j = (bin_index % BINS).to(tl.float32)
        is_read = (bin_index < BINS * BINS)[:, None] & (channel < n_channels)[None, :]
        gradient = tl.zeros((SIDE * SIDE, CHANNELS), tl.float32)
        for place in range(tl.load(begin_ptr + first_segment + image), tl.load(begin_ptr + first_segment + image + 1)):
            n = tl.load(order_ptr + place)
            y_start = tl.load(geometry_ptr + 4 * n)
            y_size = tl.load(geometry_ptr + 4 * n + 1)
            x_start = tl.load(geometry_ptr + 4 * n + 2)
            x_size = tl.load(geometry_ptr + 4 * n + 3)
            is_near = (y_start < tile_y + SIDE + 1) & (y_start + BINS * y_size > tile_y - 2)
            if is_near & (x_start < tile_x + SIDE + 1) & (x_start + BINS * x_size > tile_x - 2):
                y_weight = tl.zeros((SIDE * SIDE, PADDED_BINS), tl.float32)
                x_weight = tl.zeros((SIDE * SIDE, PADDED_BINS), tl.float32)
                for sample in tl.static_range(SAMPLES):
                    at, counts = _sample(y_start, y_size, i, (sample + 0.5) / SAMPLES, height.to(tl.float32))
                    y_weight += counts * tl.maximum(1.0 - tl.abs(at[None, :] - y[:, None].to(tl.float32)), 0.0)
                    at, counts = _sample(x_start, x_size, j, (sample + 0.5) / SAMPLES, width.to(tl.float32))
                    x_weight += counts * tl.maximum(1.0 - tl.abs(at[None, :] - x[:, None].to(tl.float32)), 0.0)
                weight = y_weight * x_weight * (1.0 / (SAMPLES * SAMPLES))  # (pixels, bins)
                where = (n * (BINS * BINS) + bin_index)[:, None] * n_channels + channel[None, :]
                pooled = tl.load(pooled_ptr + where, mask=is_read, other=0.0).to(tl.float32)  # (bins, channels)
                gradient += tl.dot(weight, pooled, input_precision="ieee")
        pixel = first + (image.to(tl.int64) * height + y) * width + x
        is_pixel = (y < height) & (x < width)
        tl.store(
            rows_ptr + pixel[:, None] * n_channels + channel[None, :],
            gradient.to(rows_ptr.dtype.element_ty),
            mask=is_pixel[:, None] & (channel < n_channels)[None, :],
        )


def roi_align_triton(
    maps: list[Tensor],
    boxes_xyxy: Tensor,
    image: Tensor,
    level: Tensor,
    strides: list[int],
    output_size: int,
    samples: int,
) -> Tensor:
    """The contract of kernels.roi_align.roi_align for at least one box and channel, and maps that are not float64."""
    rows = torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps])  # (P, C)
    images = maps[0].shape[0]
    levels = [(stride, *m.shape[2:]) for stride, m in zip(strides, maps)]
    sizes = torch.tensor(levels, dtype=torch.int32)  # (L, 3): stride, height, width
    pixels = sizes[:, 1] * sizes[:, 2] * images
    table = torch.cat((sizes, (pixels.cumsum(0) - pixels).int()[:, None]), 1)  # and the first pixel of the level
    table = table.to(rows.device, non_blocking=True)
    stride, height, width, first = table[level].unbind(1)  # (N,) each
    boxes = boxes_xyxy.detach().float() / stride[:, None]
    bin_size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1) / output_size  # (N, 2), x and y
    geometry = torch.stack((boxes[:, 1], bin_size[:, 1], boxes[:, 0], bin_size[:, 0]), 1)
    cells = torch.stack((height, width, first + image.int() * height * width), 1)
    segment, order = (level * images + image).sort(stable=True)
    begin = torch.searchsorted(segment, torch.arange(len(maps) * images + 1, device=rows.device))
    pooled = _RoiAlign.apply(rows, geometry, cells, order, begin, levels, images, output_size, samples)
    return pooled.permute(0, 3, 1, 2)  # (N, C, output_size, output_size)


def _tile(bins: int) -> dict[str, int]:
    """The tile of a program in bins and channels; a matrix product needs at least 16 on each side."""
    padded = max(16, triton.next_power_of_2(bins * bins))
    return {"BINS": bins, "PADDED_BINS": padded, "CHANNELS": min(max(16, 2048 // padded), 64)}


class _RoiAlign(torch.autograd.Function):
    """rows (P, C), geometry (N, 4): start and bin size of y and of x, cells (N, 3): height, width, first pixel."""

    @staticmethod
    def forward(ctx, rows, geometry, cells, order, begin, levels, images, bins, samples):
        n_channels, tile = rows.shape[1], _tile(bins)
        pooled = torch.empty(len(geometry), bins, bins, n_channels, dtype=rows.dtype, device=rows.device)
        with torch.cuda.device_of(rows):
            _pool_kernel[(len(geometry), triton.cdiv(n_channels, tile["CHANNELS"]))](
                rows, geometry, cells, pooled, n_channels, SAMPLES=samples, **tile, enable_fp_fusion=False
            )
        ctx.save_for_backward(geometry, order, begin)
        ctx.levels, ctx.images, ctx.bins, ctx.samples, ctx.num_pixels = levels, images, bins, samples, len(rows)
        return pooled

    @staticmethod
    def backward(ctx, pooled):
        refuse_second_derivative("roi_align")
        geometry, order, begin = ctx.saved_tensors
        pooled = pooled.contiguous()  # (N, bins, bins, C)
        n_channels, tile = pooled.shape[3], _tile(ctx.bins)
        rows = torch.empty(ctx.num_pixels, n_channels, dtype=pooled.dtype, device=pooled.device)
        first = 0
        with torch.cuda.device_of(rows):
            for level, (_, height, width) in enumerate(ctx.levels):
                tiles = ctx.images * triton.cdiv(height, SIDE) * triton.cdiv(width, SIDE)
                _spread_kernel[(tiles, triton.cdiv(n_channels, tile["CHANNELS"]))](
                    pooled, geometry, order, begin, rows, n_channels, height, width, first, level * ctx.images,
                    SAMPLES=ctx.samples, **tile, SIDE=SIDE, enable_fp_fusion=False,
                )  # fmt: skip
                first += ctx.images * height * width
        return rows, None, None, None, None, None, None, None, None
