"""A study: the rows of a table, each a config trained with several seeds, read from one YAML file.

    name: losses                          # the keys of a config: the protocol that all rows share
    student: {arch: yolov8n}
    teachers:
      - {name: big, arch: yolov8s}        # without weights: trained once, as the row `teacher_big`
    ...
    rows:
      baseline:
      cwd:
        terms: [{teacher: big, loss: cwd, weight: 2.0, student_maps: [p3], adapter: conv1x1}]
        against: [baseline, longer]
      longer: {compute_of: cwd}           # alone, for as much compute as cwd has with its teacher

A row with a section `condense` (engine/condensing/config.py) trains on a synthetic set. compare.py makes each set once,
before the first run that needs it. A section `condense` at the top level holds what the sets share.

    condense: {network: {row: full}}      # for methods that need a trained network: the first run of a row above
    rows:
      full:
      random_5: {condense: {method: random, pictures: 5}, seeds: 5}                      # five draws
      learnt_5: {condense: {method: gradient_matching, pictures: 5, seed: 0}, seeds: 3}  # one set

A row may change every key of the config except FIXED: sections are merged, lists are replaced. It has the teachers that
its terms, its pseudo boxes and its student.inherit name, and no others. A term of weight 0 is left out, with a note
under the table. RowFile lists the keys that only a row has. A row and the rows it is compared to must train alike
(engine/comparison/rows.py), except in the keys that it names in `differs`. `rows.cwd.terms.0.weight=1.0` overrides
one value of a row. A file without `rows` has the rows of `four_rows`. A section `decide` holds the rule of the verdicts
(engine/comparison/decision.py).
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
from config import STUDENT, Config, TeacherConfig, from_tree, only_config, read_tree, to_tree
from engine.comparison.decision import DEFAULT_RULE, DecisionRule, rule_origin
from engine.comparison.rows import (
    Row,
    describe_differences,
    differing_keys,
    equal_compute_epochs,
    find_random_row,
    last_weights,
)
from engine.condensing.config import Task, read_condense
from engine.training.idle_terms import is_idle, without_idle_terms
from engine.training.teaching import EMA, used_teachers
from errors import UserError, expect, naming, shortened

FIXED = ("name", "runs", "seed", "teachers")  # one for the whole study
IN_PLACE = ("epochs", "start_weights", "backbone_weights", "optimizer", "data")  # of a teacher that the study trains
ROW_NAME = re.compile(r"[A-Za-z0-9_+-]+")  # a folder name that is valid in --rows and before a dot


@dataclass(frozen=True)
class StudyFile(Config):
    """The top level of a study's YAML file."""

    rows: dict[str, Any] = field(default_factory=dict)
    condense: dict[str, Any] = field(default_factory=dict)
    decide: DecisionRule | None = None


@dataclass(frozen=True)
class RowFile(Config):
    """A row of the file, with the shared keys filled in."""

    condense: dict[str, Any] | None = None  # merged into the section at the top level; None: real pictures
    decoded: bool = False  # train on the decoded pictures, not the stored ones
    against: tuple[str, ...] | None = None  # rows it is compared to; None: its baseline
    differs: tuple[str, ...] = ()  # keys or sections in which it may train differently from those
    seeds: int | None = None  # None: as many as --seeds
    compute_of: str | None = None  # a row above: train for as many FLOPs as it and its teachers (replaces epochs)


@dataclass(frozen=True)
class Study:
    """config: the shared protocol. rows: in the order of the table; a teacher comes before the first row it teaches.

    rule: of the verdicts. rule_origin: where it stands, and since when.
    """

    config: Config
    rows: tuple[Row, ...]
    rule: DecisionRule = DEFAULT_RULE
    rule_origin: str = "the default"

    @property
    def folder(self) -> Path:
        return study_folder(self.config)

    def with_teachers(self, names: list[str]) -> list[Row]:
        """The rows of these names and the teachers trained for them, in the order of the table."""
        all_names = [row.name for row in self.rows]
        if unknown := [name for name in names if name not in all_names]:
            found = ", ".join(map(repr, unknown))
            raise UserError(f"argument --rows: found {found}, expected some of {', '.join(all_names)}")
        weights = {t.weights for row in self.rows if row.name in names for t in row.config.teachers}
        needed = {row.name for row in self.rows if row.is_teacher and last_weights(row) in weights}
        needed |= {row.network_row for row in self.rows if row.name in names and row.network_row is not None}
        return [row for row in self.rows if row.name in needed.union(names)]


def load_study(path: str | Path, overrides: Sequence[str] = (), *, seeds: int | None = None) -> Study:
    """The study in a YAML file, after `key=value` overrides. UserError for every mistake in the file.

    seeds: of the rows that have no number of their own; None: those of the rule in the file, or one.
    """
    file = from_tree(StudyFile, read_tree(path, list(overrides)), source=str(path))
    config = only_config(file)
    if seeds is None:
        seeds = file.decide.seeds if file.decide is not None else 1
    study = build_study(config, file.rows or four_rows(config), seeds=seeds, source=str(path), condense=file.condense)
    if file.decide is None:
        return study
    file.decide.check(str(path))
    return dataclasses.replace(study, rule=file.decide, rule_origin=rule_origin(path, overrides))


def four_rows(config: Config) -> dict[str, Any]:
    """The rows of a config with teachers and terms: does distillation help, and more than as much compute would?"""
    if not (config.terms or config.pseudo_boxes):
        raise UserError(
            "keys 'teachers' and 'terms': found none, expected a teacher and a term to compare, or 'rows'; train.py "
            "trains a config without them, and condense.py takes one with a section 'condense'"
        )
    alone: dict[str, Any] = {"terms": []}
    if config.data.unlabelled is not None:
        alone["data"] = {"unlabelled": None}
    if not config.teachers:  # the student teaches itself: a row of equal compute would be the baseline again
        return {"baseline": alone, "distilled": {}}
    distilled = {"against": ["baseline", "longer"]}
    return {"baseline": alone, "distilled": distilled, "longer": alone | {"compute_of": "distilled"}}


def build_study(
    config: Config, rows: dict[str, Any], *, seeds: int, source: str, condense: dict[str, Any] | None = None
) -> Study:
    """The study with the config of every row; teachers that are not trained yet get the path of their later weights."""
    check_teachers_of_study(config.teachers, source)
    in_place = {t.name: teacher_row(config, t, source) for t in config.teachers if is_trained_in_place(t)}
    planned: dict[str, Row] = {}
    files: dict[str, RowFile] = {}
    idle_teachers: set[str] = set()
    for name, overrides in rows.items():
        where = f"{source}: row {name!r}"
        if name in {row.name for row in in_place.values()}:
            raise UserError(f"{where}: is the name of the row of a teacher, expected another")
        file = read_row(config, name, overrides, where)
        idle_teachers |= {term.teacher for term in file.terms if is_idle(term)}
        with naming(where):
            file, idle = without_idle_terms(file)
        own_teachers = [teacher for teacher in config.teachers if teacher.name in used_teachers(file)]
        planned |= {row.name: row for t in own_teachers if (row := in_place.get(t.name)) is not None}
        taught_by = tuple(with_later_weights(teacher, in_place) for teacher in own_teachers)
        row_config = dataclasses.replace(only_config(file), runs=str(study_folder(config)), teachers=taught_by)
        own_seeds = seeds_of_row(file, config.seed, seeds, where)
        row = Row(name, row_config, own_seeds, differs=file.differs, compute_of=file.compute_of, idle=idle)
        if file.condense is not None:
            row = condensed_row(row, file, config, condense or {}, planned, where)
        if file.compute_of is not None:
            row = with_equal_compute(row, planned, where)
        files[name], planned[name] = file, row
    check_each_teaches(config.teachers, planned, idle_teachers, source)
    return Study(config, tuple(with_comparisons(row, planned, files, source) for row in planned.values()))


def study_folder(config: Config) -> Path:
    """The folder of the runs, sets and tables of a study, or of the sets of a single config."""
    return Path(config.runs) / config.name


def with_later_weights(teacher: TeacherConfig, in_place: dict[str, Row]) -> TeacherConfig:
    """The teacher, and if a row trains it in place, with the weights that this row will write."""
    if teacher.name not in in_place:
        return teacher
    return dataclasses.replace(teacher, weights=last_weights(in_place[teacher.name]))


def seeds_of_row(file: RowFile, first: int, seeds: int, where: str) -> tuple[int, ...]:
    """The seeds of a row, from `first` on: as many as it asks for itself, else `seeds`."""
    count = seeds if file.seeds is None else file.seeds
    expect(count >= 1, f"{where}: key 'seeds'", count, "at least 1")
    return tuple(range(first, first + count))


def sets_folder(config: Config) -> Path:
    """The folder of the synthetic sets of a study or of a single config."""
    return study_folder(config) / "sets"


def task_of(config: Config, section: dict[str, Any], source: str) -> Task:
    """The task of making the set that a section `condense` describes from a config's training pictures."""
    condense = read_condense(section, source)
    return Task(config.data, config.image_size, condense.arch or config.student.arch, condense)


def condensed_row(
    row: Row, file: RowFile, config: Config, shared: dict[str, Any], planned: dict[str, Row], where: str
) -> Row:
    """The row with the task of its set, which replaces the real training pictures.

    The set is made from the shared training pictures and for the shared student (or `arch`), not for the row's own.
    """
    expect(file.data.train_root is None, f"{where}: key 'data.train_root'", "beside 'condense'", "one of them")
    section = merge(shared, file.condense or {})
    task = task_of(dataclasses.replace(config, image_size=file.image_size), section, where)
    network_row = task.condense.network.row if task.needs_network else None
    task = with_network_of_row(task, planned, where)
    with naming(where):
        task.check()
    is_met = not file.decoded or task.decoded > task.condense.pictures
    expect(is_met, f"{where}: key 'decoded'", "true", "a set of condense.formation with more than one tile")
    data = dataclasses.replace(row.config.data, train_format="yolo", train="train_decoded" if file.decoded else "train")
    # max_samples is meant for the real pictures; the set is small already.
    row_config = dataclasses.replace(row.config, data=dataclasses.replace(data, max_samples=0))
    return dataclasses.replace(row, config=row_config, task=task, sets=sets_folder(config), network_row=network_row)


def with_network_of_row(task: Task, planned: dict[str, Row], where: str) -> Task:
    """The task, and if a row trains its network, with the weights that this row will write."""
    network = task.condense.network
    if network.row is None:
        return task
    expect(network.weights is None, f"{where}: key 'condense.network'", "a row and weights", "one of them")
    real_rows = [name for name, row in planned.items() if row.task is None]
    expected = "a row of real pictures above: " + (", ".join(real_rows) or "none is above it")
    expect(network.row in real_rows, f"{where}: key 'condense.network.row'", repr(network.row), expected)
    network = dataclasses.replace(network, weights=last_weights(planned[network.row]), row=None)
    return dataclasses.replace(task, condense=dataclasses.replace(task.condense, network=network))


def read_row(config: Config, name: Any, overrides: Any, where: str) -> RowFile:
    """A row of the file merged into the shared config. UserError for a mistake in its name or in one of its keys."""
    if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
        raise UserError(f"{where}: expected a name of letters, digits, _, + and -")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, dict):
        raise UserError(f"{where}: found {overrides!r}, expected keys and values")
    for key in FIXED:
        if key in overrides:
            raise UserError(f"{where}: key {key!r} is the same for all rows, expected it at the top level only")
    file = from_tree(RowFile, merge(to_tree(config), overrides), source=where)
    is_met = file.compute_of is None or "epochs" not in overrides
    expect(is_met, f"{where}: key 'epochs'", "beside 'compute_of', which sets it", "one of them")
    check_teachers_of_row(file, tuple(teacher.name for teacher in config.teachers), where)
    return file


def check_teachers_of_study(teachers: Sequence[TeacherConfig], source: str) -> None:
    """UserError for two teachers of one name, and for keys about training in place of one that is not trained so."""
    if len({teacher.name for teacher in teachers}) != len(teachers):
        raise UserError(f"{source}: key 'teachers': two have the same name")
    for index, teacher in enumerate(teachers):
        given = next((key for key in IN_PLACE if getattr(teacher, key)), None)
        if given is not None and not is_trained_in_place(teacher):
            raise UserError(f"{source}: key 'teachers.{index}.{given}': {teacher.name!r} is not trained in place")


def check_each_teaches(teachers: Sequence[TeacherConfig], planned: dict[str, Row], idle: set[str], source: str) -> None:
    """UserError for a teacher that no row has, except for `idle`, those of terms of weight 0."""
    used = {teacher.name for row in planned.values() for teacher in row.config.teachers}
    for index, teacher in enumerate(teachers):
        if teacher.name not in used | idle:
            raise UserError(
                f"{source}: key 'teachers.{index}.name': no row has a term or pseudo boxes of "
                f"{teacher.name!r}: it could never act"
            )


def check_teachers_of_row(file: RowFile, teachers: tuple[str, ...], where: str) -> None:
    """UserError for a teacher of a term or of pseudo boxes that the study lacks. teachers: their names."""
    expected = ", ".join(teachers) or "no teacher: there are none"
    named = {f"terms.{index}.teacher": term.teacher for index, term in enumerate(file.terms)}
    if (pseudo := file.pseudo_boxes) is not None:
        named["data.unlabelled.pseudo.teacher"] = pseudo.teacher
    for key, name in named.items():
        expect(name in (*teachers, STUDENT), f"{where}: key {key!r}", repr(name), expected)


def merge(tree: dict, overrides: dict) -> dict:
    """`tree` with the values of `overrides`; dicts are merged, everything else is replaced."""
    merged = dict(tree)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def is_taught(config: Config) -> bool:
    """Whether a teacher teaches by terms or by pseudo boxes."""
    return bool(config.terms) or config.pseudo_boxes is not None


def is_trained_in_place(teacher: TeacherConfig) -> bool:
    """Whether a teacher is a detector without weights; the EMA needs none, and teacher-only models are not trained."""
    return teacher.weights is None and teacher.arch != EMA and teacher.arch not in models.TEACHERS


def teacher_row(config: Config, teacher: TeacherConfig, source: str) -> Row:
    """The row that trains a teacher: the shared protocol with its own model, epochs and optimizer, and one seed.

    It learns from the labelled pictures alone; those of its key `data` may be others. The shared threshold of
    suppression is none for a teacher without it.
    """
    tree = to_tree(dataclasses.replace(config, runs=str(study_folder(config)), teachers=(), terms=()))
    own = {"weights": teacher.start_weights, "backbone_weights": teacher.backbone_weights}
    tree["student"] = {"arch": teacher.arch, **own}
    tree["optimizer"] |= teacher.optimizer
    tree["data"] |= {"unlabelled": None} | teacher.data
    if not models.suppresses(teacher.arch):
        tree["evaluation"]["iou_threshold"] = None
    tree["epochs"] = config.epochs if teacher.epochs is None else teacher.epochs
    own_config = from_tree(Config, tree, source=f"{source}: teacher {teacher.name!r}")
    return Row(f"teacher_{teacher.name}", own_config, (config.seed,), is_teacher=True)


def with_equal_compute(row: Row, planned: dict[str, Row], where: str) -> Row:
    """The row with the epochs that cost as much as those of the row `compute_of` with its teachers."""
    others = [name for name, other in planned.items() if not other.is_teacher and other.compute_of is None]
    if row.compute_of not in others:
        expected = "a row above: " + (shortened(others) or "there is none")
        raise UserError(f"{where}: key 'compute_of': found {row.compute_of!r}, expected {expected}")
    other = planned[row.compute_of]
    weights = {teacher.weights for teacher in other.config.teachers}
    teachers = [r for r in planned.values() if r.is_teacher and last_weights(r) in weights]
    epochs = equal_compute_epochs(row, other, teachers)
    return dataclasses.replace(row, config=dataclasses.replace(row.config, epochs=epochs))


def with_comparisons(row: Row, planned: dict[str, Row], files: dict[str, RowFile], source: str) -> Row:
    """The row with its baseline, and the rows it is compared to.

    UserError if it names a row in `against` that trains differently in a key that neither of the two names in
    `differs`. If it names none, it is then compared to no row, and a note says so.
    """
    untaught = (name for name, file in files.items() if not is_taught(file) and file.student == row.config.student)
    baseline = next(untaught, next(iter(files)))
    named = files[row.name].against if row.name in files else None
    where = f"{source}: row {row.name!r}: key 'against'"
    others = [name for name in planned if name != row.name]
    against: list[str] = []
    notes = [f"{row.name}: {row.idle}"] if row.idle else []
    for name in default_against(row, planned, baseline) if named is None else named:
        expect(name in others, where, repr(name), f"one of {shortened(others)}")
        other = planned[name]
        if refused := refused_keys(row, other):
            what = describe_differences(row, other, refused)
            if named is not None:
                raise UserError(
                    f"{where}: {name!r} trains differently: {what}; expected a row that trains alike, or `differs: "
                    f"[{', '.join(refused)}]` if that is what the row compares"
                )
            notes.append(f"{row.name} is compared to no row: {name} trains differently ({what})")
            continue
        against.append(name)
    return dataclasses.replace(row, baseline=baseline, against=tuple(against), notes=tuple(notes))


def default_against(row: Row, planned: dict[str, Row], baseline: str) -> tuple[str, ...]:
    """The row that one without `against` is compared to: as many random real pictures, else its baseline."""
    other = find_random_row(row, planned)
    if other is None or other == row.name:
        other = baseline
    return () if other == row.name else (other,)


def refused_keys(row: Row, other: Row) -> list[str]:
    """The keys in which two rows may not differ, but do. A teacher is always another model: its row is compared."""
    if row.is_teacher or other.is_teacher:
        return []
    return differing_keys(row, other, (*row.differs, *other.differs))
