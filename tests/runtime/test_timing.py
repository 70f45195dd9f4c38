"""Taking turns: who is called when, and which time belongs to whom."""

from runtime.timing import rotate


def test_each_round_starts_with_another():
    calls = []
    ticks = iter(range(1000))
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = rotate(contestants, 4, clock=lambda: next(ticks))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # the first round is not measured
    assert seconds == {name: [1, 1, 1, 1] for name in "abc"}


def test_a_time_belongs_to_its_contestant():
    now = [0.0]

    def taking(duration):
        def call():
            now[0] += duration

        return call

    seconds = rotate({"slow": taking(3.0), "quick": taking(1.0)}, 2, clock=lambda: now[0])
    assert seconds == {"slow": [3.0, 3.0], "quick": [1.0, 1.0]}


def test_settled_calls_follow_one_of_their_own():
    calls = []
    ticks = iter(range(1000))
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = rotate(contestants, 2, clock=lambda: (calls.append("|"), next(ticks))[1], settle=True)
    assert "".join(calls) == "ab" + "a|a|b|b|" + "b|b|a|a|"
    assert seconds == {"a": [1, 1], "b": [1, 1]}
