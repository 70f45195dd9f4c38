"""The Triton kernels on a GPU: bytes, bandwidth, and times beside eager, torch.compile and public peers.

    python benchmarks/gpu_kernels.py [--rounds 50] [--output benchmarks/results] [--only kl]

None of this has run on a GPU yet, and no number of it is known. Only its plumbing is tested, on a CPU, with
`--device cpu --small`, where the kernels' column stays empty.

A row times the forward pass and the student's gradient (RoIAlign: all maps' gradients; NMS and attention have none).
"GB" is the least traffic: for a fused loss three passes over a tensor, read student, read teacher, write gradient; with
a mask, two of them only where it marks. "TB/s" is that over the kernel's time, and "of copy" its share of what copying
1 GiB reaches here. Contestants take turns, on input sets that together exceed the L2 cache several times, so that none
finds its inputs there; times are medians of milliseconds between events on the device, and for NMS, whose result the
host waits for, of the clock. Before anything is timed, what a contestant computes is compared with the specification.
The table goes to the terminal and to OUTPUT/gpu_kernels.md, the times to OUTPUT/gpu_kernels.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.nms import clustered_boxes
from boxes import cxcywh_to_xyxy
from errors import run_script
from kernels.backend import HAS_TRITON
from kernels.channel_wise_kl import channel_kl, channel_kl_eager
from kernels.deformable_attention import deformable_attention, deformable_attention_eager
from kernels.masked_mse import masked_squares, masked_squares_eager
from kernels.nms import batched_nms, select_detections
from kernels.roi_align import assign_levels, roi_align
from kernels.sigmoid_kl import sigmoid_kl, sigmoid_kl_eager
from kernels.temperature_kl import temperature_kl, temperature_kl_eager

Inputs = tuple[Any, ...]
CONTESTANTS = ("kernel", "eager", "compile", "peer")
CACHE_BYTES = 4 * 60 * 2**20  # four times the L2 cache of an H200


@dataclass(frozen=True)
class Case:
    """run(*inputs) is timed under KERNELS=triton and KERNELS=eager, beside what torch.compile and a peer make of it.

    compiled() returns what torch.compile made of the specification. is_exact: equal to the last bit, or wrong.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]  # on the CPU
    run: Callable[..., Any]
    gigabytes: float | None = None
    compiled: Callable[[], Callable[..., Any]] | None = None
    peer: Callable[..., Any] | None = None
    waits: bool = False  # the host waits for the result
    is_exact: bool = False
    targets: dict[str, float] = field(default_factory=dict)  # "ms" at most; "of copy", "eager", "compile" at least


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """loss(s, ...) -> its value and its gradient with respect to s."""

    def run(s: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        value = loss(s, *others)
        return value.detach(), torch.autograd.grad(value, s)[0]

    return run


def twice(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss with a factor from above, which a held gradient still has to meet."""
    return lambda *inputs: 2 * loss(*inputs)


def loss_cases(small: bool) -> list[Case]:
    """The fused losses, in float32 and bfloat16, at the sizes of a batch of 32."""
    batch, locations, channels, side = (2, 50, 4, 8) if small else (32, 8400, 256, 80)
    fused = {"of copy": 0.8, "eager": 5.0, "compile": 1.5}
    cases = []
    for dtype in (torch.float32, torch.bfloat16):

        def pair(*shape: int, layout=torch.contiguous_format, dtype=dtype) -> Callable[[torch.Generator], Inputs]:
            def make(generator: torch.Generator) -> Inputs:
                s, t = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
                return s.contiguous(memory_format=layout).requires_grad_(), t.contiguous(memory_format=layout)

            return make

        def marked(share: float, shape: tuple[int, ...], pair=pair) -> Callable[[torch.Generator], Inputs]:
            return lambda generator: (*pair(*shape)(generator), blob_mask(shape, share))

        short = str(dtype).removeprefix("torch.")
        logits, maps = (batch, locations, 80), (batch, channels, side, side)
        rows = torch.Size(logits[:-1]).numel()
        kl = lambda s, t: temperature_kl(s, t, temperature=2.0, normaliser=rows)  # noqa: B023
        kl_spec = lambda s, t: temperature_kl_eager(s, t, 2.0, None, rows)  # noqa: B023
        sigmoid = lambda s, t: sigmoid_kl(s, t, temperature=2.0, normaliser=rows)  # noqa: B023
        sigmoid_spec = lambda s, t: sigmoid_kl_eager(s, t, 2.0, None, rows)  # noqa: B023
        cwd, cwd_spec = lambda s, t: channel_kl(s, t, temperature=2.0), lambda s, t: channel_kl_eager(s, t, 2.0)
        mse = lambda s, t, mask: masked_squares(s, t, mask, normaliser=1000.0)
        mse_spec = lambda s, t, mask: masked_squares_eager(s, t, mask, 1000.0)

        def fused_case(name, make, loss, specification, shape, passes, targets=None, dtype=dtype) -> Case:
            gigabytes = passes * torch.Size(shape).numel() * dtype.itemsize / 1e9
            compiled = lambda: with_gradient(torch.compile(specification))
            return Case(name, make, with_gradient(loss), gigabytes, compiled, targets=targets or {})

        last = pair(*maps, layout=torch.channels_last)
        cases += [
            fused_case(f"kl {logits} {short}", pair(*logits), kl, kl_spec, logits, 3, fused),
            fused_case(f"kl {logits} {short}, twice the loss", pair(*logits), *map(twice, (kl, kl_spec)), logits, 5),
            fused_case(f"sigmoid kl {logits} {short}", pair(*logits), sigmoid, sigmoid_spec, logits, 3, fused),
            fused_case(f"cwd {maps} {short}", pair(*maps), cwd, cwd_spec, maps, 3, fused),
            fused_case(f"cwd {maps} {short}, channels last", last, cwd, cwd_spec, maps, 3),
            fused_case(f"masked mse {maps} {short}, all", marked(1.0, maps), mse, mse_spec, maps, 3, fused),
            fused_case(f"masked mse {maps} {short}, 1/5", marked(0.2, maps), mse, mse_spec, maps, 1.4),
        ]
    return cases


def blob_mask(shape: tuple[int, ...], share: float) -> Tensor:
    """(B, 1, H, W) bool: a rectangle in the middle that covers about that share of each image."""
    b, _, h, w = shape
    mask = torch.zeros(b, 1, h, w, dtype=torch.bool)
    height, width = round(h * share**0.5), round(w * share**0.5)
    mask[:, :, (h - height) // 2 : (h + height) // 2, (w - width) // 2 : (w + width) // 2] = True
    return mask


def nms_cases(small: bool) -> list[Case]:
    """80 classes, IoU 0.5, every survivor; and a batch of 32 images."""
    limits = {1000: 0.15, 10_000: None, 30_000: 0.8, 100_000: None} if not small else {50: 0.15}
    torchvision = installed("torchvision")

    def boxes_of(count: int) -> Callable[[torch.Generator], Inputs]:
        def make(generator: torch.Generator) -> Inputs:
            boxes, labels = clustered_boxes(count, generator)
            return cxcywh_to_xyxy(boxes), torch.rand(count, generator=generator), labels

        return make

    def images_of(images: int, count: int) -> Callable[[torch.Generator], Inputs]:
        def make(generator: torch.Generator) -> Inputs:
            found = [boxes_of(count)(generator) for _ in range(images)]
            return torch.stack([boxes for boxes, _, _ in found]), torch.stack([s for _, s, _ in found])[..., None]

        return make

    cases = []
    for count, limit in limits.items():
        run = lambda boxes, scores, labels: batched_nms(boxes, scores, labels, 0.5, len(boxes))
        peer = (lambda *inputs: torchvision.ops.batched_nms(*inputs, 0.5)) if torchvision else None
        targets = {} if limit is None else {"ms": limit}
        name = f"nms, {count:,} boxes"
        cases.append(Case(name, boxes_of(count), run, peer=peer, waits=True, is_exact=True, targets=targets))
    images, count = (2, 20) if small else (32, 1000)

    def batch(boxes: Tensor, scores: Tensor) -> list[Tensor]:
        found = select_detections(boxes, scores, score_threshold=0.0, iou_threshold=0.5, max_detections=count)
        return [detections.boxes_xyxy for detections in found]

    def peer_batch(boxes: Tensor, scores: Tensor) -> list[Tensor]:
        return [b[torchvision.ops.nms(b, s, 0.5)] for b, s in zip(boxes, scores[..., 0])]

    name, peer = f"nms, {images} images of {count:,} boxes", peer_batch if torchvision else None
    make = images_of(images, count)
    return [*cases, Case(name, make, batch, peer=peer, waits=True, is_exact=True, targets={"ms": 0.5})]


def pooling_cases(small: bool) -> list[Case]:
    """RoIAlign as Faster R-CNN trains it, and deformable attention as an RT-DETR teacher runs it."""
    size, channels, count = (64, 4, 6) if small else (800, 256, 1024)
    strides = [4, 8, 16, 32]
    torchvision = installed("torchvision")

    def pyramid(generator: torch.Generator) -> Inputs:
        maps = [torch.randn(2, channels, size // s, size // s, generator=generator).requires_grad_() for s in strides]
        corner = torch.rand(count, 2, generator=generator) * size * 0.7
        boxes = torch.cat((corner, corner + 8 + torch.rand(count, 2, generator=generator) ** 3 * size / 2), 1)
        return maps, boxes, torch.arange(count) % 2, assign_levels(boxes, strides)

    def pooled(maps: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        value = roi_align(maps, boxes, image, level, strides=strides)
        return value.detach(), *torch.autograd.grad(value, maps, value.detach())

    def peer(maps: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        value = maps[0].new_zeros(len(boxes), channels, 7, 7)
        for number, (stride, m) in enumerate(zip(strides, maps)):
            rows = (level == number).nonzero().squeeze(1)
            rois = torch.cat((image[rows, None].to(boxes), boxes[rows]), 1)
            found = torchvision.ops.roi_align(m, rois, 7, 1 / stride, sampling_ratio=2, aligned=False)
            value = value.index_copy(0, rows, found)
        return value.detach(), *torch.autograd.grad(value, maps, value.detach())

    def attention(generator: torch.Generator) -> Inputs:
        sizes, (b, q) = [(8, 8), (4, 4)] if small else [(80, 80), (40, 40), (20, 20)], (1, 5) if small else (16, 300)
        value = torch.randn(b, sum(h * w for h, w in sizes), 8, 32, generator=generator)
        points = torch.rand(b, q, 8, len(sizes), 4, 2, generator=generator)
        prob = torch.rand(b, q, 8, len(sizes), 4, generator=generator)
        return value, sizes, points, prob

    peer = peer if torchvision else None
    compiled = lambda: torch.compile(deformable_attention_eager)
    return [
        Case(f"roi align, {count:,} boxes, {channels} channels", pyramid, pooled, peer=peer),
        Case("deformable attention", attention, deformable_attention, compiled=compiled),
    ]


def installed(module: str) -> Any:
    """The module, or None."""
    try:
        return __import__(module)
    except (ImportError, RuntimeError):
        return None


def to(value: Any, device: torch.device) -> Any:
    """Tensors and lists of them on the device, leaves again; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(to(item, device) for item in value)
    return value


def size_of(value: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def contestants_of(case: Case, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Those that can run here, by column."""

    def under(choice: str) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            os.environ["KERNELS"] = choice
            return case.run(*inputs)

        return run

    on_gpu = device.type == "cuda"
    found = {"eager": under("eager")}
    if on_gpu and HAS_TRITON:
        found["kernel"] = under("triton")
    if on_gpu and case.compiled is not None:
        found["compile"] = case.compiled()
    if case.peer is not None:
        found["peer"] = case.peer
    return {name: found[name] for name in CONTESTANTS if name in found}


def measure(case: Case, rounds: int, device: torch.device, most_sets: int = 64) -> dict[str, list[float]]:
    """Milliseconds of each contestant, one call a round, each round with the next input set."""
    generator = torch.Generator().manual_seed(0)
    first = to(case.make(generator), device)
    count = min(most_sets, max(2, -(-CACHE_BYTES // max(size_of(first), 1)))) if device.type == "cuda" else 1
    sets = [first, *(to(case.make(generator), device) for _ in range(count - 1))]
    contestants = contestants_of(case, device)
    expected = contestants["eager"](*first)
    for name, run in contestants.items():
        if not (case.is_exact and name == "peer"):  # peers round differently, and a tie may fall on the other side
            assert_agree(run(*first), expected, 0.0 if case.is_exact else 0.02, f"{case.name}, {name}")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 3):
        for name, run in contestants.items():
            took = clock(run, sets[number % count], device, case.waits)
            if number >= 3:  # the first rounds warm up
                times[name].append(took)
    return times


def assert_agree(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """AssertionError unless tensors are equal up to `tolerance` of the largest entry."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
        if expected.numel():
            error, largest = (found - expected).abs().max().item(), expected.abs().max().item()
            assert error <= tolerance * largest, f"{what}: off by {error:.3g} where the largest entry is {largest:.3g}"
        return
    assert len(found) == len(expected), f"{what}: {len(found)} results, expected {len(expected)}"
    for one, other in zip(found, expected):
        assert_agree(one, other, tolerance, what)


def clock(run: Callable[..., Any], inputs: Inputs, device: torch.device, waits: bool) -> float:
    """Milliseconds of one call: between two events on the device, or until the host has the result."""
    if device.type != "cuda" or waits:
        synchronize(device)
        start = time.perf_counter()
        run(*inputs)
        synchronize(device)
        return 1000 * (time.perf_counter() - start)
    # A millisecond of other work first, so that all launches are queued before the device reaches the first.
    torch.cuda._sleep(2_000_000)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run(*inputs)
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, num_bytes: int, rounds: int) -> float:
    """TB/s of copying, read and written bytes together."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [clock(target.copy_, (source,), device, waits=False) for _ in range(rounds + 3)][3:]
    return 2 * num_bytes / statistics.median(times) / 1e9


def row(case: Case, times: dict[str, list[float]], copy: float) -> dict[str, Any]:
    """The numbers of one line: medians, bandwidth and its share of copying, ratios, and which targets are missed."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    numbers: dict[str, Any] = {"name": case.name, "GB": case.gigabytes, "TB/s": None, "of copy": None} | medians
    kernel = medians.get("kernel")
    if kernel is not None:
        if case.gigabytes is not None:
            numbers["TB/s"] = case.gigabytes / kernel
            numbers["of copy"] = numbers["TB/s"] / copy
        reached = {"ms": kernel, "of copy": numbers["of copy"]}
        reached |= {name: medians[name] / kernel for name in ("eager", "compile", "peer") if name in medians}
        is_met = lambda name, target: reached[name] <= target if name == "ms" else reached[name] >= target
        missed = [name for name, target in case.targets.items() if name in reached and not is_met(name, target)]
        numbers["targets"] = ("missed: " + ", ".join(missed)) if missed else ("met" if case.targets else "")
    return numbers


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; times in milliseconds, an empty cell for what did not run."""
    columns = ("name", "GB", "TB/s", "of copy", *CONTESTANTS, "targets")
    units = {"name": "case", "of copy": "of copy", "targets": "targets"} | {n: f"{n} ms" for n in CONTESTANTS}

    def cell(column: str, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return f"{value:.0%}" if column == "of copy" else f"{value:.3f}"

    lines = [[units.get(c, c) for c in columns], ["---"] + ["---:"] * 7 + ["---"]]
    lines += [[cell(c, numbers.get(c)) for c in columns] for numbers in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny inputs: to see that it runs")
    args = parser.parse_args(argv)
    device, chosen = torch.device(args.device), os.environ.get("KERNELS")
    is_gpu = device.type == "cuda"
    copy = copy_bandwidth(device, 2**20 if args.small else 2**30, args.rounds)
    heading = (
        f"{torch.cuda.get_device_name(device) if is_gpu else 'CPU'}, torch {torch.__version__}, "
        f"triton {installed('triton').__version__ if HAS_TRITON else 'not installed'}, {args.rounds} rounds; "
        f"copying reaches {copy:.2f} TB/s\n"
    )
    print(heading)
    rows, times = [], {}
    try:
        for case in loss_cases(args.small) + nms_cases(args.small) + pooling_cases(args.small):
            if args.only in case.name:
                times[case.name] = measure(case, args.rounds, device)
                rows.append(row(case, times[case.name], copy))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        os.environ.pop("KERNELS", None)
        if chosen is not None:
            os.environ["KERNELS"] = chosen
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gpu_kernels.md").write_text(f"{heading}\n{table(rows)}", encoding="utf-8")
    report = {"heading": heading.strip(), "copy_TB_per_s": copy, "milliseconds": times}
    (args.output / "gpu_kernels.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\n{table(rows)}\nwritten to {args.output}")


if __name__ == "__main__":
    run_script(main)
