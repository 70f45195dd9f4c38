"""Fused squared difference of two maps under a mask: the core of masked imitation.

    L         = 1 / (2 M) * sum_bcp m_bp (s_bcp - t_bcp)^2
    dL/ds_bcp = m_bp / M * (s_bcp - t_bcp)

The kernel writes dL/ds everywhere, but reads s and t only near marked pixels. It reads groups of neighbours of 16
bytes, the largest load of a thread, if any pixel of the group is marked. With a fifth of the pixels marked in blobs
this is 1.4 passes over a map; a separate backward pass would make it five.
"""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON, is_wide, not_floating, require_shape, scale_of, use_triton
from kernels.precomputed_gradient import empty_gradient, with_gradient
from layers.precision import compute_dtype


def masked_squares_eager(s_map: Tensor, t_map: Tensor, mask: Tensor, normaliser: Tensor | float) -> Tensor:
    """Specification: (B, C, H, W), (B, C, H, W), mask (B, 1, H, W), normaliser M -> the scalar L."""
    dtype = compute_dtype(s_map, t_map)
    s_map, t_map = s_map.to(dtype), t_map.detach().to(dtype)
    mask = mask.detach().to(dtype)
    difference = torch.where(mask > 0, s_map - t_map, 0.0)  # 0 * inf would be nan
    squares = difference.square().sum(1, keepdim=True)  # (B, 1, H, W)
    return scale_of(0.5, normaliser, squares) * (mask * squares).sum()


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _mse_kernel(
        s_ptr, t_ptr, mask_ptr, scale_ptr, loss_ptr, gradient_ptr,
        n_channels, n_pixels,
        s_image, s_channel, s_pixel, t_image, t_channel, t_pixel, g_image, g_channel, g_pixel,
        ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, IS_CHANNELS_LAST: tl.constexpr,
        HAS_GRADIENT: tl.constexpr, IS_WIDE: tl.constexpr, DTYPE: tl.constexpr,
    ):  # fmt: skip
        # A program takes a tile (ROWS, GROUPS, WIDTH) of one image. WIDTH neighbours in memory are one load: all are
        # read or none. They are pixels, and rows are channels; in a channels_last map it is the reverse.
        row_tiles = tl.cdiv(n_pixels if IS_CHANNELS_LAST else n_channels, ROWS)
        group_tiles = tl.cdiv(n_channels if IS_CHANNELS_LAST else n_pixels, GROUPS * WIDTH)
        tile = tl.program_id(0) // group_tiles
        image = (tile // row_tiles).to(tl.int64)
        row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)[:, None, None]
        group = (tl.program_id(0) % group_tiles) * (GROUPS * WIDTH) + tl.arange(0, GROUPS)[None, :, None] * WIDTH
        member = group + tl.arange(0, WIDTH)[None, None, :]
        if IS_WIDE:
            row = row.to(tl.int64)
            member = member.to(tl.int64)
        pixel = row if IS_CHANNELS_LAST else member
        channel = member if IS_CHANNELS_LAST else row
        marked = tl.load(mask_ptr + image * n_pixels + pixel, mask=pixel < n_pixels, other=0).to(DTYPE)
        inside = (pixel < n_pixels) & (channel < n_channels)
        is_read = inside & (tl.max(marked, 2, keep_dims=True) > 0)
        s = tl.load(s_ptr + image * s_image + channel * s_channel + pixel * s_pixel, mask=is_read, other=0.0)
        t = tl.load(t_ptr + image * t_image + channel * t_channel + pixel * t_pixel, mask=is_read, other=0.0)
        difference = tl.where(marked > 0, s.to(DTYPE) - t.to(DTYPE), 0.0)  # unmarked neighbours may be read
        gradient = tl.load(scale_ptr) * marked * difference
        tl.store(loss_ptr + tl.program_id(0), 0.5 * tl.sum(gradient * difference))
        if HAS_GRADIENT:
            where = image * g_image + channel * g_channel + pixel * g_pixel
            tl.store(gradient_ptr + where, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def masked_squares_triton(s_map: Tensor, t_map: Tensor, mask: Tensor, normaliser: Tensor | float) -> Tensor:
    """The kernel, with its gradient: the contract of masked_squares_eager, for at least one element."""
    s, t, mask = s_map.flatten(2), t_map.detach().flatten(2), mask.detach().flatten(1)  # (B, C, P) and (B, P)
    needs_gradient = torch.is_grad_enabled() and s.requires_grad
    loss, gradient = _launch(s.detach(), t, mask.contiguous(), normaliser, needs_gradient)
    return with_gradient(s, loss, gradient) if needs_gradient else loss


def _launch(
    s: Tensor, t: Tensor, mask: Tensor, normaliser: Tensor | float, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, P), (B, C, P), (B, P) -> L (), and dL/ds in the form of s (empty without needs_gradient)."""
    images, n_channels, n_pixels = s.shape
    dtype = compute_dtype(s, t)
    is_channels_last = s.stride(2) != 1
    width = 16 // max(s.element_size(), t.element_size())
    rows, groups = 16, 128 // width
    outside, along = (n_pixels, n_channels) if is_channels_last else (n_channels, n_pixels)
    programs = images * triton.cdiv(outside, rows) * triton.cdiv(along, groups * width)
    gradient = empty_gradient(s if needs_gradient else s[:0])
    losses = torch.empty(programs, dtype=dtype, device=s.device)
    with torch.cuda.device_of(s):
        _mse_kernel[(programs,)](
            s, t, mask, scale_of(1.0, normaliser, losses), losses, gradient,
            n_channels, n_pixels, *s.stride(), *t.stride(), *gradient.stride(),
            ROWS=rows, GROUPS=groups, WIDTH=width, IS_CHANNELS_LAST=is_channels_last,
            HAS_GRADIENT=needs_gradient, IS_WIDE=is_wide(s, t, gradient),
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=4,
        )  # fmt: skip
    return losses.sum(), gradient


def masked_squares(s_map: Tensor, t_map: Tensor, mask: Tensor, *, normaliser: Tensor | float = 1.0) -> Tensor:
    """L (), the equation above, by the kernel or its specification (kernels.backend).

    Args:
        s_map, t_map: (B, C, H, W), of equal shape and any strides. Gradient flows to the student.
        mask: m, (B, 1, H, W), bool or at least 0. Where it is 0, s and t have no effect, even if they are nan or
            infinite. Mask and normaliser are detached.
        normaliser: M > 0, () or a number.
    Returns:
        float64 if a map is float64, else float32; 0 for empty maps. ValueError for other shapes.
    """
    require_shape("t_map", t_map, s_map.shape)
    require_shape("mask", mask, (s_map.shape[0], 1, *s_map.shape[2:]))
    implementation = masked_squares_eager
    if use_triton("masked_squares", s_map, t_map, mask, unsupported=not_floating(s_map=s_map, t_map=t_map)):
        implementation = masked_squares_triton if s_map.numel() else masked_squares_eager
    return implementation(s_map, t_map, mask, normaliser)
