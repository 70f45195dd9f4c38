"""The precision that losses and decoding compute in: float32 for half-precision inputs and under autocast, too."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32: what losses are computed in, eager or not."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is."""
    return x.to(compute_dtype(x))
