"""Which implementation runs, and that none of them is needed to import the others."""

import importlib
import sys

import pytest
import torch

from errors import UserError
from kernels import backend
from kernels.backend import not_floating, scale_of, use_triton
from kernels.temperature_kl import temperature_kl, temperature_kl_eager
from tests.conftest import ROOT

CPU, META = torch.zeros(2), torch.zeros(2, device="meta")


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "IS_INTERPRETED", False)
    monkeypatch.delenv("KERNELS", raising=False)


class OnDevice:
    """All that the rule asks of a tensor."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("unsupported", [None, "it is blue, expected green"])
def test_the_rule(unsupported, device, has_triton, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", has_triton)
    x = OnDevice(device)
    can = has_triton and device != "cpu" and unsupported is None
    assert use_triton("operation", x, x, None, unsupported=unsupported) is can
    monkeypatch.setenv("KERNELS", "auto")
    assert use_triton("operation", x, unsupported=unsupported) is can
    monkeypatch.setenv("KERNELS", "eager")
    assert use_triton("operation", x, unsupported=unsupported) is False
    monkeypatch.setenv("KERNELS", "triton")
    if can:
        assert use_triton("operation", x, unsupported=unsupported) is True
    else:
        with pytest.raises(UserError, match="KERNELS=triton: operation: "):
            use_triton("operation", x, unsupported=unsupported)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    with pytest.raises(UserError, match="it is blue"):
        use_triton("operation", OnDevice("cuda"), unsupported="it is blue")
    with pytest.raises(UserError, match=r"tensors on cpu, expected a CUDA device"):
        use_triton("operation", CPU)
    with pytest.raises(UserError, match=r"tensors on cpu and meta, expected one device"):
        use_triton("operation", META, CPU)
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(UserError, match="'triton' is not installed"):
        use_triton("operation", CPU)
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(UserError, match=r"KERNELS='fast': expected eager, triton or auto"):
        use_triton("operation", CPU)


def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "IS_INTERPRETED", True)
    assert use_triton("operation", CPU) is False
    monkeypatch.setenv("KERNELS", "triton")
    assert use_triton("operation", CPU) is True


def test_an_operation_never_falls_back_in_silence(monkeypatch):
    s = torch.randn(3, 4)
    torch.testing.assert_close(temperature_kl(s, -s), temperature_kl_eager(s, -s, 1.0, None, 1.0))
    monkeypatch.setenv("KERNELS", "triton")
    for pair in ((s, -s), (s.int(), s.int())):
        with pytest.raises(UserError, match="KERNELS=triton: temperature_kl: "):
            temperature_kl(*pair)


def test_types():
    half, whole = CPU.half(), CPU.int()
    assert not_floating(s=CPU, t=half) is None
    assert not_floating(s=CPU, t=whole) == "t is torch.int32, expected float32, bfloat16, float16 or float64"


def test_scale():
    assert torch.equal(scale_of(6.0, 3.0, CPU), torch.tensor(2.0))
    assert torch.equal(scale_of(6.0, torch.tensor(3), CPU.double()), torch.tensor(2.0, dtype=torch.float64))
    assert not scale_of(1.0, torch.tensor(3.0, requires_grad=True), CPU).requires_grad


@pytest.mark.parametrize("offset", [0, 3])
def test_wide_offsets(offset):
    base = torch.empty(2**31 + 2**20, dtype=torch.uint8, device="meta")
    narrow, wide = (base.as_strided((5, 2, 3), (2**40, step, 1), offset) for step in (2**30, 2**31))
    assert not backend.is_wide(narrow, CPU[:0].view(0, 1, 1)) and backend.is_wide(narrow, wide)


def test_everything_imports_without_triton(monkeypatch):
    """As on a machine without it: a name that is None in sys.modules cannot be imported."""
    names = ["kernels", *(f"kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("[a-z]*.py")))]
    for name in names:
        importlib.import_module(name)
    for name in names:
        monkeypatch.delitem(sys.modules, name)  # and put back in the end
    monkeypatch.setitem(sys.modules, "triton", None)
    modules = {name: importlib.import_module(name) for name in names}
    assert not modules["kernels.backend"].HAS_TRITON
    assert modules["kernels.sigmoid_kl"].sigmoid_kl(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    box = torch.tensor([[0.0, 0, 1, 1]])
    assert modules["kernels.nms"].batched_nms(box, torch.ones(1), torch.zeros(1), 0.5, 9).tolist() == [0]
