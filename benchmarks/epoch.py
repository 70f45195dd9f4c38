"""A whole epoch on the CPU: decode, augment, train, evaluate, save. Ours beside Ultralytics' command.

    python -m datasets.convert voc data/voc2012_animals train,val yolo data/animals_yolo
    python benchmarks/epoch.py data/animals_yolo [--pictures 1000] [--image-size 192] [--threads 1] [--rounds 3]
        [--peers-python /path/to/env/bin/python]      # a Python that has ultralytics

Both train a YOLOv8n from scratch on the same pictures, in a process of its own: once for one epoch and once for two.
The difference is an epoch; imports, the scan of the set and the plots at the end are in neither. The contestants take
turns, and a time is the median of its rounds, in CPU seconds of all threads and in the clock's.

    like for like    float32, contiguous, SGD, batches of 16, mosaic, every picture decoded again in each epoch
    channels_last    the same for ours in that memory layout, beside the peer's as above, which has no such setting
    default          what each does when nothing is said: ours bfloat16 where the CPU computes in it, channels_last,
                     decoded pictures kept in memory; theirs float32, decoded again

Both evaluate the split val and save after each epoch. The last table has the parts of our epoch, like for like, in this
process: reading and augmenting, steps, evaluation, saving.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.folders import list_files
from datasets.images import SUFFIXES
from errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 16
SAME = ("precision=float32", "channels_last=false", "data.cache=false")
VARIANTS = {"like for like": SAME, "channels_last": (SAME[0], SAME[2]), "default": ()}
PEER = """
import sys
from ultralytics import YOLO
data, size, epochs, folder = sys.argv[1:]
YOLO("yolov8n.yaml").train(
    data=data, imgsz=int(size), epochs=int(epochs), batch=16, workers=0, device="cpu", optimizer="SGD", lr0=0.01,
    close_mosaic=0, plots=False, project=folder, name="peer", exist_ok=True, verbose=False, seed=0,
)
"""
Cost = tuple[float, float]  # CPU seconds of all threads, seconds of the clock


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


def our_overrides(data: Path, image_size: int, folder: Path) -> list[str]:
    return [
        "name=ours", f"runs={folder}", "data.format=yolo", f"data.root={data}", "data.train=train", "data.test=val",
        f"image_size={image_size}", f"batch_size={BATCH_SIZE}", "evaluation.every_epochs=1", "optimizer.name=sgd",
        "optimizer.learning_rate=0.01", "augment.flip_vertical=0",
    ]  # fmt: skip


def cost_of(command: list[str], threads: int) -> Cost:
    """What a process takes. UserError with its last line if it fails."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{command[:2]}: exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def epoch_of(run: Callable[[int], Cost]) -> Cost:
    """The cost of two epochs without that of one. run: number of epochs -> what they take."""
    (one, seconds_of_one), (two, seconds_of_two) = run(1), run(2)
    return two - one, seconds_of_two - seconds_of_one


def parts(overrides: list[str]) -> dict[str, float]:
    """CPU seconds of each part of our second epoch, in this process."""
    import train
    from config import load_config
    from engine.runtime.processes import Processes
    from engine.runtime.run_folder import RunFolder
    from engine.training.building import with_published_settings
    from engine.training.reporting import evaluate
    from engine.training.saving import save
    from engine.training.state import TrainingState

    config = with_published_settings(load_config("configs/bccd_yolov8n.yaml", [*overrides, "epochs=2"]))
    setup = train.build(config, Processes(config.device), None, lambda line: None)
    setup.learner.train()
    folder, state = RunFolder(Path(config.runs) / "parts"), TrainingState(epoch=1)
    seconds = dict.fromkeys(("read and augment", "steps"), 0.0)
    batches, began = iter(setup.loader.epoch(state.epoch)), time.process_time()
    while (batch := next(batches, None)) is not None:
        read = time.process_time()
        train.train_step(setup, [batch], state, folder)
        now = time.process_time()
        seconds["read and augment"] += read - began
        seconds["steps"] += now - read
        began = now
    evaluate(setup, setup.ema.model, setup.splits.test)
    evaluated = time.process_time()
    save(setup, state, folder)
    return seconds | {"evaluation": evaluated - began, "saving": time.process_time() - evaluated}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a YOLO set with the splits train and val")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers-python", help="a Python with ultralytics; without, its columns are empty")
    parser.add_argument("--parts", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.parts:
        print(json.dumps(parts(args.parts)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "set"
        make_part(args.data.resolve(), data, args.pictures)
        own = our_overrides(data, args.image_size, folder / "runs")

        def ours(variant: tuple[str, ...]) -> Callable[[int], Cost]:
            command = [sys.executable, "train.py", "configs/bccd_yolov8n.yaml", *own, *variant]
            return lambda epochs: cost_of([*command, f"epochs={epochs}"], args.threads)

        def peer(epochs: int) -> Cost:
            command = [args.peers_python, "-c", PEER, str(data / "data.yaml"), str(args.image_size), str(epochs), name]
            return cost_of(command, args.threads)

        runs = {variant: ours(changes) for variant, changes in VARIANTS.items()}
        runs |= {"Ultralytics": peer} if args.peers_python else {}
        costs: dict[str, list[Cost]] = {contestant: [] for contestant in runs}
        for _ in range(args.rounds):
            for contestant, run in runs.items():
                costs[contestant].append(epoch_of(run))
        print(f"YOLOv8n, {args.pictures} pictures of {args.image_size} px, {args.threads} threads")
        print(f"{'an epoch':<24}{'CPU s':>8}{'ratio':>8}{'clock s':>10}{'ratio':>8}")
        medians = {name: [statistics.median(values) for values in zip(*found)] for name, found in costs.items()}
        for contestant, own_seconds in medians.items():
            theirs = medians.get("Ultralytics")
            ratios = [f"{t / o:.2f}" for t, o in zip(theirs, own_seconds)] if theirs else ["", ""]
            print(f"{contestant:<24}{own_seconds[0]:8.1f}{ratios[0]:>8}{own_seconds[1]:10.1f}{ratios[1]:>8}")
        command = [sys.executable, str(Path(__file__).resolve()), str(data), "--parts", *own, *SAME]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UserError(f"the parts of an epoch: exit code {done.returncode}")
        seconds = json.loads(done.stdout.splitlines()[-1])
        for part, value in seconds.items():
            print(f"{part:<24}{value:8.1f} CPU s{100 * value / sum(seconds.values()):6.0f} %")


if __name__ == "__main__":
    run_script(main)
