"""Writes the checkpoint of a run, its best and its last weights, and says how to go on after a stop."""

import dataclasses
from typing import Any

import checkpoint
from engine.runtime.progress import Progress
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup, machine_facts
from engine.training.state import TrainingState, describe_model
from errors import DISK_EXIT_CODE, UserError


def save(setup: TrainingSetup, state: TrainingState, folder: RunFolder) -> None:
    """Write weights/last.pt: everything that --resume needs; no teacher."""
    if not setup.processes.is_first:
        return
    setup.check_claim()
    saved = describe_model(setup.config, setup.splits.names) | {
        "epoch": state.epoch,
        "step": state.step,
        "position": dataclasses.asdict(state),
        "model": setup.student.state_dict(),
        "ema": setup.ema.model.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "criterion": setup.criterion.state_dict(),
        "data": setup.data,
        "inputs": setup.inputs,
        "machine": machine_facts(setup),
    }
    checkpoint.save(folder.last, saved, keep_previous=True)


def save_best(setup: TrainingSetup, epoch: int, step: int, folder: RunFolder) -> None:
    """Write weights/best.safetensors: the averaged weights, every bit of them."""
    checkpoint.save_student(folder.best, describe_student(setup, epoch, step))


def finish_weights(setup: TrainingSetup, state: TrainingState, folder: RunFolder, progress: Progress) -> None:
    """At the end of a run: write weights/student.safetensors, and remove last.prev.pt if last.pt is whole.

    The averaged weights are also in last.pt, as float32; the file to hand on has no more than it needs. Weights that
    float16 cannot hold stay float32.
    """
    student = describe_student(setup, state.epoch, state.step)
    try:
        checkpoint.save_student(folder.student, student, half=setup.config.student_file == "float16")
    except UserError as error:
        if error.exit_code == DISK_EXIT_CODE:
            raise
        progress.say(f"{error}; written as float32")
        checkpoint.save_student(folder.student, student)
    previous = checkpoint.previous_path(folder.last)
    if not previous.is_file():
        return
    try:
        checkpoint.check_whole(folder.last)
    except UserError as error:
        progress.say(f"{error}; kept: {previous}")
    else:
        previous.unlink(missing_ok=True)


def describe_student(setup: TrainingSetup, epoch: int, step: int) -> dict[str, Any]:
    """What checkpoint.save_student needs."""
    described = describe_model(setup.config, setup.splits.names)
    return described | {"epoch": epoch, "step": step, "ema": setup.ema.model.state_dict()}


def how_to_go_on(folder: RunFolder | None) -> str:
    """The last line of a run that was stopped: what was saved, and the command that goes on."""
    if folder is None or not folder.last.is_file():
        return "stopped before the first checkpoint; nothing was saved"
    step = checkpoint.load(folder.last)["step"]
    return f"stopped, saved at step {step}; go on with: python train.py --resume {folder.path}"
