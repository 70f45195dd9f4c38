"""Train a detector, alone or with teachers, in one process or many.

    python train.py CONFIG [key=value ...]     train a config
    python train.py STUDY --row NAME           train one row of a study (compare.py trains all of them)
    python train.py CONFIG --dry-run           print every loss term of one batch with its gradient; write nothing
    python train.py --resume runs/NAME         continue after a signal, a crash or a full disk
    torchrun --nproc-per-node 2 train.py CONFIG
    python train.py --init NEW.yaml --data FOLDER [--teacher ARCH] [key=value ...]     write a config for your pictures
    python train.py --keys [WORD] | --list     print the keys of a config; architectures, teachers and losses

Example:

    python train.py configs/shapes_yolov8n.yaml epochs=10 optimizer.learning_rate=0.02

docs/configs.md lists all keys. `batch_size` is the number of images of one batch over all processes. Each step depends
only on the seed, its number and the weights: a run that was killed and resumed ends with the same bytes as one that was
not (on the same machine, with the same torch and number of threads).

Exit codes: 0 done, 1 another process of the run is gone, 2 a mistake in the arguments or the data, 3 a number that is
not finite, 4 out of memory, 5 a file that could not be written, 130 after Ctrl-C, 143 after SIGTERM. A stopped run is
saved, and its last good checkpoint always stays whole.
"""

# ruff: noqa: B023  (train_step calls its inner function before the loop goes on)

import contextlib
import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, load_config
from datasets.loader import Batch, LoaderProcessDied
from engine.command_line.arguments import answer_at_once, parse_train_arguments
from engine.runtime import claims, run_folder
from engine.runtime.interruption import StopRequested, StopSignals
from engine.runtime.processes import Processes, averaging, keep_freed_memory
from engine.runtime.progress import Progress, ScalarLog
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup, describe_setup, with_published_settings
from engine.training.dry_run import dry_run
from engine.training.exits import check_finite, exit_codes
from engine.training.idle_terms import without_idle_terms
from engine.training.int8 import move_ranges
from engine.training.reporting import finish, finish_epoch, measure_start
from engine.training.saving import how_to_go_on, save
from engine.training.starting import resume_run, start_run
from engine.training.state import TrainingState
from engine.training.step import augment_batch, detection_losses, scheduled_step, set_learning_rates
from errors import UserError, run_script
from layers.over_processes import sum_over_processes
from random_streams import Stream, seeded_generator


def train_step(
    setup: TrainingSetup, batches: list[Batch], state: TrainingState, folder: RunFolder
) -> list[dict[str, float]]:
    """One optimizer step on consecutive batches of an epoch. Returns the value of every loss for each batch.

    With L the sum of the losses of a batch and B its number of images, the step descends

        sum over the batches of B L    with optimizer.sum_over_batch
        mean over the batches of L     without

    B and L are those of all processes together: W processes learn like one with the joined batches, except for batch
    normalisation and random draws. The normalisers of L are those of its own batch.
    """
    config, optimizer, rows = setup.config, setup.optimizer, []
    scheduled = scheduled_step(setup, state)
    set_learning_rates(setup, scheduled)
    stream = seeded_generator(Stream.STEP, config.seed, state.step, setup.processes.rank)
    torch.manual_seed(stream.initial_seed())
    is_warm = scheduled >= setup.warmup_steps
    # While a term's weight is measured, the gradient on the student's maps is needed, which a compiled graph hides.
    student = setup.student.forward if setup.criterion.shares.is_measuring else setup.student
    for number, batch in enumerate(batches, state.batch):
        images, targets, content = augment_batch(setup, batch, state.epoch, number)
        t_outputs = setup.teachers(images)

        def losses_of_batch() -> dict[str, Tensor]:
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=setup.bfloat16):
                s_output = student(images)
            detection = detection_losses(setup, s_output, targets, batch.is_labelled)
            epoch = state.epoch + number / setup.batches_per_epoch  # fractional: the schedules of the terms follow it
            terms = setup.criterion(
                s_output, t_outputs, targets, epoch, content, batch.is_labelled, detection=detection, is_warm=is_warm
            )
            return detection | terms

        with averaging(setup.learner, is_last=batch is batches[-1]):
            losses = setup.learner(losses_of_batch)  # calls it, through DistributedDataParallel if there is one
            scale = len(batch) * setup.processes.count if config.optimizer.sum_over_batch else 1 / len(batches)
            (sum(losses.values()) * scale).backward()
        rows.append(torch.stack([loss.detach() for loss in losses.values()]))

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or math.inf)
    losses_of_all = sum_over_processes(torch.cat(rows)) / setup.processes.count
    values = torch.cat((losses_of_all, norm[None])).tolist()  # the one wait for the device in a step
    check_finite(values, list(losses), batches, setup.splits.train, state, folder)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.step += 1
    setup.processes.share_buffers(setup.student)  # else each process would keep, and measure, an average of its own
    setup.ema.update(state.step)
    return [dict(zip(losses, values[i * len(losses) :])) for i in range(len(batches))]


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` consecutive batches; the last may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def train(
    setup: TrainingSetup,
    state: TrainingState,
    folder: RunFolder,
    progress: Progress,
    stop: StopSignals,
    on_epoch: Callable[[dict[str, float | None]], None] | None = None,
) -> None:
    """Train from `state` to the end of the last epoch. Raises StopRequested after a signal, when all is saved."""
    config, processes = setup.config, setup.processes
    scalars = ScalarLog(folder.path, purge_step=state.epoch + 1, enabled=processes.is_first and not progress.quiet)
    if scalars.missing:
        progress.say(f"without TensorBoard events: {scalars.missing} is not installed")
    stop.may_raise = False
    while not state.is_over(config):
        setup.learner.train()
        move_ranges(setup.student, config, state.epoch)
        progress.start(f"epoch {state.epoch + 1}/{config.epochs}", setup.batches_per_epoch, state.batch)
        began = time.perf_counter()
        loaded = setup.loader.epoch(state.epoch, start=state.batch)
        for batches in in_groups(loaded, config.optimizer.accumulate):
            for batch, losses in zip(batches, train_step(setup, batches, state, folder)):
                state.count(losses, len(batch) * processes.count)
                progress.advance(losses)
            state.seconds += time.perf_counter() - began  # includes the wait for data, but not saving
            wants_stop = processes.any(stop.received is not None)
            if wants_stop or (config.save_every_steps and state.step % config.save_every_steps == 0):
                save(setup, state, folder)
            if wants_stop:
                progress.finish()
                raise StopRequested
            began = time.perf_counter()
        progress.finish()
        row = finish_epoch(setup, state, folder, progress, scalars, stop)
        if on_epoch is not None and processes.is_first:
            on_epoch(row)
    stop.may_raise = True  # nothing is lost from here on
    scalars.close()


def run(
    config: Config,
    *,
    resume: bool = False,
    teachers: dict[str, nn.Module] | None = None,
    quiet: bool = False,
    allow_change: tuple[str, ...] = (),
    on_epoch: Callable[[dict[str, float | None]], None] | None = None,
    claim: claims.Claim | None = None,
) -> dict[str, Any]:
    """Train a config to its end and return the report that is also written to runs/<name>/report.json.

    Args:
        resume: go on with runs/<name>, which must have the same config; otherwise use a new folder <name>, <name>2, ...
        teachers: modules by the names in config.teachers, instead of their weights. They are frozen, in eval mode.
        quiet: print only the line about a signal.
        allow_change: keys that a resumed run may change.
        on_epoch: is called with the row of metrics.csv after each epoch, when all is saved, in the first process alone;
            for a logger of your own. A value that the epoch does not have is None.
        claim: on the run's folder, if the caller takes and releases it; otherwise the run does.
    Raises UserError, or SystemExit after a signal, when all is saved. Both carry the exit codes above.
    """
    keep_freed_memory()
    all_teachers = {teacher.name for teacher in config.teachers}
    config, idle = without_idle_terms(with_published_settings(config))
    idle_teachers = all_teachers - {teacher.name for teacher in config.teachers}
    given = {name: model for name, model in (teachers or {}).items() if name not in idle_teachers}
    processes = Processes(config.device)
    progress = Progress(quiet=quiet or not processes.is_first, mark=config.plumbing)
    if idle:
        progress.say(idle)
    folder = run_folder.find(Path(config.runs) / config.name) if resume else None
    with exit_codes(), processes, StopSignals() as stop, contextlib.ExitStack() as held:
        try:
            if folder is None:
                setup, state, folder = start_run(config, processes, given, progress, claim, held)
            else:
                setup, state = resume_run(folder, config, processes, given, progress, allow_change, claim, held)
            if processes.is_first:
                for role, report in setup.splits.reports.items():
                    report.write(folder.path / "dataset" / role)
            progress.say(f"{folder.path}: {describe_setup(setup)}")
            if not resume:
                measure_start(setup, state, progress)
            if state.is_over(config):
                progress.say(f"epoch {state.epoch}/{config.epochs} was the last: only the test is left")
            train(setup, state, folder, progress, stop, on_epoch)
            return finish(setup, state, folder, progress)
        except (StopRequested, LoaderProcessDied) as error:
            # A signal to the whole process group ends the loader's processes as well. Without one, it is an error.
            if isinstance(error, LoaderProcessDied) and stop.received is None:
                raise
            if processes.is_first:
                print(how_to_go_on(folder), flush=True)
            raise SystemExit(stop.exit_code) from None


def start_or_continue(config: Config, claim: claims.Claim, *, quiet: bool = False) -> dict[str, Any]:
    """As `run`, in runs/<name>: from the checkpoint that is there, else from the start. claim: on that folder."""
    folder = RunFolder(Path(config.runs) / config.name)
    if folder.path.exists() and not folder.can_resume:
        shutil.rmtree(folder.path)  # stopped before its first checkpoint: nothing to continue
    return run(config, resume=folder.can_resume, claim=claim, quiet=quiet)


def train_row(study: str, overrides: list[str], row: str, *, is_dry: bool) -> None:
    """Train one row of a study's file, in its own folder or not at all; or run it dry."""
    from engine.comparison.one_row import load_row, load_row_for_dry_run  # the parts of compare.py, for --row alone

    if is_dry:
        dry_run(*load_row_for_dry_run(study, overrides, row))
        return
    config = load_row(study, overrides, row)
    is_first = Processes(config.device).is_first
    with claims.take(Path(config.runs) / config.name) if is_first else contextlib.nullcontext() as claim:
        run(config, claim=claim)


def main(argv: list[str]) -> None:
    arguments = parse_train_arguments(argv, __doc__)
    if answer_at_once(arguments):
        return
    source, overrides = arguments.config, arguments.overrides
    if arguments.row is not None:
        if not source or arguments.resume:
            raise UserError("argument --row: expected a study's file before it, without --resume")
        train_row(source, overrides, arguments.row, is_dry=arguments.dry_run)
        return
    if arguments.resume:
        folder = run_folder.find(arguments.resume)
        config = load_config(source or folder.config, overrides)
        config = dataclasses.replace(config, name=folder.path.name, runs=str(folder.path.parent))
    elif source:
        config = load_config(source, overrides)
    else:
        raise UserError("no config given, expected: train.py CONFIG [key=value ...], or --resume RUN")
    if arguments.dry_run:
        dry_run(config)
    else:
        run(config, resume=bool(arguments.resume), allow_change=tuple(arguments.allow_change))


if __name__ == "__main__":
    run_script(main)
