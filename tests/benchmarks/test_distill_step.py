"""The benchmark of a distilled step runs, and its steps are what they are called."""

import pytest
import torch

from benchmarks import distill_step
from benchmarks.timing import random_batch
from engine.training.teaching import Teachers


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("terms", distill_step.TERMS)
def test_it_prints_its_table(terms, capsys, one_thread):
    distill_step.main(["--image-size", "64", "--batch-size", "1", "--rounds", "1", "--device", "cpu", "--terms", terms])
    said = capsys.readouterr().out
    assert all(
        row in said for row in ("student's step", "teacher's forward pass", "distilled step, outputs kept", "overhead")
    )
    assert f"target for ours {distill_step.TARGET}" in said and f"target for ours {distill_step.KEPT_TARGET}" in said


def test_a_step_that_finds_its_outputs_asks_no_teacher(one_thread, tmp_path, monkeypatch):
    """And has the losses of the one that computes them, up to their rounding on disk."""
    terms, asked = distill_step.TERMS["cwd+soft_class"], []
    original = Teachers._forward
    monkeypatch.setattr(Teachers, "_forward", lambda *args: asked.append(1) or original(*args))
    steps = distill_step.our_steps(random_batch(1, 64), terms, False, tmp_path)
    expected = [steps["distilled"]() for _ in range(2)]
    assert len(asked) == 2
    assert [steps["kept"]() for _ in range(2)] == pytest.approx(expected, rel=1e-3)
    assert len(asked) == 3
    assert distill_step.kept_ratio({("ours", "kept"): [2.0, 3.0, 9.0], ("ours", "student"): [2.0, 2.0, 2.0]}) == 1.5


def test_only_the_distilled_step_pays_for_terms(one_thread):
    batch = random_batch(1, 64)
    steps = distill_step.our_steps(batch, distill_step.TERMS["cwd+soft_class"], False)
    assert tuple(steps) == distill_step.PARTS
    values = {name: [step() for _ in range(3)] for name, step in steps.items()}
    assert values["distilled"][0] > values["student"][0] > 0
    assert len(set(values["student"])) == len(set(values["distilled"])) == 3  # both learn
    assert len(set(values["teacher"])) == 1  # the teacher does not


def test_overhead_is_the_median_of_the_rounds():
    seconds = {
        ("ours", "student"): [1.0, 2.0, 1.0],
        ("ours", "teacher"): [1.0, 2.0, 1.0],
        ("ours", "distilled"): [2.2, 4.2, 9.0],
    }
    assert distill_step.overhead(seconds, "ours") == pytest.approx(1.1)
