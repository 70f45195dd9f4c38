"""Tests of the Triton kernels themselves: on a CUDA device, or interpreted on the CPU with TRITON_INTERPRET=1.

In a process that has neither nothing here is collected; tests/kernels/test_interpreted.py starts one that interprets.
"""

import pytest
import torch

from kernels.backend import HAS_TRITON, IS_INTERPRETED

ON_CUDA = HAS_TRITON and torch.cuda.is_available() and not IS_INTERPRETED
if not (ON_CUDA or IS_INTERPRETED):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_CUDA else "cpu")


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
