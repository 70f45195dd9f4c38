"""The work of a study: its runs and condensed sets in their order, and which of them are done.

Several processes may work on one study, on one machine or on many that share the folder. What is done and what failed
is read from the disk, so each of them knows what the others did; who works on what is a matter of claims
(engine/runtime/claims.py). A run that failed leaves its reason beside its claim: the other processes do not try it
again, but a command that is given later does.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import Config, from_tree, to_tree
from engine.comparison.rows import Row, last_weights
from engine.comparison.table import Result
from engine.condensing.set_files import read_manifest
from engine.runtime import claims
from engine.runtime.run_folder import RunFolder, write_text
from engine.training.building import with_published_settings
from engine.training.inputs import KnownInputs, weights_name
from engine.training.state import first_difference
from errors import UserError, expect, shortened
from yaml_files import read_yaml


@dataclass(frozen=True)
class Work:
    """A run of a row, or the condensed set of that run.

    needs: the names of the works that it begins with: runs of teachers and networks, its set.
    """

    row: Row
    seed: int
    is_set: bool = False
    needs: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.row.set_folder(self.seed) if self.is_set else self.row.folder(self.seed)

    @property
    def name(self) -> str:
        """Of its folder in that of the study."""
        return f"sets/{self.path.name}" if self.is_set else self.path.name

    @property
    def failure(self) -> Path:
        """The file that says why it failed."""
        return self.path.parent / claims.FOLDER / f"{self.path.name}.failed"


def list_work(rows: Sequence[Row]) -> list[Work]:
    """Every row with its first seed, then with the next; each work after those it needs, a set just before its run."""
    first_runs = {row.name: Work(row, row.seeds[0]).name for row in rows}
    of_weights = {last_weights(row): first_runs[row.name] for row in rows}
    works: dict[str, Work] = {}
    for number in range(max(len(row.seeds) for row in rows)):
        for row in (row for row in rows if number < len(row.seeds)):
            seed = row.seeds[number]
            needs = [of_weights[t.weights] for t in row.config.teachers if t.weights in of_weights]
            if row.task is not None:
                network = () if row.network_row is None else (first_runs[row.network_row],)
                made = Work(row, seed, is_set=True, needs=network)
                works.setdefault(made.name, made)
                needs.append(made.name)
            run = Work(row, seed, needs=tuple(needs))
            works[run.name] = run
    return list(works.values())


def with_needs(works: Sequence[Work], names: Sequence[str]) -> list[Work]:
    """The works of these names and all that they need, in their order. UserError for a name that none has."""
    by_name = {work.name: work for work in works}
    needed, found = list(names), set()
    while needed:
        name = needed.pop()
        expect(name in by_name, "argument --run", repr(name), f"one of {shortened(by_name)}")
        found.add(name)
        needed += by_name[name].needs
    return [work for work in works if work.name in found]


class StudyProgress:
    """What is done of a study, by whatever process; `refresh` reads it from the disk.

    results: of every row, for the table. retried: works whose earlier failure counts no more.
    """

    def __init__(self, works: Sequence[Work], results: dict[str, Result], retried: Iterable[Work]) -> None:
        self.works, self.results, self.inputs = works, results, KnownInputs()
        self._by_name = {work.name: work for work in works}
        self._failed: dict[str, str] = {}
        self._forgiven = {work.name: read_failure(work) for work in retried}
        self.refresh()

    def refresh(self) -> None:
        """Read the reports and failures of all runs. A run whose teacher, network or set failed has failed.

        UserError where labels or weights changed between two runs, or between a set and a run.
        """
        self._failed = {}
        for work in self.works:
            failures = self.results[work.row.name].failures
            if work.is_set and (manifest := read_manifest(work.path)) is not None:
                self.inputs.add(work.path, manifest.get("inputs", {}))
            if not work.is_set:
                failures.pop(work.seed, None)
                if self._read_report(work):
                    continue
            if (why := self._why_failed(work)) is not None:
                self._failed[work.name] = why
                if not work.is_set:
                    failures[work.seed] = why

    def _why_failed(self, work: Work) -> str | None:
        """Why a work has failed, or one that it needs; None if none has. The works before it are judged first."""
        broken = next((self._by_name[need] for need in work.needs if need in self._failed), None)
        if broken is not None:
            return self._failed[broken.name] if broken.is_set else f"{broken.row.name} failed"
        failure = read_failure(work)
        return None if failure is None or failure == self._forgiven.get(work.name) else failure[1]

    def _read_report(self, work: Work) -> bool:
        """Read the report of a run into the results. False if the run has not finished."""
        reports, file = self.results[work.row.name].reports, RunFolder(work.path).report
        if work.seed not in reports and file.is_file():
            refuse_other(RunFolder(work.path), work.row.run(work.seed))  # it may be of another version of the study
            reports[work.seed] = json.loads(file.read_text(encoding="utf-8"))
        if work.seed in reports:
            self.inputs.add(work.path, reports[work.seed].get("inputs", {}))
        return work.seed in reports

    def is_open(self, work: Work) -> bool:
        """Whether it has neither been done nor failed, as of the last `refresh`."""
        is_done = (
            work.seed in self.results[work.row.name].reports if not work.is_set else bool(read_manifest(work.path))
        )
        return not is_done and work.name not in self._failed

    def can_begin(self, work: Work) -> bool:
        """Whether nothing that it needs is open."""
        return not any(self.is_open(other) for other in self.works if other.name in work.needs)

    def check_weights(self, works: Sequence[Work]) -> None:
        """UserError where weights are gone that finished runs learned from, or that a work is to begin with.

        works: to be done. A teacher that is trained anew has other weights than before. Its students of before and of
        later do not belong in one table, and that would show only after the first of the later ones.
        """
        for work in filter(self.is_open, works):
            own = RunFolder(work.path).last
            student = self.inputs.first(weights_name(str(own)))
            uses = {} if student is None else {own: f"{student} learned from it"}
            for need in (self._by_name[name] for name in work.needs):
                if not need.is_set and not self.is_open(need):
                    uses[RunFolder(need.path).last] = f"its run is finished and {work.name} begins with it"
            for weights, use in uses.items():
                expected = "it as it was: put it back, or remove its run and all that learned from it"
                expect(weights.is_file(), str(weights), f"no such file, but {use}", expected)


def read_failure(work: Work) -> tuple[int, str] | None:
    """When a run failed, as the file system tells it, and why; None if it did not."""
    try:
        return work.failure.stat().st_mtime_ns, work.failure.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_failure(work: Work, why: str) -> None:
    write_text(work.failure, why)


def refuse_other(folder: RunFolder, config: Config) -> None:
    """UserError if the folder holds a run of another config: its numbers do not belong in this table."""
    try:
        tree = read_yaml(folder.config)
    except UserError:
        if folder.config.is_file():
            raise
        return  # there is none, or another process begins the run anew
    found = from_tree(Config, tree, source=str(folder.config))
    key = first_difference(*(to_tree(with_published_settings(c)) for c in (found, config)))
    if key:
        raise UserError(
            f"{folder.config}: key {key!r} differs from this comparison; give another name=, or remove {folder.path}"
        )
