"""Run by test_resume.py in a process of its own: trains once undisturbed, then kills and resumes until done.

Each attempt is a forked child. How it dies is drawn at random: by its own hand after a random optimizer step, or before
a random system call of a save, or by ours after a random time. Afterwards attempts are not killed, until one reaches
the end. The result is written to FOLDER/result.json.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import torch

import checkpoint
import models
import train
from config import Config
from engine.training import reporting
from engine.training.optimization import Ema
from tests.tiny_training import tiny_config, write_dataset


def make_config(folder: Path, workers: int) -> Config:
    """Three epochs of six steps with a teacher, momentum, an adapter, mosaic that closes, held-out pictures.

    The term's weight is measured in ten batches after the first three steps. With workers, half of each batch has no
    labels but pseudo boxes, and the term acts on that half.
    """
    pseudo = {"teacher": "teacher", "boxes_per_object": 1.0, "ignored_per_object": 1.0}
    unlabelled = {"rest": True, "labelled_share": 0.5, "pseudo": pseudo}
    few = {"max_samples": 20, "pictures_per_epoch": 24, "unlabelled": unlabelled} if workers else {}
    return tiny_config(
        folder / "data",
        folder / "runs",
        epochs=3,
        batch_size=4,
        save_every_steps=2,
        student={"arch": "yolov8_narrow"},
        data={"workers": workers, "holdout_fraction": 0.15} | few,
        augment={"close_mosaic_epochs": 1, "mixup": 0.3},
        evaluation={"every_epochs": 2},
        optimizer={"accumulate": 2 if workers else 1, "name": "sgd" if workers else "adamw", "learning_rate": 1e-3},
        teachers=[{"name": "teacher", "arch": "yolov8_narrow", "weights": str(folder / "teacher.pt")}],
        terms=[
            {
                "teacher": "teacher",
                "loss": "mse",
                "weight": {"share": 0.5},
                "student_maps": ["p4"],
                "adapter": "conv1x1",
                "on": "unlabelled" if workers else "all",
            }
        ],
    )


def write_teacher(path: Path) -> None:
    """A teacher whose scores are about 1/2, so that it finds objects."""
    torch.manual_seed(1)
    model = models.build("yolov8_narrow", 2)
    for branch in model.head.cls:
        torch.nn.init.zeros_(branch[-1].bias)
        torch.nn.init.normal_(branch[-1].weight, std=0.4)
    state = {"arch": "yolov8_narrow", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(path, state | {"ema": model.state_dict()})


def attempt(config: Config, death: tuple[str, int | float] | None) -> int:
    """Train or resume in a child that may die: its exit code, or minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            if death is not None and death[0] != "time":
                arm(*death)
            resume = (Path(config.runs) / config.name / "weights" / "last.pt").exists()
            if not resume and (Path(config.runs) / config.name).exists():
                os.rename(Path(config.runs) / config.name, Path(config.runs) / f"early_{os.getpid()}")
            train.run(config, resume=resume, quiet=True)
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if death is not None and death[0] == "time":
        time.sleep(death[1])
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def arm(kind: str, number: int) -> None:
    """Send this process a signal at a chosen point: after a number of steps, or of system calls in saves."""
    count = [0]

    def tick() -> None:
        if count[0] == number:
            os.kill(os.getpid(), {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(kind, signal.SIGKILL))
        count[0] += 1

    if kind == "call":
        for name in ("fsync", "link", "replace"):
            original = getattr(os, name)
            setattr(os, name, lambda *args, _original=original: (tick(), _original(*args))[1])
    else:
        update = Ema.update
        Ema.update = lambda self, step: (tick(), update(self, step))[1]


def main(folder: Path, workers: int, kills: int, seed: int) -> None:
    reporting.draw = lambda *args: None
    write_dataset(folder / "data", train=28, test=4)  # 24 to train on, 4 held out
    write_teacher(folder / "teacher.pt")
    config = make_config(folder, workers)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        train.run(Config(**{**vars(config), "runs": str(folder / "whole")}), quiet=True)
        os._exit(0)
    whole = os.waitpid(child, 0)[1]
    took = time.monotonic() - began
    rng = random.Random(seed)
    kinds = ["step", "call", "time", "interrupt", "terminate"]
    deaths, codes = [], []
    # An attempt that has no step left ends before a signal that waits for a step: then that signal gets another turn.
    while codes.count(-signal.SIGKILL) < kills or not {130, 143} <= set(codes):
        kind = kinds[len(deaths) % len(kinds)] if len(deaths) < 2 * len(kinds) else rng.choice(kinds)
        limits = {"step": (0, 4), "call": (0, 14), "time": (0, took / 3), "interrupt": (0, 2), "terminate": (0, 2)}[
            kind
        ]
        deaths.append((kind, rng.uniform(*limits) if kind == "time" else rng.randint(*limits)))
        codes.append(attempt(config, deaths[-1]))
        if codes[-1] == 0:  # it got to the end before it died; begin again
            os.rename(folder / "runs" / "tiny", folder / "runs" / f"done_{len(codes)}")
    for _ in range(4):
        codes.append(attempt(config, None))
        if codes[-1] == 0:
            break
    (folder / "result.json").write_text(json.dumps({"whole": whole, "deaths": deaths, "codes": codes}))
