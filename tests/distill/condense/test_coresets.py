"""Choosing pictures: each rule against brute force in numpy, and what all of them promise."""

import itertools

import numpy as np
import pytest
import torch

from distill.condense.coresets import (
    balanced_rows,
    herding,
    k_center,
    random_rows,
    region_cover,
    rows_in_turn,
    top_rows,
)


def features(count, width=4, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)) + 1.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


COUNTS = torch.from_numpy(np.random.default_rng(1).integers(0, 6, (12, 3)))
OBJECT_ROWS = torch.tensor([0, 0, 1, 2, 2, 2, 4, 5, 6, 6, 8, 9, 10, 10, 11])  # images 3 and 7 have no object
OBJECT_LABELS = torch.tensor([0, 5, 5, 0, 0, 5, 9, 0, 9, 5, 0, 5, 9, 0, 0])
RULES = {
    "random": lambda n: random_rows(12, n, generator=seeded(0)),
    "in_turn": lambda n: rows_in_turn(COUNTS, n, generator=seeded(0)),
    "balanced": lambda n: balanced_rows(COUNTS, n, generator=seeded(0)),
    "herding": lambda n: herding(features(12), n),
    "k_center": lambda n: k_center(features(12), n),
    "regions": lambda n: region_cover(features(15), OBJECT_ROWS, OBJECT_LABELS, n, 12),
    "top": lambda n: top_rows(COUNTS.sum(1), n),
}


@pytest.mark.parametrize("choose", RULES.values(), ids=RULES)
def test_distinct_rows_and_smaller_choices_are_prefixes(choose):
    everything = choose(12).tolist()
    assert sorted(everything) == list(range(12))
    for count in range(1, 12):
        assert choose(count).tolist() == everything[:count] and choose(count).dtype == torch.int64
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"{count} pictures of 12"):
            choose(count)


def test_random_draws_differ_and_repeat():
    draws = {tuple(random_rows(30, 5, generator=seeded(seed)).tolist()) for seed in range(20)}
    assert len(draws) == 20
    assert torch.equal(random_rows(30, 5, generator=seeded(3)), random_rows(30, 5, generator=seeded(3)))
    first = [int(random_rows(4, 1, generator=seeded(seed))) for seed in range(400)]
    assert np.bincount(first, minlength=4).min() > 70


def test_in_turn_has_each_class_in_its_turn_and_empty_pictures_last():
    counts = torch.tensor([[1, 0, 0], [0, 3, 0], [0, 0, 2], [1, 0, 0], [0, 0, 0], [2, 0, 0]])  # class 0 three times
    for seed in range(10):
        rows = rows_in_turn(counts, 6, generator=seeded(seed)).tolist()
        assert rows[1:3] == [1, 2] and sorted([rows[0], *rows[3:5]]) == [0, 3, 5] and rows[5] == 4
    draws = {int(rows_in_turn(counts, 1, generator=seeded(seed))) for seed in range(40)}
    assert draws == {0, 3, 5}


def test_balanced_takes_the_least_unequal_set_at_each_step():
    counts, chosen = COUNTS.numpy().astype(float), []

    def imbalance(rows):
        total = counts[rows].sum(0)
        return np.square(total / total.sum() - 1 / 3).sum()

    for row in balanced_rows(COUNTS, 8, generator=seeded(2)).tolist():
        best = min(imbalance([*chosen, other]) for other in range(12) if other not in chosen and counts[other].sum())
        assert imbalance([*chosen, row]) == pytest.approx(best, abs=1e-12)
        chosen.append(row)
    random = np.mean([imbalance(np.random.default_rng(s).permutation(12)[:8]) for s in range(50)])
    assert imbalance(chosen) < random / 2


def test_balanced_breaks_ties_at_random_and_leaves_empty_pictures_for_the_end():
    counts = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 0], [2, 2, 0]])  # nothing is of the third class
    firsts = {int(balanced_rows(counts, 1, generator=seeded(seed))) for seed in range(40)}
    assert firsts == {0, 2, 3}
    assert int(balanced_rows(counts, 4, generator=seeded(0))[-1]) == 1
    assert sorted(balanced_rows(torch.zeros(3, 2), 3, generator=seeded(0)).tolist()) == [0, 1, 2]


def test_herding_matches_the_mean_at_each_step():
    x, chosen = features(15).numpy(), []
    for row in herding(features(15), 9).tolist():
        others = [i for i in range(15) if i not in chosen]
        gaps = {i: np.linalg.norm(x.mean(0) - np.mean(x[[*chosen, i]], axis=0)) for i in others}
        assert row == min(gaps, key=gaps.get)
        chosen.append(row)


def test_herding_of_unit_features_is_the_recurrence_of_its_paper():
    x = torch.nn.functional.normalize(features(40, 6, seed=5), dim=1).numpy()
    mean, chosen = x.mean(0), []
    weight = mean.copy()
    for _ in range(10):
        scores = x @ weight
        scores[chosen] = -np.inf
        chosen.append(int(scores.argmax()))
        weight = weight + mean - x[chosen[-1]]
    assert herding(torch.from_numpy(x), 10).tolist() == chosen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_k_center_is_within_twice_the_best_radius(seed, count):
    x = features(11, 2, seed).numpy()
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)

    def radius(rows):
        return distances[:, list(rows)].min(1).max()

    chosen = k_center(torch.from_numpy(x), count).tolist()
    best = min(radius(rows) for rows in itertools.combinations(range(11), count))
    assert radius(chosen) <= 2 * best + 1e-12
    for step in range(1, count):
        assert chosen[step] == int(distances[:, chosen[:step]].min(1).argmax())
    assert chosen[0] == int(np.linalg.norm(x - x.mean(0), axis=1).argmin())


def test_k_center_visits_every_cluster_before_any_twice():
    centers = np.array([[0, 0], [50, 0], [0, 50], [50, 50.0]])
    x = np.repeat(centers, 5, axis=0) + np.random.default_rng(0).normal(size=(20, 2))
    assert sorted(row // 5 for row in k_center(torch.from_numpy(x), 4).tolist()) == [0, 1, 2, 3]
    assert sorted(k_center(torch.zeros(4, 2), 4).tolist()) == [0, 1, 2, 3]  # all the same: still all of them


def test_top_rows_are_the_largest_first_and_ties_go_to_the_lowest_row():
    values = torch.tensor([3, 9, 9, 1, 9, 4])
    assert top_rows(values, 4).tolist() == [1, 2, 4, 5]
    big = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 200))
    expected = sorted(range(200), key=lambda row: (-int(big[row]), row))
    assert top_rows(big, 200).tolist() == expected


def region_value(chosen):
    """What region_cover raises, image by image and class by class, from its definition."""
    x, rows, labels = features(15).numpy(), OBJECT_ROWS.numpy(), OBJECT_LABELS.numpy()
    mean, value = x.mean(0), 0.0
    for label in (0, 5, 9):
        of_image = {i: x[(rows == i) & (labels == label)].mean(0) - mean for i in set(rows[labels == label])}
        for other in of_image.values():
            cosines = [
                f @ other / np.linalg.norm(f) / np.linalg.norm(other) for i, f in of_image.items() if i in chosen
            ]
            value += max([(1 + cosine) / 2 for cosine in cosines], default=0.0) / len(of_image)
    return value


def test_region_cover_takes_the_best_image_at_each_step_and_empty_ones_last():
    chosen = []
    for row in region_cover(features(15), OBJECT_ROWS, OBJECT_LABELS, 12, 12).tolist():
        values = {i: region_value({*chosen, i}) for i in range(12) if i not in chosen}
        assert values[row] == pytest.approx(max(values.values()), abs=1e-12)
        chosen.append(row)
    assert set(chosen[:3]) & {0, 2, 5, 8, 10, 11} and region_value(set(chosen)) == pytest.approx(3)
    best = max(region_value(set(rows)) for rows in itertools.combinations(range(12), 3))
    assert best >= region_value(set(chosen[:3])) >= (1 - 1 / np.e) * best
    assert region_cover(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 2, 3
    ).tolist() == [0, 1]
