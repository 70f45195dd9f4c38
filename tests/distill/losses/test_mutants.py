"""The checks of every loss pass on it and fail on each of its wrong variants."""

import importlib
import pkgutil

import pytest

import distill.losses
from tests.distill.losses.mutants.machinery import Edit, LossCase, apply_edit
from tests.distill.losses.mutants.table import CASES
from tests.distill.losses.properties import is_loss

MUTANTS = [pytest.param(case, wrong, id=f"{case.name}: {wrong}") for case in CASES for wrong in case.mutants]
CHECKS = [
    pytest.param(case.loss, check, id=f"{case.name}-{check.__name__}-{i}")
    for case in CASES
    for i, check in enumerate(case.checks)
]


@pytest.mark.parametrize(("loss", "check"), CHECKS)
def test_check_holds(loss, check):
    check(loss)


@pytest.mark.parametrize(("case", "wrong"), MUTANTS)
def test_mutant_is_killed(case, wrong):
    mutant = case.mutant(wrong)  # outside: an edit that does not fit is no kill
    with pytest.raises(AssertionError):
        case.check(mutant)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_loss_has_four_mutants(case):
    assert len(case.mutants) >= 4


def test_every_loss_is_in_the_table():
    """A loss is a public function of a module in distill/losses with keyword-only s_ and t_ arguments."""
    folder = distill.losses
    modules = [importlib.import_module(f"{folder.__name__}.{m.name}") for m in pkgutil.iter_modules(folder.__path__)]
    losses = {v for m in modules for v in vars(m).values() if is_loss(v) and v.__module__ == m.__name__}
    assert len(losses) > 20
    missing = losses - {case.loss for case in CASES}
    assert not missing, f"without checks and mutants: {sorted(v.__name__ for v in missing)}"


def test_an_edit_that_does_not_fit_is_no_mutant():
    case: LossCase = CASES[0]
    with pytest.raises(LookupError):
        apply_edit(case.loss, Edit("no such text", ""))
