"""The epochs that give a row as much compute as another row has with its teachers (the key `compute_of`).

    compute = epochs * pictures * step + sum_k epochs_k * pictures_k * step_k + pseudo boxes

step: FLOPs of a training step for one picture, its teachers' passes included (engine/training/flops.py). k: the
teachers that are trained in place, counted whole, though they may teach several rows and seeds; one whose weights are
given cost somebody else. Outputs of a teacher that are kept on disk and read again count as computed.

The compute is a function of the config. Only where the rows learn from different numbers of pictures, or from pseudo
boxes, is the dataset opened to count them.
"""

from typing import TYPE_CHECKING

from engine.comparison.protocol import pictures_key
from engine.training.flops import pseudo_flops, step_flops
from engine.training.splits import count_training_pictures
from engine.training.teaching import pseudo_of

if TYPE_CHECKING:
    from engine.comparison.study import Row


def equal_compute_epochs(row: "Row", other: "Row", teachers: list["Row"]) -> int:
    """The epochs of `row` that cost as much as `other`, to the nearest; at least 1.

    teachers: the rows that train the teachers of `other` in place.
    """
    rows = [row, other, *teachers]
    are_equal = pseudo_of(other.config) is None and len({repr(pictures_key(r)) for r in rows}) == 1
    own, *others = [step_flops(r.config) * (1 if are_equal else pictures_per_epoch(r)) for r in rows]
    total = sum(r.config.epochs * flops for r, flops in zip(rows[1:], others)) + pseudo_flops(other.config)
    return max(1, round(total / own))


def pictures_per_epoch(row: "Row") -> int:
    return row.config.data.pictures_per_epoch or count_training_pictures(row.config)
