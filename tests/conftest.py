"""Fixtures shared by all tests: the small real data beside the checkout, and the golden files."""

import ctypes
import fcntl
import gc
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_training import tiny_config, write_dataset

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_configure(config: pytest.Config) -> None:
    """The order below holds for several processes, too: xdist would put the files with the most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector, a tenth of the time, need not search it."""
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data that development checkouts have beside them; tests of it are skipped without."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the small real data (../shared/data) is not beside this checkout")
    return path


def read_golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and meta of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(bytes(arrays.pop("meta")))


@pytest.fixture(scope="session")
def golden():
    return read_golden


@pytest.fixture(scope="module")
def one_thread():
    """Of PyTorch, so that tiny pictures are not shared out among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_second_stage():
    """Faster R-CNN with 32 hidden units in its box head instead of 1,024, and 32 regions of an image, not up to 1,000:
    nine tenths of a small one's weights, and most of the time of a tiny run.
    """
    from frcnn import faster_rcnn, heads

    few = lambda proposals, **counts: counts | {"proposals": min(proposals, 32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "HIDDEN", 32)
        patch.setattr(faster_rcnn, "ROI_SAMPLES", 32)
        patch.setattr(faster_rcnn, "Selection", few)
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The dataset of tests.tiny_training; nobody changes it."""
    return write_dataset(tmp_path_factory.mktemp("tiny") / "set")


@pytest.fixture(scope="session", autouse=True)
def runs_without_pictures():
    """The pictures and plots of a tiny run take longer than the run. Tests of them put run_pictures.draw back."""
    from engine.training import reporting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "draw", lambda *args: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """Only a power cut loses what was written and not flushed. Tests of the order of writing count the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_returned():
    """glibc keeps gigabytes that large models were in, and a fork, such as a loader's worker, copies their tables."""
    yield
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture
def one_plot(monkeypatch):
    """compare.py draws its plot anew after each run; here it draws the last one alone, with the pictures."""
    from engine.comparison import plot

    write = plot.write
    last = lambda path, *results, with_pictures: write(path, *results, with_pictures=True) if with_pictures else path
    monkeypatch.setattr(plot, "write", last)


@pytest.fixture
def make_tiny(tiny_data, tmp_path):
    """make_tiny(**changes): a tiny_config whose runs are in a folder of this test."""
    return lambda **changes: tiny_config(tiny_data, tmp_path / "runs", **changes)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """tests.exporting.export_student, once for all processes; tests of it are skipped without the packages of ONNX."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    from tests.exporting import export_student

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exported"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = folder / "exported.pickle"
        if not result.exists():
            result.write_bytes(pickle.dumps(export_student(folder)))
    return pickle.loads(result.read_bytes())
