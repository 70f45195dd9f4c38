"""What augmentation costs: milliseconds per batch, and as a share of a YOLOv8n training step on the same machine.

    python benchmarks/augment.py [--image-size 320] [--batch-size 16] [--device cpu]

Both are timed in turns, so that a busy machine slows both; each time is the median of its rounds in milliseconds (the
best in brackets), and the share the median of the shares of the rounds. A step is forward, losses, backward and SGD
with bfloat16 autocast where the processor computes in it, and channels_last, as train.py does by default.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.timing import build_step, device_seconds, header, options, parse, random_batch, row, versions
from config import AugmentConfig
from datasets.augment import augment, jitter_hsv
from engine.runtime.processes import choose_device, use_bfloat16
from engine.runtime.timing import rotate
from errors import run_script
from structures import Targets


def main(argv: list[str]) -> None:
    parser = options(__doc__, rounds=9, image_size=320, batch_size=16)
    parser.add_argument("--device", default="auto", help="cuda where there is one")
    args = parse(parser, argv)
    device = choose_device(args.device)
    pixels, targets = random_batch(args.batch_size, args.image_size)  # the targets stay on the host, as in train.py
    pixels = pixels.to(device)
    images = (255 * pixels).to(torch.uint8)
    settings = {
        "default": AugmentConfig(),
        "without mosaic": AugmentConfig(mosaic=0.0),
        "without colour": AugmentConfig(hue=0.0, saturation=0.0, value=0.0),
        "with rotation, shear": AugmentConfig(degrees=10.0, shear=5.0),
        "with mixup": AugmentConfig(mixup=1.0),
    }
    generator = torch.Generator().manual_seed(0)
    jobs = {name: lambda s=s: augment(images, targets, generator=generator, settings=s) for name, s in settings.items()}
    gains = 0.7 + 0.6 * torch.rand(2, args.batch_size)
    jobs["HSV alone"] = lambda: jitter_hsv(pixels, torch.full((args.batch_size,), 0.01), *gains)
    jobs = {"training step": make_step(pixels, targets), **jobs}
    seconds = rotate(jobs, args.rounds, device_seconds(device, host_waits=True))
    print(f"batch of {args.batch_size} at {args.image_size} px, {device}; {versions()}")
    print(f"{header('')}  share of a step")
    for name, times in seconds.items():
        share = statistics.median(x / y for x, y in zip(times, seconds["training step"]))
        print(f"{row(name, {'ours': times}, lambda s: 1000 * s)}{share:17.1%}")


def make_step(images: Tensor, targets: Targets) -> Callable[[], float]:
    """A YOLOv8n training step on fixed images."""
    torch.manual_seed(0)
    model = models.build("yolov8n", num_classes=80).to(images.device).train()
    targets, bfloat16 = targets.to(images.device), use_bfloat16("auto", images.device)

    def loss(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            output = model(images)
        return sum(model.losses(output, targets).values())

    return build_step(model, loss, images, channels_last=True)


if __name__ == "__main__":
    run_script(main)
