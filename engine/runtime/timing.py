"""Fair timing of competing functions: they take turns, so that other load on the machine affects all of them."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Call = Callable[[], object]
Name = TypeVar("Name")
Time = TypeVar("Time")


def wall_seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cpu_seconds(call: Call) -> float:
    """CPU seconds of all threads of this process; other load disturbs them less than the wall clock."""
    began = time.process_time()
    call()
    return time.process_time() - began


def wall_and_cpu(call: Call) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads."""
    wall = 0.0

    def timed() -> None:
        nonlocal wall
        wall = wall_seconds(call)

    cpu = cpu_seconds(timed)
    return wall, cpu


def rotate(
    contestants: Mapping[Name, Call],
    rounds: int,
    time_call: Callable[[Call], Time],
    *,
    settle: bool = False,
) -> dict[Name, list[Time]]:
    """Times of each contestant: one call per round, each round starts with the next one; a first round is not timed.

    time_call: calls a contestant and returns its time, e.g. wall_seconds.
    settle: call a contestant once untimed before each timed call, so that memory and caches are as in a run that does
        nothing else, not as the previous contestant left them.
    """
    names = list(contestants)
    for name in names:
        contestants[name]()
    times: dict[Name, list[Time]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if settle:
                contestants[name]()
            times[name].append(time_call(contestants[name]))
    return times
