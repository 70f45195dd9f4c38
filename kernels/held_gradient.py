"""A loss whose gradient was computed in the same pass over memory as its value.

A fused loss reads student and teacher once and writes the student's gradient at once: three passes over a tensor, where
a backward pass of its own would read both again and make it five. What the gradient lacks is the factor that arrives
from above:

    ds = upstream * gradient

The factor is a number on the device. Where it is 1, `_scale_kernel` returns before it has touched the gradient, so the
fourth and fifth pass are only made for a loss that is multiplied by something afterwards.
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
    """Room for the gradient of s, in its memory layout.

    float16 is held as float32 until the upstream factor is known: a loss scaler's factor of 2^16 has to meet numbers
    that have not been flushed to zero yet.
    """
    return torch.empty_like(s, dtype=torch.float32 if s.dtype == torch.float16 else s.dtype)


def with_gradient(s: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
    """`loss` (), a number computed outside of autograd, as a function of s whose derivative is `gradient`.

    gradient: from empty_gradient(s); it is handed on, perhaps after scaling in place: do not use it afterwards. A graph
    that is kept for a second backward pass gets a copy each time. Asking for a graph of the gradient is an error.
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
    """gradient *= upstream, reading and writing nothing where upstream () is 1."""
    count = gradient.numel()
    if count:
        with torch.cuda.device_of(gradient):
            grid = (triton.cdiv(count, SCALE_BLOCK),)
            _scale_kernel[grid](gradient, upstream.contiguous(), count, BLOCK=SCALE_BLOCK)
