"""The distillation terms of a run compared with its detection loss: by gradients before the run, by values after it.

A term far below 1 % of the detection loss teaches nothing; one far above 200 % drowns the labels. A value says little
about its gradient, so --dry-run prints both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOWEST, HIGHEST = 0.01, 2.0  # of the detection loss, epoch by epoch


@dataclass(frozen=True)
class TermBalance:
    """One loss term of one batch. A ratio is its gradient norm divided by that of all detection terms together."""

    name: str
    value: float
    share: float  # of the sum of all terms
    neck_ratio: float
    student_ratio: float


def balances(terms: dict[str, Tensor], student: nn.Module, distillation: set[str]) -> list[TermBalance]:
    """The value and gradient of each term beside those of the detection loss; nothing is changed.

        ratio(term) = ||d term / d w|| / ||d sum(detection terms) / d w||,    w the parameters of the neck, or all

    terms: named scalars with their graph. distillation: the names of the distillation terms. For a student without a
    neck, w is all parameters in both ratios. NaN where the detection loss has no gradient.
    """
    neck = next((getattr(student, name) for name in ("neck", "pyramid") if hasattr(student, name)), student)
    everything = [p for p in student.parameters() if p.requires_grad]
    of_neck = {id(p) for p in neck.parameters()}
    is_neck = [id(p) in of_neck for p in everything]

    def norms(loss: Tensor | int) -> tuple[float, float]:
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return 0.0, 0.0
        gradients = torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True)
        squares = [0.0 if g is None else g.double().square().sum().item() for g in gradients]
        return sum(s for s, inside in zip(squares, is_neck) if inside) ** 0.5, sum(squares) ** 0.5

    reference = norms(sum(value for name, value in terms.items() if name not in distillation))
    total = sum(value.item() for value in terms.values())
    rows = []
    for name, value in terms.items():
        ratios = [n / r if r else float("nan") for n, r in zip(norms(value), reference)]
        rows.append(TermBalance(name, value.item(), value.item() / total if total else float("nan"), *ratios))
    return rows


def balance_table(rows: list[TermBalance]) -> str:
    width = max([4, *(len(row.name) for row in rows)])
    lines = [f"{'term':<{width}}  {'value':>10}  {'share':>7}  gradient / detection's: neck  student"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {row.value:>10.4g}  {row.share:>6.1%}  {row.neck_ratio:>28.3g}  "
            f"{row.student_ratio:>7.3g}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class TermRange:
    """The lowest and highest share of a distillation term in the detection loss, over the epochs in which it acted.

    Both are 0 for a term that never acted.
    """

    name: str
    lowest: float
    highest: float

    @property
    def stayed(self) -> bool:
        return LOWEST <= self.lowest and self.highest <= HIGHEST

    @property
    def acted(self) -> bool:
        return self.highest > 0

    def __str__(self) -> str:
        if not self.acted:
            return f"{self.name}: 0 in every epoch, it never acted"
        line = f"{self.name}: {self.lowest:.1%} to {self.highest:.1%} of the detection loss"
        return line if self.stayed else f"{line}; it left {LOWEST:.0%} to {HIGHEST:.0%}, reconsider its weight"


def term_ranges(epochs: list[dict[str, float]], distillation: list[str]) -> list[TermRange]:
    """One TermRange per distillation term. epochs: the mean of every term, by name, for each epoch.

    A term that acted only where the detection loss is 0 has none; without an epoch the list is empty.
    """
    shares: dict[str, list[float]] = {name: [] for name in distillation}
    for means in epochs:
        detection = sum(value for name, value in means.items() if name not in shares)
        for name in distillation:
            if means[name] != 0 and detection > 0:
                shares[name].append(means[name] / detection)
    for name in distillation if epochs else ():
        if all(means[name] == 0 for means in epochs):
            shares[name].append(0.0)
    return [TermRange(name, min(values), max(values)) for name, values in shares.items() if values]
