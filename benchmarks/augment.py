"""What augmentation costs: milliseconds per batch, and as a share of a YOLOv8n training step on the same machine.

    python benchmarks/augment.py [--image-size 320] [--batch-size 16] [--device cpu]

Both are timed in turns, so that a busy machine slows both; each figure is the median of its rounds, and the share
the median of the shares of the rounds. A step is forward, losses, backward and SGD with bfloat16 autocast where the
processor computes in it, and channels_last, as train.py does by default.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from config import AugmentConfig
from datasets.augment import augment, jitter_hsv
from errors import run_script
from structures import Targets


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/augment.py", description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    images, targets = make_batch(a.batch_size, a.image_size, a.device)
    step = make_step(images.float() / 255, targets, a.device)
    settings = {
        "default": AugmentConfig(),
        "without mosaic": AugmentConfig(mosaic=0.0),
        "without colour": AugmentConfig(hue=0.0, saturation=0.0, value=0.0),
        "with rotation, shear": AugmentConfig(degrees=10.0, shear=5.0),
        "with mixup": AugmentConfig(mixup=1.0),
    }
    generator = torch.Generator().manual_seed(0)
    jobs = {name: lambda s=s: augment(images, targets, generator=generator, settings=s) for name, s in settings.items()}
    pixels, gains = images.float() / 255, 0.7 + 0.6 * torch.rand(2, a.batch_size)
    jobs["HSV alone"] = lambda: jitter_hsv(pixels, torch.full((a.batch_size,), 0.01), *gains)
    times = measure({"training step": step, **jobs}, a.rounds, a.device)

    threads = f", {torch.get_num_threads()} threads" if a.device == "cpu" else ""
    print(f"batch of {a.batch_size} at {a.image_size} px, {a.device}{threads}, torch {torch.__version__}")
    print(f"{'':22}  median ms  best ms  share of a step")
    for name, ms in times.items():
        share = statistics.median(x / y for x, y in zip(ms, times["training step"]))
        print(f"{name:22}  {statistics.median(ms):9.1f}  {min(ms):7.1f}  {share:15.1%}")


def make_batch(count: int, size: int, device: str) -> tuple[torch.Tensor, Targets]:
    """Noise, and ten boxes a picture; the targets stay on the host, as in train.py."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(10 * count, 2, generator=generator) * 0.8 * size
    side = (0.03 + 0.3 * torch.rand(10 * count, 2, generator=generator)) * size
    boxes = torch.cat((corner, (corner + side).clamp(max=size)), dim=1)
    labels = torch.randint(0, 80, (10 * count,), generator=generator)
    image = torch.arange(count).repeat_interleave(10)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images.to(device), Targets(boxes, labels, image, torch.zeros(10 * count, dtype=torch.bool))


def make_step(images: torch.Tensor, targets: Targets, device: str):
    """A YOLOv8n training step on fixed pictures."""
    torch.manual_seed(0)
    model = models.build("yolov8n", num_classes=80).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    images, targets = images.contiguous(memory_format=torch.channels_last), targets.to(device)
    has_bfloat16 = torch.cuda.is_bf16_supported() if device == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=has_bfloat16):
            output = model(images)
        loss = sum(model.losses(output, targets).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def measure(jobs: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each job in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            _wait(device)
            start = time.perf_counter()
            job()
            _wait(device)
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_script(main)
