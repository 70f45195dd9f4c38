"""Multi-scale deformable attention: each query reads a few points of a pyramid of maps, not every cell.

Zhu et al., "Deformable DETR", arXiv:2010.04159, section 4.1. `deformable_attention_eager` is the specification; the
kernel computes the same without gradients, for a teacher. The projections around it belong to the model.

Differs from the paper's formula: the input is the sum of reference point and offset, so that each model can scale its
offsets in its own way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import HAS_TRITON, not_floating, use_triton


def deformable_attention_eager(
    value: Tensor, level_sizes: list[tuple[int, int]], points: Tensor, attention_prob: Tensor
) -> Tensor:
    """Specification of deformable_attention, differentiable in value, points and attention_prob."""
    B, _, M, D = value.shape
    Q = points.shape[1]
    cells = [height * width for height, width in level_sizes]
    dtype = torch.promote_types(value.dtype, torch.promote_types(points.dtype, attention_prob.dtype))
    out = torch.zeros(B * M, D, Q, dtype=dtype, device=value.device)
    if out.numel():
        grid = 2 * points.to(dtype) - 1  # grid_sample takes -1..1
        for level, (x, (height, width)) in enumerate(zip(value.to(dtype).split(cells, dim=1), level_sizes)):
            maps = x.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
            at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B M, Q, P, 2)
            read = F.grid_sample(maps, at, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B M, D, Q, P)
            prob = attention_prob[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B M, Q, P)
            out = out + torch.einsum("ndqp,nqp->ndq", read, prob.to(dtype))
    return out.unflatten(0, (B, M)).permute(0, 3, 1, 2).to(value.dtype)  # (B, Q, M, D)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _attention_kernel(
        value_ptr, table_ptr, points_ptr, prob_ptr, out_ptr, n_cells, n_queries,
        HEADS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
        QUERIES: tl.constexpr, PADDED_CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        # A program computes QUERIES outputs of one head of one image; each corner of a point is a row of D numbers.
        image = (tl.program_id(0) // HEADS).to(tl.int64)
        head = tl.program_id(0) % HEADS
        query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
        channel = tl.arange(0, PADDED_CHANNELS)
        is_query = query < n_queries
        read = ((image * n_queries + query) * HEADS + head) * (LEVELS * POINTS)
        out = tl.zeros((QUERIES, PADDED_CHANNELS), DTYPE)
        for level in range(LEVELS):
            height = tl.load(table_ptr + 3 * level)
            width = tl.load(table_ptr + 3 * level + 1)
            first = tl.load(table_ptr + 3 * level + 2)
            for point in range(POINTS):
                at = read + level * POINTS + point
                prob = tl.load(prob_ptr + at, mask=is_query, other=0.0).to(DTYPE)
                x = tl.load(points_ptr + 2 * at, mask=is_query, other=0.0).to(DTYPE) * width - 0.5
                y = tl.load(points_ptr + 2 * at + 1, mask=is_query, other=0.0).to(DTYPE) * height - 0.5
                x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)  # beyond, all is 0; so x fits an integer
                y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
                left = tl.floor(x)
                top = tl.floor(y)
                for corner in tl.static_range(4):
                    column = left.to(tl.int32) + corner % 2
                    row = top.to(tl.int32) + corner // 2
                    x_weight = x - left if corner % 2 else 1.0 - (x - left)
                    y_weight = y - top if corner // 2 else 1.0 - (y - top)
                    is_inside = is_query & (column >= 0) & (column < width) & (row >= 0) & (row < height)
                    cell = image * n_cells + first + row * width + column
                    read_value = tl.load(
                        value_ptr + (cell * HEADS + head)[:, None] * CHANNELS + channel[None, :],
                        mask=is_inside[:, None] & (channel < CHANNELS)[None, :],
                        other=0.0,
                    )
                    out += (prob * x_weight * y_weight)[:, None] * read_value.to(DTYPE)
        where = ((image * n_queries + query) * HEADS + head)[:, None] * CHANNELS + channel[None, :]
        is_stored = is_query[:, None] & (channel < CHANNELS)[None, :]
        tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=is_stored)


def deformable_attention_triton(
    value: Tensor, level_sizes: list[tuple[int, int]], points: Tensor, attention_prob: Tensor
) -> Tensor:
    """The kernel: the same contract for at least one output, without gradients; sums are at least float32."""
    B, S, M, D = value.shape
    Q, L, P = points.shape[1], *points.shape[3:5]
    sizes = torch.tensor(level_sizes, dtype=torch.int32)
    cells = sizes.prod(1)
    table = torch.cat((sizes, (cells.cumsum(0) - cells).int()[:, None]), 1).to(value.device, non_blocking=True)
    out = torch.empty(B, Q, M, D, dtype=value.dtype, device=value.device)
    is_double = torch.float64 in (value.dtype, points.dtype, attention_prob.dtype)
    with torch.cuda.device_of(value):
        _attention_kernel[(B * M, triton.cdiv(Q, 32))](
            value.contiguous(), table, points.contiguous(), attention_prob.contiguous(), out, S, Q,
            HEADS=M, CHANNELS=D, LEVELS=L, POINTS=P, QUERIES=32, PADDED_CHANNELS=triton.next_power_of_2(D),
            DTYPE=tl.float64 if is_double else tl.float32,
        )  # fmt: skip
    return out


def deformable_attention(
    value: Tensor, level_sizes: list[tuple[int, int]], points: Tensor, attention_prob: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples, head by head.

        out[b, q, m] = sum_{l, p} attention_prob[b, q, m, l, p] * x_l[b, m](points[b, q, m, l, p])

    x_l[b, m](u, v) is the bilinear interpolation of level l's map (H_l, W_l, D) at the fractions u of its width and v
    of its height. The center of cell (row i, column j) is at u = (j + 1/2) / W_l, v = (i + 1/2) / H_l. The map is
    padded with zeros.

    Args:
        value: (B, S, M, D) for M heads, S = sum_l H_l W_l cells: level by level, row by row.
        level_sizes: (H_l, W_l) of the L levels.
        points: (B, Q, M, L, P, 2), x then y, as fractions of the map; any real number.
        attention_prob: (B, Q, M, L, P); usually sums to 1 over the L * P points, but need not.
    Returns:
        (B, Q, M, D) in the dtype of `value`, computed in the widest dtype of the inputs. If an input requires grad, the
        specification runs (kernels.backend). B and Q may be 0. ValueError if S does not fit level_sizes.
    """
    if sum(height * width for height, width in level_sizes) != value.shape[1] or len(level_sizes) != points.shape[3]:
        levels = points.shape[3]
        raise ValueError(
            f"{value.shape[1]} cells and points on {levels} levels, expected levels of {level_sizes} (height, width)"
        )
    tensors = (value, points, attention_prob)
    unsupported = not_floating(value=value, points=points, attention_prob=attention_prob)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        unsupported = "the kernel computes no gradient, and an input requires one"
    implementation = deformable_attention_eager
    if use_triton("deformable_attention", *tensors, unsupported=unsupported) and value.numel() and points.numel():
        implementation = deformable_attention_triton
    return implementation(value, level_sizes, points, attention_prob)
