"""Compare models trained under one protocol: train the rows of a study over several seeds, and write one table.

    python compare.py CONFIG --seeds N [key=value ...]       a config with teachers and terms: the four rows below
    python compare.py STUDY --seeds N [--rows NAME,...]      a study: the rows that its file lists
    python compare.py STUDY --print-runs                     a command for each run, for any scheduler
    python compare.py STUDY --submit local|slurm --workers N

Examples:

    python compare.py configs/studies/demo.yaml --seeds 3
    python compare.py configs/studies/bccd_study.yaml --seeds 3 --rows baseline,cwd,fgd epochs=10

A config with teachers and terms is trained as

    baseline    the student alone
    teacher_*   each teacher without weights, alone, once, with the config's seed
    distilled   the student with the config's distillation terms
    longer      the student alone, for as much compute (FLOPs) as the distilled row has with its teachers: their passes,
                and their training unless their weights are given

engine/comparison/study.py describes the file of a study. All rows are trained with the first seed, then with the next.

comparison.md, comparison.json and comparison.png in <runs>/<name>/ are rewritten after every run and list the missing
runs. The numbers are those of the last EMA weights on the test split; no epoch is selected on it. A finished run with
the same config is not repeated and an interrupted one is continued: stop the command and give it again at any time,
also with more seeds or rows. A run with a loss that is not finite is listed as failed, and the others continue.

The command can be given many times at once, on machines that share the folder: each process takes the next run that
nobody works on. At the end it waits for the runs of the others, and takes over those whose process is gone
(docs/many_machines.md).

Exit codes: 0 all trained, 2 a mistake in the arguments or the data, 3 a run failed with a loss that is not finite,
4 out of memory, 5 a file that could not be written, 130 after Ctrl-C, 143 after SIGTERM.
"""

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import models
import train
from condense import condense
from config import Config
from datasets.index import DatasetIndex
from datasets.open import open_dataset
from engine.comparison import plot, submission
from engine.comparison.condensed_table import condensed_markdown, condensed_tree
from engine.comparison.rows import Row, last_weights
from engine.comparison.study import Study, load_study
from engine.comparison.table import Result, as_json, markdown
from engine.comparison.work import StudyProgress, Work, list_work, refuse_other, with_needs, write_failure
from engine.condensing.methods import load_network
from engine.runtime import claims, run_folder
from engine.training.batch_norms import check_batches
from engine.training.building import build_criterion, build_student
from engine.training.checks import check_config
from engine.training.inputs import Inputs, digest_of_labels, labels_of, weights_name, weights_of
from engine.training.pseudo_boxes import open_pseudo_teacher
from engine.training.splits import count_training_pictures
from engine.training.teaching import build_teachers
from errors import NOT_FINITE_EXIT_CODE, ArgumentParser, UserError, counted, expect, naming, run_script, shortened
from structures import SIZE_MULTIPLE

POLL_S = 5.0  # between two looks at runs that other processes work on


def main(argv: list[str]) -> None:
    parser = ArgumentParser("compare.py", __doc__)
    parser.add_argument("config", help="a YAML file: a study with `rows`, or a config with teachers and terms")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the file")
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="train each row with N seeds: seed, seed + 1, ... (those of `decide` in the file, or 1)",
    )
    parser.add_argument(
        "--rows", metavar="NAME,...", help="train only these rows and the teachers they need (default: all)"
    )
    parser.add_argument("--run", metavar="NAME", help="train only this run, and the teachers and the set it needs")
    parser.add_argument("--print-runs", action="store_true", help="print a command for each run, in their order")
    parser.add_argument(
        "--submit", choices=("local", "slurm"), help="submit workers through submitit, and wait for them"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="with --submit: how many (%(default)s)")
    parser.add_argument(
        "--submit-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --submit: an option of submitit, such as slurm_partition=gpu, gpus_per_node=1 or timeout_min=600",
    )
    arguments = parser.parse_intermixed_args(argv)
    check_arguments(arguments)
    study = load_study(arguments.config, arguments.overrides, seeds=arguments.seeds)
    only = arguments.rows.split(",") if arguments.rows is not None else None
    if arguments.print_runs:
        for work in choose(list_work(study.rows), study, only):
            print(shlex.join(["python", "compare.py", *same_study(arguments), "--run", work.name]))
    elif arguments.submit:
        submit(study, arguments, only=only)
    else:
        compare(study, only=only, run=arguments.run)


def check_arguments(arguments: argparse.Namespace) -> None:
    """UserError for numbers and combinations that cannot be meant."""
    for name, value in (("--seeds", arguments.seeds), ("--workers", arguments.workers)):
        expect(value is None or value >= 1, f"argument {name}", value, "at least 1")
    ways = {"--run": arguments.run, "--print-runs": arguments.print_runs, "--submit": arguments.submit}
    given = [name for name, value in ways.items() if value]
    if arguments.run and arguments.rows is not None:
        given.append("--rows")
    if len(given) > 1:
        raise UserError(f"argument {given[1]}: found beside {given[0]}, expected one of them")
    if not arguments.submit and (arguments.workers != 1 or arguments.submit_option):
        raise UserError("arguments --workers and --submit-option: expected --submit with them")


def same_study(arguments: argparse.Namespace) -> list[str]:
    """The arguments that give the same study to another process."""
    seeds = [] if arguments.seeds is None else ["--seeds", str(arguments.seeds)]
    return [arguments.config, *arguments.overrides, *seeds]


@dataclass(frozen=True)
class Plan:
    """What a command is to train.

    works: in their order. shown: the rows of the table that it prints at the end; None: all.
    """

    study: Study
    works: list[Work]
    progress: StudyProgress
    shown: list[str] | None


def make_plan(study: Study, *, only: list[str] | None = None, run: str | None = None) -> Plan:
    """The works of the rows `only` (None: all) or of one run, checked before anything is trained."""
    plot.require_plots()
    every = list_work(study.rows)
    if run is None:
        works = retried = choose(every, study, only)
        shown = only
    else:
        works = with_needs(every, [run])
        retried, shown = works[-1:], [works[-1].row.name]
    progress = StudyProgress(every, {row.name: find_finished(row) for row in study.rows}, retried)
    progress.check_weights(works)
    open_rows = {work.row.name for work in works if progress.is_open(work)}
    progress.inputs.add("now", check_rows([row for row in study.rows if row.name in open_rows], study))
    return Plan(study, works, progress, shown)


def choose(works: list[Work], study: Study, only: list[str] | None) -> list[Work]:
    """The works of the rows `only` (None: all), and those that they need."""
    if only is None:
        return works
    names = {row.name for row in study.with_teachers(only)}
    return with_needs(works, [work.name for work in works if work.row.name in names])


def compare(study: Study, *, only: list[str] | None = None, run: str | None = None) -> list[Result]:
    """Train the missing runs of the rows `only` (None: all), or one run, then print their part of the comparison.

    run: the name of a Work. Other processes may do the same at the same time: none trains what another one trains, and
    each ends when all is done.
    Returns the results of every row of the study, in the order of the table. UserError if a run failed, after all
    others are trained and everything is written.
    """
    plan = make_plan(study, only=only, run=run)
    train_all(plan)
    is_whole = not any(plan.progress.is_open(work) for work in plan.progress.works)
    return finish(plan, with_pictures=run is None or is_whole)


def train_all(plan: Plan) -> None:
    """Do all works, together with the other processes that are at it."""
    progress = plan.progress
    printed: list[str] = []
    while waiting := [work for work in plan.works if progress.is_open(work)]:
        held = {}
        for work in filter(progress.can_begin, waiting):
            try:
                make_or_train(work, progress)
            except claims.Claimed as error:
                held[work.name] = error
                continue
            write_tables(plan)
            break
        else:  # other processes are at all that can begin
            if list(held) != printed:
                print("waiting: " + "; ".join(map(str, held.values())), flush=True)
                printed = list(held)
            time.sleep(POLL_S)
        progress.refresh()


def finish(plan: Plan, *, with_pictures: bool = True) -> list[Result]:
    """Write and print the tables. UserError if a run failed."""
    study, results = plan.study, plan.progress.results
    write_tables(plan, with_pictures=with_pictures)
    print(tables(study, results, plan.shown))
    print("written: " + ", ".join(str(study.folder / f"comparison.{suffix}") for suffix in ("md", "json", "png")))
    names = {work.row.name for work in plan.works}
    failed = [result.name for result in results.values() if result.failures and result.name in names]
    if failed:
        raise UserError(f"{study.folder}: runs failed, see the table: {shortened(failed)}", NOT_FINITE_EXIT_CODE)
    return list(results.values())


def submit(study: Study, arguments: argparse.Namespace, *, only: list[str] | None) -> None:
    """Let workers train what `compare` would, wait for them, and finish as it does."""
    submission.require_submitit(arguments.submit)
    options = submission.read_options(arguments.submit_option)
    plan = make_plan(study, only=only)
    rows = [] if only is None else ["--rows", arguments.rows]
    command = [sys.executable, str(Path(__file__).resolve()), *same_study(arguments), *rows]
    errors = submission.run_workers(
        arguments.submit, command, workers=arguments.workers, options=options, folder=study.folder / "jobs"
    )
    plan.progress.refresh()
    if missing := [work.name for work in plan.works if plan.progress.is_open(work)]:
        why = f"; a worker ended with: {errors[0]}" if errors else ""
        raise UserError(f"{study.folder}: not made yet: {shortened(missing)}{why}; give the command again to go on")
    finish(plan)


def find_finished(row: Row) -> Result:
    """The reports of the finished runs of a row. UserError if a folder holds a run of another config."""
    result = Result(row)
    for seed in row.seeds:
        folder = run_folder.RunFolder(row.folder(seed))
        refuse_other(folder, row.run(seed))
        if folder.report.is_file():
            print(f"finished before: {folder.report}")
            result.reports[seed] = json.loads(folder.report.read_text(encoding="utf-8"))
    return result


def check_rows(rows: list[Row], study: Study) -> Inputs:
    """Build the models and the criterion of every row, to find mistakes in the last row before the first is trained.

    rows: those with runs to train. Untrained models replace teachers that are not trained yet. Returns inputs_of_rows.
    """
    open_once = functools.cache(lambda place, classes: open_dataset(*place, classes=classes))
    in_place = {last_weights(row): row.config for row in study.rows if row.is_teacher}
    for row in rows:
        with naming(f"row {row.name!r}"):
            check_config(row.run(row.seeds[0]), [t.name for t in row.config.teachers if t.weights in in_place])
            if row.task is not None:
                models.check_arch(row.task.arch)
                if row.network_row is None:
                    load_network(row.task)
    real = study.config.data
    for row in rows:
        data = row.config.data
        with naming(f"row {row.name!r}"):
            if row.task is not None:
                row.task.check_source(len(open_once(real.train_place, real.classes)))
            check_models(row, in_place, open_once(data.test_place, data.classes).names)
    return inputs_of_rows(rows, open_once)


def inputs_of_rows(rows: list[Row], open_once: Callable[..., DatasetIndex]) -> Inputs:
    """The inputs that are there already, without the weights of teachers among the rows: these will be others."""
    inputs: Inputs = {}
    unfinished = {weights_name(last_weights(row)) for row in rows if row.is_teacher}
    for row in rows:
        data = row.config.data
        has_labels = row.task is None and data.train is not None  # a set's manifest has those of its source
        with naming(f"row {row.name!r}"):
            for place in (data.test_place, data.train_place) if has_labels else (data.test_place,):
                name = labels_of(place, data)
                if name not in inputs:
                    inputs[name] = digest_of_labels(open_once(place, data.classes))
            inputs |= weights_of(row.config, known=inputs.keys() | unfinished)
    return inputs


def check_models(row: Row, in_place: dict[str, Config], names: tuple[str, ...]) -> None:
    """Build the models and the criterion of a row. in_place: the configs of teachers by their later weights."""
    config = row.config
    fresh = {
        t.name: build_student(in_place[t.weights], names, say=say_nothing)
        for t in config.teachers
        if t.weights in in_place and not Path(t.weights).is_file()
    }
    student = build_student(config, names, say=say_nothing, given=fresh)
    teachers = build_teachers(config, names, fresh, student)
    build_criterion(config, names, student, teachers)
    open_pseudo_teacher(config, names, fresh, say_nothing)
    if config.image_size == SIZE_MULTIPLE:  # where a batch of one image is too small
        pictures = row.task.decoded if row.task is not None else count_training_pictures(row.run(row.seeds[0]))
        check_batches(config, pictures, student)


def say_nothing(line: str) -> None:
    """Print no line on the start weights: the training prints it."""


def make_or_train(work: Work, progress: StudyProgress) -> None:
    """Make a set, or train or continue a run. claims.Claimed if another process is at it."""
    config = work.row.run(work.seed)
    if work.is_set:
        assert work.row.task is not None
        condense(work.row.task.with_seed(work.seed), work.path, device=config.device)
        return
    with claims.take(work.path) as claim:
        progress.refresh()
        if not progress.is_open(work):
            return  # another process was at it until now
        work.failure.unlink(missing_ok=True)
        print(f"== {config.name}: {config.student.arch}, {counted(config.epochs, 'epoch')}", flush=True)
        if work.row.idle:
            print(work.row.idle)
        try:
            train.start_or_continue(config, claim)
        except UserError as error:
            if error.exit_code != NOT_FINITE_EXIT_CODE:
                raise
            write_failure(work, str(error))
            print(f"failed: {error}", flush=True)


def tables(study: Study, results: dict[str, Result], only: Collection[str] | None = None) -> str:
    """The tables of all rows, or of those in `only`."""
    return markdown(study, results, only) + condensed_markdown(results, only)


def write_tables(plan: Plan, *, with_pictures: bool = False) -> None:
    """Write the tables and the plot of all runs so far, those of other processes among them; one process at a time."""
    study, results = plan.study, plan.progress.results
    with claims.wait_for(study.folder / "comparison"):
        plan.progress.refresh()
        run_folder.write_text(study.folder / "comparison.md", tables(study, results))
        text = as_json(study, results, condensed=condensed_tree(results))
        run_folder.write_text(study.folder / "comparison.json", text)
        plot.write(study.folder / "comparison.png", study, results, with_pictures=with_pictures)


if __name__ == "__main__":
    run_script(main)
