"""Whole epochs on the CPU: read, augment, train, evaluate, save. Ours beside Ultralytics', where it is installed.

    python -m datasets.convert voc data/voc2012_animals train,val yolo data/animals_yolo
    /path/to/env/bin/python benchmarks/epoch.py data/animals_yolo      # an environment with torch and ultralytics
        [--pictures 1000] [--image-size 192] [--threads 1] [--rounds 3]

Both train a YOLOv8n from scratch on the same pictures, in batches of 16, with SGD and mosaic; both evaluate the split
val and save after each epoch. Each contestant is a process, and trains only when it is its turn: one epoch in a round.
Imports and the scan of the set do not count. Times are CPU seconds of all threads, medians of the rounds, so what else
runs on the machine counts only through the caches and cores that it shares.

    like for like    float32, channels_last, each picture decoded once in each epoch, a step of the optimizer for each
                     batch, freed memory kept for the next step (processes.keep_freed_memory)
    default          what each does when nothing is said: ours bfloat16 where the CPU computes in it, channels_last,
                     decoded pictures kept in memory; theirs float32, contiguous, decoded again, a step of the optimizer
                     for every fourth batch
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.folders import list_files
from datasets.images import SUFFIXES
from errors import ArgumentParser, UserError, counted, run_script

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 16
VARIANTS = ("like for like", "default")
PARTS = ("read and augment", "steps", "evaluation", "saving")
MARK = "epoch done: "
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


class PartsOfEpoch:
    """In a contestant: CPU seconds of each part of the epoch, told to the parent at its end."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, *_: Any) -> None:
        """An epoch begins now; what was before it does not count."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = time.process_time()

    def mark(self, part: str) -> None:
        """What was done since the last mark was this part."""
        now = time.process_time()
        self.seconds[part] += now - self.last
        self.last = now

    def around(self, function: Callable[..., Any], before: str, part: str) -> Callable[..., Any]:
        """The function, which is `part`; what is done between the last mark and its call is `before`."""

        def call(*args: Any, **keywords: Any) -> Any:
            self.mark(before)
            result = function(*args, **keywords)
            self.mark(part)
            return result

        return call

    def end_epoch(self, *_: Any) -> None:
        """Print the parts, and wait for the next turn: a line on standard input, or its end, which ends the process."""
        self.mark("saving")
        print(f"\n{MARK}{json.dumps(self.seconds)}", flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self.begin()


def run_ours(data: Path, variant: str, image_size: int, threads: int, *changes: str) -> None:
    """Train as train.py does. changes: further key=value."""
    import torch

    import train
    from config import load_config
    from engine.training import reporting

    torch.set_num_threads(threads)
    parts = PartsOfEpoch()
    vars(train).update(
        train_step=parts.around(train.train_step, "read and augment", "steps"),
        augment_batch=parts.around(train.augment_batch, "steps", "read and augment"),
    )
    loop = train.train

    def loop_from_here(*args: Any) -> None:
        parts.begin()
        loop(*args)

    vars(train).update(train=loop_from_here)
    vars(reporting).update(evaluate=parts.around(reporting.evaluate, "saving", "evaluation"))
    keys = [
        "name=ours", f"runs={data / variant}", "data.format=yolo", f"data.root={data}", "data.train=train",
        "data.test=val", f"image_size={image_size}", f"batch_size={BATCH_SIZE}", "evaluation.every_epochs=1",
        "optimizer.name=sgd", "optimizer.learning_rate=0.01", "augment.flip_vertical=0",
    ]  # fmt: skip
    if variant == "like for like":
        keys += ["precision=float32", "channels_last=true", "data.cache=false"]
    train.run(load_config("configs/bccd_yolov8n.yaml", [*keys, *changes]), on_epoch=parts.end_epoch)


def run_peer(data: Path, variant: str, image_size: int, threads: int) -> None:
    import torch
    from ultralytics import YOLO

    is_alike = variant == "like for like"
    parts = PartsOfEpoch()

    def arrange(trainer: Any) -> None:
        torch.set_num_threads(threads)  # the trainer has set it to the number of cores without one
        if is_alike:  # its own setting channels_last is for CUDA alone
            for model in (trainer.model, trainer.ema.ema):
                model.to(memory_format=torch.channels_last)

    model = YOLO("yolov8n.yaml")
    model.add_callback("on_pretrain_routine_end", arrange)
    for event, part in (
        ("on_train_batch_start", "read and augment"),
        ("on_train_batch_end", "steps"),
        ("on_val_end", "evaluation"),
        ("on_model_save", "saving"),
    ):
        model.add_callback(event, functools.partial(lambda part, _: parts.mark(part), part))
    model.add_callback("on_train_start", parts.begin)
    model.add_callback("on_fit_epoch_end", parts.end_epoch)
    model.train(
        data=str(data / "data.yaml"), imgsz=image_size, epochs=100, batch=BATCH_SIZE, workers=0, device="cpu",
        optimizer="SGD", lr0=0.01, close_mosaic=0, plots=False, project=str(data / variant), name="peer", seed=0,
        verbose=False, warmup_epochs=0,  # in which it would take more steps of the optimizer than in later epochs
        **({"nbs": BATCH_SIZE} if is_alike else {}),
    )  # fmt: skip


CONTESTANTS = {"ours": run_ours, "Ultralytics": run_peer}


def make_part(source: Path, target: Path, count: int) -> None:
    """The first `count` training pictures of a YOLO set and all of its val split, as links, with a data.yaml."""
    for split, most in (("train", count), ("val", None)):
        pictures = list_files(source / "images" / split, SUFFIXES)[:most]
        if not pictures or (most and len(pictures) < most):
            raise UserError(f"{source}: {len(pictures)} pictures in images/{split}, expected {most or 'some'}")
        for kind in ("images", "labels"):
            (target / kind / split).mkdir(parents=True)
        for picture in pictures:
            label = source / "labels" / split / f"{picture.stem}.txt"
            (target / "images" / split / picture.name).symlink_to(picture.resolve())
            (target / "labels" / split / label.name).symlink_to(label.resolve())
    names = (source / "data.yaml").read_text(encoding="utf-8").partition("names:")[2]
    (target / "data.yaml").write_text(
        f"path: {target}\ntrain: images/train\nval: images/val\nnames:{names}", encoding="utf-8"
    )


def start(side: str, variant: str, data: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    environment = os.environ | {"YOLO_OFFLINE": "true"} | (KEEP_FREED_MEMORY if variant == "like for like" else {})
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    command = [sys.executable, str(Path(__file__).resolve()), str(data), "--contestant", side, variant]
    command += ["--image-size", str(args.image_size), "--threads", str(args.threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def parts_of_epoch(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a contestant tells at the end of its epoch. UserError with its last line if it ends instead."""
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
        last = line.strip() or last
    raise UserError(f"{process.args}: exit code {process.wait()}: {last}")


def measure(data: Path, args: argparse.Namespace) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(variant, side) -> the parts of each round's epoch."""
    sides = [side for side in CONTESTANTS if side == "ours" or importlib.util.find_spec("ultralytics")]
    found: dict[tuple[str, str], list[dict[str, float]]] = {(v, side): [] for v in VARIANTS for side in sides}
    with contextlib.ExitStack() as held:
        processes = {}
        for number in range(args.rounds):
            for (variant, side), rounds in found.items():
                if number == 0:  # it goes on to the end of its first epoch
                    processes[variant, side] = held.enter_context(start(side, variant, data, args))
                else:
                    print("go", file=processes[variant, side].stdin, flush=True)
                rounds.append(parts_of_epoch(processes[variant, side]))
                print(f"{number + 1} {variant}, {side}: {rounds[-1]}", file=sys.stderr, flush=True)
    return found


def main(argv: list[str]) -> None:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("data", type=Path, help="a YOLO set with the splits train and val")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.contestant:
        side, variant = args.contestant
        CONTESTANTS[side](args.data, variant, args.image_size, args.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        make_part(args.data.resolve(), data, args.pictures)
        found = measure(data, args)
    scale = f"{args.image_size} px, {counted(args.threads, 'thread')}, {counted(args.rounds, 'round')}"
    print(f"YOLOv8n, {counted(args.pictures, 'picture')} of {scale}")
    print(f"{'CPU seconds of an epoch':<28}{'all':>8}" + "".join(f"{part:>18}" for part in PARTS))
    for (variant, side), rounds in found.items():
        whole = statistics.median(sum(parts.values()) for parts in rounds)
        cells = [statistics.median(parts[part] for parts in rounds) for part in PARTS]
        shares = "".join(f"{cell:11.1f} ({100 * cell / sum(cells):3.0f} %)" for cell in cells)
        print(f"{variant + ', ' + side:<28}{whole:8.1f}{shares}")
    for variant in VARIANTS if (VARIANTS[0], "Ultralytics") in found else ():
        ours, theirs = ([sum(p.values()) for p in found[variant, side]] for side in CONTESTANTS)
        rounds_of = ", ".join(f"{t / o:.2f}" for o, t in zip(ours, theirs))
        ratio = statistics.median(theirs) / statistics.median(ours)
        print(f"{variant}: {ratio:.2f} times Ultralytics' pictures per CPU second (by round: {rounds_of})")


if __name__ == "__main__":
    run_script(main)
