"""Which implementation of an operation runs: its eager specification or its Triton kernel.

The environment variable KERNELS decides, read at every call:

    auto    (the default) the kernel for CUDA tensors where Triton is installed and the kernel takes them; else eager
    eager   the specification, always
    triton  the kernel, always: what it does not take, and a missing device or Triton, is a UserError

With TRITON_INTERPRET=1, set before this package is imported, Triton runs kernels on CPU tensors in numpy, thousands
of times slower: for tests. Only KERNELS=triton uses it.
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
    """Whether `operation` runs its kernel on these tensors; None stands for one that was not given.

    unsupported: why the kernel cannot take them, or None. Raises UserError where KERNELS asks for what cannot be.
    """
    asked = os.environ.get("KERNELS", "auto")
    if asked not in {"auto", "eager", "triton"}:
        raise UserError(f"KERNELS={asked!r}: expected eager, triton or auto")
    if asked == "eager":
        return False
    obstacle = unsupported or _obstacle([x for x in tensors if x is not None], interpreter_counts=asked == "triton")
    if obstacle and asked == "triton":
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
    """Names the first tensor whose type no kernel computes with, for `unsupported`; None where all are fine."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64"
    return None


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has that shape: eager code would broadcast it, a kernel read beyond its end."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def refuse_second_derivative(operation: str) -> None:
    """RuntimeError in the backward pass of a kernel where autograd is asked for a graph of it."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation}: the kernel has no second derivative: use KERNELS=eager with create_graph=True"
        )


def is_wide(*tensors: Tensor) -> bool:
    """Whether offsets within one slice of the first dimension of any of the tensors need 64 bits."""
    span = lambda x: sum((size - 1) * abs(step) for size, step in zip(x.shape[1:], x.stride()[1:]))
    return any(span(x) >= 2**31 - 2**16 for x in tensors if x.numel())  # a block may reach beyond the last element


def at_temperature(values: Tensor, temperature: float) -> Tensor:
    """values / T; the values themselves at T = 1, which saves a pass over them forwards and another backwards."""
    return values if temperature == 1 else values / temperature


def scale_of(factor: float, normaliser: Tensor | float, like: Tensor) -> Tensor:
    """factor / normaliser, () in the dtype and on the device of `like`, without waiting for the device."""
    if isinstance(normaliser, Tensor):
        return factor / normaliser.detach().to(like)
    return torch.full((), factor / normaliser, dtype=like.dtype, device=like.device)
