"""Two processes with gloo: the gradients of one process with the double batch, and a whole run.

One thing is not equal by construction, and stays so: batch normalisation sees each process's own pictures.
"""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import models
from config import to_tree
from engine.runtime import run_folder
from engine.runtime.processes import Processes
from tests.conftest import ROOT
from tests.engine.training.distributed_worker import KINDS, gradients, save_gradients, train_as_command, train_quietly
from tests.forked_processes import run_group
from tests.tiny_training import environment, tiny_config, write_dataset
from yaml_files import dump_yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def by_torchrun(config: Path, folder: Path) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    child = subprocess.run(
        [*command, "train.py", config], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout


def by_forks(config: Path, folder: Path) -> str:
    """With torchrun's variables, without its start of a Python for each process."""
    finished = run_group(train_as_command, [(config,)] * 2, folder=folder)
    assert [child.code for child in finished] == [0, 0], finished
    return "".join(child.text for child in finished)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def write_teacher(path: Path) -> None:
    torch.manual_seed(1)
    state = {"arch": "yolov8_narrow", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(path, state | {"ema": models.build("yolov8_narrow", 2).state_dict()})


def test_gradients_equal_one_process_with_the_double_batch(data, tmp_path):
    write_teacher(tmp_path / "teacher.pt")
    finished = run_group(save_gradients, [(data, tmp_path)] * 2, folder=tmp_path)
    assert [child.code for child in finished] == [0, 0], finished
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    first, second = (rank["average"] for rank in ranks)  # which each measures on its part of the pictures
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind in KINDS:
        alone = gradients(data, tmp_path, Processes("cpu"), kind)
        assert set(alone) == set(ranks[0][kind])
        assert {"batch 0: cls", "batch 1: pkd_t", "adapters.pkd_t.0.weight"} <= set(alone)
        assert alone["batch: measured batches"] == 2
        largest = max(gradient.abs().max().item() for name, gradient in alone.items() if not name.startswith("batch"))
        assert largest > 0
        for name, expected in alone.items():
            found, again = (rank[kind][name] for rank in ranks)
            assert torch.equal(found, again), name
            size = max(expected.abs().item(), 1e-3) if name.startswith("batch") else largest
            error = (found - expected).abs().max().item()
            assert error <= 1e-4 * size, f"{kind} {name}: {error} of {size}"  # float32; own counts: 0.1 and more
    torch.set_num_threads(threads)


@pytest.mark.parametrize("start", [by_forks, pytest.param(by_torchrun, marks=pytest.mark.weekly)])
def test_a_run_of_two_processes(start, data, tmp_path):
    """Its files; and the same bytes when one of the processes is killed and both are resumed."""
    terms = [
        {"teacher": "t", "loss": "mse", "weight": 1, "student_maps": ["p4"], "adapter": "conv1x1", "stop_epoch": 1}
    ]
    write_teacher(tmp_path / "teacher.pt")
    config = tiny_config(
        data,
        tmp_path / "runs",
        evaluation={"every_epochs": 1},
        optimizer={"accumulate": 2},
        save_every_steps=1,
        data={"holdout_fraction": 0.25},
        student={"arch": "yolov8_narrow"},
        teachers=[{"name": "t", "arch": "yolov8_narrow", "weights": str(tmp_path / "teacher.pt")}],
        terms=terms,
    )
    (tmp_path / "c.yaml").write_text(dump_yaml(to_tree(config)))
    printed = start(tmp_path / "c.yaml", tmp_path)
    run = run_folder.RunFolder(tmp_path / "runs" / "tiny")
    assert [path.name for path in (tmp_path / "runs").glob("[!.]*")] == ["tiny"]  # one folder for both
    report = json.loads(run.report.read_text())
    assert report["processes"] == 2 and report["steps"] == 4 and report["epochs"] == 2
    rows = run_folder.read_metrics(run.metrics)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[0]["train/mse_t"]) > 0 and float(rows[1]["train/mse_t"]) == 0
    assert printed.count("epoch 2/2") == 1  # only one process speaks
    state = checkpoint.load(run.last)
    assert state["position"]["images"] == 36  # every picture once an epoch
    assert checkpoint.load_model(run.last)[1].step == 4

    other = dataclasses.replace(config, name="killed")
    finished = run_group(train_quietly, [(other, False, None), (other, False, 3)], folder=tmp_path)
    assert [child.code for child in finished] == [1, -9], finished
    killed = run_folder.RunFolder(tmp_path / "runs" / "killed")
    assert checkpoint.load(killed.last)["step"] < 4
    finished = run_group(train_quietly, [(other, True, None)] * 2, folder=tmp_path)
    assert [child.code for child in finished] == [0, 0], finished
    resumed = checkpoint.load(killed.last)
    for part in ("model", "ema", "criterion"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in state[part].items())
