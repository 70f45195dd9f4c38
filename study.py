"""A study: rows of a table, each a config trained with several seeds, all read from one YAML file.

    name: losses                          # the keys of a config are the protocol that all rows share
    student: {arch: yolov8n}
    teachers:
      - {name: big, arch: yolov8s}        # without weights: trained in place, once, as a row `teacher_big`
    ...
    rows:
      baseline:
      cwd:
        terms: [{teacher: big, loss: cwd, weight: 2.0, student_maps: [p3], adapter: conv1x1}]
        against: [baseline, longer]
      longer: {plus_epochs_of: [big]}

A row changes any key of the config but FIXED; sections are merged into the shared ones, lists replace them. It carries
the teachers that its terms name and no others. Its own keys are those of RowFile. `rows.cwd.terms.0.weight=1.0`
overrides one value of a row. A file without `rows` is the four rows of `four_rows`.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
from config import Config, TeacherConfig, from_tree, read_tree, to_tree
from errors import UserError
from teaching import EMA

FIXED = ("name", "runs", "seed", "teachers")  # one for the whole study
ROW_NAME = re.compile(r"[A-Za-z0-9_+-]+")  # names a folder, and may stand in --rows and before a dot


@dataclass(frozen=True)
class StudyFile(Config):
    """The top level of a study's YAML file."""

    rows: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowFile(Config):
    """A row as its file gives it, the shared keys filled in."""

    against: tuple[str, ...] | None = None  # rows it is compared to; none given: its baseline
    seeds: int | None = None  # none given: as many as --seeds
    plus_epochs_of: tuple[str, ...] = ()  # teachers trained in place whose epochs this row trains longer


@dataclass(frozen=True)
class Row:
    """One line of the table. `config` is that of its runs, but for their names and seeds.

    baseline: the row that the cost of a step is relative to: the first one without terms that has the same student,
    else the first of the file. A row that names none to be compared to is compared to that one.
    """

    name: str
    config: Config
    seeds: tuple[int, ...]
    baseline: str = ""
    against: tuple[str, ...] = ()
    is_teacher: bool = False

    def run(self, seed: int) -> Config:
        return dataclasses.replace(self.config, name=f"{self.name}_seed{seed}", seed=seed)

    def folder(self, seed: int) -> Path:
        return Path(self.config.runs) / f"{self.name}_seed{seed}"


@dataclass(frozen=True)
class Study:
    """config: the shared protocol. rows: in the order of the table, each teacher before the first row it teaches."""

    config: Config
    rows: tuple[Row, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def with_teachers(self, names: list[str]) -> list[Row]:
        """The rows of these names, and the teachers that are trained for them, in the order of the table."""
        known = [row.name for row in self.rows]
        for name in names:
            if name not in known:
                raise UserError(f"argument --rows: found {name!r}, expected some of {', '.join(known)}")
        weights = {t.weights for row in self.rows if row.name in names for t in row.config.teachers}
        needed = {row.name for row in self.rows if row.is_teacher and last_weights(row) in weights}
        return [row for row in self.rows if row.name in needed.union(names)]


def load_study(path: str | Path, overrides: list[str] = (), *, seeds: int = 1) -> Study:
    """The study in a YAML file, after `key=value` overrides. UserError for every mistake that the file alone shows."""
    file = from_tree(StudyFile, read_tree(path, overrides), source=str(path))
    config = Config(**{f.name: getattr(file, f.name) for f in dataclasses.fields(Config)})
    return plan(config, file.rows or four_rows(config), seeds=seeds, source=str(path))


def four_rows(config: Config) -> dict[str, Any]:
    """What a config with teachers and terms asks: is the student better for them, and better than just more epochs?

    `longer` is absent where every teacher came with weights: no time was spent on them here.
    """
    if not config.teachers or not config.terms:
        raise UserError("keys 'teachers' and 'terms': found none, expected a teacher and a term to compare, or 'rows'")
    in_place = [teacher.name for teacher in config.teachers if is_trained_in_place(teacher)]
    rows: dict[str, Any] = {"baseline": {"terms": []}, "distilled": {}}
    if in_place:
        rows["distilled"] = {"against": ["baseline", "longer"]}
        rows["longer"] = {"terms": [], "plus_epochs_of": in_place}
    return rows


def plan(config: Config, rows: dict[str, Any], *, seeds: int, source: str) -> Study:
    """Every row with its config, its teachers' weights named where they will be once they are trained."""
    teachers = {teacher.name: teacher for teacher in config.teachers}
    if len(teachers) != len(config.teachers):
        raise UserError(f"{source}: key 'teachers': two have the same name")
    for index, teacher in enumerate(config.teachers):
        if teacher.start_weights is not None and not is_trained_in_place(teacher):
            raise UserError(f"{source}: key 'teachers.{index}.start_weights': {teacher.name!r} is not trained in place")
    alone = dataclasses.replace(config, runs=str(Path(config.runs) / config.name), teachers=(), terms=())
    in_place = {t.name: teacher_row(alone, t, source) for t in config.teachers if is_trained_in_place(t)}
    planned: dict[str, Row] = {}
    files: dict[str, RowFile] = {}
    for name, overrides in rows.items():
        where = f"{source}: row {name!r}"
        if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
            raise UserError(f"{where}: expected a name of letters, digits, _, + and -")
        if name in {row.name for row in in_place.values()}:
            raise UserError(f"{where}: is the name of the row of a teacher, expected another")
        files[name] = file = read_row(config, overrides, where)
        row_config = Config(**{f.name: getattr(file, f.name) for f in dataclasses.fields(Config)})
        taught = []
        for index, term in enumerate(file.terms):
            if term.teacher not in teachers:
                expected = ", ".join(teachers) or "no teacher: there are none"
                raise UserError(f"{where}: key 'terms.{index}.teacher': found {term.teacher!r}, expected {expected}")
        for teacher in config.teachers:
            if teacher.name not in {term.teacher for term in file.terms}:
                continue
            if teacher.name in in_place:
                row = in_place[teacher.name]
                planned.setdefault(row.name, row)
                teacher = dataclasses.replace(teacher, weights=last_weights(row))
            taught.append(teacher)
        epochs = file.epochs + sum(more_epochs(teacher, in_place, where) for teacher in file.plus_epochs_of)
        row_config = dataclasses.replace(row_config, runs=alone.runs, teachers=tuple(taught), epochs=epochs)
        count = seeds if file.seeds is None else file.seeds
        if count < 1:
            raise UserError(f"{where}: key 'seeds': found {count}, expected at least 1")
        planned[name] = Row(name, row_config, tuple(range(config.seed, config.seed + count)))
    used = {teacher.name for row in planned.values() for teacher in row.config.teachers}
    for index, teacher in enumerate(config.teachers):
        if teacher.name not in used:
            raise UserError(
                f"{source}: key 'teachers.{index}.name': no row has a term that names {teacher.name!r}: "
                f"it could never act"
            )
    return Study(config, tuple(find_rivals(planned, files, source)))


def read_row(config: Config, overrides: Any, where: str) -> RowFile:
    """A row of the file merged into the shared config, every key known and every type checked."""
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, dict):
        raise UserError(f"{where}: found {overrides!r}, expected keys and values")
    for key in FIXED:
        if key in overrides:
            raise UserError(f"{where}: key {key!r} is one for all rows, expected it at the top level only")
    return from_tree(RowFile, merge(to_tree(config), overrides), source=where)


def merge(tree: dict, overrides: dict) -> dict:
    """`tree` with the values of `overrides`; dicts are merged, everything else is replaced."""
    merged = dict(tree)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def is_trained_in_place(teacher: TeacherConfig) -> bool:
    """A detector without weights. The student's own average needs none; what only teaches is not trained here."""
    return teacher.weights is None and teacher.arch != EMA and teacher.arch not in models.TEACHERS


def teacher_row(alone: Config, teacher: TeacherConfig, source: str) -> Row:
    """The row that trains a teacher: the shared protocol with its own model, epochs and rates, and one seed."""
    start = teacher.start_weights
    own = {"weights": start, "new_head": start is not None, "backbone_weights": teacher.backbone_weights}
    tree = to_tree(alone) | {"student": {"arch": teacher.arch, **own}}
    tree["optimizer"] = tree["optimizer"] | teacher.optimizer
    tree["epochs"] = alone.epochs if teacher.epochs is None else teacher.epochs
    config = from_tree(Config, tree, source=f"{source}: teacher {teacher.name!r}")
    return Row(f"teacher_{teacher.name}", config, (alone.seed,), is_teacher=True)


def last_weights(row: Row) -> str:
    """Where a teacher that is trained in place leaves its weights."""
    return str(row.folder(row.seeds[0]) / "weights" / "last.pt")


def more_epochs(teacher: str, in_place: dict[str, Row], where: str) -> int:
    if teacher not in in_place:
        expected = "a teacher trained in place: " + (", ".join(in_place) or "there is none")
        raise UserError(f"{where}: key 'plus_epochs_of': found {teacher!r}, expected {expected}")
    return in_place[teacher].config.epochs


def find_rivals(planned: dict[str, Row], files: dict[str, RowFile], source: str) -> list[Row]:
    """The rows with their baselines, and with the rows they are compared to."""
    first = next(iter(files))
    found = []
    for row in planned.values():
        alike = (n for n, file in files.items() if not file.terms and file.student == row.config.student)
        baseline = next(alike, first)
        against = files[row.name].against if row.name in files else None
        if against is None:
            against = () if baseline == row.name else (baseline,)
        for name in against:
            if name not in planned or name == row.name:
                others = ", ".join(other for other in planned if other != row.name)
                raise UserError(f"{source}: row {row.name!r}: key 'against': found {name!r}, expected one of {others}")
        found.append(dataclasses.replace(row, baseline=baseline, against=against))
    return found
