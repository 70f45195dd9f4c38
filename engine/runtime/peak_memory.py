"""Peak memory of a piece of work: of this process, or of its GPU."""

import contextlib
import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Start counting here. Outside Linux the peak of the process cannot be reset and counts from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gigabytes(device: torch.device) -> float | None:
    """In 10^9 bytes: allocated on a GPU, else resident in this process with its libraries; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / 1e9 if sys.platform == "darwin" else highest * 1024 / 1e9
