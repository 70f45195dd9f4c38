"""The state of a run: how far it is, how that is saved, and which keys may differ when it is resumed."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

import checkpoint
from config import Config, from_tree, to_tree
from datasets.index import DatasetIndex
from errors import UserError

# The result does not depend on these keys, so a resumed run may change them freely.
FREE_KEYS = (
    *("name", "runs", "save_every_steps", "student_file"),
    *("data.root", "data.train_root", "data.unlabelled.root", "data.workers"),
    "data.cache",
)


@dataclass
class TrainingState:
    """How far a run is. `sums`: of each loss term, over the batches of the epoch in progress."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # in progress, from 0
    batch: int = 0  # batches of that epoch done
    images: int = 0  # seen so far, by all processes
    seconds: float = 0.0  # of training so far, evaluation and saving left out
    sums: dict[str, float] = field(default_factory=dict)
    best: float | None = None  # held-out mAP50-95 of the best epoch
    best_epoch: int | None = None  # from 1
    start: dict[str, float] | None = None  # numbers on the test split before the first step, where they are measured

    def count(self, terms: dict[str, float], images: int) -> None:
        """Count one batch, its loss terms and its images."""
        self.batch += 1
        self.images += images
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def count_in(self, batches: int) -> None:
        """Count what the epoch in progress has had as this number of batches, with the same means."""
        self.sums = {name: mean * batches for name, mean in self.means().items()}
        self.batch = batches

    def means(self) -> dict[str, float]:
        return {name: total / max(self.batch, 1) for name, total in self.sums.items()}

    def next_epoch(self) -> None:
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}

    def is_over(self, config: Config) -> bool:
        """All epochs done, or `patience` of them without a better held-out result."""
        waited = self.epoch - self.best_epoch if self.best_epoch is not None else 0
        return self.epoch >= config.epochs or bool(config.patience and waited >= config.patience)


def describe_model(config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    """The part of a checkpoint that describes its model: with `ema`, enough for checkpoint.load_model."""
    return {
        "arch": config.student.arch,
        "names": list(names),
        "image_size": config.image_size,
        "config": to_tree(config),
        "versions": {"torch": str(torch.__version__), "format": checkpoint.FORMAT},
    }


def fingerprint(index: DatasetIndex) -> str:
    """A hash of all picture names, picture sizes and objects, in order. The folders above the files do not count."""
    digest = hashlib.sha256("\n".join(index.names).encode())
    for sample in index.samples:
        digest.update(f"\n{sample.image_path.name} {sample.width} {sample.height} ".encode())
        digest.update(sample.boxes_xyxy.tobytes() + sample.labels.tobytes() + sample.ignore.tobytes())
        if not sample.is_labelled:
            digest.update(b"unlabelled")
        if sample.class_scores is not None:
            digest.update(sample.class_scores.tobytes())
    return digest.hexdigest()


def refuse_changes(saved: dict[str, Any], config: Config, allowed: tuple[str, ...], source: str) -> None:
    """UserError with the first key that differs from the saved config tree, except for FREE_KEYS and `allowed`.

    A key that the saved tree lacks had its default value.
    """
    before, now = flat_tree(to_tree(from_tree(Config, saved, source=source))), flat_tree(to_tree(config))
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and not is_covered((*FREE_KEYS, *allowed), key):
            raise UserError(
                f"{source}: key {key!r}: the run was started with {_value_at(before, key)}, "
                f"found {_value_at(now, key)}; "
                f"a resumed run would not be the same run (--allow-change {key} if that is meant)"
            )


def _value_at(flat: dict[str, Any], key: str) -> str:
    """A value of a flat tree as text; of a section or a list, its values."""
    inner = [value for name, value in flat.items() if name.startswith(f"{key}.")]
    return repr(flat.get(key, inner or None))


def is_covered(allowed: tuple[str, ...], key: str) -> bool:
    """Whether a dotted key, or a section that holds it, is allowed."""
    return any(key == name or key.startswith(name + ".") for name in allowed)


def flat_tree(tree: Any, key: str = "") -> dict[str, Any]:
    """{"optimizer.momentum": 0.9, "terms.0.weight": 1.0, ...}; an empty list or dict is a value of its own."""
    if not isinstance(tree, dict | list | tuple):
        return {key: tree}
    if not tree:
        return {key: []}
    flat: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        flat |= flat_tree(value, f"{key}.{name}" if key else str(name))
    return flat


def first_difference(a: Any, b: Any) -> str | None:
    """The first dotted key at which two trees of plain values differ; None if they are equal."""
    first, second = flat_tree(a), flat_tree(b)
    keys = dict.fromkeys([*first, *second])
    return next((key for key in keys if key not in first or key not in second or first[key] != second[key]), None)
