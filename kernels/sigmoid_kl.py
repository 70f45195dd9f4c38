"""Fused KL divergence of independent sigmoids under a temperature, for heads without a softmax.

    L        = T^2 / M * sum_n w_n sum_k KL(Bern(p^t_nk) || Bern(p^s_nk)),    p = sigmoid(logit / T)
    dL/ds_nk = T / M * w_n (p^s_nk - p^t_nk)

kernels.temperature_kl is the same with a softmax. The kernel reads s and t and writes dL/ds: three passes over
a tensor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import HAS_TRITON, at_temperature, not_floating, scale_of, use_triton
from kernels.rows import Tile, require_rows, row_loss_triton
from layers.precision import compute_dtype


def sigmoid_kl_eager(
    s_logits: Tensor, t_logits: Tensor, temperature: float, weight: Tensor | None, normaliser: Tensor | float
) -> Tensor:
    """Specification: (..., K), (..., K), weight (...) or None for 1, normaliser M -> the scalar L."""
    dtype = compute_dtype(s_logits, t_logits)
    s, t = s_logits.to(dtype), t_logits.detach().to(dtype)
    kl = bernoulli_kl(at_temperature(s, temperature), at_temperature(t, temperature)).sum(-1)  # (...)
    if weight is not None:
        kl = weight.detach().to(dtype) * kl
    return scale_of(temperature**2, normaliser, kl) * kl.sum()


def bernoulli_kl(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """KL(Bern(sigmoid(t)) || Bern(sigmoid(s))) element by element, from logits, stable when saturated.

        KL = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q)),    p = sigmoid(t), q = sigmoid(s)
           = softplus(s) - softplus(t) + p (t - s)

    The second form is computed. It is exactly 0 at s = t with the exact gradient q - p, and takes a third of the time.
    """
    return softplus(s_logits) - softplus(t_logits) + t_logits.sigmoid() * (t_logits - s_logits)


def softplus(values: Tensor) -> Tensor:
    """log(1 + exp(value)), exact also in float64; torch's default returns `value` beyond 20."""
    return F.softplus(values, threshold=40)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _sigmoid_and_softplus(x, TERMS: tl.constexpr):
        # log(1 + e) = 2 artanh(z) for e = exp(-|x|) in (0, 1] and z = e / (2 + e) <= 1/3. This is exact to the last
        # digits even for a tiny e, for which the rounded sum 1 + e would be 1.
        e = tl.exp(-tl.abs(x))
        z = e / (2.0 + e)
        series = z * 0.0
        for term in tl.static_range(TERMS):
            series = series * (z * z) + 1.0 / (2 * (TERMS - term) - 1)
        sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        return sigmoid, tl.maximum(x, 0.0) + 2.0 * z * series

    @triton.jit
    def _kl_kernel(
        s_ptr, t_ptr, weight_ptr, scale_ptr, loss_ptr, gradient_ptr,
        n_rows, n_columns,
        s_outer, s_row, s_column, t_outer, t_row, t_column, g_outer, g_row, g_column,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        HAS_WEIGHT: tl.constexpr, HAS_GRADIENT: tl.constexpr, IS_WIDE: tl.constexpr,
        TEMPERATURE: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
    ):  # fmt: skip
        # A program takes ROWS rows and COLUMNS columns of one outer index of (O, n_rows, n_columns), any strides.
        row_tiles = tl.cdiv(n_rows, ROWS)
        column_tiles = tl.cdiv(n_columns, COLUMNS)
        outer = (tl.program_id(0) // (column_tiles * row_tiles)).to(tl.int64)
        row_tile = tl.program_id(0) // column_tiles % row_tiles
        column_tile = tl.program_id(0) % column_tiles
        if IS_WIDE:
            row_tile = row_tile.to(tl.int64)
            column_tile = column_tile.to(tl.int64)
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        is_row = row < n_rows
        inside = is_row[:, None] & (column < n_columns)[None, :]
        weight = tl.load(scale_ptr)
        if HAS_WEIGHT:
            weight = weight * tl.load(weight_ptr + outer * n_rows + row, mask=is_row, other=0.0)[:, None]
        s = tl.load(s_ptr + outer * s_outer + row[:, None] * s_row + column[None, :] * s_column, mask=inside, other=0.0)
        t = tl.load(t_ptr + outer * t_outer + row[:, None] * t_row + column[None, :] * t_column, mask=inside, other=0.0)
        s = s.to(DTYPE) * (1 / TEMPERATURE)
        t = t.to(DTYPE) * (1 / TEMPERATURE)
        p_s, softplus_s = _sigmoid_and_softplus(s, TERMS)
        p_t, softplus_t = _sigmoid_and_softplus(t, TERMS)
        kl = softplus_s - softplus_t + p_t * (t - s)  # 0 outside, where s = t = 0
        tl.store(loss_ptr + tl.program_id(0), tl.sum(weight * kl))
        if HAS_GRADIENT:
            gradient = weight * (1 / TEMPERATURE) * (p_s - p_t)
            where = outer * g_outer + row[:, None] * g_row + column[None, :] * g_column
            tl.store(gradient_ptr + where, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def sigmoid_kl_triton(
    s_logits: Tensor, t_logits: Tensor, temperature: float, weight: Tensor | None, normaliser: Tensor | float
) -> Tensor:
    """The kernel, with its gradient: the contract of sigmoid_kl_eager, for at least one element."""
    return row_loss_triton(_kl_kernel, tile_of, s_logits, t_logits, temperature, weight, normaliser)


def tile_of(n_columns: int, column_stride: int, dtype: torch.dtype) -> Tile:
    """2,048 elements, or 1,024 in float64; longer along the dimension that is contiguous in memory."""
    size, terms = (1024, 18) if dtype == torch.float64 else (2048, 8)
    columns = min(max(16, 1 << (n_columns - 1).bit_length()), size if column_stride == 1 else 64)
    return Tile(size // columns, columns, False, {"TERMS": terms, "num_warps": 4})


def sigmoid_kl(
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
    implementation = sigmoid_kl_eager
    unsupported = not_floating(s_logits=s_logits, t_logits=t_logits)
    if use_triton("sigmoid_kl", s_logits, t_logits, weight, unsupported=unsupported) and s_logits.numel():
        implementation = sigmoid_kl_triton
    return implementation(s_logits, t_logits, temperature, weight, normaliser)
