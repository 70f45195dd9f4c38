"""The methods on a space of numbers: what is drawn, who is a parent, who dies, who is trained for longer."""

import torch

from engine.search.methods import evolve, halve, random_shapes


class Numbers:
    """Whole numbers are drawn; the child of a shape is it with a decimal place more. Notes the parents."""

    def __init__(self):
        self.parents = []

    def draw(self, generator, taken):
        return int(torch.randint(1000, (), generator=generator))

    def mutate(self, shape, generator, taken):
        self.parents.append(shape)
        return shape + 0.001 * (1 + len(self.parents))


def test_the_first_shapes_are_the_same_for_every_count_and_method():
    shapes = random_shapes(Numbers(), 8, seed=3)
    assert random_shapes(Numbers(), 3, seed=3) == shapes[:3] != random_shapes(Numbers(), 3, seed=4)
    evolved = evolve(Numbers(), 8, float, seed=3, population=3, tournament=2)
    assert evolved[:3] == shapes[:3] and len(evolved) == 8
    assert evolved == evolve(Numbers(), 8, float, seed=3, population=3, tournament=2)
    assert evolve(Numbers(), 2, float, seed=3, population=3, tournament=2) == shapes[:2]


def test_the_oldest_dies_however_good_it_is():
    """The tournament is larger than the population, so the best living shape is the parent: first the best of all."""
    space = Numbers()
    first = random_shapes(space, 3, seed=0)
    score = lambda shape: 1e6 if shape == first[0] else first.index(shape) if shape in first else -shape
    shapes = evolve(space, 8, score, seed=0, population=3, tournament=100)
    assert space.parents[0] == first[0]  # then it dies, and first[2] is the best of what is left
    assert space.parents[1:3] == [first[2], first[2]]  # until it dies too
    assert set(space.parents[3:]).isdisjoint(first)
    for number, parent in enumerate(space.parents):
        assert parent in shapes[number : number + 3]


def test_the_parent_is_the_best_of_the_tournament_and_no_more():
    """In a tournament of one, any living shape can become the parent, even the worst."""
    space = Numbers()
    evolve(space, 60, float, seed=1, population=2, tournament=1)
    shapes = evolve(Numbers(), 60, float, seed=1, population=2, tournament=1)
    ranks = [parent == max(shapes[number : number + 2]) for number, parent in enumerate(space.parents)]
    assert 10 < sum(ranks) < 50


def test_halving_keeps_the_best_and_counts_them():
    trained = []
    score = lambda shape, epochs: trained.append((shape, epochs)) or -abs(shape - 10) + epochs
    rungs = halve(range(20), score, (2, 6, 18), keep=3)
    assert [len(rung) for rung in rungs] == [20, 6, 2] and len(trained) == 28
    assert [shape for shape, _ in rungs[1]] == [10, 9, 11, 8, 12, 7]  # ties in the order in which they were drawn
    assert rungs[2] == [(10, 18), (9, 17)]
    assert {shape for shape, epochs in trained if epochs == 18} == {9, 10}
    assert [len(rung) for rung in halve(range(4), score, (1, 2, 3), keep=3)] == [4, 1, 1]
    assert [len(rung) for rung in halve([5], score, (7,), keep=2)] == [1]
