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

A row with a section `condense` (engine/condensing/config.py) trains on a synthetic set, which compare.py makes before:
once, for all rows and seeds that ask for the same one. What the sets share stands in a section at the top level.

    condense: {network: {row: full}}      # the trained network of methods that need one: the first run of a row above
    rows:
      full:
      random_5: {condense: {method: random, pictures: 5}, seeds: 5}                      # five draws
      learnt_5: {condense: {method: gradient_matching, pictures: 5, seed: 0}, seeds: 3}  # one set

A row changes any key of the config but FIXED; sections are merged into the shared ones, lists replace them. It carries
the teachers that its terms name and no others. Its own keys are those of RowFile; what it is compared to must train as
it does (engine/comparison/protocol.py), but for the keys that it names in `differs`. `rows.cwd.terms.0.weight=1.0`
overrides one value of a row. A file without `rows` is the four rows of `four_rows`.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
from config import Config, TeacherConfig, from_tree, read_tree, to_tree
from engine.comparison.protocol import describe_difference, differing_keys, same_teaching
from engine.condensing.config import Task, read_condense
from engine.training.teaching import EMA
from errors import UserError

FIXED = ("name", "runs", "seed", "teachers")  # one for the whole study
ROW_NAME = re.compile(r"[A-Za-z0-9_+-]+")  # names a folder, and may stand in --rows and before a dot


@dataclass(frozen=True)
class StudyFile(Config):
    """The top level of a study's YAML file."""

    rows: dict[str, Any] = field(default_factory=dict)
    condense: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowFile(Config):
    """A row as its file gives it, the shared keys filled in."""

    condense: dict[str, Any] | None = None  # what differs from the section at the top level; none: real pictures
    decoded: bool = False  # train on the pictures that the stored ones decode into
    against: tuple[str, ...] | None = None  # rows it is compared to; none given: its baseline
    differs: tuple[str, ...] = ()  # keys or sections in which it may train otherwise than those: what it is about
    seeds: int | None = None  # none given: as many as --seeds
    plus_epochs_of: tuple[str, ...] = ()  # teachers trained in place whose epochs this row trains longer


@dataclass(frozen=True)
class Row:
    """One line of the table. `config` is that of its runs, but for their names and seeds.

    baseline: the row that the cost of a step is relative to: the first one without terms that has the same student,
    else the first of the file. A row that names none to be compared to is compared to that one, or where it trains on
    a condensed set to the row of as many real pictures at random; to none where that one trains otherwise.
    """

    name: str
    config: Config
    seeds: tuple[int, ...]
    baseline: str = ""
    against: tuple[str, ...] = ()
    is_teacher: bool = False
    task: Task | None = None  # of the set it trains on
    sets: Path = Path()
    network_row: str | None = None  # whose first run its set is made with
    more_epochs: int = 0  # of its epochs, those of plus_epochs_of
    differs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # in which keys it differs from rows that it is compared to, or is not for that reason

    def run(self, seed: int) -> Config:
        config = dataclasses.replace(self.config, name=f"{self.name}_seed{seed}", seed=seed)
        if self.task is None:
            return config
        data = dataclasses.replace(config.data, train_root=str(self.set_folder(seed)))
        return dataclasses.replace(config, data=data)

    def set_folder(self, seed: int) -> Path:
        """Where the synthetic set of a run is."""
        return self.task.with_seed(seed).folder(self.sets)

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
        if unknown := [name for name in names if name not in known]:
            found = ", ".join(map(repr, unknown))
            raise UserError(f"argument --rows: found {found}, expected some of {', '.join(known)}")
        weights = {t.weights for row in self.rows if row.name in names for t in row.config.teachers}
        needed = {row.name for row in self.rows if row.is_teacher and last_weights(row) in weights}
        needed |= {row.network_row for row in self.rows if row.name in names and row.network_row is not None}
        return [row for row in self.rows if row.name in needed.union(names)]


def load_study(path: str | Path, overrides: list[str] = (), *, seeds: int = 1) -> Study:
    """The study in a YAML file, after `key=value` overrides. UserError for every mistake that the file alone shows."""
    file = from_tree(StudyFile, read_tree(path, overrides), source=str(path))
    config = Config(**{f.name: getattr(file, f.name) for f in dataclasses.fields(Config)})
    return plan(config, file.rows or four_rows(config), seeds=seeds, source=str(path), condense=file.condense)


def four_rows(config: Config) -> dict[str, Any]:
    """What a config with teachers and terms asks: is the student better for them, and better than just more epochs?

    `longer` is absent where every teacher came with weights: no time was spent on them here.
    """
    if not config.teachers or not config.terms:
        raise UserError(
            "keys 'teachers' and 'terms': found none, expected a teacher and a term to compare, or 'rows'; train.py "
            "trains a config without them, and condense.py takes one with a section 'condense'"
        )
    in_place = [teacher.name for teacher in config.teachers if is_trained_in_place(teacher)]
    rows: dict[str, Any] = {"baseline": {"terms": []}, "distilled": {}}
    if in_place:
        rows["distilled"] = {"against": ["baseline", "longer"]}
        rows["longer"] = {"terms": [], "plus_epochs_of": in_place}
    return rows


def plan(
    config: Config, rows: dict[str, Any], *, seeds: int, source: str, condense: dict[str, Any] | None = None
) -> Study:
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
        more = sum(epochs_of(teacher, in_place, where) for teacher in file.plus_epochs_of)
        row_config = dataclasses.replace(row_config, runs=alone.runs, teachers=tuple(taught), epochs=file.epochs + more)
        count = seeds if file.seeds is None else file.seeds
        if count < 1:
            raise UserError(f"{where}: key 'seeds': found {count}, expected at least 1")
        seeds_of_row = tuple(range(config.seed, config.seed + count))
        row = Row(name, row_config, seeds_of_row, more_epochs=more, differs=file.differs)
        planned[name] = (
            row if file.condense is None else condensed_row(row, file, config, condense or {}, planned, where)
        )
    used = {teacher.name for row in planned.values() for teacher in row.config.teachers}
    for index, teacher in enumerate(config.teachers):
        if teacher.name not in used:
            raise UserError(
                f"{source}: key 'teachers.{index}.name': no row has a term that names {teacher.name!r}: "
                f"it could never act"
            )
    return Study(config, tuple(find_rivals(planned, files, source)))


def sets_folder(config: Config) -> Path:
    """Where the synthetic sets of a study are, or of a config by itself."""
    return Path(config.runs) / config.name / "sets"


def task_of(config: Config, section: dict[str, Any], source: str) -> Task:
    """The set that a section `condense` asks of a config's training pictures."""
    condense = read_condense(section, source)
    return Task(config.data, config.image_size, condense.arch or config.student.arch, condense)


def condensed_row(
    row: Row, file: RowFile, config: Config, shared: dict[str, Any], planned: dict[str, Row], where: str
) -> Row:
    """The row with the task of its set, and with that set in the place of the real training pictures.

    The set is made of the shared training pictures and, but for `arch`, for the shared student, whoever trains on it.
    """
    if file.data.train_root is not None:
        raise UserError(f"{where}: key 'data.train_root': found beside 'condense', expected one of them")
    section = merge(shared, file.condense)
    task = task_of(dataclasses.replace(config, image_size=file.image_size), section, where)
    network = task.condense.network
    network_row = network.row if task.needs_network else None
    if network.row is not None:
        if network.weights is not None:
            raise UserError(f"{where}: key 'condense.network': found a row and weights, expected one of them")
        known = [name for name, other in planned.items() if other.task is None]
        if network.row not in known:
            expected = ", ".join(known) or "none is above it"
            raise UserError(
                f"{where}: key 'condense.network.row': found {network.row!r}, expected a row of real pictures above: "
                f"{expected}"
            )
        weights = last_weights(planned[network.row])
        network = dataclasses.replace(network, weights=weights, row=None)
        task = dataclasses.replace(task, condense=dataclasses.replace(task.condense, network=network))
    try:
        task.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if file.decoded and task.decoded == task.condense.pictures:
        raise UserError(
            f"{where}: key 'decoded': found true, expected a set of condense.formation with more than one tile"
        )
    data = dataclasses.replace(row.config.data, train_format="yolo", train="train_decoded" if file.decoded else "train")
    # Sampling a fraction is for the real pictures; the set is small as it is.
    row_config = dataclasses.replace(row.config, data=dataclasses.replace(data, max_samples=0))
    return dataclasses.replace(row, config=row_config, task=task, sets=sets_folder(config), network_row=network_row)


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
    own = {"weights": teacher.start_weights, "backbone_weights": teacher.backbone_weights}
    tree = to_tree(alone) | {"student": {"arch": teacher.arch, **own}}
    tree["optimizer"] = tree["optimizer"] | teacher.optimizer
    tree["epochs"] = alone.epochs if teacher.epochs is None else teacher.epochs
    config = from_tree(Config, tree, source=f"{source}: teacher {teacher.name!r}")
    return Row(f"teacher_{teacher.name}", config, (alone.seed,), is_teacher=True)


def last_weights(row: Row) -> str:
    """Where a teacher that is trained in place leaves its weights."""
    return str(row.folder(row.seeds[0]) / "weights" / "last.pt")


def epochs_of(teacher: str, in_place: dict[str, Row], where: str) -> int:
    if teacher not in in_place:
        expected = "a teacher trained in place: " + (", ".join(in_place) or "there is none")
        raise UserError(f"{where}: key 'plus_epochs_of': found {teacher!r}, expected {expected}")
    return in_place[teacher].config.epochs


def find_rivals(planned: dict[str, Row], files: dict[str, RowFile], source: str) -> list[Row]:
    """The rows with their baselines, and with the rows they are compared to.

    UserError where a row of `against` trains otherwise in a key that neither of the two names in `differs`. A teacher's
    row is another model by its nature: it is compared, and the table says in which keys it differs.
    """
    first = next(iter(files))
    found = []
    for row in planned.values():
        alike = (n for n, file in files.items() if not file.terms and file.student == row.config.student)
        baseline = next(alike, first)
        against = files[row.name].against if row.name in files else None
        is_named = against is not None
        if against is None:
            rival = random_rival(row, planned)
            rival = baseline if rival in (None, row.name) else rival
            against = () if rival == row.name else (rival,)
        compared, notes = [], []
        for name in against:
            if name not in planned or name == row.name:
                others = ", ".join(other for other in planned if other != row.name)
                raise UserError(f"{source}: row {row.name!r}: key 'against': found {name!r}, expected one of {others}")
            other = planned[name]
            is_teacher = row.is_teacher or other.is_teacher
            if unlike := [] if is_teacher else differing_keys(row, other, (*row.differs, *other.differs)):
                what = ", ".join(describe_difference(row, other, key) for key in unlike)
                if is_named:
                    raise UserError(
                        f"{source}: row {row.name!r}: key 'against': {name!r} trains otherwise: {what}; expected a row "
                        f"that trains alike, or `differs: [{', '.join(unlike)}]` where the row is about that"
                    )
                notes.append(f"{row.name} is compared to no row: {name} trains otherwise ({what})")
                continue
            compared.append(name)
            known = differing_keys(row, other)
            known += ["epochs"] * (row.config.epochs != other.config.epochs and "epochs" not in known)
            if known:
                what = ", ".join(describe_difference(row, other, key) for key in known)
                notes.append(f"{row.name} and {name} differ in {what}")
        found.append(dataclasses.replace(row, baseline=baseline, against=tuple(compared), notes=tuple(notes)))
    return found


def random_rival(row: Row, rows: dict[str, Row]) -> str | None:
    """The row that trains as this one does, but on as many real pictures at random; None where there is none."""
    return next((other.name for other in random_rows(row, rows) if trains_alike(other, row)), None)


def random_rows(row: Row, rows: dict[str, Row]) -> list[Row]:
    """The rows of as many real pictures at random as this one stores, with its terms, however they train."""
    if row.task is None:
        return []
    of_sets = (other for other in rows.values() if other.task is not None and other.task.condense.method == "random")
    pictures = row.task.condense.pictures
    return [o for o in of_sets if o.task.condense.pictures == pictures and same_teaching(o, row)]


def trains_alike(a: Row, b: Row, *, terms: bool = True) -> bool:
    """Whether the rows differ in nothing but their pictures and, with `terms` False, in what they are taught."""
    return not differing_keys(a, b) and (not terms or same_teaching(a, b))
