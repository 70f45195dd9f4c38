"""Run by test_distributed.py under torchrun: the loop's gradients of this process's pictures, averaged by DDP.

torchrun --nproc-per-node 2 -m tests.engine.training.distributed_worker DATA OUT
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import train
from engine.runtime import run_folder
from engine.runtime.processes import Processes
from engine.training import building
from engine.training.optimization import Ema
from engine.training.state import TrainingState
from errors import run_script
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
    teachers = [{"name": "t", "arch": "yolov8n", "weights": str(folder / "teacher.pt")}]
    terms = [term | {"on": on} for term, on in zip(TERMS, images)]
    changes = changes | {"augment": PLAIN, "teachers": teachers, "terms": terms, "optimizer": optimizer}
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        if os.environ["RANK"] == "1":
            update = Ema.update
            die = lambda self, step: os.kill(os.getpid(), signal.SIGKILL) if step == 3 else update(self, step)
            Ema.update = die
        run_script(lambda arguments: train.main(arguments[1:]))
    data, out = Path(sys.argv[2]), Path(sys.argv[3])
    with Processes("cpu") as processes:
        result = {kind: gradients(data, out, processes, kind) for kind in KINDS}
        torch.save(result, out / f"rank{processes.rank}.pt")
