"""Starts a run, or resumes one: everything is built and checked before anything is written to its folder."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

import checkpoint
from config import Config
from engine.runtime import claims, run_folder
from engine.runtime.processes import Processes
from engine.runtime.progress import Progress
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup, build, machine_facts
from engine.training.inputs import inputs_of_resumed
from engine.training.state import TrainingState, refuse_changes
from errors import UserError

RESUMED_KEYS = ("config", "position", "model", "ema", "optimizer", "criterion", "data", "machine")


def start_run(
    config: Config,
    processes: Processes,
    given: dict[str, nn.Module],
    progress: Progress,
    claim: claims.Claim | None,
    held: ExitStack,
) -> tuple[TrainingSetup, TrainingState, RunFolder]:
    """Build a run, then make its folder: runs/<name>, or <name>2, <name>3, ... with a config of that name.

    given: teachers by name, instead of their weights.
    claim: on runs/<name>, if the caller has it; otherwise one is taken here, and released with `held`.
    """
    setup, folder = build(config, processes, given, progress.say), None
    if processes.is_first:
        folder, config, setup.claim = run_folder.create(config, claim)
        if setup.claim is not claim:
            held.enter_context(setup.claim)
    folder, setup.config = processes.from_first((folder, config))
    return setup, TrainingState(), folder


def resume_run(
    folder: RunFolder,
    config: Config,
    processes: Processes,
    given: dict[str, nn.Module],
    progress: Progress,
    allow_change: tuple[str, ...],
    claim: claims.Claim | None,
    held: ExitStack,
) -> tuple[TrainingSetup, TrainingState]:
    """Build a run as its newest checkpoint has it, and write its config anew. given, claim, held: as of start_run."""
    if processes.is_first and claim is None:
        claim = held.enter_context(claims.take(folder.path))
    processes.from_first(None)  # the others wait for the claim: nobody else writes the checkpoint now
    saved = load_saved(folder, config, allow_change, progress.say)
    setup = build(config, processes, given, progress.say, saved["model"])
    setup.claim = claim
    state = restore(setup, saved, folder, progress, allow_change)  # before anything is written: it may refuse
    if processes.is_first:
        folder.remove_stale()
        run_folder.write_config(folder, config)
    return setup, state


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
    state = TrainingState(**saved["position"])
    if setup.config.batch_size != saved["config"]["batch_size"]:
        batches = state.batch * saved["config"]["batch_size"] // setup.config.batch_size
        state.count_in(min(batches, setup.batches_per_epoch))
    return state
