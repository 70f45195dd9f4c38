"""A run that was killed and resumed ends with the same bytes as one that was not, and what may not change meanwhile."""

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import checkpoint
from datasets.loader import Loader
from datasets.yolo_txt import read_yolo
from engine.training.state import first_difference
from tests.engine.training import resume_driver
from tests.forked_processes import run_forked
from tests.tiny_training import write_dataset
from weights import read_state_dict


def assert_same_bytes(a, b, where=""):
    """Equal trees of plain values and tensors; floats by their bits."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_bytes(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_bytes(x, y, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("workers", "kills"),
    [(0, 2), (2, 2), pytest.param(0, 6, marks=pytest.mark.weekly), pytest.param(2, 6, marks=pytest.mark.weekly)],
)
def test_killed_and_resumed_ends_with_the_same_bytes(tmp_path, workers, kills):
    """kills: at least so many, beside an interruption and a termination."""
    child = run_forked(resume_driver.main, tmp_path, workers, kills, 0, folder=tmp_path)
    assert child.code == 0, child.text[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["whole"] == 0 and result["codes"][-1] == 0, (result, child.text[-2000:])
    assert set(result["codes"]) <= {0, -9, 130, 143}, (result, child.text[-2000:])
    assert sum(code == -9 for code in result["codes"]) >= kills
    for kind, code in (("interrupt", 130), ("terminate", 143)):
        assert any(d[0] == kind and c == code for d, c in zip(result["deaths"], result["codes"])), result

    whole, resumed = tmp_path / "whole" / "tiny", tmp_path / "runs" / "tiny"
    a, b = checkpoint.load(whole / "weights" / "last.pt"), checkpoint.load(resumed / "weights" / "last.pt")
    for key in ("model", "ema", "optimizer", "criterion", "step", "epoch"):
        assert_same_bytes(a[key], b[key], key)
    assert a["step"] == (18 if workers == 0 else 9)
    times = {"seconds"}
    assert {k: v for k, v in a["position"].items() if k not in times} == {
        k: v for k, v in b["position"].items() if k not in times
    }
    best_a, best_b = (read_state_dict(run / "weights" / "best.safetensors")[0] for run in (whole, resumed))
    assert_same_bytes(best_a, best_b)
    assert read_rows(whole) == read_rows(resumed)
    assert not list(resumed.rglob("*.tmp"))
    tests = [json.loads((run / "report.json").read_text())["test"] for run in (whole, resumed)]
    assert tests[0] == tests[1]


def read_rows(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["time"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    return rows


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_no_loader_process_outlives_a_killed_run(tmp_path):
    """Also when the run is killed right after it started them, before PyTorch's own watch over it has begun."""
    index = read_yolo(write_dataset(tmp_path / "set"), "train")
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os.setsid()
            batches = Loader(index, image_size=64, batch_size=4, seed=0, workers=2).epoch(0)
            threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            list(batches)
            time.sleep(5)
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    deadline = time.monotonic() + 20
    while left := [pid for child in children for pid in processes_of_group(child)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def processes_of_group(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended in between
        if int(process_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_first_difference():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a.1.b"
    assert first_difference({"a": 1}, {"a": 1, "c": 2}) == "c"
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == "a.1"
    assert first_difference({"a": None}, {"a": {"b": None}}) == "a"
    assert first_difference({"a": [1, 2]}, {"a": [1, 2]}) is None
