"""Compare models trained under one protocol: train the rows of a study over several seeds, and write one table.

    python compare.py CONFIG --seeds N [key=value ...]       a config with teachers and terms: the four rows below
    python compare.py STUDY --seeds N [--rows NAME,...]      a study: the rows that its file lists

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

Exit codes: 0 all trained, 2 a mistake in the arguments or the data, 3 a run failed with a loss that is not finite,
4 out of memory, 5 a file that could not be written, 130 after Ctrl-C, 143 after SIGTERM.
"""

import argparse
import json
import shutil
from collections.abc import Collection
from pathlib import Path

import models
import train
from condense import condense
from config import Config, from_tree, to_tree
from datasets.index import DatasetIndex
from datasets.open import open_dataset
from engine.comparison import plot
from engine.comparison.condensed_table import condensed_markdown, condensed_tree
from engine.comparison.study import Row, Study, last_weights, load_study
from engine.comparison.table import Result, as_json, markdown
from engine.condensing.methods import check_network
from engine.runtime import run_folder
from engine.training.batch_norms import check_batches
from engine.training.building import build_criterion, build_student, with_published_settings
from engine.training.checks import SIZE_MULTIPLE, check_config
from engine.training.exits import NOT_FINITE_EXIT_CODE
from engine.training.pseudo_boxes import open_pseudo_teacher
from engine.training.splits import count_training_pictures, training_set
from engine.training.teaching import build_teachers
from errors import UserError, run_script
from yaml_files import read_yaml


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    arguments = parser.parse_intermixed_args(argv)
    if arguments.seeds is not None and arguments.seeds < 1:
        raise UserError(f"argument --seeds: found {arguments.seeds}, expected at least 1")
    study = load_study(arguments.config, arguments.overrides, seeds=arguments.seeds)
    compare(study, only=arguments.rows.split(",") if arguments.rows is not None else None)


def compare(study: Study, *, only: list[str] | None = None) -> list[Result]:
    """Train the missing runs of the rows `only` (None: all), then print their part of the comparison.

    Returns the results of every row of the study, in the order of the table. UserError if a run failed, after all
    others are trained and everything is written.
    """
    plot.require_plots()
    rows = list(study.rows) if only is None else study.with_teachers(only)
    results = {row.name: find_finished(row) for row in study.rows}
    check_rows([row for row in rows if results[row.name].missing], study)
    for number in range(max(len(row.seeds) for row in rows)):
        for row in rows:
            result = results[row.name]
            if number >= len(row.seeds) or row.seeds[number] in result.reports:
                continue
            train_seed(result, row.seeds[number], results)
            write(study, results)
    write(study, results, with_pictures=True)
    print(tables(study, results, only))
    print("written: " + ", ".join(str(study.folder / f"comparison.{suffix}") for suffix in ("md", "json", "png")))
    failed = [result.name for result in results.values() if result.failures]
    if failed:
        raise UserError(f"{study.folder}: runs failed, see the table: {', '.join(failed)}", NOT_FINITE_EXIT_CODE)
    return list(results.values())


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


def refuse_other(folder: run_folder.RunFolder, config: Config) -> None:
    """UserError if the folder holds a run of another config: its numbers do not belong in this table."""
    if not folder.config.is_file():
        return
    found = from_tree(Config, read_yaml(folder.config), source=str(folder.config))
    key = first_difference(*(to_tree(with_published_settings(c)) for c in (found, config)))
    if key:
        raise UserError(
            f"{folder.config}: key {key!r} differs from this comparison; give another name=, or remove {folder.path}"
        )


def check_rows(rows: list[Row], study: Study) -> None:
    """Build the models and the criterion of every row, to find mistakes in the last row before the first is trained.

    Teachers that are not trained yet are replaced by untrained models.
    """
    in_place = {last_weights(row): row.config for row in study.rows if row.is_teacher}
    for row in rows:
        try:
            check_config(row.run(row.seeds[0]), [t.name for t in row.config.teachers if t.weights in in_place])
            if row.task is not None:
                models.check_arch(row.task.arch)
                if row.network_row is None:
                    check_network(row.task)
        except UserError as error:
            raise UserError(f"row {row.name!r}: {error}", error.exit_code) from None
    source: DatasetIndex | None = None
    for row in rows:
        config = row.config
        try:
            if row.task is not None:
                source = source or open_dataset(*training_set(study.config.data), classes=study.config.data.classes)
                row.task.check_source(len(source))
            data = config.data
            names = open_dataset(data.format, data.root, data.test, classes=data.classes).names
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
        except UserError as error:
            raise UserError(f"row {row.name!r}: {error}", error.exit_code) from None


def say_nothing(line: str) -> None:
    """Print no line on the start weights: the training prints it."""


def train_seed(result: Result, seed: int, results: dict[str, Result]) -> None:
    """Train or continue one run of a row, and add its report or the reason of its failure to the result."""
    config = result.row.run(seed)
    weights = {teacher.weights for teacher in config.teachers}
    for other in results.values():
        is_teacher = last_weights(other.row) in weights
        if other.failures and (is_teacher or other.name == result.row.network_row):
            result.failures[seed] = f"{other.name} failed"
            return
    print(f"== {config.name}: {config.student.arch}, {config.epochs} epochs", flush=True)
    if result.row.idle:
        print(result.row.idle)
    path = result.row.folder(seed)
    is_started = run_folder.RunFolder(path).last.is_file()
    if path.exists() and not is_started:
        shutil.rmtree(path)  # stopped before its first checkpoint: nothing to continue
    try:
        if result.row.task is not None:
            condense(result.row.task.with_seed(seed), result.row.set_folder(seed), device=config.device)
        result.reports[seed] = train.run(config, resume=is_started)
    except UserError as error:
        if error.exit_code != NOT_FINITE_EXIT_CODE:
            raise
        result.failures[seed] = str(error)
        print(f"failed: {error}", flush=True)


def tables(study: Study, results: dict[str, Result], only: Collection[str] | None = None) -> str:
    """The tables of all rows, or of those in `only`."""
    return markdown(study, results, only) + condensed_markdown(results, only)


def write(study: Study, results: dict[str, Result], *, with_pictures: bool = False) -> None:
    """Write the tables and the plot of all runs so far."""
    run_folder.write_text(study.folder / "comparison.md", tables(study, results))
    text = as_json(study, results, condensed=condensed_tree(results))
    run_folder.write_text(study.folder / "comparison.json", text)
    plot.write(study.folder / "comparison.png", study, results, with_pictures=with_pictures)


def first_difference(a: dict | list | object, b: dict | list | object, key: str = "") -> str | None:
    """The first dotted key at which two trees of plain values differ; None if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{key}.{name}" if key else str(name)
            if (name in a) != (name in b):
                return inner
            if found := first_difference(a[name], b[name], inner):
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b)):
            if found := first_difference(x, y, f"{key}.{index}"):
                return found
        return None
    return None if a == b else key


if __name__ == "__main__":
    run_script(main)
