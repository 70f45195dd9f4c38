"""The processes of a run: one alone, or those torchrun started. DistributedDataParallel does the work."""

import contextlib
import ctypes
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from errors import UserError


class Processes:
    """Rank and number of this run's processes, and the few things they have to agree on.

    Under torchrun (RANK and WORLD_SIZE are set) the group is joined on entering the context, nccl with GPUs and gloo
    without; alone every method is a no-op on its argument.
    """

    def __init__(self, device: str = "auto") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        self.is_first = self.rank == 0
        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))

    def __enter__(self) -> "Processes":
        if self.count > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self.count > 1 and kind is None:  # after an error the others may be gone: torchrun ends the group
            dist.destroy_process_group()

    def from_first(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def check_same(self, what: str, value: Any) -> None:
        """UserError where the processes differ, e.g. in the pictures they see."""
        if self.count > 1 and self.from_first(value) != value:
            raise UserError(f"process {self.rank} of {self.count} has another {what} than process 0")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    def wrap(self, module: nn.Module, *, find_unused: bool) -> nn.Module:
        """The module under DistributedDataParallel, which averages its gradients over the processes."""
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=find_unused)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the group is gone.

    nccl and the store raise DistError; gloo has no type for a closed connection and raises a plain RuntimeError, which
    only its text tells from others.
    """
    return isinstance(error, dist.DistError) or "by peer" in str(error)


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, for the next step, instead of giving it back to the system.

    A step on the CPU frees and allocates the same blocks as the one before; memory that was given back costs a page
    fault for each 4 KiB. The most memory a process holds does not change. glibc alone has this (mallopt(3)); elsewhere
    nothing happens. Blocks above 32 MiB are mapped and given back as before.
    """
    trim_threshold, mmap_threshold = -1, -3  # their names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 25)  # the most that glibc takes
        mallopt(trim_threshold, (1 << 31) - 1)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`: a CUDA device where there is one. UserError for a device this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"key 'device': found {name!r}, expected auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"key 'device': found {name!r}, but PyTorch sees no CUDA device here")
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """`auto` is bfloat16 on CUDA, and on a CPU only where it multiplies bfloat16 itself; elsewhere it is slower."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
