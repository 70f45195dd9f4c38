"""The checkpoint of a run: written, read back, and what is said of it when a run stops."""

from typing import Any

import checkpoint
from config import Config
from engine.runtime import run_folder
from engine.runtime.progress import Progress
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup, machine_facts
from engine.training.state import TrainingState, describe_model, position_from, position_tree
from errors import UserError


def save(setup: TrainingSetup, state: TrainingState, folder: RunFolder) -> None:
    """weights/last.pt: everything --resume needs, and no teacher."""
    if not setup.processes.is_first:
        return
    saved = describe_model(setup.config, setup.splits.names) | {
        "epoch": state.epoch,
        "step": state.step,
        "position": position_tree(state),
        "model": setup.student.state_dict(),
        "ema": setup.ema.model.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "criterion": setup.criterion.state_dict(),
        "data": setup.data,
        "machine": machine_facts(setup),
    }
    checkpoint.save(folder.last, saved, keep_previous=True)


def restore(setup: TrainingSetup, saved: dict[str, Any], folder: RunFolder, progress: Progress) -> TrainingState:
    """Fill the models and the optimizer from a checkpoint of this run."""
    if saved["data"] != setup.data:
        raise UserError(f"{folder.path}: the training pictures or labels are not those the run was started with")
    for key, value in machine_facts(setup).items():
        if saved["machine"][key] != value:
            progress.say(
                f"resuming with {key} {value}, before {saved['machine'][key]}: the bytes may differ from then on"
            )
    checkpoint.load_state(setup.student, saved["model"], folder.last)
    checkpoint.load_state(setup.ema.model, saved["ema"], folder.last)
    checkpoint.load_state(setup.criterion, saved["criterion"], folder.last)
    setup.optimizer.load_state_dict(saved["optimizer"])
    return position_from(saved)


def open_folder(folder: RunFolder | None, config: Config) -> tuple[RunFolder, Config]:
    """The folder of a resumed run, with its config as it is now; or a new folder, and the config under its name."""
    if folder is None:
        return run_folder.create(config)
    folder.remove_stale()
    run_folder.write_config(folder, config)
    return folder, config


def how_to_go_on(folder: RunFolder | None) -> str:
    if folder is None or not folder.last.is_file():
        return "stopped before the first checkpoint; nothing was saved"
    step = checkpoint.load(folder.last)["step"]
    return f"stopped, saved at step {step}; go on with: python train.py --resume {folder.path}"
