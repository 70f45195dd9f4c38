"""How a search chooses the shapes that it trains. Everything is a function of (seed, scores).

    random      n shapes drawn at random (arXiv:1902.07638: the row to beat)
    evolution   the first P at random, each later one a mutation of a good one that is still alive

Both train n shapes for a few epochs; successive halving (arXiv:1502.07943) then trains the best for longer. So both
train as many shapes for as many epochs.

Differs from the papers: halving is theirs, but each rung trains from the start, with the whole schedule of its epochs:
a score is then that of a finished training, and a shape has one score at a rung however it came there. A child that was
trained before is drawn again.
"""

from collections import deque
from collections.abc import Callable, Sequence

from engine.search.space import Shape, Space, choose
from random_streams import Stream, seeded_generator

Scored = list[tuple[Shape, float]]


def random_shapes(space: Space, count: int, *, seed: int) -> list[Shape]:
    """Different shapes; the first of them are the same whatever the count."""
    shapes: list[Shape] = []
    for number in range(count):
        shapes.append(space.draw(seeded_generator(Stream.SHAPES, seed, number), shapes))
    return shapes


def evolve(
    space: Space, count: int, score: Callable[[Shape], float], *, seed: int, population: int, tournament: int
) -> list[Shape]:
    """Regularised evolution (arXiv:1802.01548, algorithm 1): all shapes, in the order in which they were trained.

    The first `population` are those of random_shapes. Then each step draws `tournament` of the living, with
    replacement; the one with the highest score is the parent of a new shape, and the oldest dies, however good it is.
    """
    shapes = random_shapes(space, min(population, count), seed=seed)
    alive = deque((shape, score(shape)) for shape in shapes)
    for number in range(len(shapes), count):
        generator = seeded_generator(Stream.MUTATION, seed, number)
        parent, _ = max((choose(alive, generator) for _ in range(tournament)), key=lambda pair: pair[1])
        child = space.mutate(parent, generator, shapes)
        shapes.append(child)
        alive.append((child, score(child)))
        alive.popleft()
    return shapes


def halve(
    shapes: Sequence[Shape], score: Callable[[Shape, int], float], rungs: Sequence[int], *, keep: int
) -> list[Scored]:
    """For each rung the shapes that were trained for its epochs, best first; ties in the order of `shapes`.

    rungs: epochs. n shapes train at the first rung, the best max(1, n // keep) of them at the second, and so on.
    """
    results: list[Scored] = []
    for number, epochs in enumerate(rungs):
        if number:
            shapes = [shape for shape, _ in results[-1][: max(1, len(shapes) // keep)]]
        scored = [(shape, score(shape, epochs)) for shape in shapes]
        results.append(sorted(scored, key=lambda pair: -pair[1]))
    return results
