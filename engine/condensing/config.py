"""The `condense` section of a config, and the Task: everything that determines one synthetic set.

    condense: {method: random, pictures: 5}                  python condense.py CONFIG

In a study (engine/comparison/study.py), the section at the top level holds what its sets share; a row that trains on a
set has a section of its own.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from config import AugmentConfig, DataConfig, check_image_size, from_tree, to_tree
from distill.condense.gradient_distance import DISTANCES
from distill.condense.gradient_matching import MatchingSettings
from distill.condense.head_matching import CURVATURE, HeadSettings
from distill.condense.head_matching import DISTANCES as HEAD_DISTANCES
from errors import UserError, expect

Rule = Literal[  # how real pictures are chosen
    "random",  # at random
    "in_turn",  # one with an object of each class in turn, at random
    "uniform",  # with about as many objects of each class
    "herding",  # so that the mean of their features is the mean over all pictures
    "k_center",  # so that every other picture is near one of them, by features
    "region_cover",  # so that objects of each class are similar to those of a chosen one, by features
    "highest_loss",  # with the highest loss of a trained network
    "most_objects",  # with the most objects
    "head_gradient",  # whose gradients move a linear head on a frozen network towards that of all pictures
]
Method = Literal[
    Rule,
    "crops",  # mosaics of crops around real objects
    "mosaic",  # several real pictures in each stored one
    "gradient_matching",  # learnt pixels, whose gradient matches that of real pictures early in training
    "linear_head",  # learnt pixels that train a linear head on a frozen network as all real pictures do
]
RULES: tuple[Rule, ...] = get_args(Rule)
LEARNT = ("gradient_matching", "linear_head")  # methods whose pixels are learnt
MEASURED = ("herding", "k_center", "region_cover", "highest_loss", "head_gradient")  # rules that need a trained network
WITHOUT_DRAWS = (*MEASURED, "most_objects")  # rules whose result does not depend on the seed
SIAMESE = AugmentConfig(mosaic=0.0, flip_vertical=0.5, close_mosaic_epochs=0)


@dataclass(frozen=True)
class NetworkConfig:
    """A trained detector: a checkpoint of ours, or a released file and its architecture. For highest_loss its classes
    are those of the dataset.

    row: in a study, a row above whose first run is used instead of `weights`.
    """

    weights: str | None = None
    arch: str | None = None
    row: str | None = None


@dataclass(frozen=True)
class CondenseConfig:
    """The section `condense`: one synthetic set. Keys that its method does not use have no effect."""

    method: Method  # how its pictures are made
    pictures: int  # number of stored pictures
    seed: int | None = None  # None: the config's; in a study, the seed of each run
    formation: tuple[int, ...] = (1, 1)  # r, c: a stored picture holds r rows and c columns of real ones
    init: Literal["noise", "real", "crops"] = "real"  # start of learnt pixels, and source of the labels
    layouts: Rule = "random"  # which real pictures: for init noise and real, and for mosaic
    crops: int = 2  # crops along each side of a mosaic of crops
    network: NetworkConfig = NetworkConfig()  # for rules that need a trained network, and for linear_head
    arch: str | None = None  # of the networks whose gradients are matched; None: the student's
    real_batch: int = 16  # real pictures per matching step
    augment: AugmentConfig = SIAMESE  # of a matching step, the same for all its pictures
    matching: MatchingSettings = field(default_factory=MatchingSettings)  # how gradient_matching learns pixels
    head: HeadSettings = field(default_factory=HeadSettings)  # how linear_head learns pixels
    save_every_steps: int = 50  # steps between two saves: what a killed process may lose; 0: never
    picture_every_steps: int = 100  # steps between two pictures of the state in steps/; 0: never


def read_condense(tree: Any, source: str) -> CondenseConfig:
    """The section of a file; keys that it leaves out of `augment` are taken from SIAMESE."""
    if isinstance(tree, dict) and isinstance(tree.get("augment"), dict):
        tree = tree | {"augment": to_tree(SIAMESE) | tree["augment"]}
    return from_tree(CondenseConfig, tree, source=source, key="condense")


@dataclass(frozen=True)
class Task:
    """Everything that determines the pixels of one set. arch: of the networks whose gradients are matched."""

    data: DataConfig
    image_size: int
    arch: str
    condense: CondenseConfig

    def with_seed(self, seed: int) -> "Task":
        """The task with this seed, unless the set has a seed of its own."""
        if self.condense.seed is not None:
            return self
        return dataclasses.replace(self, condense=dataclasses.replace(self.condense, seed=seed))

    @property
    def seed(self) -> int:
        return self.condense.seed or 0

    @property
    def formation(self) -> tuple[int, int]:
        """Rows and columns of real pictures in a stored one; `check` has made sure that there are two numbers."""
        rows, columns = self.condense.formation
        return rows, columns

    @property
    def decoded(self) -> int:
        """The number of pictures that the stored ones decode into."""
        return self.condense.pictures * math.prod(self.condense.formation)

    @property
    def rule(self) -> str | None:
        """How real pictures are chosen, one of RULES; None for a set of crops."""
        c = self.condense
        if c.method in RULES:
            return c.method
        return c.layouts if self.has_layouts else None

    @property
    def needs_network(self) -> bool:
        return self.rule in MEASURED or self.condense.method == "linear_head"

    @property
    def is_learnt(self) -> bool:
        """Whether the pixels are learnt, not copied from real pictures."""
        return self.condense.method in LEARNT

    @property
    def has_layouts(self) -> bool:
        """Whether `layouts` chooses its real pictures."""
        c = self.condense
        return c.method == "mosaic" or (self.is_learnt and c.init in ("noise", "real"))

    def settings(self) -> dict[str, Any]:
        """The settings that this set depends on, as plain values: equal settings give equal pixels."""
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
            tree["init"] = c.init
        if self.has_layouts:
            tree["layouts"] = c.layouts
        if c.method == "crops" or (is_learnt and c.init == "crops"):
            tree["crops"] = c.crops
        if self.needs_network:
            tree["network"] = to_tree(c.network)
        if self.rule == "head_gradient":
            tree["ridge"] = c.head.ridge
        if c.method == "gradient_matching":
            matching = {"real_batch": c.real_batch, "matching": to_tree(c.matching)}
            tree |= {"augment": to_tree(c.augment), "arch": self.arch, **matching}
        if c.method == "linear_head":
            tree["head"] = to_tree(c.head)
        return tree

    @property
    def name(self) -> str:
        """The name of its folder: method, number of pictures, seed, and a hash of all settings."""
        settings = self.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        seed = f"_seed{settings['seed']}" if "seed" in settings else ""
        return f"{self.condense.method}_{self.condense.pictures}{seed}_{digest}"

    def folder(self, sets: str | Path) -> Path:
        return Path(sets) / self.name

    def check(self) -> None:
        """UserError for every mistake in the settings."""
        c, size, tiles = self.condense, self.image_size, math.prod(self.condense.formation)
        check_image_size("key 'image_size'", size)
        require = lambda is_met, key, found, expected: expect(is_met, f"key 'condense.{key}'", found, expected)
        require(c.pictures >= 1, "pictures", c.pictures, "at least 1")
        is_pair = len(c.formation) == 2 and all(1 <= side <= size for side in c.formation)
        require(is_pair, "formation", list(c.formation), f"[rows, columns], each 1 to {size}")
        if c.method == "mosaic":
            require(tiles > 1, "formation", list(c.formation), "more than one tile: a mosaic of one picture is random")
        elif not self.is_learnt:
            require(tiles == 1, "formation", list(c.formation), f"[1, 1]: {c.method} stores pictures as they are")
        require(c.crops >= 1 and size % c.crops == 0, "crops", c.crops, f"a divisor of {size} pixels")
        if self.needs_network and c.network.weights is None:
            raise UserError(f"key 'condense.network': {c.method} needs a trained network, expected {{weights: FILE}}")
        if self.data.train is None or self.data.per_class or self.data.unlabelled is not None:
            raise UserError(
                "keys 'data.train', 'data.per_class', 'data.unlabelled': a set is condensed from labelled "
                "pictures, expected a split alone (data.max_samples takes some of them)"
            )
        require(c.real_batch >= 1, "real_batch", c.real_batch, "at least 1")
        require(c.save_every_steps >= 0, "save_every_steps", c.save_every_steps, "a number, or 0 for never")
        require(c.picture_every_steps >= 0, "picture_every_steps", c.picture_every_steps, "a number, or 0 for never")
        require(c.seed is None or c.seed >= 0, "seed", c.seed, "0 or more")
        of_whole = "none: condense.seed is the seed of the whole set"
        require(not c.matching.seed, "matching.seed", c.matching.seed, of_whole)
        for key, learning, distances in (
            ("matching", c.matching, DISTANCES),
            ("head", c.head, (CURVATURE, *HEAD_DISTANCES)),
        ):
            weight, rate, momentum = learning.total_variation, learning.learning_rate, learning.momentum
            require(learning.steps >= 0, f"{key}.steps", learning.steps, "a number, or 0 for none")
            require(0 <= weight < math.inf, f"{key}.total_variation", weight, "a weight, or 0 for none")
            require(0 < rate < math.inf, f"{key}.learning_rate", rate, "a number above 0")
            require(0 <= momentum < 1, f"{key}.momentum", momentum, "a number of 0 up to less than 1")
            distance, expected = learning.distance, f"one of {', '.join(distances)}"
            require(distance in distances, f"{key}.distance", repr(distance), expected)
        ridge, rate = c.head.ridge, c.matching.pool.learning_rate
        require(0 < ridge < math.inf, "head.ridge", ridge, "a number above 0")
        require(0 <= rate < math.inf, "matching.pool.learning_rate", rate, "a number, or 0 for none")

    def check_source(self, count: int) -> None:
        """UserError if the source has too few pictures: each is used at most once."""
        if self.decoded > count:
            found = f"found {self.condense.pictures}"
            if self.decoded > self.condense.pictures:
                found += f", {' x '.join(map(str, self.condense.formation))} real ones each"
            place = f"{self.data.train_root or self.data.root} {self.data.train}"
            raise UserError(f"key 'condense.pictures': {found}, expected as many as {place} has: {count}")
