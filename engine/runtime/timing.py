"""Fair times of things that compete: they take turns, so that whatever else the machine does meets all of them."""

import time
from collections.abc import Callable, Hashable
from typing import TypeVar

Call = Callable[[], object]
Time = TypeVar("Time")


def wall_seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cpu_seconds(call: Call) -> float:
    """CPU seconds of all threads of this process; neighbours on the machine disturb them less than the clock."""
    began = time.process_time()
    call()
    return time.process_time() - began


def wall_and_cpu(call: Call) -> tuple[float, float]:
    """Seconds of the clock, and CPU seconds of all threads."""
    wall = 0.0

    def timed() -> None:
        nonlocal wall
        wall = wall_seconds(call)

    cpu = cpu_seconds(timed)
    return wall, cpu


def rotate(
    contestants: dict[Hashable, Call],
    rounds: int,
    time_call: Callable[[Call], Time] = wall_seconds,
    *,
    settle: bool = False,
) -> dict[Hashable, list[Time]]:
    """Times of each contestant, one call a round, each round starting with another; after one unmeasured round.

    settle: a call is timed after an untimed one of the same contestant, so that memory and caches are as in a run that
        does nothing else, not as the contestant before left them.
    """
    names = list(contestants)
    for name in names:
        contestants[name]()
    times: dict[Hashable, list[Time]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if settle:
                contestants[name]()
            times[name].append(time_call(contestants[name]))
    return times
