"""The Triton kernels that benchmarks/gpu.py times: inputs, specifications, peers, and how they are compared."""

import contextlib
import importlib
import itertools
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.nms import clustered_boxes
from benchmarks.timing import device_seconds
from boxes import cxcywh_to_xyxy
from engine.runtime.timing import rotate
from kernels.backend import HAS_TRITON
from kernels.channel_wise_kl import channel_kl, channel_kl_eager
from kernels.deformable_attention import deformable_attention, deformable_attention_eager
from kernels.masked_mse import masked_squares, masked_squares_eager
from kernels.nms import batched_nms, select_detections
from kernels.roi_align import assign_levels, roi_align
from kernels.sigmoid_kl import sigmoid_kl, sigmoid_kl_eager
from kernels.temperature_kl import temperature_kl, temperature_kl_eager

Inputs = tuple[Any, ...]
CACHE_BYTES = 4 * 60 * 2**20  # four times the L2 cache of an H200
TOLERANCE = 0.02  # of results against eager's, relative: bfloat16, and operations in another order


@dataclass(frozen=True)
class Sizes:
    """Those of a batch of 32 images of 640 px, and of RoIAlign's pyramid."""

    maps: tuple[int, int, int, int] = (32, 256, 80, 80)
    locations: int = 8400
    boxes: tuple[int, ...] = (30_000, 1000, 10_000, 100_000)
    regions: int = 1024
    image_size: int = 640
    calls: int = 50
    copied_bytes: int = 2**30


@dataclass(frozen=True)
class Case:
    """run(*inputs) is timed with our kernel and without, beside what torch.compile and a peer make of it."""

    name: str
    make: Callable[[torch.Generator], Inputs]  # on the generator's device
    run: Callable[..., Any]
    gigabytes: float | None = None
    specification: Callable[..., Any] | None = None  # what torch.compile gets, and
    around: Callable[[Callable], Callable] = lambda run: run  # what is called around it
    peer: Callable[..., Any] | None = None
    is_exact: bool = False  # equal to the last bit, or wrong; the host waits for the result


def with_gradient(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """loss(s, ...) -> its value and its gradient with respect to s."""

    def run(s: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        value = loss(s, *others)
        return value.detach(), torch.autograd.grad(value, s)[0]

    return run


def loss_cases(sizes: Sizes) -> Iterator[Case]:
    """The fused losses at the sizes of a batch of 32, in bfloat16, as in training, and float32."""
    logits, maps = (sizes.maps[0], sizes.locations, 80), sizes.maps
    options = dict(temperature=2.0, normaliser=float(logits[0] * logits[1]))
    of_rows = lambda loss: lambda s, t: loss(s, t, 2.0, None, options["normaliser"])
    losses = {  # name: loss, specification, shape, layout, share of the marked pixels
        "kl": (lambda s, t: temperature_kl(s, t, **options), of_rows(temperature_kl_eager), logits, False, None),
        "sigmoid kl": (lambda s, t: sigmoid_kl(s, t, **options), of_rows(sigmoid_kl_eager), logits, False, None),
    }
    channel = (lambda s, t: channel_kl(s, t, temperature=2.0), lambda s, t: channel_kl_eager(s, t, 2.0))
    masked = (lambda *x: masked_squares(*x, normaliser=1000.0), lambda *x: masked_squares_eager(*x, 1000.0))
    losses |= {"cwd": (*channel, maps, False, None), "cwd, channels last,": (*channel, maps, True, None)}
    losses |= {f"masked mse, {share:.0%} marked,": (*masked, maps, False, share) for share in (1.0, 0.2)}
    for dtype in (torch.bfloat16, torch.float32):
        for name, (loss, specification, shape, is_last, share) in losses.items():

            def make(generator, shape=shape, is_last=is_last, share=share, dtype=dtype) -> Inputs:
                layout = torch.channels_last if is_last else torch.contiguous_format
                draw = lambda: torch.randn(shape, generator=generator, device=generator.device).to(dtype)
                pair = draw().contiguous(memory_format=layout).requires_grad_(), draw().contiguous(memory_format=layout)
                return pair if share is None else (*pair, blob_mask(shape, share).to(generator.device))

            passes = 1 + 2 * (share or 1.0)  # the gradient is written everywhere, maps are read where the mask marks
            gigabytes = passes * torch.Size(shape).numel() * dtype.itemsize / 1e9
            name = f"{name} {shape} {str(dtype).removeprefix('torch.')}"
            yield Case(name, make, with_gradient(loss), gigabytes, specification, with_gradient)


def blob_mask(shape: tuple[int, ...], share: float) -> Tensor:
    """(B, 1, H, W) bool: a rectangle in the middle that covers about that share of each image."""
    b, _, h, w = shape
    mask = torch.zeros(b, 1, h, w, dtype=torch.bool)
    height, width = round(h * share**0.5), round(w * share**0.5)
    mask[:, :, (h - height) // 2 : (h + height) // 2, (w - width) // 2 : (w + width) // 2] = True
    return mask


def other_cases(sizes: Sizes) -> Iterator[Case]:
    """NMS of 80 classes with every survivor, RoIAlign as Faster R-CNN trains it, attention as an RT-DETR runs it."""
    with contextlib.suppress(ImportError, RuntimeError):
        importlib.import_module("torchvision")
    vision = sys.modules.get("torchvision")
    size, strides, channels, count = sizes.image_size, [4, 8, 16, 32], sizes.maps[1], sizes.regions

    def boxes_of(number: int, generator: torch.Generator) -> Inputs:
        host = torch.Generator().manual_seed(
            int(torch.randint(2**31, (), generator=generator, device=generator.device))
        )
        boxes, labels = clustered_boxes(number, host)
        inputs = cxcywh_to_xyxy(boxes), torch.rand(number, generator=host), labels
        return tuple(x.to(generator.device) for x in inputs)

    for number in sizes.boxes:
        run = lambda boxes, scores, labels: batched_nms(boxes, scores, labels, 0.5, len(boxes))
        peer = (lambda *inputs: vision.ops.batched_nms(*inputs, 0.5)) if vision else None
        make = lambda generator, number=number: boxes_of(number, generator)
        yield Case(f"nms, {number:,} boxes", make, run, peer=peer, is_exact=True)

    def batch_of(generator: torch.Generator) -> Inputs:
        found = [boxes_of(sizes.boxes[-1] // 100, generator) for _ in range(sizes.maps[0])]
        return torch.stack([boxes for boxes, _, _ in found]), torch.stack([scores for _, scores, _ in found])[..., None]

    def select(boxes: Tensor, scores: Tensor) -> list[Tensor]:
        at_most = boxes.shape[1]
        found = select_detections(boxes, scores, score_threshold=0.0, iou_threshold=0.5, max_detections=at_most)
        return [detections.boxes_xyxy for detections in found]

    peer = (lambda b, s: [x[vision.ops.nms(x, y[:, 0], 0.5)] for x, y in zip(b, s)]) if vision else None
    name = f"nms, {sizes.maps[0]} images of {sizes.boxes[-1] // 100:,} boxes"
    yield Case(name, batch_of, select, peer=peer, is_exact=True)

    def pyramid(generator: torch.Generator) -> Inputs:
        draw = lambda *shape: torch.rand(shape, generator=generator, device=generator.device)
        maps = [draw(2, channels, size // s, size // s).requires_grad_() for s in strides]
        corner = draw(count, 2) * size * 0.7
        boxes = torch.cat((corner, corner + 8 + draw(count, 2) ** 3 * size / 4), 1)
        return maps, boxes, torch.arange(count, device=boxes.device) % 2, assign_levels(boxes, strides)

    def pooled(maps: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        value = roi_align(maps, boxes, image, level, strides=strides)
        return value.detach(), *torch.autograd.grad(value, maps, value.detach())

    yield Case(f"roi align, {count:,} boxes, {channels} channels", pyramid, pooled)

    def attention(generator: torch.Generator) -> Inputs:
        sizes = [(size // s, size // s) for s in strides[1:]]
        draw = lambda *shape: torch.rand(shape, generator=generator, device=generator.device)
        prob, points = draw(16, 300, 8, 3, 4), draw(16, 300, 8, 3, 4, 2)
        return draw(16, sum(h * w for h, w in sizes), 8, 32), sizes, points, prob

    yield Case("deformable attention", attention, deformable_attention, specification=deformable_attention_eager)


def kernel_cases(sizes: Sizes) -> Iterator[Case]:
    yield from loss_cases(sizes)
    yield from other_cases(sizes)


@contextlib.contextmanager
def kernels(choice: str) -> Iterator[None]:
    """The environment variable KERNELS for a while."""
    before = os.environ.get("KERNELS")
    os.environ["KERNELS"] = choice
    try:
        yield
    finally:
        os.environ.pop("KERNELS")
        os.environ.update({} if before is None else {"KERNELS": before})


def tensors(value: Any) -> list[Tensor]:
    """Those in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in tensors(item)] if isinstance(value, list | tuple) else []


def require_equal(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """ValueError unless the tensors are equal up to `tolerance` of the largest entry of each."""
    pairs = list(itertools.zip_longest(tensors(found), tensors(expected)))
    for x, y in pairs:
        if x is None or y is None or x.shape != y.shape:
            raise ValueError(f"{what}: results of other shapes than eager's")
        if y.numel() and not (x - y).abs().max() <= tolerance * y.abs().max():
            error, largest = (x - y).abs().max().item(), y.abs().max().item()
            raise ValueError(f"{what}: off by {error:.3g} where the largest entry of eager's is {largest:.3g}")


def measure_kernel(case: Case, sizes: Sizes, device: torch.device, copy: float) -> dict[str, Any]:
    """A row of the table: milliseconds of each contestant that can run here, and is right."""
    generator, is_gpu = torch.Generator(device).manual_seed(0), device.type == "cuda"
    first = case.make(generator)
    num_bytes = sum(x.numel() * x.element_size() for x in tensors(first))
    count = min(64, max(2, -(-CACHE_BYTES // num_bytes))) if is_gpu else 1
    sets = [first, *(case.make(generator) for _ in range(count - 1))]

    def turns(run: Callable[..., Any], choice: str) -> Callable[[], Any]:
        inputs = itertools.cycle(sets)

        def call() -> Any:
            os.environ["KERNELS"] = choice
            return run(*next(inputs))

        return call

    contestants = {"eager": turns(case.run, "eager")}
    if is_gpu and HAS_TRITON:
        contestants["kernel"] = turns(case.run, "triton")
    if is_gpu and case.specification:
        contestants["compile"] = turns(case.around(torch.compile(case.specification)), "eager")
    if case.peer:
        contestants["peer"] = turns(case.peer, "eager")
    row: dict[str, Any] = {"GB": case.gigabytes, "TB/s": None, "of copy": None}
    with kernels("eager"):
        expected = case.run(*first)
        for name, call in list(contestants.items()):
            try:
                if not (case.is_exact and name == "peer"):  # peers round differently; a tie may fall on the other side
                    require_equal(call(), expected, 0.0 if case.is_exact else TOLERANCE, name)
            except Exception as error:  # one contestant that fails must not cost the others' numbers
                traceback.print_exc()
                row["error"] = first_line(error)
                del contestants[name]
        times = rotate(contestants, sizes.calls, device_seconds(device, host_waits=case.is_exact))
    medians = {name: statistics.median(values) for name, values in times.items()}
    row |= {f"{name} ms": 1000 * value for name, value in medians.items()}
    if "kernel" in medians:
        row |= {f"{name} / kernel": value / medians["kernel"] for name, value in medians.items() if name != "kernel"}
        if case.gigabytes:
            rate = case.gigabytes / medians["kernel"] / 1000
            row |= {"TB/s": rate, "of copy": rate / copy}
    return row


def copy_rate(device: torch.device, sizes: Sizes) -> float:
    """TB/s of copying, read and written bytes together."""
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = rotate({"copy": lambda: target.copy_(source)}, sizes.calls, device_seconds(device))["copy"]
    return 2 * sizes.copied_bytes / statistics.median(times) / 1e12


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
