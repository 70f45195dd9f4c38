"""The reports of a run: the row of an epoch, the choice of the best weights, the final test."""

from collections.abc import Iterator
from typing import Any

from torch import nn

import checkpoint
from config import to_tree
from datasets.index import DatasetIndex
from engine.evaluation import measuring
from engine.runtime import run_folder
from engine.runtime.interruption import StopRequested, StopSignals
from engine.runtime.progress import Progress, ScalarLog, format_values
from engine.runtime.run_folder import RunFolder
from engine.training.balance import TermRange, term_ranges
from engine.training.building import TrainingSetup, count_parameters, evaluation_loader, machine_facts, place
from engine.training.run_pictures import draw, evaluation_pictures
from engine.training.saving import finish_weights, save, save_best
from engine.training.state import TrainingState
from engine.training.step import set_learning_rates
from errors import counted
from metrics.report import DetectionReport


def measure_start(setup: TrainingSetup, state: TrainingState, progress: Progress) -> None:
    """Measure a student that begins at weights on the test split, before the first step: what training adds to.

    A start without a class head of its own (fresh weights, an ImageNet backbone) detects nothing, and is not measured.
    """
    student = setup.config.student
    if setup.config.evaluation.of_start and (student.weights is not None or student.inherit is not None):
        state.start, _ = evaluate(setup, setup.ema.model, setup.splits.test)
        shown = {name: state.start[name] for name in ("precision", "recall", "mAP50", "mAP50-95")}
        progress.say(f"untrained, on {setup.config.data.test}: {format_values(shown)}")


def finish_epoch(
    setup: TrainingSetup,
    state: TrainingState,
    folder: RunFolder,
    progress: Progress,
    scalars: ScalarLog,
    stop: StopSignals,
) -> dict[str, float | None]:
    """Evaluate if it is due, keep the best weights, write the row of the epoch, save, and go on to the next epoch.

    Returns the row, which is also in metrics.csv.
    """
    epoch, is_held_out = state.epoch + 1, setup.splits.holdout is not None
    index = setup.splits.holdout or setup.splits.test
    results = evaluate_if_due(setup, state, folder, index, stop)
    is_best = is_held_out and bool(results) and (state.best is None or results["mAP50-95"] > state.best)
    if is_best:
        state.best, state.best_epoch = results["mAP50-95"], epoch
    row = row_of_epoch(setup, state, results)
    state.next_epoch()
    if setup.processes.is_first:
        setup.check_claim()
        if is_best:
            save_best(setup, epoch, state.step, folder)
        run_folder.append_metrics(folder.metrics, row)
        scalars.add(row, epoch)
        if results:
            scalars.add_pictures(lambda: evaluation_pictures(setup, index), epoch)
    save(setup, state, folder)
    shown = {name.split("/")[-1]: value for name, value in row.items() if name not in ("epoch", *run_folder.AP_COLUMNS)}
    kind = "held-out" if is_held_out else setup.config.data.test
    where = f"  on {counted(len(index), f'{kind} picture')}" if results else ""
    progress.say(f"epoch {epoch}/{setup.config.epochs}  {format_values(shown)}{where}" + per_iou_line(results))
    for line in setup.criterion.shares.announcements():
        progress.say(line)
    return row


def evaluate_if_due(
    setup: TrainingSetup, state: TrainingState, folder: RunFolder, index: DatasetIndex, stop: StopSignals
) -> dict[str, float]:
    """The numbers of the averaged weights at the end of an epoch; {} if evaluation.every_epochs skips it.

    A signal ends the evaluation at once, after everything is saved.
    """
    every, epoch = setup.config.evaluation.every_epochs, state.epoch + 1
    if not every or (epoch % every and epoch != setup.config.epochs):
        return {}
    save(setup, state, folder)
    stop.may_raise = True
    if stop.received is not None:
        raise StopRequested
    results, _ = evaluate(setup, setup.ema.model, index)
    stop.may_raise = False
    return results


def row_of_epoch(setup: TrainingSetup, state: TrainingState, results: dict[str, float]) -> dict[str, float | None]:
    """The row of metrics.csv. results: of evaluate_if_due."""
    row: dict[str, float | None] = {"epoch": state.epoch + 1, "time": state.seconds}
    row |= {f"train/{name}": value for name, value in state.means().items()}
    row |= {name: results.get(name.removeprefix("metrics/")) for name in run_folder.METRIC_COLUMNS}
    row["lr"] = set_learning_rates(setup, (state.epoch + 1) * setup.steps_per_epoch - 1)
    return row | ({run_folder.PLUMBING: 1.0} if setup.config.plumbing else {})


def per_iou_line(numbers: dict[str, float]) -> str:
    """A separate line with AP at each IoU threshold; "" where nothing was evaluated."""
    names = [column.removeprefix("metrics/") for column in run_folder.AP_COLUMNS]
    return f"\n  {format_values({name: numbers.get(name) for name in names})}" if numbers else ""


def finish(setup: TrainingSetup, state: TrainingState, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Evaluate the last EMA weights, and the held-out best, on the test split; write the report and the pictures."""
    test, details = evaluate(setup, setup.ema.model, setup.splits.test)
    best = measure_best(setup, state, folder)
    ranges = balance_of_run(setup, folder)
    report = describe_run(setup, state, test, best, ranges)
    if setup.processes.is_first:
        setup.check_claim()
        finish_weights(setup, state, folder, progress)
        run_folder.write_report(folder.report, report)
        draw(setup, details, folder, progress)
        for text in closing_lines(setup, folder, test, ranges):
            progress.say(text)
    return report


def measure_best(setup: TrainingSetup, state: TrainingState, folder: RunFolder) -> dict[str, Any] | None:
    """The weights that were best on the held-out pictures, on the test split; None without such weights."""
    if state.best_epoch is None:
        return None
    device = setup.processes.device
    model, info = checkpoint.load_model(folder.best, device=str(device))
    model = place(model, setup.config, device)  # as when it was chosen: other kernels round differently
    scores, _ = evaluate(setup, model, setup.splits.test)
    return {"epoch": info.epoch, "holdout mAP50-95": state.best, "test": scores}


def describe_run(
    setup: TrainingSetup,
    state: TrainingState,
    test: dict[str, float],
    best: dict[str, Any] | None,
    ranges: list[TermRange],
) -> dict[str, Any]:
    """The content of report.json. test: the numbers of the last EMA weights. best: of measure_best."""
    config = setup.config
    return {
        "name": config.name,
        "plumbing": config.plumbing or None,
        "arch": config.student.arch,
        "parameters": count_parameters(setup.student),
        "seed": config.seed,
        "epochs": state.epoch,
        "steps": state.step,
        "weights": "last EMA weights",
        "split": config.data.test,
        "labelled_pictures": setup.splits.labelled,
        "unlabelled_pictures": setup.splits.unlabelled,
        "pseudo_boxes": None if setup.splits.pseudo is None else setup.splits.pseudo.to_tree(),
        "shared_pictures": {" and ".join(o.names): len(o.shared) for o in setup.splits.overlaps},
        "evaluation": to_tree(config.evaluation),
        "inputs": setup.inputs,
        "start": state.start,
        "test": test,
        "best_on_holdout": best,
        "distillation": {
            term.name: {"lowest": term.lowest, "highest": term.highest, "stayed": term.stayed} for term in ranges
        },
        "gradient_shares": setup.criterion.shares.report(),
        "teacher_outputs": setup.teachers.counts(),
        "seconds": state.seconds,
        "images_per_second": state.images / state.seconds if state.seconds else None,
        **run_folder.environment(),
        **machine_facts(setup),
    }


def closing_lines(
    setup: TrainingSetup, folder: RunFolder, test: dict[str, float], ranges: list[TermRange]
) -> Iterator[str]:
    """What a run prints at its end: the ranges of its terms, the outputs kept of its teachers, and the test numbers."""
    for term in ranges:
        # The weight of a term with a share is set by gradients, so its values say nothing.
        if term.name not in setup.criterion.shares.shares or not term.acted:
            yield str(term)
    for name, counts in setup.teachers.counts().items():
        yield f"parts of outputs of {name}: " + ", ".join(f"{number} {what}" for what, number in counts.items())
    shown = {name: test[name] for name in ("precision", "recall", "f1", "mAP50", "mAP50-95")}
    numbers = f"{setup.config.data.test}: {format_values(shown)}{per_iou_line(test)}"
    overlaps = (str(overlap) for overlap in setup.splits.overlaps if overlap.shared)
    yield "\n".join([numbers, *overlaps, f"written: {folder.path}"])


def balance_of_run(setup: TrainingSetup, folder: RunFolder) -> list[TermRange]:
    """The share of each distillation term in the detection loss, from the rows of metrics.csv."""
    if not setup.processes.is_first or not setup.criterion.terms:
        return []
    rows = [
        {name.removeprefix("train/"): float(value) for name, value in row.items() if name.startswith("train/")}
        for row in run_folder.read_metrics(folder.metrics)
    ]
    return term_ranges(rows, list(setup.criterion.terms))


def evaluate(setup: TrainingSetup, model: nn.Module, index: DatasetIndex) -> tuple[dict[str, float], DetectionReport]:
    """Evaluate a model on a split: the numbers of metrics.csv and report.json, and the data of the plots.

    The rows of the epochs, the choice of the best and the final test all use this, so equal weights get equal numbers.
    Every process calls it and gets the result of all pictures, its own and those of the other processes.
    """
    loader, device = evaluation_loader(setup, index), setup.processes.device
    result = measuring.evaluate_loader(model, loader, device=device, **setup.config.evaluation.arguments())
    numbers = {"f1" if name == "F1" else name: value for name, value in result.numbers.items()}
    per_iou = {f"AP{100 * threshold:.0f}": value for threshold, value in result.ap_result.ap_per_iou.items()}
    return numbers | per_iou, result.report
