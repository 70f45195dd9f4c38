"""Whether two rows train alike. Only then does their difference measure what the study compares, and nothing else.

The same in both: student and start weights, optimizer, batch, accumulation, augmentation, image size, weight of the
detection loss, precision, evaluation and number of steps. Free: the pictures, the teachers and terms that a study
compares, and keys that no result depends on.
"""

from typing import TYPE_CHECKING

from config import to_tree
from engine.training.building import with_published_settings
from engine.training.state import flat_tree, is_covered

if TYPE_CHECKING:
    from engine.comparison.study import Row

FREE = (
    *("name", "runs", "seed", "teachers", "terms", "teacher_weighting", "teacher_cache_gigabytes", "save_every_steps"),
    *("data.train", "data.train_root", "data.train_format", "data.max_samples", "data.max_bad_fraction"),
    *("data.per_class", "data.draw_seed", "data.unlabelled"),
    *("data.workers", "data.cache", "evaluation.every_epochs", "evaluation.of_start", "evaluation.batch_size"),
)
# Equal in two rows: the same pictures, so the same number of steps.
PICTURES = ("data.train", "data.train_root", "data.train_format", "data.max_samples", "data.per_class")


def differing_keys(a: "Row", b: "Row", allowed: tuple[str, ...] = ()) -> list[str]:
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


def pictures_key(row: "Row") -> object:
    """A value that is equal for rows whose epochs have as many pictures: their number, or the keys of the real set."""
    if row.config.data.pictures_per_epoch:
        return row.config.data.pictures_per_epoch
    if row.task is None:
        flat = flat_tree(to_tree(row.config))
        unlabelled = row.config.data.unlabelled
        sources = unlabelled and (unlabelled.rest, unlabelled.split, unlabelled.root, unlabelled.max_samples)
        return *(flat[key] for key in PICTURES), sources
    return row.task.decoded if row.config.data.train == "train_decoded" else row.task.condense.pictures


def same_teaching(a: "Row", b: "Row") -> bool:
    """Whether terms, teachers and their weighting are the same."""
    return all(getattr(a.config, key) == getattr(b.config, key) for key in ("terms", "teachers", "teacher_weighting"))


def describe_differences(a: "Row", b: "Row", keys: list[str]) -> str:
    """`epochs 20 and 40, optimizer.name sgd and adamw`; a key alone where other keys cause the difference."""
    first, second = (flat_tree(to_tree(with_published_settings(row.config))) for row in (a, b))
    are_equal = {key: first.get(key) == second.get(key) for key in keys}
    return ", ".join(key if are_equal[key] else f"{key} {first.get(key)} and {second.get(key)}" for key in keys)
