"""Shares and gradients of distillation terms, on functions whose gradients are known."""

import math

import pytest
import torch
from torch import nn

from engine.training.balance import TermRange, balance_table, balances, term_ranges


class Student(nn.Module):
    """A neck with one weight 3, and a head with one weight 4."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Linear(1, 1, bias=False)
        self.head = nn.Linear(1, 1, bias=False)
        self.neck.weight.data.fill_(3.0)
        self.head.weight.data.fill_(4.0)


def test_ratios_are_those_of_the_gradients():
    """a = n h, gradient (4, 3) of norm 5; b = n, gradient (1, 0); c = h, gradient (0, 1); d has none."""
    student = Student()
    n, h = student.neck.weight.sum(), student.head.weight.sum()
    terms = {"a": n * h, "b": 2 * n, "c": h, "d": torch.tensor(0.0)}
    rows = {row.name: row for row in balances(terms, student, {"b", "c", "d"})}
    assert rows["a"].neck_ratio == pytest.approx(1) and rows["a"].student_ratio == pytest.approx(1)
    assert rows["b"].neck_ratio == pytest.approx(2 / 4) and rows["b"].student_ratio == pytest.approx(2 / 5)
    assert rows["c"].neck_ratio == 0 and rows["c"].student_ratio == pytest.approx(1 / 5)
    assert rows["d"].neck_ratio == 0 and rows["d"].value == 0
    assert sum(row.share for row in rows.values()) == pytest.approx(1) and rows["a"].share == pytest.approx(12 / 22)
    assert student.neck.weight.grad is None
    lines = balance_table(list(rows.values())).splitlines()
    assert len(lines) == 5 and lines[2].split() == ["b", "6", "27.3%", "0.5", "0.4"]


def test_without_a_detection_gradient_there_is_no_ratio():
    student = Student()
    (row,) = balances({"kd": student.head.weight.sum()}, student, {"kd"})
    assert math.isnan(row.neck_ratio)


def test_ranges_are_over_the_epochs_in_which_a_term_acted():
    epochs = [
        {"box": 1.0, "cls": 3.0, "low": 0.02, "high": 2.0, "off": 0.0},
        {"box": 1.0, "cls": 1.0, "low": 0.04, "high": 5.0, "off": 0.0},
        {"box": 0.5, "cls": 0.5, "low": 0.0, "high": 0.5, "off": 0.0},
    ]
    low, high, off = term_ranges(epochs, ["low", "high", "off"])
    assert (low.lowest, low.highest) == (0.02 / 4, 0.04 / 2) and not low.stayed
    assert (high.lowest, high.highest) == (0.5, 2.5) and "left 1% to 200%" in str(high)
    assert TermRange("fine", 0.01, 2.0).stayed and "reconsider" not in str(TermRange("fine", 0.01, 2.0))
    assert off == TermRange("off", 0, 0) and str(off) == "off: 0 in every epoch, it never acted" and not off.stayed
    assert term_ranges([], ["low"]) == []
    assert term_ranges([{"box": 0.0, "alone": 1.0}], ["alone"]) == []
