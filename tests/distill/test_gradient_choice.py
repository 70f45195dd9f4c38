"""Choosing pictures by their gradients: products against numpy, the objective, the best set by trying all."""

import itertools

import numpy as np
import pytest
import torch

from distill.gradient_choice import SKETCH, ChoiceSettings, gradient_products, matching_rows, set_distance, sketch_of
from distill.mean_gradient import matched_parameters, summed_gradient
from distill.network_pool import NetworkPool, PoolSettings
from structures import Targets
from tests.distill.tiny_detector import build_tiny, tiny_scene

FRESH = PoolSettings(networks=1, first_steps=0, steps_between=0, normalization="group")


def products_of(vectors: np.ndarray) -> torch.Tensor:
    K = vectors @ vectors.T
    return torch.from_numpy(K / np.diagonal(K).mean())


def objective(vectors: np.ndarray, rows) -> float:
    """As the head of the module has it, for one network."""
    off = vectors[list(rows)].mean(0) - vectors.mean(0)
    return float((off**2).sum() / (vectors**2).sum(1).mean())


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(9, 5)) + 1.0


def test_objective_from_products_is_that_of_the_gradients(vectors):
    K = products_of(vectors)
    for rows in ([0], [3, 7], [8, 1, 4], list(range(9))):
        assert set_distance(K, torch.tensor(rows)) == pytest.approx(objective(vectors, rows), abs=1e-12)
    assert set_distance(K, torch.arange(9)) == pytest.approx(0, abs=1e-12)
    nothing = (vectors.mean(0) ** 2).sum() / (vectors**2).sum(1).mean()
    assert set_distance(K, torch.tensor([], dtype=torch.int64)) == pytest.approx(nothing)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_exchange_of_one_row_betters_the_chosen_set(vectors, count):
    """And it is among the best tenth of all sets of its size."""
    rows = matching_rows(products_of(vectors), count).tolist()
    assert len(set(rows)) == count
    mine = objective(vectors, rows)
    for place, row in itertools.product(range(count), range(9)):
        if row not in rows:
            assert objective(vectors, [*rows[:place], row, *rows[place + 1 :]]) >= mine - 1e-12
    everything = sorted(objective(vectors, rows) for rows in itertools.combinations(range(9), count))
    assert mine <= everything[len(everything) // 10] + 1e-12


def test_a_known_best_set():
    """Four pictures that cancel around the mean, among others that do not."""
    vectors = np.random.default_rng(1).normal(size=(12, 30)) * 3 + 5
    vectors[[2, 5, 7, 11]] = vectors.mean(0) + np.outer([1, -1, 2, -2], np.ones(30))
    others = [row for row in range(12) if row not in (2, 5, 7, 11)]
    vectors[others] += vectors[[2, 5, 7, 11]].mean(0) - vectors[others].mean(0)  # the mean of all is that of the four
    assert sorted(matching_rows(products_of(vectors), 4).tolist()) == [2, 5, 7, 11]


def test_all_or_none_of_the_rows(vectors):
    K = products_of(vectors)
    assert sorted(matching_rows(K, 9).tolist()) == list(range(9))
    assert matching_rows(K, 0).shape == (0,)


def test_sketches_keep_inner_products():
    """Of vectors that are orthogonal, equal and in between, to four standard deviations of the sketch."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    places, signs = sketch_of(100_000, generator)
    assert set(signs.tolist()) == {-1.0, 1.0} and places.min() >= 0 and places.max() < SKETCH
    sketch = lambda x: torch.zeros(SKETCH, dtype=x.dtype).index_add(0, places, x * signs)
    for x, y in ((a, a), (a, b), (a, a + b)):
        allowed = 4 * float(x.norm() * y.norm()) / SKETCH**0.5
        assert float(sketch(x) @ sketch(y)) == pytest.approx(float(x @ y), abs=allowed)


def read_tiny(row: int) -> tuple[torch.Tensor, Targets]:
    pictures, targets = tiny_scene(5)
    mine = targets[targets.image == row]
    return pictures[row : row + 1], Targets(mine.boxes_xyxy, mine.labels, torch.zeros_like(mine.image), mine.ignore)


def products_of_tiny(**changes) -> torch.Tensor:
    options = dict(
        settings=ChoiceSettings(2, FRESH), build_network=build_tiny, draw_real=lambda generator: tiny_scene(5)
    )
    return gradient_products(read_tiny, 5, **options | changes)


def test_products_are_those_of_the_detection_loss_of_each_picture():
    pool = NetworkPool(build_tiny, settings=FRESH, draw_real=None, draw_augmentation=None, seed=3)
    expected = np.zeros((5, 5))
    for visit in range(2):
        network, _, _ = pool.visit(visit)
        parameters = matched_parameters(network)
        rows = []
        for row in range(5):
            g, _ = summed_gradient(network, *read_tiny(row), parameters, 0, create_graph=False)
            rows.append(np.concatenate([part.numpy().ravel() for part in g]))
        K = np.stack(rows) @ np.stack(rows).T
        expected += K / np.diagonal(K).mean() / 2
    got = products_of_tiny(seed=3)
    np.testing.assert_allclose(got, expected, atol=4 * np.diagonal(expected).max() / SKETCH**0.5)
    assert got.diagonal().mean().item() == pytest.approx(1)
    assert torch.equal(got, products_of_tiny(seed=3)) and not torch.equal(got, products_of_tiny(seed=4))


def test_every_visit_is_told_and_none_is_refused():
    told = []
    products_of_tiny(on_visit=told.append)
    assert told == [1, 2]
    with pytest.raises(ValueError, match="visits: found 0, expected at least 1"):
        products_of_tiny(settings=ChoiceSettings(0, FRESH))
