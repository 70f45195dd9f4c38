"""Which outputs of a class head belong to which class, and how to copy them from a head of other classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassRows:
    """Which outputs (rows, dim 0 of weight and bias) of some layers of a detector belong to which of its K classes.

        rows = groups * (shared + K * each + others)

    layer: how the names of the layers' entries begin; each {} is one integer.
    groups: equal blocks, one after the other, such as the anchors of a cell. The order within a block:
    shared: first the rows that belong to no class: box and objectness, or the background.
    each: then this many rows for each class, in the order of the classes.
    others: then the rows of classes that the detector distinguishes but does not report.
    """

    layer: str
    groups: int = 1
    shared: int = 0
    each: int = 1
    others: int = 0
    is_softmax: bool = False

    def split(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of an entry: shared (groups, shared, ...), classes (groups, K, each, ...), others as classes."""
        rows = value.unflatten(0, (self.groups, -1))
        num_own = rows.shape[1] - self.shared - self.others
        shared, classes, others = rows.split((self.shared, num_own, self.others), dim=1)
        return shared, classes.unflatten(1, (-1, self.each)), others.unflatten(1, (-1, self.each))


def take_rows(
    fresh: Tensor, released: Tensor, columns: Sequence[int | None], *, fresh_rows: ClassRows, released_rows: ClassRows
) -> Tensor:
    """A head's entry with K classes: class k gets the rows of the released class columns[k], or of `fresh` for None.

    Shared rows are the released ones. If fresh_rows has `others`, they are the released head's others, then its classes
    that are not in `columns`.
    """
    shared, classes, others = released_rows.split(released)
    own = fresh_rows.split(fresh)[1]
    taken = torch.stack([own[:, k] if c is None else classes[:, c] for k, c in enumerate(columns)], dim=1)
    parts = [shared, taken.flatten(1, 2)]  # (groups, shared, ...), (groups, K each, ...)
    if fresh_rows.others:
        left = [column for column in range(classes.shape[1]) if column not in columns]
        parts += [others.flatten(1, 2), classes[:, left].flatten(1, 2)]
    return torch.cat(parts, dim=1).flatten(0, 1)
