"""What the benchmarks share: options, turns, clocks, the cells of a table, and a batch and a step to time."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boxes import xyxy_to_cxcywh
from config import OptimizerConfig
from engine.runtime.timing import Call, cpu_seconds, rotate, wall_seconds
from engine.training.optimization import build_optimizer
from errors import ArgumentParser, counted, expect
from structures import Targets

Seconds = dict[Any, list[float]]  # by contestant


def options(doc: str, *, rounds: int, **sizes: int) -> argparse.ArgumentParser:
    """--rounds, --threads, --cpu-time, and an option for each size, as --image-size for image_size=320."""
    parser = ArgumentParser(Path(sys.argv[0]).name, doc)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default, one for each core")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of all threads, not the clock's")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The arguments; torch has as many threads as they ask for. Not every benchmark has --rounds."""
    args = parser.parse_args(argv)
    expect(getattr(args, "rounds", 1) >= 1, "--rounds", getattr(args, "rounds", 1), "at least 1")
    expect(args.threads >= 0, "--threads", args.threads, "at least 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def take_turns(contestants: dict[Any, Call], args: argparse.Namespace, *, settle: bool = False) -> Seconds:
    return rotate(contestants, args.rounds, cpu_seconds if args.cpu_time else wall_seconds, settle=settle)


def versions(*peers: str) -> str:
    """torch and its threads; the version of each peer, or that its column is empty. Call it after their import."""
    found = [f"torch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"]
    for name in peers:
        is_there = name in sys.modules
        found.append(f"{name} {sys.modules[name].__version__}" if is_there else f"no {name}: its column is empty")
    return "; ".join(found)


def header(title: str, *peers: str) -> str:
    return f"{title:<34}" + "".join(f"{side:>20}" for side in ("ours", *peers)) + ("  ratio" if peers else "")


def row(name: str, seconds: Seconds, show: Callable[[float], float]) -> str:
    """What `show` makes of the median time (and of the shortest) of "ours" and "peer"; the peer's time over ours.

    seconds: by side, or by (side, name).
    """
    sides = {side: seconds.get(side, seconds.get((side, name))) for side in ("ours", "peer")}
    line = f"{name:<34}"
    for times in sides.values():
        line += f"{show(statistics.median(times)):10.2f} ({show(min(times)):7.2f})" if times else ""
    if sides["peer"]:
        line += f"{statistics.median(sides['peer']) / statistics.median(sides['ours']):7.2f}"
    return line


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> Any:
    """A point in the work of a device, for seconds_between; on a GPU the host does not wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Any, after: Any) -> float:
    """Call it when the device has passed both points."""
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1000


def device_seconds(device: torch.device, *, host_waits: bool = False) -> Callable[[Call], float]:
    """A clock for `rotate`: the time that the device works on a call, or until the host has its result."""

    def until_result(call: Call) -> float:
        synchronize(device)
        return wall_seconds(lambda: (call(), synchronize(device)))

    def of_work(call: Call) -> float:
        torch.cuda._sleep(2_000_000)  # a millisecond of other work, so that all launches are queued before it ends
        before = now(device)
        call()
        after = now(device)
        synchronize(device)
        return seconds_between(before, after)

    return until_result if host_waits or device.type != "cuda" else of_work


def random_batch(
    count: int, image_size: int, *, objects: int = 10, num_classes: int = 80, generator: torch.Generator | None = None
) -> tuple[Tensor, Targets]:
    """Noise (B, 3, S, S) in [0, 1], and `objects` boxes an image, of 1/25 to 1/2 of its side."""
    generator = generator or torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, image_size, image_size, generator=generator)
    rows = count * objects
    side = torch.empty(rows, 2).uniform_(0.04, 0.5, generator=generator)
    corner = torch.rand(rows, 2, generator=generator) * (1 - side)
    labels = torch.randint(0, num_classes, (rows,), generator=generator)
    image = torch.arange(count).repeat_interleave(objects)
    boxes_xyxy = torch.cat((corner, corner + side), 1) * image_size
    return images, Targets(boxes_xyxy, labels, image, torch.zeros(rows, dtype=torch.bool))


def ultralytics_rows(targets: Targets, image_size: int) -> dict[str, Tensor]:
    """The same targets as the losses of that package take them."""
    boxes_cxcywh_norm = xyxy_to_cxcywh(targets.boxes_xyxy) / image_size
    return {"cls": targets.labels[:, None].float(), "bboxes": boxes_cxcywh_norm, "batch_idx": targets.image.float()}


def build_step(
    model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool
) -> Callable[[], float]:
    """A function that makes one step of SGD with Nesterov momentum and returns its loss."""
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = build_optimizer([model], OptimizerConfig(learning_rate=1e-3))

    def step() -> float:
        total = loss(images)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step
