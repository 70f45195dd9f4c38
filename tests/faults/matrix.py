"""The matrix of faults: its cases, how each of them may end, and the table of the counts.

A case is a file or a state that a user may meet, with a function that meets it. It may end in four ways:

    refused     one line that names the file and the place in it, what was found and what was expected
    counted     the rest is read, and what was dropped or changed is listed with its file and line
    correct     as if nothing had been wrong
    unseen      read with other values, because the file's format has no checksum that the damage could break

Everything else is a fault of ours: another exception, another message, a hang, a file left behind, memory.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import UserError

Outcome = Literal["refused", "counted", "correct", "unseen"]
OUTCOMES: tuple[Outcome, ...] = ("refused", "counted", "correct", "unseen")
MAX_GIGABYTES = 2.0  # that the cases of a group add to the memory of their process, at most
LONGEST_LINE = 1000  # characters

# Kinds of faults whose cases are tests elsewhere, because they need processes, signals or a patched system.
ELSEWHERE = {
    "D1": "tests/engine/training/test_resume.py tests/test_checkpoint.py tests/engine/comparison/test_many_workers.py",
    "D2": "tests/engine/training/test_stopping.py tests/engine/training/test_resume.py",
    "D6": "tests/datasets/test_loader.py",
    "D7": "tests/engine/training/test_distributed.py tests/distill/test_two_processes.py",
    "D8": "tests/engine/training/test_stopping.py",
    "E1": "tests/weights/test_hostile_files.py tests/house/test_security.py",
}


@dataclass(frozen=True)
class Case:
    """One fault. kind: A1 to E2; name: unique in its kind; run: meets the fault; seconds: it takes at most so long."""

    kind: str
    name: str
    run: Callable[[], Outcome]
    seconds: float = 2.0


def refusal(call: Callable[[], object], place: str | Path, words: str = "", exit_code: int = 2) -> Outcome:
    """ "refused" if the call raises a UserError: one line with `place` in it, matched by the expression `words`."""
    try:
        call()
    except UserError as error:
        text = str(error)
        assert str(place) in text, f"does not name {place}: {text}"
        assert "\n" not in text and len(text) - len(str(place)) < LONGEST_LINE, f"not one line: {text}"
        assert re.search(words, text.replace(str(place), "")), f"expected {words!r}: {text}"
        assert error.exit_code == exit_code, f"exit code {error.exit_code}, expected {exit_code}: {text}"
        return "refused"
    raise AssertionError("was taken")


def judge(cases: Iterable[Case]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Run the cases: how many of each kind ended how, and a line for each that ended in another way."""
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    for case in cases:
        began = time.process_time()
        try:
            outcome = case.run()
            assert outcome in OUTCOMES, f"ended with {outcome!r}"
            took = time.process_time() - began
            assert took < case.seconds, f"took {took:.1f} s, expected at most {case.seconds:g}"
        except Exception as error:  # a case that ends in none of the four ways
            outcome = "fault"
            faults.append(f"{case.kind} {case.name}: {type(error).__name__}: {error}")
        counts[case.kind, outcome] += 1
    return counts, faults


def table(counts: Counter[tuple[str, str]]) -> list[str]:
    """The counts as lines: a row for each kind of fault, a column for each way to end."""
    columns = (*OUTCOMES, "fault")
    kinds = sorted({kind for kind, _ in counts})
    rows = [(kind, *(counts[kind, column] for column in columns)) for kind in kinds]
    rows.append(("all", *(sum(row[1 + n] for row in rows) for n in range(len(columns)))))
    lines = ["kind   cases" + "".join(f"{column:>9}" for column in columns)]
    lines += [f"{kind:<6}{sum(numbers):>6}" + "".join(f"{number:>9}" for number in numbers) for kind, *numbers in rows]
    return lines
