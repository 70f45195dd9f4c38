"""The checkpoint of a run: how it is written, how a run is restored from it, and how to go on after a stop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import checkpoint
from config import Config
from engine.runtime import run_folder
from engine.runtime.claims import Claim
from engine.runtime.progress import Progress
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup, machine_facts
from engine.training.inputs import inputs_of_resumed
from engine.training.state import TrainingState, describe_model, refuse_changes
from errors import DISK_EXIT_CODE, UserError

RESUMED_KEYS = ("config", "position", "model", "ema", "optimizer", "criterion", "data", "machine")


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


def load_saved(
    folder: RunFolder, config: Config, allow_change: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, Any]:
    """The newest checkpoint of a run that goes on with this config. UserError for a key that may not differ."""
    saved = checkpoint.load_newest(folder.last, say)
    checkpoint.require_keys(saved, RESUMED_KEYS, folder.last)
    refuse_changes(saved["config"], config, allow_change, str(folder.path))
    return saved


def restore(
    setup: TrainingSetup,
    saved: dict[str, Any],
    folder: RunFolder,
    progress: Progress,
    allow_change: tuple[str, ...] = (),
) -> TrainingState:
    """Load the models and the optimizer from a checkpoint of this run, and return its state."""
    if saved["data"] != setup.data:
        raise UserError(f"{folder.path}: the training pictures or labels are not those that the run started with")
    before, data = saved.get("inputs", {}), setup.config.data
    setup.inputs = inputs_of_resumed(before, setup.inputs, data, allow_change, str(folder.path))
    for key, value in machine_facts(setup).items():
        if saved["machine"][key] != value:
            progress.say(
                f"resuming with {key} {value}, before {saved['machine'][key]}: the bytes may differ from then on"
            )
    checkpoint.load_state(setup.student, saved["model"], folder.last)
    checkpoint.load_state(setup.ema.model, saved["ema"], folder.last)
    checkpoint.load_state(setup.criterion, saved["criterion"], folder.last)
    try:
        setup.optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:  # a change that was allowed
        raise UserError(f"{folder.path}: {error}; the run cannot go on with this change") from None
    return TrainingState(**saved["position"])


def open_folder(folder: RunFolder | None, config: Config, claim: Claim | None) -> tuple[RunFolder, Config, Claim]:
    """The folder of a resumed run with its config, written anew; or a new folder, and the config under its name.

    claim: the one on the folder that is held already; a resumed run has one. It is returned, or that on a new folder.
    """
    if folder is None:
        return run_folder.create(config, claim)
    assert claim is not None
    folder.remove_stale()
    run_folder.write_config(folder, config)
    return folder, config, claim


def how_to_go_on(folder: RunFolder | None) -> str:
    """The last line of a run that was stopped: what was saved, and the command that goes on."""
    if folder is None or not folder.last.is_file():
        return "stopped before the first checkpoint; nothing was saved"
    step = checkpoint.load(folder.last)["step"]
    return f"stopped, saved at step {step}; go on with: python train.py --resume {folder.path}"
