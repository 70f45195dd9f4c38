"""The common part of the fused losses over rows of logits: views of (..., K) as rows, and the launch of a kernel.

    L = T^2 / M * sum_n w_n KL_n(s_n, t_n)

Each loss has its own kernel for a tile of rows, which defines KL_n, and its own tile size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON, is_wide, require_shape, scale_of
from kernels.precomputed_gradient import empty_gradient, with_gradient
from layers.precision import compute_dtype

if HAS_TRITON:
    import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """The share of one program: `rows` rows by `columns` columns, or all columns in steps of `columns`."""

    rows: int
    columns: int
    all_columns: bool
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the kernel and its compilation

    def programs(self, outer: int, n_rows: int, n_columns: int) -> int:
        return outer * -(-n_rows // self.rows) * (1 if self.all_columns else -(-n_columns // self.columns))


def as_rows(x: Tensor) -> Tensor:
    """(..., K) -> (O, N, K), a view if the strides allow one."""
    return x[(None,) * (3 - x.dim())] if x.dim() < 3 else x.flatten(0, -3)


def require_rows(s_logits: Tensor, t_logits: Tensor, weight: Tensor | None) -> None:
    """ValueError unless the shapes are (..., K), (..., K) and (...): a kernel uses the shape of the student for all."""
    require_shape("t_logits", t_logits, s_logits.shape)
    if weight is not None:
        require_shape("weight", weight, s_logits.shape[:-1])


def row_loss_triton(
    kernel: Any,
    tile_of: Callable[[int, int, torch.dtype], Tile],
    s_logits: Tensor,
    t_logits: Tensor,
    temperature: float,
    weight: Tensor | None,
    normaliser: Tensor | float,
) -> Tensor:
    """L (), with its gradient if s_logits requires it, for at least one element.

    tile_of(K, stride of the columns, dtype of the computation) -> Tile.
    """
    s, t = as_rows(s_logits), as_rows(t_logits.detach())  # (O, N, K)
    outer, n_rows, n_columns = s.shape
    needs_gradient = torch.is_grad_enabled() and s.requires_grad
    dtype = compute_dtype(s, t)
    tile = tile_of(n_columns, s.stride(2), dtype)
    programs = tile.programs(outer, n_rows, n_columns)
    gradient = empty_gradient(s if needs_gradient else s[:0])
    losses = torch.empty(programs, dtype=dtype, device=s.device)
    scale = scale_of(temperature**2, normaliser, losses)
    with torch.cuda.device_of(s):
        kernel[(programs,)](
            s.detach(), t, scale if weight is None else weight.detach().to(dtype).contiguous(), scale, losses, gradient,
            n_rows, n_columns, *s.stride(), *t.stride(), *gradient.stride(),
            ROWS=tile.rows, COLUMNS=tile.columns,
            HAS_WEIGHT=weight is not None, HAS_GRADIENT=needs_gradient, IS_WIDE=is_wide(s, t, gradient),
            TEMPERATURE=temperature, DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, **tile.options,
        )  # fmt: skip
    loss = losses.sum()
    return with_gradient(s, loss, gradient) if needs_gradient else loss
