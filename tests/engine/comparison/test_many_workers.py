"""Several compare.py on one study: killed again and again, they end with the table of one that was left alone."""

import itertools
import random
import threading

import pytest

from engine.runtime import claims
from tests.engine.comparison import study_worker
from tests.forked_processes import run_forked


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "kills"), [(2, 3), pytest.param(3, 12, marks=pytest.mark.weekly)])
def test_killed_workers_end_with_the_table_of_one_that_was_not(workers, kills, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        study_worker.write_study(folder)
    child = run_forked(study_worker.work, alone, None, folder=alone)
    assert child.code == 0, child.text[-2000:]

    rng = random.Random(0)
    deaths = [("step", rng.randint(0, 1)) if i % 2 else ("call", rng.randint(0, 12)) for i in range(kills)]
    children = []

    def keep_one_at_work(slot):
        slot.mkdir()
        code = None
        while code != 0 and len(children) < 4 * kills:
            child = run_forked(study_worker.work, together, deaths.pop() if deaths else None, folder=slot)
            children.append(child)
            code = child.code

    threads = [threading.Thread(target=keep_one_at_work, args=(tmp_path / str(i),)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [child.code for child in children]
    assert codes.count(0) == workers and codes.count(-9) >= max(2, kills - 2) and set(codes) == {0, -9}, [
        c.text for c in children
    ]

    for name in ("comparison.md", "comparison.json"):
        assert (together / "runs/study" / name).read_bytes() == (alone / "runs/study" / name).read_bytes()
    check_steps((alone / "steps").read_text(), kills=0)
    check_steps((together / "steps").read_text(), kills=kills)
    for run in study_worker.RUNS:
        claims.take(together / "runs" / "study" / run).release()


def check_steps(text, *, kills):
    """Every run took all its steps, in the hands of one process after the other; a kill costs at most one step."""
    lines = [line.split() for line in text.splitlines()]
    assert {run for run, _, _ in lines} == set(study_worker.RUNS)
    total = study_worker.EPOCHS * study_worker.STEPS
    for name in study_worker.RUNS:
        own = [(pid, int(step)) for run, step, pid in lines if run == name]
        pids = [pid for pid, _ in itertools.groupby(own, key=lambda row: row[0])]
        assert len(pids) == len(set(pids)), f"{name} went back to a process that had lost it"
        assert sorted({step for _, step in own}) == list(range(1, total + 1))
    assert len(lines) <= total * len(study_worker.RUNS) + kills
