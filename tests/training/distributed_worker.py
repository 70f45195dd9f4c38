"""Run by test_distributed.py under torchrun: gradients of this process's half of the pictures, averaged by DDP.

torchrun --nproc-per-node 2 -m tests.training.distributed_worker DATA OUT
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import train
from datasets.loader import Loader
from errors import run_script
from runtime.processes import Processes
from structures import Targets
from tests.tiny_training import SIZE, tiny_config
from training import building
from training.optimization import Ema

PLAIN = dict.fromkeys(("mosaic", "scale", "translate", "flip_horizontal", "hue", "saturation", "value"), 0.0)


def per_picture_mean(output, targets: Targets) -> dict[str, torch.Tensor]:
    """A loss that is a mean over pictures, as DistributedDataParallel's average presumes."""
    return {"logits": output.class_logits.square().mean(), "boxes": output.box_logits.square().mean()}


def gradients(data: Path, folder: Path, processes: Processes, kind: str) -> dict[str, torch.Tensor]:
    """Of one batch of 8 over all processes; batch normalisation in eval mode, because its batches differ."""
    terms, teachers = [], []
    if kind == "distilled":
        teachers = [{"name": "t", "arch": "yolov8n", "weights": str(folder / "teacher.pt")}]
        terms = [{"teacher": "t", "loss": "mse", "weight": 1, "student_maps": ["p4"], "adapter": "conv1x1"}]
    config = tiny_config(data, folder / "runs", augment=PLAIN, teachers=teachers, terms=terms)
    parts = building.build(config, processes, None, lambda line: None)
    if kind != "detection":
        parts.student.losses = per_picture_mean
    for module in parts.student.modules():
        module.train(not isinstance(module, nn.BatchNorm2d))
    batch = next(parts.loader.epoch(0))
    if kind == "detection":  # the same pictures for every process: losses are divided by its own positives
        batch = next(Loader(parts.splits.train, image_size=SIZE, batch_size=4, seed=0).epoch(0))
    images, targets = parts.prepare(batch, 0, 0)
    sum(parts.objective(images, targets, parts.teachers(images), 0.0).values()).backward()
    named = [*parts.student.named_parameters(), *parts.criterion.named_parameters()]
    return {name: parameter.grad.clone() for name, parameter in named}


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
        result = {kind: gradients(data, out, processes, kind) for kind in ("plain", "distilled", "detection")}
        torch.save(result, out / f"rank{processes.rank}.pt")
