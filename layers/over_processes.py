"""Sums and normalisers of a loss over W processes, so that they learn like one process with all images.

DistributedDataParallel averages gradients, so a run minimises 1/W sum_r L_r. If one process with the joined batch has
the loss L = sum_n l_n / M, process r must therefore compute

    L_r = sum_(n of r) l_n / (M / W)

with M over all processes. `joint_normaliser` computes M / W from the count of each process. `joint_mean` scales a mean
over the n_r items of a process by n_r W / sum_q n_q. A loss that is not a sum over items, such as a spread, is computed
from `sum_over_processes`, through which the gradient flows.

With a single process each function returns the values of that process, at no cost. With more, every process must call
each function equally often and in the same order, even without items: after an early return the others would wait for
ever. The numbers stay on the device, and the host does not wait. They belong to one forward pass: with accumulated
gradients each micro-batch has its own normalisers.
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
    """The sum over all processes of a tensor that has one shape in all of them. Gradient flows.

    Every L_r depends on the share of each process, so the backward pass sums the gradients of all processes. If all
    processes compute the same loss L = f(sum), the average of DistributedDataParallel is then the gradient of L.
    """
    return values if process_count() == 1 else _Sum.apply(values)


@overload
def joint_normaliser(own: Tensor, like: Tensor, *, at_least: float = 1) -> Tensor: ...


@overload
def joint_normaliser(own: float, like: Tensor, *, at_least: float = 1) -> Tensor | float: ...


def joint_normaliser(own: Tensor | float, like: Tensor, *, at_least: float = 1) -> Tensor | float:
    """max(sum over the W processes of `own`, at_least) / W, detached.

    own: a tensor of one shape in all processes, or a number. For a number, `like` gives the device and the dtype (at
    least float32). A single process returns max(own, at_least), as a number if `own` is one.
    """
    count = process_count()
    if count == 1:
        return own.detach().clamp(min=at_least) if isinstance(own, Tensor) else max(own, at_least)
    return _total(own, like).clamp(min=at_least) / count


def joint_mean(mean: Tensor, own: int) -> Tensor:
    """The share of a mean () over `own` items in the mean over the items of all W processes: mean * own W / sum own.

    A single process returns the mean itself. `mean` must be finite even if own is 0.
    """
    count = process_count()
    return mean if count == 1 else mean * (own * count / _total(own, mean).clamp(min=1))


def _total(own: Tensor | float, like: Tensor) -> Tensor:
    """The sum of `own` over all processes. Numbers are summed in float64, which counts exactly."""
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
