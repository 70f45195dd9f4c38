"""The file of a search: a config, the rule of its verdict, and a section `search`.

    name: shapes_search
    data: {format: shapes, root: data/shapes, train: train, test: test}
    student: {arch: yolov8n}              # whose widths and depths vary
    epochs: 18                            # of a full training
    ...
    decide: {metric: mAP, smallest: 0.01, level: 0.95, seeds: 3}
    search: {flops: 0.25, shapes: 9, short_epochs: [2, 6]}

The score by which shapes are chosen is `decide.metric` on `data.test`. It has to be a split that the final numbers are
not from. decide.seeds: how often each method searches, with draws of its own; all trainings have the config's seed, so
that two shapes differ in nothing else. The verdict on two methods is that of a study (engine/comparison/decision.py).

With teachers and terms in the file, `search.on` chooses what the shapes learn from: the labels alone, or the teachers
as well. With both, each has its own search, and the order of the same shapes in both is compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import models
from config import Config, from_tree, read_tree
from engine.comparison.decision import DecisionRule
from engine.runtime import run_folder
from engine.training.idle_terms import without_idle_terms
from errors import UserError, expect

Teaching = Literal["labels", "distillation"]
MAX_DEPTH = 12  # deeper, synflow exceeds float64


@dataclass(frozen=True)
class SearchConfig:
    """Which shapes there are, and how many of them are trained for how long."""

    flops: float = 0.5  # no shape costs more than this share of the architecture's FLOPs
    least: float = 0.5  # nor less than this share of that limit
    widths: tuple[float, ...] = (0.25, 1.5)  # least and largest width of a stage, relative to the architecture's
    depth: int = 3  # the most bottlenecks of a stage
    shapes: int = 9  # shapes that a method trains for the first number of epochs
    short_epochs: tuple[int, ...] = (2, 6)  # epochs of the rungs before the last, which has `epochs`
    keep: int = 3  # one in `keep` shapes of a rung, the best, goes on to the next
    population: int = 4  # of evolution: as many of its shapes are drawn at random, and as many are alive
    tournament: int = 2  # of evolution: the number of shapes of which the best is the parent
    ranked: int = 12  # random shapes that are trained in full, for Kendall's tau
    ranked_again: bool = False  # train these once more, with the next seed: how far the noise of a training lets tau go
    on: tuple[Teaching, ...] = ()  # what the shapes learn from; none: the teachers, if there are any


@dataclass(frozen=True)
class SearchFile(Config):
    """The top level of the YAML file of a search."""

    decide: DecisionRule = field(default_factory=DecisionRule)
    search: SearchConfig = SearchConfig()

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs of each rung."""
        return (*self.search.short_epochs, self.epochs)

    @property
    def teachings(self) -> tuple[Teaching, ...]:
        return self.search.on or (("distillation",) if self.terms else ("labels",))

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> SearchFile:
    """The search in a YAML file, after `key=value` overrides. UserError, with the key, for every mistake in it."""
    tree = read_tree(path, list(overrides))
    if "search" not in tree:
        raise UserError(f"{path}: key 'search' is missing, expected a section with the shapes to search")
    file = from_tree(SearchFile, tree, source=str(path))
    file, idle = without_idle_terms(file)
    if idle:
        print(idle)
    file.decide.check(str(path))
    run_folder.check_name(file.name)
    check(file, str(path))
    return file


def check(file: SearchFile, source: str) -> None:
    """UserError for values that are out of range, or that a search cannot vary."""
    search, student = file.search, file.student
    models.check_arch(student.arch)
    expect(models.size_of(student.arch) is not None, f"{source}: key 'student.arch'", student.arch, "a YOLOv8")
    for key in ("weights", "inherit", "widths", "int8"):
        if getattr(student, key) is not None:
            raise UserError(f"{source}: key 'student.{key}': every shape begins fresh, expected none")
    rising = all(a < b for a, b in zip(file.rungs, file.rungs[1:])) and file.rungs[0] >= 1
    low, high = search.widths if len(search.widths) == 2 else (0.0, 0.0)
    most = search.shapes * file.decide.seeds
    for name, is_fine, expected in (
        ("flops", 0 < search.flops < math.inf, "a share above 0"),
        ("least", 0 <= search.least < 1, "a share in 0..1, below 1"),
        ("widths", 0 < low < high < math.inf, "the least and the largest factor"),
        ("depth", 1 <= search.depth <= MAX_DEPTH, f"1..{MAX_DEPTH}"),
        ("short_epochs", rising, f"rising numbers below the file's epochs, {file.epochs}"),
        ("keep", search.keep >= 2, "at least 2"),
        ("population", 1 <= search.population <= search.shapes, f"1..{search.shapes}, as many as shapes"),
        ("tournament", search.tournament >= 1, "at least 1"),
        ("ranked", 0 <= search.ranked <= most, f"0..{most}, random shapes"),
        ("on", "distillation" not in search.on or file.terms, "labels: the file has no terms"),
    ):
        expect(bool(is_fine), f"{source}: key 'search.{name}'", getattr(search, name), expected)
