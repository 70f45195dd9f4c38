"""Autograd for a loss whose kernel computes the gradient in the forward pass.

A fused loss reads student and teacher once and writes the student's gradient in the same pass: three passes over a
tensor. A separate backward pass would read both again, five in all. The backward pass only multiplies the precomputed
gradient by the upstream factor, a number on the device:

    ds = upstream * gradient

If the factor is 1, `_scale_kernel` returns without touching the gradient. So a fourth and a fifth pass are needed only
if the loss is multiplied by something afterwards.
"""

import torch
from torch import Tensor

from kernels.backend import HAS_TRITON, refuse_second_derivative

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _scale_kernel(gradient_ptr, upstream_ptr, count, BLOCK: tl.constexpr):
        upstream = tl.load(upstream_ptr)
        if upstream != 1.0:
            i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            gradient = tl.load(gradient_ptr + i, mask=i < count)
            product = gradient.to(upstream.dtype) * upstream
            tl.store(gradient_ptr + i, product.to(gradient.dtype), mask=i < count)


SCALE_BLOCK = 4096


def empty_gradient(s: Tensor) -> Tensor:
    """An uninitialised tensor for the gradient of s, in the memory layout of s.

    For float16 it is float32 until the upstream factor is known: small numbers must not become 0 before a loss scaler
    multiplies them by 2^16.
    """
    return torch.empty_like(s, dtype=torch.float32 if s.dtype == torch.float16 else s.dtype)


def with_gradient(s: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
    """`loss` (), computed outside of autograd, as a function of s with the derivative `gradient`.

    gradient: from empty_gradient(s). The backward pass scales it in place and passes it on, so do not use it
    afterwards; with retain_graph=True each backward pass gets a copy. RuntimeError with create_graph=True.
    """
    return _WithGradient.apply(s, loss, gradient)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = s.dtype
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative("a fused loss")
        (gradient,) = ctx.saved_tensors
        if gradient.dtype != ctx.dtype or torch._C._autograd._get_current_graph_task_keep_graph():
            return (gradient * upstream).to(ctx.dtype), None, None
        scale_in_place(gradient, upstream)
        return gradient, None, None


def scale_in_place(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream (), without reading or writing the gradient if upstream is 1."""
    count = gradient.numel()
    if count:
        with torch.cuda.device_of(gradient):
            grid = (triton.cdiv(count, SCALE_BLOCK),)
            _scale_kernel[grid](gradient, upstream.contiguous(), count, BLOCK=SCALE_BLOCK)
