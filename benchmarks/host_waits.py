"""Where the host waits for the device, by the line of this project that makes it wait.

On a CUDA device PyTorch reports it itself (torch.cuda.set_sync_debug_mode). On a CPU nothing waits; counted are the
operations that would on a device whose tensors are all there: those whose shape or Python result depends on values, and
tensors made of lists of numbers. For torch.device("meta"), whose tensors have no values, counted are the copies to it
that are not non_blocking: what code with tensors of both the host and a device makes wait.
"""

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
ATEN = torch.ops.aten
WAITING = {
    ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.unique_dim, ATEN._unique2, ATEN.unique_consecutive,
    ATEN.bincount, ATEN.equal,
}  # fmt: skip
BY_MASK = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}


@contextlib.contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts them while the block runs: {"yolo/assigners.py:129": 2, ...}."""
    found: Counter[str] = Counter()
    with _warnings_of_cuda(found) if device.type == "cuda" else _Watch(found, device):
        yield found


@contextlib.contextmanager
def _warnings_of_cuda(found: Counter[str]) -> Iterator[None]:
    def note(message, *others, **named) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_line_of_project()] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _Watch(TorchDispatchMode):
    def __init__(self, found: Counter[str], device: torch.device) -> None:
        super().__init__()
        self.found, self.device = found, device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        is_masked = packet in BY_MASK and any(x is not None and x.dtype == torch.bool for x in args[1])
        if is_masked and len(args) > 2 and args[2].numel() == 1:
            is_masked = False  # one number under a mask is a masked_fill
        named = kwargs or {}
        is_list = packet is ATEN.lift_fresh and args[0].dim() > 0  # one number is filled in, without a copy
        repeats_by_value = packet is ATEN.repeat_interleave and named.get("output_size") is None
        if self.device.type == "meta":
            device = named.get("device")
            waits = packet is ATEN._to_copy and device is not None and device.type == "meta"
            waits = waits and args[0].device != device and not named.get("non_blocking")
        else:
            waits = packet in WAITING or is_masked or is_list or repeats_by_value
        if waits:
            self.found[_line_of_project()] += 1
        return function(*args, **named)


def _line_of_project() -> str:
    """The innermost line outside of libraries and of this file that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__).resolve():
            return f"{path.relative_to(ROOT).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
