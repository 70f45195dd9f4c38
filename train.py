"""The one training loop: any student, zero or more teachers, one process or many.

    python train.py configs/shapes_yolov8n.yaml [key=value ...]
    python train.py STUDY --row NAME           one row of a study (compare.py trains all of them)
    python train.py CONFIG --dry-run           every loss term of one batch and its gradient, and nothing written
    python train.py --resume runs/NAME         go on after a signal, a crash or a full disk
    torchrun --nproc-per-node 2 train.py CONFIG

`batch_size` counts the pictures of one batch over all processes. Each step is a pure function of the seed, its number
and the weights, so a run that was killed and resumed ends with the same bytes as one that was not (on the same machine,
with the same torch and number of threads).

Exit codes: 0 done; 1 another process of the run is gone; 2 usage or data; 3 a number that is not finite; 4 out of
memory; 5 the disk; 130, 143 stopped by SIGINT or SIGTERM after saving. The last good checkpoint always stays whole.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
from comparison.one_row import load_row, load_row_for_dry_run
from config import Config, load_config, to_tree
from datasets.index import DatasetIndex
from datasets.loader import Batch
from errors import UserError, run_script
from evaluation import measuring
from layers.over_processes import sum_over_processes
from metrics.report import DetectionReport
from random_streams import Stream, seeded_generator
from runtime import run_folder
from runtime.interruption import StopRequested, StopSignals
from runtime.processes import Processes, keep_freed_memory
from runtime.progress import Progress, ScalarLog, words
from runtime.run_folder import RunFolder
from training.balance import TermRange, term_ranges
from training.building import Parts, build, count_parameters, with_published_settings
from training.dry_run import dry_run
from training.run_pictures import draw, evaluation_pictures
from training.state import Position, describe_model, position_from, position_tree, refuse_changes

LOST_EXIT_CODE, NOT_FINITE_EXIT_CODE, MEMORY_EXIT_CODE = 1, 3, 4


def train(parts: Parts, position: Position, folder: RunFolder, progress: Progress, stop: StopSignals) -> None:
    """From `position` to the end of the last epoch. Raises StopRequested after saving where a signal asked to stop."""
    config, optimizer = parts.config, parts.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scalars = ScalarLog(
        folder.path, purge_step=position.epoch + 1, enabled=parts.processes.is_first and not progress.quiet
    )
    if scalars.missing:
        progress.say(f"without TensorBoard events: {scalars.missing} is not installed")
    stop.may_raise = False
    while not position.is_over(config):
        epoch = position.epoch
        parts.objective.train()
        progress.start(f"epoch {epoch + 1}/{config.epochs}", parts.batches_per_epoch, position.batch)
        began = time.perf_counter()
        for batches in in_groups(parts.loader.epoch(epoch, start=position.batch), config.optimizer.accumulate):
            parts.set_rates(position.step)
            stream = seeded_generator(Stream.STEP, config.seed, position.step, parts.processes.rank)
            torch.manual_seed(stream.initial_seed())
            terms, losses = step_gradients(parts, batches, epoch, position.batch)
            norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or math.inf)
            values = torch.cat((losses, norm[None])).tolist()  # the one wait for the device in a step
            check_finite(values, terms, batches, parts.splits.train, position, folder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            position.step += 1
            parts.ema.update(position.step)

            for i, batch in enumerate(batches):
                row = dict(zip(terms, values[i * len(terms) :]))
                position.count(row, len(batch) * parts.processes.count)
                progress.advance(row)
            position.seconds += time.perf_counter() - began  # with the wait for data, without saving
            wants_stop = parts.processes.any(stop.received is not None)
            if wants_stop or (config.save_every_steps and position.step % config.save_every_steps == 0):
                save(parts, position, folder)
            if wants_stop:
                progress.finish()
                raise StopRequested
            began = time.perf_counter()
        progress.finish()
        finish_epoch(parts, position, folder, progress, scalars, stop)
    stop.may_raise = True  # nothing is lost from here on
    scalars.close()


def step_gradients(parts: Parts, batches: list[Batch], epoch: int, first: int) -> tuple[list[str], Tensor]:
    """The gradient of one optimizer step, in the parameters; the names of the terms, and their values batch by batch.

        sum over the batches of B L, or the mean of L without optimizer.sum_over_batch

    B and the loss L of a batch are those of all processes together: several learn as one with the joined batches, but
    for batch normalisation and what is drawn. L of each batch has normalisers of its own, as if it stood alone.

    first: the number within the epoch of the first batch.
    """
    count, last, rows = parts.processes.count, first + len(batches) - 1, []
    for number, batch in enumerate(batches, first):
        images, targets = parts.prepare(batch, epoch, number)
        t_outputs = parts.teachers(images)
        with contextlib.nullcontext() if number == last else no_sync(parts.objective):
            terms = parts.objective(images, targets, t_outputs, epoch + number / parts.batches_per_epoch)
            rows.append(torch.stack([term.detach() for term in terms.values()]))
            scale = len(batch) * count if parts.config.optimizer.sum_over_batch else 1 / len(batches)
            (sum(terms.values()) * scale).backward()
    return list(terms), sum_over_processes(torch.cat(rows)) / count


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive batches, `size` at a time, as long as there are any; the last group may be smaller."""
    while group := list(itertools.islice(batches, size)):
        yield group


def no_sync(objective: nn.Module) -> contextlib.AbstractContextManager:
    """Gradients stay in this process: DistributedDataParallel averages them with those of the group's last batch."""
    return objective.no_sync() if hasattr(objective, "no_sync") else contextlib.nullcontext()


def check_finite(
    values: list[float],
    names: list[str],
    batches: list[Batch],
    index: DatasetIndex,
    position: Position,
    folder: RunFolder,
) -> None:
    """Stop before the weights take it in: UserError with the terms and the pictures, all of them in nonfinite.json."""
    if all(map(math.isfinite, values)):
        return
    *terms, norm = values
    found = {f"{name}": value for name, value in zip(names * len(batches), terms) if not math.isfinite(value)}
    found = found or {"the gradient's norm": norm}
    pictures = [str(index.samples[row].image_path) for batch in batches for row in batch.indices.tolist()]
    with contextlib.suppress(UserError):
        details = {"step": position.step, "terms": {k: str(v) for k, v in found.items()}, "pictures": pictures}
        run_folder.write_text(folder.path / "nonfinite.json", json.dumps(details, indent=2) + "\n")
    shown = ", ".join(pictures[:8]) + (f" and {len(pictures) - 8} more" if len(pictures) > 8 else "")
    raise UserError(
        f"step {position.step}: {', '.join(f'{name} is {value}' for name, value in found.items())}, expected finite "
        f"numbers; pictures of the batch: {shown}; the last checkpoint is untouched",
        NOT_FINITE_EXIT_CODE,
    )


def finish_epoch(
    parts: Parts, position: Position, folder: RunFolder, progress: Progress, scalars: ScalarLog, stop: StopSignals
) -> None:
    """Evaluate where it is due, keep the best, write the row of the epoch, save, and move to the next one."""
    config, epoch = parts.config, position.epoch + 1
    every = config.evaluation.every_epochs
    index = parts.splits.holdout or parts.splits.test
    results: dict[str, float] = {}
    if every and (epoch % every == 0 or epoch == config.epochs):
        save(parts, position, folder)  # a signal may end the evaluation at once
        stop.may_raise = True
        if stop.received is not None:
            raise StopRequested
        results, _ = evaluate(parts, parts.ema.model, index)
        stop.may_raise = False
    is_best = parts.splits.holdout is not None and bool(results)
    is_best = is_best and (position.best is None or results["mAP50-95"] > position.best)
    if is_best:
        position.best, position.best_epoch = results["mAP50-95"], epoch
    row = {"epoch": epoch, "time": position.seconds} | {f"train/{k}": v for k, v in position.means().items()}
    row |= {name: results.get(name.removeprefix("metrics/")) for name in run_folder.METRIC_COLUMNS}
    row["lr"] = parts.set_rates(position.step - 1)
    position.next_epoch()
    if parts.processes.is_first:
        if is_best:
            best = {"epoch": epoch, "step": position.step, "ema": parts.ema.model.state_dict()}
            checkpoint.save(folder.best, describe_model(config, parts.splits.names) | best)
        run_folder.append_metrics(folder.metrics, row)
        scalars.add(row, epoch)
        if results:
            scalars.add_pictures(lambda: evaluation_pictures(parts, index), epoch)
    save(parts, position, folder)
    shown = {name.split("/")[-1]: value for name, value in row.items() if name not in ("epoch", *run_folder.AP_COLUMNS)}
    where = ""
    if results:
        where = f"  on {len(index)} {'held-out' if parts.splits.holdout is not None else config.data.test} pictures"
    progress.say(f"epoch {epoch}/{config.epochs}  {words(shown)}{where}" + per_iou_line(results))


def per_iou_line(numbers: dict[str, float]) -> str:
    """A line of its own with AP at each IoU threshold; nothing where nothing was evaluated."""
    found = {name: numbers.get(name) for name in (column.removeprefix("metrics/") for column in run_folder.AP_COLUMNS)}
    return f"\n  {words(found)}" if numbers else ""


def save(parts: Parts, position: Position, folder: RunFolder) -> None:
    """weights/last.pt: everything --resume needs, and no teacher."""
    if not parts.processes.is_first:
        return
    state = describe_model(parts.config, parts.splits.names) | {
        "epoch": position.epoch,
        "step": position.step,
        "position": position_tree(position),
        "model": parts.student.state_dict(),
        "ema": parts.ema.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "criterion": parts.criterion.state_dict(),
        "data": parts.data,
        "machine": parts.machine(),
    }
    checkpoint.save(folder.last, state, keep_previous=True)


def restore(parts: Parts, state: dict[str, Any], folder: RunFolder, progress: Progress) -> Position:
    """Fill the models and the optimizer from a checkpoint of this run."""
    if state["data"] != parts.data:
        raise UserError(f"{folder.path}: the training pictures or labels are not those the run was started with")
    for key, value in parts.machine().items():
        if state["machine"][key] != value:
            progress.say(
                f"resuming with {key} {value}, before {state['machine'][key]}: the bytes may differ from then on"
            )
    checkpoint.load_state(parts.student, state["model"], folder.last)
    checkpoint.load_state(parts.ema.model, state["ema"], folder.last)
    checkpoint.load_state(parts.criterion, state["criterion"], folder.last)
    parts.optimizer.load_state_dict(state["optimizer"])
    return position_from(state)


def run(
    config: Config,
    *,
    resume: bool = False,
    teachers: dict[str, nn.Module] | None = None,
    quiet: bool = False,
    allow_change: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train a config to its end and return the report that is also written to runs/<name>/report.json.

    Args:
        resume: go on with runs/<name>, which must be of the same config; otherwise a new folder <name>, <name>2, ...
        teachers: modules by the names in config.teachers, in place of their weights; put in eval mode, frozen.
        quiet: print nothing but the line about a signal.
        allow_change: keys that a resumed run may change.
    Raises UserError, or SystemExit after a signal, when all is saved; both with the exit codes above.
    """
    keep_freed_memory()
    config = with_published_settings(config)
    processes = Processes(config.device)
    progress = Progress(quiet=quiet or not processes.is_first)
    state, folder, position = None, None, Position()
    try:
        with processes, StopSignals() as stop:
            try:
                if resume:
                    folder = run_folder.find(Path(config.runs) / config.name)
                    state = checkpoint.load_newest(folder.last, progress.say)
                    refuse_changes(state["config"], config, allow_change, str(folder.path))
                saved = state and state["model"]
                parts = build(config, processes, teachers, progress.say, saved)
                folder, parts.config = processes.from_first(open_folder(folder, config) if processes.is_first else None)
                if processes.is_first:
                    for role, report in parts.splits.reports.items():
                        report.write(folder.path / "dataset" / role)
                if state is not None:
                    position = restore(parts, state, folder, progress)
                progress.say(f"{folder.path}: {parts}")
                train(parts, position, folder, progress, stop)
                return finish(parts, position, folder, progress)
            except (StopRequested, UserError) as error:
                if isinstance(error, UserError) and (stop.received is None or "DataLoader worker" not in str(error)):
                    raise
                if processes.is_first:  # a signal to the whole process group has ended the loader's workers as well
                    print(how_to_go_on(folder), flush=True)
                raise SystemExit(stop.exit_code) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.distributed.DistError) or "by peer" in str(error):
            raise UserError("another process of this run is gone; go on with --resume", LOST_EXIT_CODE) from None
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}; use a smaller "
            f"batch_size (with optimizer.accumulate) or image_size; the last checkpoint is untouched",
            MEMORY_EXIT_CODE,
        ) from None


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


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch raises its own class on CUDA and a plain RuntimeError where the CPU has no memory left."""
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text or "bad_alloc" in text
    )


def finish(parts: Parts, position: Position, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Evaluate the last EMA weights, and the held-out best, on the test split; write the report and the pictures."""
    config, is_first = parts.config, parts.processes.is_first
    test, details = evaluate(parts, parts.ema.model, parts.splits.test)
    best = None
    if position.best_epoch is not None:
        model, info = checkpoint.load_model(folder.best, device=str(parts.processes.device))
        if config.channels_last:
            model = model.to(
                memory_format=torch.channels_last
            )  # as the one that was chosen: other kernels round otherwise
        scores, _ = evaluate(parts, model, parts.splits.test)
        best = {"epoch": info.epoch, "holdout mAP50-95": position.best, "test": scores}
    ranges = balance_of_run(parts, folder)
    report = {
        "name": config.name,
        "arch": config.student.arch,
        "parameters": count_parameters(parts.student),
        "seed": config.seed,
        "epochs": position.epoch,
        "steps": position.step,
        "weights": "last EMA weights",
        "split": config.data.test,
        "shared_pictures": {" and ".join(o.names): len(o.shared) for o in parts.splits.overlaps},
        "evaluation": to_tree(config.evaluation),
        "test": test,
        "best_on_holdout": best,
        "distillation": {
            found.name: {"lowest": found.lowest, "highest": found.highest, "stayed": found.stayed} for found in ranges
        },
        "seconds": position.seconds,
        "images_per_second": position.images / position.seconds if position.seconds else None,
        **run_folder.environment(),
        **parts.machine(),
    }
    if is_first:
        run_folder.write_report(folder.report, report)
        draw(parts, details, folder, progress)
        for found in ranges:
            progress.say(str(found))
        shown = {name: test[name] for name in ("precision", "recall", "f1", "mAP50", "mAP50-95")}
        shared = "".join(f"\n{overlap}" for overlap in parts.splits.overlaps if overlap.shared)
        progress.say(f"{config.data.test}: {words(shown)}{per_iou_line(test)}{shared}\nwritten: {folder.path}")
    return report


def balance_of_run(parts: Parts, folder: RunFolder) -> list[TermRange]:
    """What share of the detection loss each distillation term had, from the rows of metrics.csv."""
    if not parts.processes.is_first or not parts.criterion.terms:
        return []
    rows = [
        {name.removeprefix("train/"): float(value) for name, value in row.items() if name.startswith("train/")}
        for row in run_folder.read_metrics(folder.metrics)
    ]
    return term_ranges(rows, list(parts.criterion.terms))


def evaluate(parts: Parts, model: nn.Module, index: DatasetIndex) -> tuple[dict[str, float], DetectionReport]:
    """The numbers of metrics.csv and report.json for a model on a split, and what the plots are drawn from.

    One way for the rows on the way, the choice of best.pt and the final test: equal weights get equal numbers. Every
    process calls this and gets the whole result of its and the others' pictures.
    """
    result = measuring.evaluate_model(
        model,
        index,
        image_size=parts.config.image_size,
        device=parts.processes.device,
        **parts.config.evaluation.arguments(),
        loader=parts.evaluation_loader(index),
        sharded=True,
    )
    numbers = {"f1" if name == "F1" else name: value for name, value in result.numbers.items()}
    per_iou = {f"AP{100 * threshold:.0f}": value for threshold, value in result.ap_result.ap_per_iou.items()}
    return numbers | per_iou, result.report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train.py", description="Train a detector, with or without teachers.")
    parser.add_argument("config", nargs="?", help="a YAML file; with --resume: not needed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the config")
    parser.add_argument("--resume", metavar="RUN", help="the folder of a run to go on with")
    parser.add_argument("--allow-change", metavar="KEY", action="append", default=[], help="may differ when resuming")
    parser.add_argument("--row", metavar="NAME", help="train this row of a study, where compare.py looks for it")
    parser.add_argument("--dry-run", action="store_true", help="print every loss term of one batch and exit")
    arguments = parser.parse_intermixed_args(argv)
    source, overrides = arguments.config, arguments.overrides
    if source and "=" in source and not Path(source).exists():
        source, overrides = None, [source, *overrides]
    if arguments.row is not None:
        if not source or arguments.resume:
            raise UserError("argument --row: expected a study's file before it, without --resume")
        if arguments.dry_run:
            dry_run(*load_row_for_dry_run(source, overrides, arguments.row))
        else:
            run(load_row(source, overrides, arguments.row))
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
