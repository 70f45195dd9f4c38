"""Taking turns: who is called when, and which time belongs to whom."""

import time

from engine.runtime.timing import cpu_seconds, rotate, wall_seconds


def test_each_round_starts_with_another():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = rotate(contestants, 4, lambda call: call() or len(calls))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first round is not measured
    assert times == {"a": [4, 9, 11, 13], "b": [5, 7, 12, 14], "c": [6, 8, 10, 15]}


def test_a_time_belongs_to_its_contestant(monkeypatch):
    now = [0.0]

    def taking(duration):
        def call():
            now[0] += duration

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    seconds = rotate({"slow": taking(3.0), "quick": taking(1.0)}, 2, wall_seconds)
    assert seconds == {"slow": [3.0, 3.0], "quick": [1.0, 1.0]}


def test_settled_calls_follow_one_of_their_own():
    calls = []

    def time_call(call):
        calls.append("|")
        call()
        calls.append("|")
        return 1

    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert rotate(contestants, 2, time_call, settle=True) == {"a": [1, 1], "b": [1, 1]}
    assert "".join(calls) == "ab" + "a|a|b|b|" + "b|b|a|a|"


def test_waiting_costs_no_cpu_time():
    wait = lambda: time.sleep(0.02)
    assert wall_seconds(wait) >= 0.02 and cpu_seconds(wait) < 0.02
