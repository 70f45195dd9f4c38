"""Fused KL divergence of softmax rows under a temperature: Hinton's loss, and CWD's over pixels.

    L        = T^2 / M * sum_n w_n KL(p^t_n || p^s_n),    p_n = softmax over the K columns of logit_n / T
    dL/ds_nk = T / M * w_n (p^s_nk - p^t_nk)

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, sec. 2. The kernel reads s and t and
writes dL/ds: three passes over a tensor. A row of up to WHOLE_ROW columns stays in registers. A longer row is read
twice, first for its maximum and its normaliser (online softmax, Milakov and Gimelshein, arXiv:1805.02867): five passes,
partly from the cache. So is a row of more than STRIDED_ROW columns that are not neighbours in memory, as in a
channels_last map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import HAS_TRITON, at_temperature, not_floating, scale_of, use_triton
from kernels.rows import Tile, require_rows, row_loss_triton
from layers.precision import compute_dtype

WHOLE_ROW = 8192  # columns that are neighbours in memory: 32 per thread and tensor, with 8 warps
STRIDED_ROW = 128  # columns that are not neighbours; 32 neighbouring rows are then read together


def temperature_kl_eager(
    s_logits: Tensor, t_logits: Tensor, temperature: float, weight: Tensor | None, normaliser: Tensor | float
) -> Tensor:
    """Specification: (..., K), (..., K), weight (...) or None for 1, normaliser M -> the scalar L."""
    dtype = compute_dtype(s_logits, t_logits)
    s, t = s_logits.to(dtype), t_logits.detach().to(dtype)
    log_p_s, log_p_t = (F.log_softmax(at_temperature(z, temperature), dim=-1) for z in (s, t))  # (..., K)
    kl = (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1)  # (...)
    if weight is not None:
        kl = weight.detach().to(dtype) * kl
    return scale_of(temperature**2, normaliser, kl) * kl.sum()


if HAS_TRITON:
    import triton
    import triton.language as tl

    PADDING = tl.constexpr(-1e30)  # exp of it is 0; unlike -inf, it minus itself is not nan

    @triton.jit
    def _load(ptr, row, column, row_stride, column_stride, inside, TEMPERATURE: tl.constexpr, DTYPE: tl.constexpr):
        x = tl.load(ptr + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0.0)
        return tl.where(inside, x.to(DTYPE) * (1 / TEMPERATURE), PADDING)

    @triton.jit
    def _kl_kernel(
        s_ptr, t_ptr, weight_ptr, scale_ptr, loss_ptr, gradient_ptr,
        n_rows, n_columns,
        s_outer, s_row, s_column, t_outer, t_row, t_column, g_outer, g_row, g_column,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_WHOLE: tl.constexpr,
        HAS_WEIGHT: tl.constexpr, HAS_GRADIENT: tl.constexpr, IS_WIDE: tl.constexpr,
        TEMPERATURE: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        # A program takes ROWS rows of one outer index. Tensors are (O, n_rows, n_columns) with any strides.
        tiles = tl.cdiv(n_rows, ROWS)
        outer = (tl.program_id(0) // tiles).to(tl.int64)
        tile = tl.program_id(0) % tiles
        column = tl.arange(0, COLUMNS)
        if IS_WIDE:
            tile = tile.to(tl.int64)
            column = column.to(tl.int64)
        row = tile * ROWS + tl.arange(0, ROWS)
        s_ptr += outer * s_outer
        t_ptr += outer * t_outer
        gradient_ptr += outer * g_outer
        is_row = row < n_rows
        scale = tl.load(scale_ptr)
        if HAS_WEIGHT:
            weight = scale * tl.load(weight_ptr + outer * n_rows + row, mask=is_row, other=0.0)  # (ROWS,)
        else:
            weight = tl.where(is_row, scale, 0.0)

        s_top = tl.full((ROWS,), PADDING, DTYPE)
        t_top = tl.full((ROWS,), PADDING, DTYPE)
        s_sum = tl.zeros((ROWS,), DTYPE)
        t_sum = tl.zeros((ROWS,), DTYPE)
        if IS_WHOLE:
            inside = is_row[:, None] & (column < n_columns)[None, :]
            s = _load(s_ptr, row, column, s_row, s_column, inside, TEMPERATURE, DTYPE)  # (ROWS, COLUMNS)
            t = _load(t_ptr, row, column, t_row, t_column, inside, TEMPERATURE, DTYPE)
            s_top = tl.max(s, 1)
            t_top = tl.max(t, 1)
            s_sum = tl.sum(tl.exp(s - s_top[:, None]), 1)
            t_sum = tl.sum(tl.exp(t - t_top[:, None]), 1)
        else:
            for start in range(0, n_columns, COLUMNS):
                inside = is_row[:, None] & (start + column < n_columns)[None, :]
                s = _load(s_ptr, row, start + column, s_row, s_column, inside, TEMPERATURE, DTYPE)
                t = _load(t_ptr, row, start + column, t_row, t_column, inside, TEMPERATURE, DTYPE)
                s_higher = tl.maximum(s_top, tl.max(s, 1))
                t_higher = tl.maximum(t_top, tl.max(t, 1))
                s_sum = s_sum * tl.exp(s_top - s_higher) + tl.sum(tl.exp(s - s_higher[:, None]), 1)
                t_sum = t_sum * tl.exp(t_top - t_higher) + tl.sum(tl.exp(t - t_higher[:, None]), 1)
                s_top = s_higher
                t_top = t_higher
        s_log_sum = tl.log(s_sum)
        t_log_sum = tl.log(t_sum)

        kl = tl.zeros((ROWS,), DTYPE)
        for start in range(0, 1 if IS_WHOLE else n_columns, COLUMNS):
            inside = is_row[:, None] & (start + column < n_columns)[None, :]
            if not IS_WHOLE:
                s = _load(s_ptr, row, start + column, s_row, s_column, inside, TEMPERATURE, DTYPE)
                t = _load(t_ptr, row, start + column, t_row, t_column, inside, TEMPERATURE, DTYPE)
            log_p_s = s - s_top[:, None] - s_log_sum[:, None]
            log_p_t = t - t_top[:, None] - t_log_sum[:, None]
            p_t = tl.exp(log_p_t)
            kl += tl.sum(p_t * (log_p_t - log_p_s), 1)
            if HAS_GRADIENT:
                gradient = (weight * (1 / TEMPERATURE))[:, None] * (tl.exp(log_p_s) - p_t)
                where = row[:, None] * g_row + (start + column)[None, :] * g_column
                tl.store(gradient_ptr + where, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        tl.store(loss_ptr + tl.program_id(0), tl.sum(weight * kl, 0))


def temperature_kl_triton(
    s_logits: Tensor, t_logits: Tensor, temperature: float, weight: Tensor | None, normaliser: Tensor | float
) -> Tensor:
    """The kernel, with its gradient: the contract of temperature_kl_eager, for at least one element."""
    return row_loss_triton(_kl_kernel, tile_of, s_logits, t_logits, temperature, weight, normaliser)


def tile_of(n_columns: int, column_stride: int, dtype: torch.dtype) -> Tile:
    """All columns of a few rows: 16 elements per thread and tensor at a time, 32 in long or strided rows."""
    columns = max(16, 1 << (n_columns - 1).bit_length())
    if column_stride != 1:
        columns = min(columns, STRIDED_ROW)
        rows, warps = min(4096 // columns, 128), 4
    elif n_columns > WHOLE_ROW:
        rows, columns, warps = 1, 4096, 8
    else:
        rows, warps = max(2048 // columns, 1), 4 if columns <= 2048 else 8
    return Tile(rows, columns, True, {"IS_WHOLE": n_columns <= columns, "num_warps": warps})


def temperature_kl(
    s_logits: Tensor,
    t_logits: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    normaliser: Tensor | float = 1.0,
) -> Tensor:
    """L (), the equation above, by the kernel or its specification (kernels.backend).

    Args:
        s_logits, t_logits: (..., K), of equal shape and any strides. Gradient flows to the student.
        temperature: T > 0. The kernel is compiled once per T.
        weight: w_n, (...), or None for 1. Weight and normaliser are detached.
        normaliser: M > 0, () or a number.
    Returns:
        float64 if an input is float64, else float32; 0 for empty inputs. ValueError for other shapes.
    """
    require_rows(s_logits, t_logits, weight)
    implementation = temperature_kl_eager
    unsupported = not_floating(s_logits=s_logits, t_logits=t_logits)
    if use_triton("temperature_kl", s_logits, t_logits, weight, unsupported=unsupported) and s_logits.numel():
        implementation = temperature_kl_triton
    return implementation(s_logits, t_logits, temperature, weight, normaliser)
