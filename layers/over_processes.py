"""Sums and normalisers of a loss over the processes of a run, so that W of them learn as one that holds every image.

DistributedDataParallel averages gradients: the loss that is minimised is 1/W sum_r L_r. Where one process with the
joined batch has L = sum_n l_n / M, process r therefore needs

    L_r = sum_(n of r) l_n / (M / W)

with M of all processes: `joint_normaliser` makes M / W of what a process counts itself. A mean over the n_r items of a
process gets the factor n_r W / sum_q n_q: `joint_mean`. What is no sum over items, such as a spread, is made of sums
by `sum_over_processes`, through which the gradient flows.

Without a process group, or alone in one, each function returns what one process has and costs nothing. With one, every
process must call each function equally often and in one order, also where it has no items: a loss that returns early
would leave the others waiting. The numbers stay on the device and the host waits for nothing. They are those of one
forward pass: with accumulated gradients each micro-batch has normalisers of its own.
"""

from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor

from layers.precision import compute_dtype


def process_count() -> int:
    """W: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all processes, with its gradient; alone the tensor itself.

    Every L_r depends on what a process adds to the sum, so the backward pass sums the gradients of all processes. Where
    all have one loss L = f(sum), the average of DistributedDataParallel is then the gradient of L.
    """
    return values if process_count() == 1 else _Sum.apply(values)


@overload
def joint_normaliser(own: Tensor, like: Tensor, *, at_least: float = 1) -> Tensor: ...


@overload
def joint_normaliser(own: float, like: Tensor, *, at_least: float = 1) -> Tensor | float: ...


def joint_normaliser(own: Tensor | float, like: Tensor, *, at_least: float = 1) -> Tensor | float:
    """max(sum over the W processes of `own`, at_least) / W, detached.

    own: () or any one shape, or a number of the host, for which `like` gives the device and the dtype (float32 for a
    half).
    Alone: max(own, at_least), a number for a number.
    """
    count = process_count()
    if count == 1:
        return own.detach().clamp(min=at_least) if isinstance(own, Tensor) else max(own, at_least)
    return _total(own, like).clamp(min=at_least) / count


def joint_mean(mean: Tensor, own: int) -> Tensor:
    """What a mean () over `own` items counts in the mean over the items of all W processes: mean * own W / sum own.

    Alone: the mean itself. It is finite also where own is 0.
    """
    count = process_count()
    return mean if count == 1 else mean * (own * count / _total(own, mean).clamp(min=1))


def _total(own: Tensor | float, like: Tensor) -> Tensor:
    """Of all processes. Numbers travel in float64, which counts exactly."""
    if isinstance(own, Tensor):
        total = own.detach().clone()
        dist.all_reduce(total)
        return total
    total = torch.full((), float(own), dtype=torch.float64, device=like.device)
    dist.all_reduce(total)
    return total.to(compute_dtype(like))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        total = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
