"""The dtype that losses and decoding compute in: at least float32, also for half-precision inputs."""

import contextlib

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or unchanged if it is float64."""
    return x.to(compute_dtype(x))


def in_precision_of(value: Tensor) -> contextlib.AbstractContextManager:
    """Autocast to the precision of a tensor, so that layers applied to it run in the precision of the model."""
    is_half = value.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(value.device.type, dtype=value.dtype if is_half else None, enabled=is_half)
