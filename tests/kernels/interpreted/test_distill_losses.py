"""The losses of distill/ that rest on a kernel pass the checks of their definition also where the kernel runs.

Their checks are the ones that tests/distill tells wrong losses from right ones with: float64 references, identities,
extreme and empty inputs. They make their tensors on the CPU, so they run with the interpreter only.
"""

import pytest

from kernels.backend import IS_INTERPRETED
from tests.distill.losses.mutants.table import CASES

NAMES = ("softmax_kl", "image_kl", "soft_class", "cwd", "masked_mse")


@pytest.mark.skipif(not IS_INTERPRETED, reason="the checks make their tensors on the CPU")
@pytest.mark.parametrize("name", NAMES)
def test_checks_hold(name):
    (case,) = (case for case in CASES if case.name == name)
    for check in case.checks:
        if check.__name__ != "check_gradcheck":  # slow; test_losses has its own
            check(case.loss)
