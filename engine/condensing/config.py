"""What a synthetic set is made of: the `condense` section of a config, and the Task that one set follows from.

    condense: {method: random, pictures: 5}                  python condense.py CONFIG

A study (engine/comparison/study.py) has the section at its top level for what its sets share, and in the rows that
train on one.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from config import AugmentConfig, DataConfig, from_tree, to_tree
from distill.condense.gradient_distance import DISTANCES
from distill.condense.gradient_matching import MatchingSettings
from errors import UserError

METHODS = {
    "random": "real pictures at random",
    "uniform": "real pictures with about as many objects of each class",
    "herding": "real pictures whose features have the mean of all",
    "k_center": "real pictures near to which all others are",
    "highest_loss": "real pictures that a trained network finds hardest",
    "most_objects": "real pictures with the most objects",
    "crops": "mosaics of crops around real objects",
    "mosaic": "several real pictures in each stored one",
    "gradient_matching": "pixels learnt: their gradient is that of real pictures, early in training",
}
MEASURED = ("herding", "k_center", "highest_loss")  # by a trained network
WITHOUT_DRAWS = (*MEASURED, "most_objects")  # the same pictures whatever the seed
RULES = ("random", "uniform", *WITHOUT_DRAWS)  # by which real pictures are chosen
SIAMESE = AugmentConfig(mosaic=0.0, flip_vertical=0.5, close_mosaic_epochs=0)


@dataclass(frozen=True)
class NetworkConfig:
    """A trained detector of the same classes: a checkpoint of ours, or a public file and its architecture.

    row: in a study, the row whose first run it is; a row above, in the place of `weights`.
    """

    weights: str | None = None
    arch: str | None = None
    row: str | None = None


@dataclass(frozen=True)
class CondenseConfig:
    """One synthetic set. Sections that its method has no use for change nothing."""

    method: Literal[tuple(METHODS)]  # a key of METHODS
    pictures: int  # how many are stored
    seed: int | None = None  # None: the config's, in a study each run's own
    formation: tuple[int, ...] = (1, 1)  # r, c: a stored picture is r rows and c columns of real ones
    init: Literal["noise", "real", "crops"] = "real"  # of learnt pixels; where labels come from
    layouts: Literal[RULES] = "random"  # which real pictures: of noise, real and mosaic
    crops: int = 2  # a mosaic of crops has this many a side
    network: NetworkConfig = NetworkConfig()  # that measures real pictures, for methods that need one
    arch: str | None = None  # of the networks whose gradients are looked at; None: the student's
    real_batch: int = 16  # real pictures of a matching step
    augment: AugmentConfig = SIAMESE  # of a learning step, the same for all its pictures
    matching: MatchingSettings = field(default_factory=MatchingSettings)  # how pixels are learnt
    save_every_steps: int = 50  # of learning: what a stop without warning may lose
    picture_every_steps: int = 100  # of learning: a picture of the state, to look at


def read_condense(tree: Any, source: str) -> CondenseConfig:
    """The section as its file gives it; keys of `augment` that it leaves out are those of SIAMESE."""
    if isinstance(tree, dict) and isinstance(tree.get("augment"), dict):
        tree = tree | {"augment": to_tree(SIAMESE) | tree["augment"]}
    return from_tree(CondenseConfig, tree, source=source, key="condense")


@dataclass(frozen=True)
class Task:
    """One set: everything that its pixels follow from. `arch` is that of the networks to match."""

    data: DataConfig
    image_size: int
    arch: str
    condense: CondenseConfig

    def with_seed(self, seed: int) -> "Task":
        """The task of a run with this seed; the set's own seed stays."""
        if self.condense.seed is not None:
            return self
        return dataclasses.replace(self, condense=dataclasses.replace(self.condense, seed=seed))

    @property
    def seed(self) -> int:
        return self.condense.seed or 0

    @property
    def decoded(self) -> int:
        """Pictures that the stored ones decode into."""
        return self.condense.pictures * math.prod(self.condense.formation)

    @property
    def rule(self) -> str | None:
        """One of RULES; None for a set that is put together of crops."""
        c = self.condense
        if c.method in RULES:
            return c.method
        return c.layouts if self.has_layouts else None

    @property
    def needs_network(self) -> bool:
        return self.rule in MEASURED

    @property
    def is_learnt(self) -> bool:
        """Whether the pixels are learnt, by gradient matching, and not those of real pictures."""
        return self.condense.method == "gradient_matching"

    @property
    def has_layouts(self) -> bool:
        c = self.condense
        return c.method == "mosaic" or (self.is_learnt and c.init in ("noise", "real"))

    def settings(self) -> dict[str, Any]:
        """The part of the config that this set depends on, as plain values: equal settings give equal pixels."""
        c, is_learnt = self.condense, self.is_learnt
        tree: dict[str, Any] = {"image_size": self.image_size, "method": c.method, "pictures": c.pictures}
        data = to_tree(self.data)
        tree["data"] = {key: data[key] for key in ("format", "train")} | {"max_samples": max(0, data["max_samples"])}
        if data["classes"]:
            tree["data"]["classes"] = data["classes"]
        if is_learnt or self.rule not in WITHOUT_DRAWS:
            tree["seed"] = self.seed
        if is_learnt or c.method == "mosaic":
            tree["formation"] = list(c.formation)
        if is_learnt:
            tree |= {"init": c.init, "augment": to_tree(c.augment)}
        if self.has_layouts:
            tree["layouts"] = c.layouts
        if c.method == "crops" or (is_learnt and c.init == "crops"):
            tree["crops"] = c.crops
        if self.needs_network:
            tree["network"] = to_tree(c.network)
        if is_learnt:
            tree |= {"arch": self.arch, "real_batch": c.real_batch, "matching": to_tree(c.matching)}
        return tree

    @property
    def name(self) -> str:
        """Of its folder: method, pictures, seed, and a hash of all settings."""
        settings = self.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        seed = f"_seed{settings['seed']}" if "seed" in settings else ""
        return f"{self.condense.method}_{self.condense.pictures}{seed}_{digest}"

    def folder(self, sets: str | Path) -> Path:
        return Path(sets) / self.name

    def check(self) -> None:
        """UserError for every mistake that the settings alone show."""
        c, key = self.condense, "key 'condense"
        if c.pictures < 1:
            raise UserError(f"{key}.pictures': found {c.pictures}, expected at least 1")
        found = f"{key}.formation': found {list(c.formation)}, expected"
        if len(c.formation) != 2 or not all(1 <= side <= self.image_size for side in c.formation):
            raise UserError(f"{found} [rows, columns], each 1 to {self.image_size}")
        tiles = math.prod(c.formation)
        if c.method == "mosaic" and tiles == 1:
            raise UserError(f"{found} more than one tile: a mosaic of one picture is random")
        if tiles > 1 and not self.is_learnt and c.method != "mosaic":
            raise UserError(f"{found} [1, 1]: {c.method} stores pictures as they are")
        if c.crops < 1 or self.image_size % c.crops:
            raise UserError(f"{key}.crops': found {c.crops}, expected a divisor of {self.image_size} pixels")
        if self.needs_network and c.network.weights is None:
            raise UserError(f"{key}.network': {c.method} measures by a trained network, expected {{weights: FILE}}")
        if c.real_batch < 1:
            raise UserError(f"{key}.real_batch': found {c.real_batch}, expected at least 1")
        for name in ("save_every_steps", "picture_every_steps"):
            if getattr(c, name) < 0:
                raise UserError(f"{key}.{name}': found {getattr(c, name)}, expected a number, or 0 for never")
        if c.matching.seed:
            found = f"{key}.matching.seed': found {c.matching.seed}"
            raise UserError(f"{found}, expected none: condense.seed is of the whole set")
        if c.matching.steps < 0:
            raise UserError(f"{key}.matching.steps': found {c.matching.steps}, expected a number, or 0 for none")
        if c.matching.distance not in DISTANCES:
            found = f"{key}.matching.distance': found {c.matching.distance!r}"
            raise UserError(f"{found}, expected one of {', '.join(DISTANCES)}")

    def check_source(self, count: int) -> None:
        """UserError where the source has too few pictures: each is used once, in one stored picture."""
        if self.decoded > count:
            found = f"found {self.condense.pictures}"
            if self.decoded > self.condense.pictures:
                found += f", {' x '.join(map(str, self.condense.formation))} real ones each"
            place = f"{self.data.train_root or self.data.root} {self.data.train}"
            raise UserError(f"key 'condense.pictures': {found}, expected as many as {place} has: {count}")
