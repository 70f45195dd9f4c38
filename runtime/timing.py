"""Fair times of things that compete: they take turns, so that whatever else the machine does meets all of them."""

import time
from collections.abc import Callable, Hashable


def rotate(
    contestants: dict[Hashable, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    settle: bool = False,
) -> dict[Hashable, list[float]]:
    """Seconds of each contestant, one call a round, each round starting with another; after one unmeasured round.

    clock: time.process_time counts the CPU seconds of all threads instead; neighbours on the machine disturb it less.
    settle: a call is timed after an untimed one of the same contestant, so that memory and caches are as in a run that
        does nothing else, not as the contestant before left them.
    """
    names = list(contestants)
    for name in names:
        contestants[name]()
    seconds: dict[Hashable, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if settle:
                contestants[name]()
            began = clock()
            contestants[name]()
            seconds[name].append(clock() - began)
    return seconds
