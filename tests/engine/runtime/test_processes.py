"""What a process asks of the C library; processes that work together are in test_distributed.py."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

RESIDENT = """
import torch
from engine.runtime.processes import keep_freed_memory

if {keep}:
    keep_freed_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1])  # pages
before = resident()
blocks = [torch.ones(1 << 22) for _ in range(8)]  # of 16 MiB
held = resident()
del blocks
print((resident() - before) / (held - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """The part of eight blocks that the process still holds when they are freed."""

    def kept(keep: bool) -> float:
        command = [sys.executable, "-c", RESIDENT.format(keep=keep)]
        return float(subprocess.check_output(command, cwd=Path(__file__).parents[3], text=True))

    assert kept(True) > 0.9
    assert kept(False) < 0.5
