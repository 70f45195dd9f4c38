"""Which outputs of a class head belong to which class, and taking them over from a head of other classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassRows:
    """How the outputs (dim 0 of weight and bias) of some layers of a detector belong to its K classes.

        (groups * (shared + K * each + others), ...)

    layer: where the names of the entries begin; each {} is one integer. groups: one after the other, such as the
    anchors of a cell. In a group, first `shared` rows of no class (box and objectness, or the background), then `each`
    rows of every class in its order, then `others` rows of classes that the detector tells apart but does not report.
    """

    layer: str
    groups: int = 1
    shared: int = 0
    each: int = 1
    others: int = 0

    def split(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of an entry: shared (groups, shared, ...), classes (groups, K, each, ...), others likewise."""
        rows = value.unflatten(0, (self.groups, -1))
        num_own = rows.shape[1] - self.shared - self.others
        shared, classes, others = rows.split((self.shared, num_own, self.others), dim=1)
        return shared, classes.unflatten(1, (-1, self.each)), others.unflatten(1, (-1, self.each))


def take_rows(
    fresh: Tensor, released: Tensor, columns: Sequence[int | None], *, fresh_rows: ClassRows, released_rows: ClassRows
) -> Tensor:
    """An entry of a head whose class k has the rows of the released head's class columns[k]; None: those of `fresh`.

    What belongs to no class is taken over. Where fresh_rows has `others`, they are the released head's own others, then
    its classes that are not in `columns`.
    """
    shared, classes, others = released_rows.split(released)
    own = fresh_rows.split(fresh)[1]
    taken = torch.stack([own[:, k] if c is None else classes[:, c] for k, c in enumerate(columns)], dim=1)
    parts = [shared, taken.flatten(1, 2)]  # (groups, shared, ...), (groups, K each, ...)
    if fresh_rows.others:
        left = [column for column in range(classes.shape[1]) if column not in columns]
        parts += [others.flatten(1, 2), classes[:, left].flatten(1, 2)]
    return torch.cat(parts, dim=1).flatten(0, 1)
