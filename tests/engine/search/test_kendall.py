"""Kendall's tau-b against its definition, pair by pair, and its spread against all orders there are."""

from itertools import permutations

import numpy as np
import pytest

from engine.search.kendall import kendall_tau, spread_without_relation
from tests.reference import kendall as reference


@pytest.mark.parametrize("n", [2, 3, 12, 40])
@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
def test_it_matches_the_reference(n, levels):
    rng = np.random.default_rng(n)
    for _ in range(10):
        x, y = rng.integers(levels, size=n) / 7, rng.integers(levels, size=n) / 7
        expected = reference.kendall_tau(x, y)
        assert kendall_tau(x, y) == (None if expected is None else pytest.approx(expected, abs=1e-15))


def test_identities():
    x = np.array([3.0, 1.0, 2.0, 7.0])
    assert kendall_tau(x, x) == kendall_tau(x, np.exp(x)) == 1
    assert kendall_tau(x, -x) == -1
    assert kendall_tau(np.array([1, 2, 3, 4]), np.array([1, 2, 4, 3])) == pytest.approx(4 / 6)  # 5 pairs agree, 1 not
    assert kendall_tau(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(2 / np.sqrt(6))  # tau-a is 2 / 3
    for things in ([], [1.0], [2.0, 2.0, 2.0]):
        assert kendall_tau(np.array(things), np.arange(len(things))) is None
    with pytest.raises(ValueError, match="not finite"):
        kendall_tau(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


@pytest.mark.parametrize("n", [2, 5])
def test_its_spread_over_all_orders(n):
    taus = [kendall_tau(np.arange(n), np.array(order)) for order in permutations(range(n))]
    assert np.std(taus) == pytest.approx(spread_without_relation(n), abs=1e-12)
