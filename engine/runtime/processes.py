"""The processes of a run: one alone, or a group that torchrun started. DistributedDataParallel does the work."""

import contextlib
import ctypes
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from errors import UserError


class Processes:
    """Rank and number of this run's processes, and what they exchange.

    Under torchrun (RANK and WORLD_SIZE are set), entering the context joins the group: nccl with GPUs, gloo without.
    In a single process every method returns its argument.
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
        """The value of process 0, in every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def check_same(self, what: str, value: Any) -> None:
        """UserError if the processes differ in a value, e.g. in the pictures they read."""
        if self.count > 1 and self.from_first(value) != value:
            raise UserError(f"process {self.rank} of {self.count} has another {what} than process 0")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the floating-point buffers of process 0, such as the running statistics of BatchNorm."""
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        if self.count == 1 or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, src=0)
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(values.view_as(buffer))

    def wrap(self, module: nn.Module, *, find_unused: bool) -> nn.Module:
        """The module in DistributedDataParallel, which averages its gradients over the processes."""
        if self.count == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=find_unused)


def averaging(learner: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager:
    """The context of a backward pass: only after the last batch of a step are gradients averaged over the processes."""
    if isinstance(learner, nn.parallel.DistributedDataParallel) and not is_last:
        return learner.no_sync()
    return contextlib.nullcontext()


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error means that another process of the group is gone.

    nccl and the store raise DistError. gloo has no type for a closed connection: it raises a plain RuntimeError, whose
    text names the peer.
    """
    return isinstance(error, dist.DistError) or "by peer" in str(error)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Each step on the CPU allocates the blocks that the step before has freed; memory that was returned costs a page
    fault for each 4 KiB. The peak memory does not change. Only glibc has this setting (mallopt(3)); elsewhere nothing
    happens. Blocks above 32 MiB are still mapped and returned.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 25)  # the largest value that glibc takes
        mallopt(trim_threshold, (1 << 31) - 1)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`: a CUDA device if there is one, else the CPU. UserError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"key 'device': found {name!r}, expected auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"key 'device': found {name!r}, but PyTorch finds no CUDA device here")
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """`auto`: bfloat16 on a GPU or CPU with instructions for it. On other CPUs it is slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
