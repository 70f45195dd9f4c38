"""What a step of gradient matching costs: seconds, and the memory it takes as the synthetic set grows.

    python benchmarks/condense.py [--arch yolov8_narrow yolov8n] [--image-size 160] [--steps 3] [--threads N]
                                  [--gigabytes 4]

A step as gradient matching takes it by default, with noise for images, three objects in each: 16 real images, the
training of the network between two matches included. `in a step` are the synthetic images whose pixels move in it:
16 of the stored ones, or all. Each row is a process of its own; its seconds are the median of --steps steps after
one that is not measured, its CPU seconds those of all threads, and its memory the largest resident size of the process,
torch's own 0.3 GB included. Exits with 1 where a step with 16 images takes more than --seconds, or any row more than
--gigabytes.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.timing import parse, random_batch, versions
from config import AugmentConfig
from datasets.augment import draw_siamese
from distill.condense.gradient_matching import GradientMatching, MatchingSettings
from distill.condense.network_pool import PoolSettings
from distill.condense.synthetic import SyntheticSet
from engine.runtime.peak_memory import peak_gigabytes
from engine.runtime.timing import rotate, wall_and_cpu
from errors import ArgumentParser, run_script

STORED = (16, 64, 256)
IMAGES, NUM_CLASSES = 16, 3


def measure(arch: str, stored: int, in_step: int, image_size: int, steps: int) -> dict[str, float]:
    """seconds and cpu of the median step, gigabytes of this process."""
    augmentation = AugmentConfig(mosaic=0.0)
    batch = functools.partial(random_batch, image_size=image_size, objects=3, num_classes=NUM_CLASSES)
    matching = GradientMatching(
        SyntheticSet(*batch(stored)),
        settings=MatchingSettings(pictures_per_step=in_step, pool=PoolSettings(networks=1)),
        build_network=lambda seed: models.build(arch, NUM_CLASSES),
        draw_real=lambda generator: batch(IMAGES, generator=generator),
        draw_augmentation=lambda generator: draw_siamese(generator=generator, settings=augmentation),
    )
    times = rotate({"step": matching.step}, steps, wall_and_cpu)["step"]  # the step that is not timed makes the network
    seconds, cpu = (statistics.median(column) for column in zip(*times))
    return {"seconds": seconds, "cpu": cpu, "gigabytes": peak_gigabytes(torch.device("cpu"))}


def main(argv: list[str]) -> int:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("--arch", nargs="+", default=["yolov8_narrow", "yolov8n"])
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--stored", type=int, nargs="+", default=list(STORED))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default, one for each core")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.row:
        arch, stored, in_step = args.row
        print(json.dumps(measure(arch, int(stored), int(in_step), args.image_size, args.steps)))
        return 0
    print(f"{args.image_size} px, {IMAGES} real images, {versions()}")
    print(f"{'network':<10}{'stored':>8}{'in a step':>11}{'seconds':>9}{'CPU s':>8}{'peak GB':>9}")
    is_within = True
    for arch in args.arch:
        for stored, in_step in dict.fromkeys(
            [(n, min(n, IMAGES)) for n in args.stored] + [(n, n) for n in args.stored]
        ):
            command = [sys.executable, __file__, "--row", arch, str(stored), str(in_step), *argv]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            figures = f"{row['seconds']:>9.2f}{row['cpu']:>8.2f}{row['gigabytes']:>9.2f}"
            print(f"{arch:<10}{stored:>8}{in_step:>11}{figures}", flush=True)
            is_within &= row["gigabytes"] <= args.gigabytes and (in_step > IMAGES or row["seconds"] <= args.seconds)
    return 0 if is_within else 1


if __name__ == "__main__":
    run_script(main)
