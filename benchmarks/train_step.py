"""One YOLOv8n training step on the CPU: ours beside Ultralytics' model and loss, where ultralytics is installed.

    python benchmarks/train_step.py [--image-size 320] [--batch-size 16] [--rounds 7] [--threads N] [--cpu-time]
    /path/to/env/bin/python benchmarks/train_step.py      # an environment with torch and ultralytics

A step is forward, loss, backward and SGD with Nesterov momentum on one batch: random pictures, ten objects each, 80
classes, the same for both. Both optimizers are torch's fused SGD over the same three groups, so a row compares model
and loss alone. Under bfloat16 the network runs in autocast, and the losses wherever each trainer computes them:
ours after it, in float32, theirs inside it. The contestants of all rows take turns, round by round, in one process;
rates are those of the median round, in brackets the best. `--cpu-time` counts CPU seconds of all threads instead of
the clock's; with `--threads 1` that is what to read on a machine that others use.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from boxes import cxcywh_to_xyxy
from errors import run_script
from runtime.processes import use_bfloat16
from runtime.timing import rotate
from structures import Targets
from training.optimization import build_optimizer

NUM_CLASSES, OBJECTS = 80, 10
VARIANTS = {  # name: (bfloat16, channels_last)
    "float32 contiguous": (False, False),
    "float32 channels_last": (False, True),
    "bfloat16 channels_last": (True, True),
}


def random_batch(batch_size: int, image_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """images (B, 3, S, S), boxes_cxcywh_norm (N, 4), labels (N,), image (N,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, image_size, image_size, generator=generator)
    count = batch_size * OBJECTS
    side = torch.empty(count, 2).uniform_(0.04, 0.5, generator=generator)
    center = side / 2 + torch.rand(count, 2, generator=generator) * (1 - side)
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return images, torch.cat((center, side), 1), labels, torch.arange(batch_size).repeat_interleave(OBJECTS)


def build_step(
    model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, channels_last: bool
) -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = build_optimizer([model], name="sgd", learning_rate=1e-3, momentum=0.937, weight_decay=5e-4)

    def step() -> float:
        total = loss(images)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


def our_step(batch: tuple[Tensor, ...], bfloat16: bool, channels_last: bool) -> Callable[[], float]:
    images, boxes_cxcywh_norm, labels, image = batch
    torch.manual_seed(0)
    model = models.build("yolov8n", num_classes=NUM_CLASSES).train()
    boxes_xyxy = cxcywh_to_xyxy(boxes_cxcywh_norm) * images.shape[-1]
    targets = Targets(boxes_xyxy, labels, image, torch.zeros_like(labels, dtype=torch.bool))

    def loss(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            output = model(images)
        return sum(model.losses(output, targets).values()) * len(images)

    return build_step(model, loss, images, channels_last)


def peer_step(batch: tuple[Tensor, ...], bfloat16: bool, channels_last: bool) -> Callable[[], float]:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.loss import v8DetectionLoss

    images, boxes_cxcywh_norm, labels, image = batch
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=NUM_CLASSES, verbose=False).train()
    model.args = get_cfg()
    criterion = v8DetectionLoss(model)
    rows = {"cls": labels[:, None].float(), "bboxes": boxes_cxcywh_norm, "batch_idx": image.float()}

    def loss(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return criterion(model(images), {"img": images, **rows})[0].sum()

    return build_step(model, loss, images, channels_last)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default, one for each core")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", choices=list(VARIANTS), help="one row")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    batch = random_batch(args.batch_size, args.image_size)
    variants = {name: VARIANTS[name] for name in VARIANTS if args.only in (None, name)}
    steps = {("ours", name): our_step(batch, *variant) for name, variant in variants.items()}
    try:
        steps |= {("peer", name): peer_step(batch, *variant) for name, variant in variants.items()}
        peer = f"ultralytics {sys.modules['ultralytics'].__version__}"
    except ImportError:
        peer = "ultralytics is not installed: its column is empty"
    unit = "images per CPU second" if args.cpu_time else "images/s"
    print(
        f"YOLOv8n, {args.image_size} px, batch {args.batch_size}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; {peer}\n{unit:<24}{'ours':>17}{'Ultralytics':>17}{'ratio':>7}"
    )
    seconds = rotate(steps, args.rounds, time.process_time if args.cpu_time else time.perf_counter)
    rate = {name: args.batch_size / statistics.median(values) for name, values in seconds.items()}
    for name in variants:
        line = f"{name:<24}"
        for side in ("ours", "peer"):
            known = (side, name) in rate
            line += (
                f"{rate[side, name]:8.2f} ({args.batch_size / min(seconds[side, name]):6.2f})" if known else " " * 17
            )
        if ("peer", name) in rate:
            line += f"{rate['ours', name] / rate['peer', name]:7.2f}"
        print(line)
    if ("peer", "float32 contiguous") in rate and args.only is None:
        bfloat16 = use_bfloat16("auto", torch.device("cpu"))
        default = "bfloat16 channels_last" if bfloat16 else "float32 channels_last"
        ratio = rate["ours", default] / rate["peer", "float32 contiguous"]
        print(f"our default on this CPU ({default}) / its default (float32 contiguous): {ratio:.2f}")


if __name__ == "__main__":
    run_script(main)
