"""The Triton kernels under Triton's interpreter, in a process of its own: it is chosen before the first import."""

import os
import subprocess
import sys

import pytest

from kernels.backend import HAS_TRITON, IS_INTERPRETED
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not HAS_TRITON, reason="the package 'triton' is not installed: its kernels are not tested"),
    pytest.mark.skipif(IS_INTERPRETED, reason="this process interprets kernels itself"),
]


def test_a_sample_of_every_kernel():
    """Every value of every parameter of every test, and every kernel with every type."""
    run_interpreted("--sample")


@pytest.mark.weekly
def test_all_of_every_kernel():
    """All parameters with one another, and training through the kernels."""
    run_interpreted()


def run_interpreted(*options: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = "tests/kernels/interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder, *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
