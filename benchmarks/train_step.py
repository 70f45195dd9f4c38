"""One YOLOv8n training step on the CPU: ours beside Ultralytics' model and loss, where ultralytics is installed.

    python benchmarks/train_step.py [--image-size 320] [--batch-size 16] [--rounds 7] [--threads N] [--cpu-time]
    /path/to/env/bin/python benchmarks/train_step.py      # an environment with torch and ultralytics

A step is forward, loss, backward and SGD with Nesterov momentum on one batch: random images, ten objects each, 80
classes, the same for both. Both optimizers are torch's fused SGD over the same three groups, so a row compares model
and loss alone. Under bfloat16 the network runs in autocast, and the losses wherever each trainer computes them:
ours after it, in float32, theirs inside it. The contestants of all rows take turns, round by round, in one process;
rates are those of the median round, in brackets the best. `--cpu-time` counts CPU seconds of all threads instead of
the clock's; with `--threads 1` that is what to read on a machine that others use.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.timing import (
    build_step,
    header,
    options,
    parse,
    random_batch,
    row,
    take_turns,
    ultralytics_rows,
    versions,
)
from engine.runtime.processes import use_bfloat16
from errors import run_script
from structures import Targets

VARIANTS = {  # name: (bfloat16, channels_last)
    "float32 contiguous": (False, False),
    "float32 channels_last": (False, True),
    "bfloat16 channels_last": (True, True),
}


def our_step(batch: tuple[Tensor, Targets], bfloat16: bool, channels_last: bool) -> Callable[[], float]:
    images, targets = batch
    torch.manual_seed(0)
    model = models.build("yolov8n", num_classes=80).train()

    def loss(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            output = model(images)
        return sum(model.losses(output, targets).values()) * len(images)

    return build_step(model, loss, images, channels_last)


def peer_step(batch: tuple[Tensor, Targets], bfloat16: bool, channels_last: bool) -> Callable[[], float]:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.loss import v8DetectionLoss

    images, targets = batch
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=80, verbose=False).train()
    model.args = get_cfg()
    criterion = v8DetectionLoss(model)
    rows = ultralytics_rows(targets, images.shape[-1])

    def loss(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return criterion(model(images), {"img": images, **rows})[0].sum()

    return build_step(model, loss, images, channels_last)


def main(argv: list[str]) -> None:
    parser = options(__doc__, rounds=7, image_size=320, batch_size=16)
    parser.add_argument("--only", choices=list(VARIANTS), help="one row")
    args = parse(parser, argv)
    batch = random_batch(args.batch_size, args.image_size)
    variants = {name: VARIANTS[name] for name in VARIANTS if args.only in (None, name)}
    steps = {("ours", name): our_step(batch, *variant) for name, variant in variants.items()}
    with contextlib.suppress(ImportError):
        steps |= {("peer", name): peer_step(batch, *variant) for name, variant in variants.items()}
    print(f"YOLOv8n, {args.image_size} px, batch {args.batch_size}, {versions('ultralytics')}")
    print(header("images per CPU second" if args.cpu_time else "images/s", "Ultralytics"))
    seconds = take_turns(steps, args)
    for name in variants:
        print(row(name, seconds, lambda s: args.batch_size / s))
    if ("peer", "float32 contiguous") in seconds and args.only is None:
        bfloat16 = use_bfloat16("auto", torch.device("cpu"))
        default = "bfloat16 channels_last" if bfloat16 else "float32 channels_last"
        ratio = statistics.median(seconds["peer", "float32 contiguous"]) / statistics.median(seconds["ours", default])
        print(f"our default on this CPU ({default}) / its default (float32 contiguous): {ratio:.2f}")


if __name__ == "__main__":
    run_script(main)
