"""One of several workers on a tiny study, for test_many_workers.py: it may kill itself at a chosen point."""

import itertools
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import compare
import condense
import train
from config import to_tree
from engine.comparison.study import load_study
from engine.runtime import claims
from engine.training import reporting
from engine.training.optimization import Ema
from tests.tiny_training import tiny_config, write_dataset
from yaml_files import dump_yaml

TERM = {"teacher": "big", "loss": "mse", "weight": 1.0, "student_maps": ["p4"], "adapter": "conv1x1"}
ROWS = {
    "baseline": {"seeds": 2},
    "taught": {"terms": [TERM]},
    "few": {"condense": {"method": "random", "pictures": 4}},
}
EPOCHS, STEPS = 2, 2  # of an epoch
RUNS = ("baseline_seed0", "teacher_big_seed0", "taught_seed0", "few_seed0", "baseline_seed1")


def write_study(folder: Path) -> None:
    """study.yaml and its pictures. All paths in it are relative, so that the table does not depend on the folder."""
    write_dataset(folder / "data", train=8, test=2)
    config = tiny_config(
        Path("data"),
        Path("runs"),
        name="study",
        student={"arch": "yolov8_narrow"},
        teachers=[{"name": "big", "arch": "yolov8_narrow"}],
        epochs=EPOCHS,
        batch_size=4,
        save_every_steps=1,
        data={"pictures_per_epoch": 4 * STEPS},
    )
    tree = to_tree(config)
    (folder / "study.yaml").write_text(dump_yaml(tree | {"rows": ROWS}))


def work(folder: Path, death: tuple[str, int] | None) -> None:
    """compare.py on the study in `folder`. death: after how many optimizer steps, or calls of the system, it dies.

    Times count calls, and memory is constant: they would differ from run to run. `steps` notes who did each step.
    """
    os.chdir(folder)
    draw_nothing()
    compare.check_rows = lambda *args, **options: {}
    compare.POLL_S = 0.02
    count = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(count)))
    train.time = condense.time = clock
    condense.peak_gigabytes = lambda device: 0.5
    note_steps(folder / "steps")
    if death is not None:
        arm(*death)
    compare.compare(load_study("study.yaml"))


def draw_nothing() -> None:
    """The pictures and plots of a tiny study take longer than its runs."""
    reporting.draw = lambda *args: None
    compare.plot.write = compare.plot.require_plots = lambda *args, **options: None
    sys.modules["torch.utils.tensorboard"] = None  # to import it takes longer than to train


def note_steps(file: Path) -> None:
    """Append a line for each optimizer step: the run, the step, the process."""
    running, run, update = [""], train.run, Ema.update

    def run_and_tell(config, **options):
        running[0] = config.name
        return run(config, **options)

    def update_and_note(self, step):
        update(self, step)
        with open(file, "a") as opened:
            opened.write(f"{running[0]} {step} {os.getpid()}\n")

    train.run, Ema.update = run_and_tell, update_and_note


def arm(kind: str, number: int) -> None:
    """SIGKILL for this process after a number of optimizer steps, or before a system call of a save or a claim."""
    count = itertools.count()

    def tick(*_) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        return lambda *args, **options: (tick(), function(*args, **options))[1]

    if kind == "call":
        for name in ("fsync", "link", "replace", "utime", "mkdir"):
            setattr(os, name, before(getattr(os, name)))
        for name in ("take", "create"):
            setattr(claims, name, before(getattr(claims, name)))
    else:
        update = Ema.update
        Ema.update = lambda self, step: (update(self, step), tick())[0]
