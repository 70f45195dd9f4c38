"""One row of a study, whether two rows train alike, and the epochs that give one as much compute as another.

Only if two rows train alike does their difference measure what the study compares, and nothing else. The same in both:
student and start weights, optimizer, batch, accumulation, augmentation, image size, weight of the detection loss,
precision, evaluation and number of steps. Free: the pictures, the teachers and terms that a study compares, and keys
that no result depends on.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from config import Config, to_tree
from engine.condensing.config import Task
from engine.training.building import with_published_settings
from engine.training.flops import pseudo_flops, step_flops
from engine.training.splits import count_training_pictures
from engine.training.state import flat_tree, is_covered

FREE = (
    *("name", "runs", "seed", "teachers", "terms", "teacher_weighting", "teacher_cache_gigabytes", "save_every_steps"),
    *("data.train", "data.train_root", "data.train_format", "data.max_samples", "data.max_bad_fraction"),
    *("data.per_class", "data.draw_seed", "data.unlabelled"),
    *("data.workers", "data.cache", "evaluation.every_epochs", "evaluation.of_start", "evaluation.batch_size"),
)
# Equal in two rows: the same pictures, so the same number of steps.
PICTURES = (
    *("data.format", "data.root", "data.train", "data.train_root", "data.train_format"),
    *("data.max_samples", "data.per_class", "data.holdout_fraction"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. config: the config of its runs, except their names and seeds.

    baseline: the row that the cost of a step is relative to: the first row with the same student that no teacher
    teaches, else the first of the file.
    against: the rows it is compared to. A row that names none is compared to the row on as many random real pictures
    (if it trains on a condensed set) or to its baseline, provided that row trains alike.
    """

    name: str
    config: Config
    seeds: tuple[int, ...]
    baseline: str = ""
    against: tuple[str, ...] = ()
    is_teacher: bool = False
    task: Task | None = None  # the set it trains on
    sets: Path = Path()
    network_row: str | None = None  # the row whose first run its set is made with
    compute_of: str | None = None  # the row that its number of epochs comes from
    differs: tuple[str, ...] = ()
    idle: str = ""  # the line on its terms of weight 0, which are left out
    notes: tuple[str, ...] = ()  # idle; keys in which it differs from a row that it is not compared to, therefore

    def run(self, seed: int) -> Config:
        config = dataclasses.replace(self.config, name=f"{self.name}_seed{seed}", seed=seed)
        if self.task is None:
            return config
        data = dataclasses.replace(config.data, train_root=str(self.set_folder(seed)))
        return dataclasses.replace(config, data=data)

    def set_folder(self, seed: int) -> Path:
        """The folder of the synthetic set of a run."""
        assert self.task is not None
        return self.task.with_seed(seed).folder(self.sets)

    def folder(self, seed: int) -> Path:
        return Path(self.config.runs) / f"{self.name}_seed{seed}"


def last_weights(row: Row) -> str:
    """The weights file of a teacher that is trained in place."""
    return str(row.folder(row.seeds[0]) / "weights" / "last.pt")


def differing_keys(a: Row, b: Row, allowed: tuple[str, ...] = ()) -> list[str]:
    """The keys in which the training of two rows differs, except FREE and `allowed` (a section covers its keys).

    Epochs from `compute_of` do not count. If an epoch is one pass over the set (data.pictures_per_epoch 0) and the
    sets may differ in size, data.pictures_per_epoch counts as different, because the number of steps is.
    """
    first, second = (flat_tree(to_tree(with_published_settings(row.config))) for row in (a, b))
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    keys = [key for key in keys if key != "epochs" or not (a.compute_of or b.compute_of)]
    if not first["data.pictures_per_epoch"] and pictures_key(a) != pictures_key(b):
        keys.append("data.pictures_per_epoch")
    return [key for key in dict.fromkeys(keys) if not is_covered((*FREE, *allowed), key)]


def pictures_key(row: Row) -> object:
    """A value that is equal for rows whose epochs have as many pictures: their number, or the keys of the real set."""
    if row.config.data.pictures_per_epoch:
        return row.config.data.pictures_per_epoch
    if row.task is None:
        flat = flat_tree(to_tree(row.config))
        unlabelled = row.config.data.unlabelled
        sources = unlabelled and (unlabelled.rest, unlabelled.split, unlabelled.root, unlabelled.max_samples)
        return *(flat[key] for key in PICTURES), sources
    return row.task.decoded if row.config.data.train == "train_decoded" else row.task.condense.pictures


def same_teaching(a: Row, b: Row) -> bool:
    """Whether terms, teachers and their weighting are the same."""
    return all(getattr(a.config, key) == getattr(b.config, key) for key in ("terms", "teachers", "teacher_weighting"))


def describe_differences(a: Row, b: Row, keys: list[str]) -> str:
    """`epochs 20 and 40, optimizer.name sgd and adamw`; a key alone where other keys cause the difference."""
    first, second = (flat_tree(to_tree(with_published_settings(row.config))) for row in (a, b))
    are_equal = {key: first.get(key) == second.get(key) for key in keys}
    return ", ".join(key if are_equal[key] else f"{key} {first.get(key)} and {second.get(key)}" for key in keys)


def describe_pair(a: Row, b: Row) -> str | None:
    """`taught and longer differ in epochs 20 and 40`, those from `compute_of` among them; None for rows alike."""
    keys = differing_keys(a, b)
    if a.config.epochs != b.config.epochs and "epochs" not in keys:
        keys.append("epochs")
    return f"{a.name} and {b.name} differ in {describe_differences(a, b, keys)}" if keys else None


def find_random_row(row: Row, rows: dict[str, Row]) -> str | None:
    """The name of the row that trains alike on as many random real pictures; None if there is none."""
    return next((other.name for other in random_rows(row, rows) if not differing_keys(other, row)), None)


def random_rows(row: Row, rows: dict[str, Row]) -> list[Row]:
    """The rows on as many random real pictures as this one stores, with its terms and its pictures without labels.

    Also those that train differently.
    """
    if row.task is None:
        return []
    size, unlabelled = ("random", row.task.condense.pictures), row.config.data.unlabelled
    with_sets = ((other, other.task.condense) for other in rows.values() if other.task is not None)
    fit = (other for other, c in with_sets if (c.method, c.pictures) == size and same_teaching(other, row))
    return [other for other in fit if other.config.data.unlabelled == unlabelled]


def equal_compute_epochs(row: Row, other: Row, teachers: list[Row]) -> int:
    """The epochs of `row` that cost as much as `other`, to the nearest; at least 1 (the key `compute_of`).

        compute = epochs * pictures * step + sum_k epochs_k * pictures_k * step_k + pseudo boxes

    step: FLOPs of a training step for one picture, its teachers' passes included (engine/training/flops.py). k: the
    rows `teachers`, which train the teachers of `other` in place: counted whole, though they may teach several rows and
    seeds; one whose weights are given cost somebody else. Outputs of a teacher that are kept on disk and read again
    count as computed.

    The compute is a function of the config. Only where the rows learn from different numbers of pictures, or from
    pseudo boxes, is the dataset opened to count them.
    """
    rows = [row, other, *teachers]
    are_equal = other.config.pseudo_boxes is None and len({repr(pictures_key(r)) for r in rows}) == 1
    own, *others = [step_flops(r.config) * (1 if are_equal else pictures_per_epoch(r)) for r in rows]
    total = sum(r.config.epochs * flops for r, flops in zip(rows[1:], others)) + pseudo_flops(other.config)
    return max(1, round(total / own))


def pictures_per_epoch(row: Row) -> int:
    return row.config.data.pictures_per_epoch or count_training_pictures(row.config)
