"""What each of the two processes of test_distributed.py does: the loop's gradients, averaged by DDP; a whole run."""

import os
import signal
from pathlib import Path

import torch
from torch import nn

import train
from config import Config
from engine.runtime import run_folder
from engine.runtime.processes import Processes
from engine.training import building, reporting
from engine.training.optimization import Ema
from engine.training.state import TrainingState
from errors import UserError
from tests.tiny_training import tiny_config

PLAIN = dict.fromkeys(("mosaic", "scale", "translate", "flip_horizontal", "hue", "saturation", "value"), 0.0)
TERMS = [
    {"teacher": "t", "loss": "pkd", "weight": 1, "student_maps": ["p4"], "adapter": "conv1x1"},
    {"teacher": "t", "loss": "cwd", "weight": {"share": 0.5}, "student_maps": ["p3"], "adapter": "conv1x1_norm"},
    {"teacher": "t", "loss": "masked_mse", "weight": 0.1, "student_maps": ["p3", "p4"], "adapter": "mlp"},
]
KINDS = {  # changes of the config, and the images of each term
    "sum": ({"optimizer": {"sum_over_batch": True}}, ("all", "all", "all")),
    "mean": ({"optimizer": {"sum_over_batch": False}}, ("all", "all", "all")),
    "unlabelled": (
        {"data": {"per_class": 3, "unlabelled": {"rest": True, "labelled_share": 0.25}, "pictures_per_epoch": 24}},
        ("unlabelled", "all", "labelled"),
    ),
}


def gradients(data: Path, folder: Path, processes: Processes, kind: str) -> dict[str, torch.Tensor]:
    """Of one step of two batches of 8 over all processes, and the losses that are written down.

    Batch normalisation is in eval mode, because each process normalises its own images.
    """
    changes, images = KINDS[kind]
    optimizer = {"accumulate": 2, "clip_norm": 0.0, "warmup_epochs": 0.0} | changes.get("optimizer", {})
    teachers = [{"name": "t", "arch": "yolov8_narrow", "weights": str(folder / "teacher.pt")}]
    terms = [term | {"on": on} for term, on in zip(TERMS, images)]
    changes = changes | {"augment": PLAIN, "teachers": teachers, "terms": terms, "optimizer": optimizer}
    changes |= {"student": {"arch": "yolov8_narrow"}}
    config = tiny_config(data, folder / "runs", **changes)
    parts = building.build(config, processes, None, lambda line: None)
    for module in parts.student.modules():
        module.train(not isinstance(module, nn.BatchNorm2d))
    batches = list(parts.loader.epoch(0))[:2]
    named = [*parts.student.named_parameters(), *parts.criterion.named_parameters()]
    found = {}
    parts.optimizer.step = lambda: found.update({name: parameter.grad.clone() for name, parameter in named})
    rows = train.train_step(parts, batches, TrainingState(), run_folder.RunFolder(folder))
    written = {f"batch {i}: {name}": torch.tensor(loss) for i, row in enumerate(rows) for name, loss in row.items()}
    measured = dict(zip(("batches", "detection", "cwd"), parts.criterion.shares.measured[0]))
    return written | {f"batch: measured {name}": value for name, value in measured.items()} | found


def average(data: Path, folder: Path, processes: Processes) -> dict[str, torch.Tensor]:
    """The student's running average after a step, in which each process normalises images of its own."""
    config = tiny_config(data, folder / "runs", augment=PLAIN, optimizer={"accumulate": 2})
    parts = building.build(config, processes, None, lambda line: None)
    parts.learner.train()
    train.train_step(parts, list(parts.loader.epoch(0))[:2], TrainingState(), run_folder.RunFolder(folder))
    return parts.ema.model.state_dict()


def save_gradients(data: Path, folder: Path) -> None:
    with Processes("cpu") as processes:
        found = {kind: gradients(data, folder, processes, kind) for kind in KINDS}
        torch.save(found | {"average": average(data, folder, processes)}, folder / f"rank{processes.rank}.pt")


def train_as_command(config: Path) -> None:
    """train.py CONFIG, without pictures."""
    reporting.draw = lambda *args: None
    train.main([str(config)])


def train_quietly(config: Config, resume: bool, dies_at: int | None) -> None:
    """A run as by train.py. With dies_at, the process is killed after the optimizer step of that number."""
    reporting.draw = lambda *args: None
    update = Ema.update
    if dies_at is not None:
        Ema.update = lambda self, step: os.kill(os.getpid(), signal.SIGKILL) if step == dies_at else update(self, step)
    try:
        train.run(config, resume=resume, quiet=True)
    except UserError as error:
        print(error)
        raise SystemExit(error.exit_code) from None
