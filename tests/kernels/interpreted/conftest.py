"""Tests of the Triton kernels themselves: on a CUDA device, or interpreted on the CPU with TRITON_INTERPRET=1.

In a process that has neither nothing here is collected; tests/kernels/test_interpreted.py starts one that interprets.
"""

import dataclasses

import pytest
import torch

from kernels.backend import HAS_TRITON, IS_INTERPRETED

ON_CUDA = HAS_TRITON and torch.cuda.is_available() and not IS_INTERPRETED
if not (ON_CUDA or IS_INTERPRETED):
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", action="store_true", help="without the slow tests, and with few cases of each other")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--sample: of each test the cases with a value of a parameter, or a type of a kernel, that no earlier one had."""
    if not config.getoption("--sample", False):
        return
    seen: set[tuple] = set()
    kept, left = [], []
    for item in items:
        call = getattr(item, "callspec", None)
        values = dict(zip(call.params, map(str, call.params.values()))) if call else {}
        test = item.nodeid.partition("[")[0]
        has = {(test, *value) for value in values.items()} or {(test,)}
        has |= {(test, "type of a kernel", values.get("dtype"), values.get("name", values.get("make")))}
        (left if item.get_closest_marker("slow") or has <= seen else kept).append(item)
        seen |= has
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_CUDA else "cpu")


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")


@pytest.fixture(autouse=True)
def unchecked_sums(request, monkeypatch):
    """--sample: the interpreter asks whether each sum of integers fits, a fifth of its time, only where they are large.

    Elsewhere a kernel that makes one too large has other results than the specification.
    """
    if IS_INTERPRETED and request.config.getoption("--sample", False) and "32_bits" not in request.node.name:
        from triton.runtime.interpreter import interpreter_builder

        unchecked = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", unchecked)
