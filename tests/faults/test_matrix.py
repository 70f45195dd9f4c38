"""Every fault of the matrix ends in one of the four ways of tests/faults/matrix.py.

`make test-faults` runs all cases and prints their counts; `make test` runs a sample of each group.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from engine.runtime.peak_memory import peak_gigabytes, reset_peak
from errors import UserError
from tests.conftest import ROOT
from tests.faults import disk_cases, label_cases, picture_cases, run_cases, weights_cases, yaml_cases
from tests.faults.matrix import ELSEWHERE, MAX_GIGABYTES, Case, judge, refusal

CPU = torch.device("cpu")
# group -> (its cases, how many of them are the sample)
GROUPS: dict[str, tuple[Callable[[Path], Iterable[Case]], int]] = {
    "code in pickles": (weights_cases.code_in_pickles, 12),
    "hostile weights": (weights_cases.hostile_files, 0),
    "damaged weights": (weights_cases.damaged_files, 25),
    "weights of other models": (weights_cases.other_models, 2),
    "good weights": (weights_cases.good_files, 3),
    "yolo labels": (label_cases.yolo, 12),
    "voc labels": (label_cases.voc, 12),
    "coco labels": (label_cases.coco, 12),
    "kitti labels": (label_cases.kitti, 8),
    "yaml and class names": (yaml_cases.yaml_files, 16),
    "damaged pictures": (picture_cases.damaged, 40),
    "picture formats": (picture_cases.formats, 10),
    "picture modes": (picture_cases.modes, 10),
    "resumed runs": (run_cases.resumed, 2),
    "disks full at any byte": (disk_cases.at_every_byte, 5),
    "disks full at any file": (disk_cases.at_every_file, 0),
    "numbers that are not finite": (run_cases.not_finite, 0),
    "places and clocks": (run_cases.places, 1),
    "same seed": (run_cases.same_seed, 0),
    "kills": (run_cases.kills, 0),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_ends_well(group, tmp_path, request, record_property):
    make, size = GROUPS[group]
    is_whole = request.config.getoption("--faults", "sample") == "whole"
    if not size and not is_whole:
        pytest.skip("each costs a run, or is a case of another test too; with --faults whole")
    reset_peak(CPU)
    before = peak_gigabytes(CPU) or 0.0  # other tests may have run in this process
    cases = list(make(tmp_path))
    if not is_whole:
        cases = random.Random(group).sample(cases, size)
    counts, faults = judge(cases)
    record_property("counts", [[kind, outcome, count] for (kind, outcome), count in counts.items()])
    assert not faults, "\n".join(faults)
    assert counts.total() == len(cases) == len({(case.kind, case.name) for case in cases})
    assert (peak_gigabytes(CPU) or 0.0) - before < MAX_GIGABYTES


def test_the_tests_of_the_other_kinds_are_there():
    named = [ROOT / name for files in ELSEWHERE.values() for name in files.split()]
    assert [path for path in named if not path.is_file()] == []


def test_what_counts_as_an_end(tmp_path):
    """The judge itself: an exception, a slow case, and a refusal without its place or of two lines are faults."""

    def refuse(text: str, **options) -> Callable[[], str]:
        def raise_it() -> None:
            raise UserError(text, **options)

        return lambda: refusal(raise_it, "a.txt", "expected a number")

    good = "a.txt:3: found x, expected a number"
    ends = {
        "refused": refuse(good), "no place": refuse(good[2:]), "no reason": refuse("a.txt:3: no"),
        "exit code": refuse(good, exit_code=5), "long": refuse(good + "x" * 2000),
        "taken": lambda: refusal(int, "a.txt"),
        "bug": lambda: 1 / 0, "slow": lambda: sum(range(2_000_000)) and "correct", "odd": lambda: "fine",
    }  # fmt: skip
    counts, faults = judge(Case("A1", name, run, seconds=0.01 if name == "slow" else 2) for name, run in ends.items())
    assert counts == {("A1", "refused"): 1, ("A1", "fault"): len(ends) - 1}
    assert [line.split(": ")[0] for line in faults] == [f"A1 {name}" for name in ends if name != "refused"]
