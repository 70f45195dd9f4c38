"""Fair times of things that compete: they take turns, so that whatever else the machine does meets all of them."""

import time
from collections.abc import Callable


def rotate(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contestant, one call a round, each round starting with another; after one unmeasured round.

    clock: time.process_time counts the CPU seconds of all threads instead; neighbours on the machine disturb it less.
    """
    names = list(contestants)
    for name in names:
        contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            contestants[name]()
            seconds[name].append(clock() - began)
    return seconds
