"""The Triton kernels compiled ahead of time for a GPU that is not there: registers, spills, the width of their loads.

Each launch is a kernel as its wrapper launches it for tensors of the shapes given: the arguments are recorded from the
wrapper, and specialised as Triton's launcher does, on strides of 1 and on what 16 divides.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

from kernels import (
    deformable_attention,
    masked_mse,
    nms_triton,
    precomputed_gradient,
    roi_align_triton,
    sigmoid_kl,
    temperature_kl,
)

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)")


@dataclass(frozen=True)
class Launch:
    """`call()` makes a wrapper launch the kernel of that name in the module; is_dense: it moves whole tensors."""

    name: str
    module: ModuleType
    kernel: str
    call: Callable[[], object]
    is_dense: bool = True


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: Counter[int]  # in the code, by bytes
    stores: Counter[int]
    ptx: str

    def wide_share(self, accesses: Counter[int]) -> float:
        """Of the bytes of these accesses, the share that moves in 16 bytes at once."""
        return 16 * accesses[16] / sum(width * count for width, count in accesses.items())


def empty(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> torch.Tensor:
    """A tensor without memory: its shape, strides and type are all a launch asks for."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def launches() -> list[Launch]:
    """Every kernel in the forms it takes in training, at its shapes."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        student = lambda *shape, dtype=dtype, **layout: empty(*shape, dtype=dtype, **layout).requires_grad_()
        logits, weight = (32, 8400, 80), empty(32, 8400)
        by_row = lambda f, s, weight=weight: lambda: f(s, s.detach(), 2.0, weight, 1.0)
        kl, sigmoid = temperature_kl.temperature_kl_triton, sigmoid_kl.sigmoid_kl_triton
        class_first = student(32, 80, 8400).transpose(1, 2)
        rows += [
            Launch(
                f"temperature_kl (32, 8400, 80) {short}", temperature_kl, "_kl_kernel", by_row(kl, student(*logits))
            ),
            Launch(f"temperature_kl, classes first, {short}", temperature_kl, "_kl_kernel", by_row(kl, class_first)),
            Launch(f"sigmoid_kl (32, 8400, 80) {short}", sigmoid_kl, "_kl_kernel", by_row(sigmoid, student(*logits))),
            Launch(f"sigmoid_kl, classes first, {short}", sigmoid_kl, "_kl_kernel", by_row(sigmoid, class_first)),
        ]
        for height in (80, 160):
            row = student(32, 256, height * height)
            name = f"channel_wise_kl (32, 256, {height}, {height}) {short}"
            rows.append(Launch(name, temperature_kl, "_kl_kernel", by_row(kl, row, None)))
        for channels_last in (False, True):
            s = student(32, 256, 80, 80, channels_last=channels_last)
            layout = ", channels last, " if channels_last else " "
            mask = empty(32, 1, 80, 80, dtype=torch.bool)
            call = lambda s=s, mask=mask: masked_mse.masked_squares_triton(s, s.detach(), mask, 1.0)
            rows.append(Launch(f"masked_mse (32, 256, 80, 80){layout}{short}", masked_mse, "_mse_kernel", call))
        last = student(32, 256, 80, 80, channels_last=True).flatten(2)
        name = f"channel_wise_kl (32, 256, 80, 80), channels last, {short}"
        rows.append(Launch(name, temperature_kl, "_kl_kernel", by_row(kl, last, None)))
        held, upstream = empty(*logits, dtype=dtype), empty()
        call = lambda held=held, upstream=upstream: precomputed_gradient.scale_in_place(held, upstream)
        rows.append(Launch(f"precomputed_gradient {short}", precomputed_gradient, "_scale_kernel", call))
    rows += pooling_launches()
    boxes, labels = empty(32, 30_000, 4), empty(32, 30_000, dtype=torch.int64)
    call = lambda: nms_triton.suppress(boxes, labels, empty(32, 30_000, dtype=torch.bool), 0.5, 300)
    for kernel in ("_compare_kernel", "_settle_kernel", "_spread_kernel"):
        rows.append(Launch(f"nms (32, 30,000) {kernel}", nms_triton, kernel, call, is_dense=False))
    call = lambda: nms_triton.in_order(boxes[0], empty(30_000), labels[0])
    for kernel in ("_usable_kernel", "_gather_kernel"):
        rows.append(Launch(f"nms 30,000 {kernel}", nms_triton, kernel, call, is_dense=False))
    return rows


def rare_launches() -> list[Launch]:
    """The other forms of the fused losses, which change the types in them: an interpreter does not see a wrong one."""
    far = lambda *shape: empty(2**32 + 64).as_strided(shape, (0, 2**31 + 64, *(1,) * (len(shape) - 2))).requires_grad_()
    learnt = lambda *shape, dtype: empty(*shape, dtype=dtype).requires_grad_()
    forms = {  # name: student's rows, student's maps
        "offsets beyond 32 bits": (far(1, 3, 16), far(1, 3, 16, 1)),
        "float64": (learnt(32, 8400, 80, dtype=torch.float64), learnt(2, 256, 80, 80, dtype=torch.float64)),
        "float16 with gradient": (learnt(2, 9, 41, dtype=torch.float16), learnt(2, 5, 7, 9, dtype=torch.float16)),
        "value alone": (empty(2, 9, 9000, dtype=torch.float16), empty(2, 5, 7, 9, dtype=torch.bfloat16)),
    }
    rows = []
    for name, (s, s_map) in forms.items():
        weight = None if name == "value alone" else empty(*s.shape[:2])
        for module, loss in (
            (temperature_kl, temperature_kl.temperature_kl_triton),
            (sigmoid_kl, sigmoid_kl.sigmoid_kl_triton),
        ):
            call = lambda loss=loss, s=s, weight=weight: loss(s, s.detach(), 2.0, weight, 1.0)
            rows.append(Launch(f"{loss.__name__}, {name}", module, "_kl_kernel", call, is_dense=False))
        mask = empty(s_map.shape[0], 1, *s_map.shape[2:])
        call = lambda s=s_map, mask=mask: masked_mse.masked_squares_triton(s, s.detach(), mask, 1.0)
        rows.append(Launch(f"masked_mse, {name}", masked_mse, "_mse_kernel", call, is_dense=False))
    held, upstream = empty(64, dtype=torch.float64), empty(dtype=torch.float64)
    call = lambda: precomputed_gradient.scale_in_place(held, upstream)
    return [*rows, Launch("precomputed_gradient, float64", precomputed_gradient, "_scale_kernel", call, is_dense=False)]


def pooling_launches() -> list[Launch]:
    """RoIAlign of a thousand boxes in a pyramid, forward and backward, and an RT-DETR's attention."""
    rows = []
    index = empty(1024, dtype=torch.int64)
    geometry, cells = empty(1024, 4), empty(1024, 3, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        pixels = empty(2 * 13_294, 256, dtype=dtype).requires_grad_()

        def pool(pixels=pixels) -> torch.Tensor:
            levels = [(4, 100, 100), (8, 50, 50), (16, 25, 25), (32, 13, 13)]
            return roi_align_triton._RoiAlign.apply(pixels, geometry, cells, index, index[:9], levels, 2, 7, 2)

        back = lambda pool=pool: pool().sum().backward()
        rows.append(Launch(f"roi align, 256 channels, {short}", roi_align_triton, "_pool_kernel", pool, is_dense=False))
        name = f"roi align backward, 256 channels, {short}"
        rows.append(Launch(name, roi_align_triton, "_spread_kernel", back, is_dense=False))
        value, sizes = empty(16, 8400, 8, 32, dtype=dtype), [(80, 80), (40, 40), (20, 20)]
        inputs = (value, sizes, empty(16, 300, 8, 3, 4, 2), empty(16, 300, 8, 3, 4))
        call = lambda inputs=inputs: deformable_attention.deformable_attention_triton(*inputs)
        name = f"deformable attention (16, 300, 8, 32) {short}"
        rows.append(Launch(name, deformable_attention, "_attention_kernel", call, is_dense=False))
    return rows


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """The kernel of the launch for compute capability architecture / 10. Needs Triton, and it not interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(launch.module, launch.kernel)
    if not isinstance(kernel, triton.runtime.JITFunction):
        kernel = triton.runtime.JITFunction(kernel.fn)
    arguments, options = record(launch)
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value, is_specialised = arguments[parameter.name], not parameter.do_not_specialize
        is_constant = parameter.is_constexpr or (isinstance(value, int) and value == 1 and is_specialised)
        signature[parameter.name] = "constexpr" if is_constant else type_of(value)
        if is_constant:
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and is_specialised):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(registers, spilled, compiled.metadata.shared, accesses(ptx, "ld"), accesses(ptx, "st"), ptx)


def record(launch: Launch) -> tuple[dict, dict]:
    """Arguments by name and compile options of the kernel's first launch in `launch.call`; nothing is launched."""
    kernel, calls = getattr(launch.module, launch.kernel), []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *values, **named: calls.append((self.name, values, named))

    names = [name for name in vars(launch.module) if name.endswith("_kernel")]
    with patch.multiple(launch.module, **{name: Recorder(name) for name in names}):
        launch.call()
    _, values, named = next(call for call in calls if call[0] == launch.kernel)
    names = kernel.arg_names
    options = {name: named.pop(name) for name in set(named) - set(names)}
    return dict(zip(names, values)) | named, options


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes it spills, from Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", said.stdout + said.stderr)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def accesses(ptx: str, direction: str) -> Counter[int]:
    """Global loads ("ld") or stores ("st") in the assembly, by the bytes of each."""
    found = (match for match in ACCESS.finditer(ptx) if match[1] == direction)
    return Counter(int(match[2] or 1) * int(match[3]) // 8 for match in found)
