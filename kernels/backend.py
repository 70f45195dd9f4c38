"""Choose the implementation of an operation: its eager specification or its Triton kernel.

The environment variable KERNELS is read at every call:

    auto    (default) the kernel for CUDA tensors, if Triton is installed and the kernel supports them; else eager
    eager   always the specification
    triton  always the kernel; unsupported tensors and a missing device or Triton are a UserError

With TRITON_INTERPRET=1, set before this package is imported, Triton runs kernels on CPU tensors in numpy, thousands of
times slower. This is for tests; only KERNELS=triton uses it.
"""

import os

import torch
from torch import Tensor

from errors import UserError

try:
    import triton
except ImportError:
    triton = None

HAS_TRITON = triton is not None
IS_INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def use_triton(operation: str, *tensors: Tensor | None, unsupported: str | None = None) -> bool:
    """Whether `operation` runs its kernel on these tensors; None is an optional tensor that was not given.

    unsupported: why the kernel does not support them, or None. UserError if KERNELS=triton and it cannot run.
    """
    setting = os.environ.get("KERNELS", "auto")
    if setting not in {"auto", "eager", "triton"}:
        raise UserError(f"KERNELS={setting!r}: expected eager, triton or auto")
    if setting == "eager":
        return False
    obstacle = unsupported or _obstacle([x for x in tensors if x is not None], interpreter_counts=setting == "triton")
    if obstacle and setting == "triton":
        raise UserError(f"KERNELS=triton: {operation}: {obstacle}")
    return not obstacle


def _obstacle(tensors: list[Tensor], interpreter_counts: bool) -> str | None:
    if not HAS_TRITON:
        return "the package 'triton' is not installed"
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        return f"tensors on {' and '.join(sorted(map(str, devices)))}, expected one device"
    device = devices.pop()
    if device.type == "cuda" or (device.type == "cpu" and IS_INTERPRETED and interpreter_counts):
        return None
    return f"tensors on {device}, expected a CUDA device (or TRITON_INTERPRET=1 from the start of the process)"


def not_floating(**tensors: Tensor) -> str | None:
    """The reason for `unsupported` if the dtype of a tensor is not in FLOATS, with the tensor's name; else None."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64"
    return None


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has that shape: eager code would broadcast it, a kernel read beyond its end."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def refuse_second_derivative(operation: str) -> None:
    """RuntimeError if the backward pass of a kernel runs with create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation}: the kernel has no second derivative: use KERNELS=eager with create_graph=True"
        )


def is_wide(*tensors: Tensor) -> bool:
    """Whether offsets within a slice along the first dimension of one of the tensors need 64 bits."""
    span = lambda x: sum((size - 1) * abs(step) for size, step in zip(x.shape[1:], x.stride()[1:]))
    return any(span(x) >= 2**31 - 2**16 for x in tensors if x.numel())  # a block may extend beyond the last element


def at_temperature(values: Tensor, temperature: float) -> Tensor:
    """values / T, or `values` if T = 1: that saves a pass over them in forward and one in backward."""
    return values if temperature == 1 else values / temperature


def scale_of(factor: float, normaliser: Tensor | float, like: Tensor) -> Tensor:
    """factor / normaliser as a scalar () of the dtype and device of `like`, without waiting for the device."""
    if isinstance(normaliser, Tensor):
        return factor / normaliser.detach().to(like)
    return torch.full((), factor / normaliser, dtype=like.dtype, device=like.device)
