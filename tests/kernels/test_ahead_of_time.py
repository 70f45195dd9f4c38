"""The Triton kernels compiled for A100 and H100, without either: nothing spills, and tensors move in wide loads."""

import re

import pytest

from kernels.backend import HAS_TRITON, IS_INTERPRETED

if not HAS_TRITON:
    pytest.skip("the package 'triton' is not installed: its kernels are not compiled", allow_module_level=True)
if IS_INTERPRETED:
    pytest.skip("this process interprets kernels", allow_module_level=True)

from tests.kernels import compilation

LAUNCHES = [pytest.param(launch, id=launch.name) for launch in compilation.launches()]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_resources(launch, architecture, record_property):
    found = compilation.compile_launch(launch, architecture)
    record_property("registers", found.registers)
    assert 16 <= found.registers <= 255
    assert found.spilled_bytes == 0
    if launch.is_dense:
        assert found.wide_share(found.loads) > 0.7, found.loads
        assert found.wide_share(found.stores) > 0.7, found.stores


@pytest.mark.parametrize("launch", [pytest.param(launch, id=launch.name) for launch in compilation.rare_launches()])
def test_rare_forms_compile(launch):
    assert compilation.compile_launch(launch, 90).spilled_bytes == 0
    arguments, _ = compilation.record(launch)
    assert arguments.get("IS_WIDE", False) == ("32 bits" in launch.name)
    assert arguments.get("HAS_GRADIENT", True) == ("alone" not in launch.name)


@pytest.mark.parametrize("launch", [case for case in LAUNCHES if re.search("nms.*(compare|spread)", case.id)])
def test_nms_rounds_as_its_specification(launch):
    """Each operation on its own, correctly rounded, numbers near 0 kept: what decides ties at the threshold."""
    ptx = compilation.compile_launch(launch, 90).ptx
    assert "div.rn.f32" in ptx
    for inexact in ("fma.rn.f32", "div.full", "div.approx", "rcp.approx", ".ftz"):
        assert inexact not in ptx


def test_accesses_are_read_from_the_assembly():
    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.v2.f64 {%fd1, %fd2}, [%rd2];
        ld.global.b8 %r5, [%rd3];
        st.global.v2.b16 [%rd4], {%h1, %h2};
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
    """
    assert compilation.accesses(ptx, "ld") == {16: 2, 1: 1}
    assert compilation.accesses(ptx, "st") == {4: 1}
