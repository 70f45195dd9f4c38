"""What a process asks of the C library; processes that work together are in test_distributed.py."""

import platform
from pathlib import Path

import pytest
import torch

from engine.runtime.processes import keep_freed_memory
from tests.forked_processes import run_forked


def print_kept(keep: bool) -> None:
    """The part of eight blocks that the process still holds when they are freed."""
    if keep:
        keep_freed_memory()
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # pages
    before = resident()
    blocks = [torch.ones(1 << 22) for _ in range(8)]  # of 16 MiB
    held = resident()
    del blocks
    print((resident() - before) / (held - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept(tmp_path):
    kept, returned = (float(run_forked(print_kept, keep, folder=tmp_path).text) for keep in (True, False))
    assert kept > 0.9 and returned < 0.5
