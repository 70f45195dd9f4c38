"""One row of a study, for train.py: the same run, in the same folder, as compare.py trains."""

from pathlib import Path

from torch import nn

from config import Config
from datasets.open import open_dataset
from engine.comparison.rows import Row, last_weights
from engine.comparison.study import Study, load_study
from engine.condensing.set_files import read_manifest
from engine.training.student import build_student
from errors import UserError, shortened


def find_row(study: Study, name: str) -> Row:
    """The row of that name. UserError that lists all rows if there is none."""
    for row in study.rows:
        if row.name == name:
            return row
    raise UserError(f"argument --row: found {name!r}, expected one of {', '.join(row.name for row in study.rows)}")


def open_row(path: str, overrides: list[str], name: str) -> tuple[Study, Row, Config]:
    """A study, its row of that name, and the config of the row's first run. UserError if its set is not made yet."""
    study = load_study(path, overrides)
    row = find_row(study, name)
    if row.task is not None and read_manifest(row.set_folder(row.seeds[0])) is None:
        raise UserError(
            f"{row.set_folder(row.seeds[0])}: the set of row {row.name!r} is not made yet: condense.py {path} --row "
            f"{row.name}"
        )
    return study, row, row.run(row.seeds[0])


def load_row(path: str, overrides: list[str], name: str) -> Config:
    """The config of a row's first run. UserError if the run exists, or if its teachers or its set do not exist yet."""
    study, row, config = open_row(path, overrides, name)
    if row.folder(config.seed).exists():
        advice = f"continue with --resume {row.folder(config.seed)}, give another seed=N, or remove it"
        raise UserError(f"{row.folder(config.seed)}: row {name!r} has a run here; {advice}")
    same = ", with the same key=value" if overrides else ""
    for teacher, trained in untrained(config, study).items():
        raise UserError(
            f"row {name!r}: its teacher {teacher!r} is not trained yet; train it first: train.py {path} --row "
            f"{trained.name}, or all of it: compare.py {path} --rows {name}{same}"
        )
    if row.idle:
        print(row.idle)
    return config


def load_row_for_dry_run(path: str, overrides: list[str], name: str) -> tuple[Config, dict[str, nn.Module]]:
    """The same, whether or not the run exists, and untrained models for teachers that are not trained yet."""
    study, row, config = open_row(path, overrides, name)
    if row.idle:
        print(row.idle)
    if not (missing := untrained(config, study)):
        return config, {}
    names = open_dataset(*config.data.test_place, classes=config.data.classes).names
    print(f"not trained yet, untrained models are used: {shortened(missing)}")
    return config, {name: build_student(row.config, names) for name, row in missing.items()}


def untrained(config: Config, study: Study) -> dict[str, Row]:
    """For each teacher of a config that is trained in place and has no weights yet, its row."""
    in_place = {last_weights(row): row for row in study.rows if row.is_teacher}
    taught_by = {teacher.name: in_place[teacher.weights] for teacher in config.teachers if teacher.weights in in_place}
    return {name: row for name, row in taught_by.items() if not Path(last_weights(row)).is_file()}
