"""The training benchmark where there is no GPU: it runs, its step is the training loop's, its table is right."""

import json
import os

import pytest
import torch

from benchmarks import gpu_train
from benchmarks.gpu_train import Setting, contestants_of, disagreement, rate_of_peer, table
from benchmarks.host_waits import host_waits
from config import AugmentConfig
from datasets.augment import augment
from yolo import assigners

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--image-size", "64", "--batch-size", "2", "--steps", "2", "--warmup", "1", "--rounds", "1"]


def test_it_runs_on_a_cpu_and_writes_its_table(tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setenv("KERNELS", "auto")
    gpu_train.main([*SMALL, "--students", "yolov8n", "--contestants", "eager", "--output", str(tmp_path / "results")])
    assert os.environ["KERNELS"] == "auto"
    report = json.loads((tmp_path / "results" / "gpu_train.json").read_text(encoding="utf-8"))
    alone, taught = report["rows"]
    assert (alone["taught"], taught["taught"]) == (False, True)
    for row in (alone, taught):
        assert row["images_per_second"] == pytest.approx(2 * 2 / row["round_seconds"][0])
        assert tuple(row["milliseconds"]) == gpu_train.PARTS and min(row["milliseconds"].values()) >= 0
        assert all(line.startswith("yolo/") for line in row["waits"])  # none of the augmentation, none of distillation
    assert set(taught["first_losses"][0]) - set(alone["first_losses"][0]) == {"cwd_yolov8m", "soft_class_yolov8m"}
    assert taught["milliseconds"]["teacher"] > alone["milliseconds"]["teacher"]
    lines = (tmp_path / "results" / "gpu_train.md").read_text(encoding="utf-8").splitlines()
    assert (
        len({line.count("|") for line in lines if line.startswith("|")}) == 1 and lines[-1] in capsys.readouterr().out
    )


def test_the_step_has_the_losses_of_the_training_loop_and_no_wait(one_thread, monkeypatch):
    setting = Setting("yolov8n", False, "eager", CPU, 64, 2)
    student, _, forward = gpu_train.our_forward(setting)
    images, targets = next(gpu_train.batches(setting))
    images = images.float() / 255
    marks: list[str] = []
    with monkeypatch.context() as patch, host_waits(CPU) as waits:
        patch.setattr(assigners, "runs_ahead", lambda device: True)
        found = forward(images, targets, marks.append)
    assert not waits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = student(images)
    expected = student.losses(expected, targets)
    assert set(found) == {"box", "cls", "dfl"} and marks == ["teacher", "student", "detection", "distillation"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_who_competes():
    cuda = torch.device("cuda")
    assert contestants_of("yolov8n", False, CPU, None) == ["eager", "peer"]
    assert "kernels" not in contestants_of("yolov8n", False, cuda, None)  # nothing it would change
    assert contestants_of("yolov8n", True, cuda, ["peer", "compile"]) == ["compile", "peer"]


@pytest.mark.parametrize("error", [RuntimeError("no memory\nat all"), ImportError("no peer", name="peer")])
def test_one_that_fails_costs_the_others_nothing(error, tmp_path, monkeypatch, capsys):
    def measure(setting, *numbers):
        if setting.student == "yolov8n":
            raise error
        return numbers_of(10.0)

    monkeypatch.setattr(gpu_train, "measure", measure)
    arguments = ["--device", "cpu", "--contestants", "eager", "--output", str(tmp_path)]
    if isinstance(error, RuntimeError):
        with pytest.raises(SystemExit, match="2 of 4 contestants failed"):
            gpu_train.main(arguments)
    else:
        gpu_train.main(arguments)
    said = capsys.readouterr().out
    assert ("RuntimeError: no memory |" if isinstance(error, RuntimeError) else "not installed: peer |") in said
    assert "| yolov8s | yes | eager | 10.0 |" in said


def numbers_of(rate: float) -> dict:
    milliseconds = {"student": 3.0, "backward": 5.0, "wait": 2.0}
    losses = [{"box": 1.0, "cls": 3.0}, {"box": 1.0, "cls": 1.0}]
    return {
        "images_per_second": rate,
        "milliseconds": milliseconds,
        "peak_gigabytes": 12.34,
        "waits": {"a.py:1": 2, "b.py:3": 1},
        "first_losses": losses,
    }


def test_a_line_of_the_table():
    rows = [
        {"student": "yolov8n", "taught": taught, "contestant": contestant} | numbers_of(rate)
        for taught, contestant, rate in ((False, "peer", 50.0), (True, "eager", 60.0), (True, "peer", 40.0))
    ]
    assert rate_of_peer(rows[1], rows) == 40.0 and rate_of_peer(rows[0], rows) == 50.0
    assert rate_of_peer(rows[1], rows[:2]) is None
    line = "| yolov8n | yes | eager | 60.0 | 1.50 | 12.3 | 3 |  |  |  | 30 |  |  | 50 |  | 20 |  |"
    assert table(rows).splitlines()[3] == line
    rows[2] = {key: rows[2][key] for key in ("student", "taught", "contestant")} | {"error": "a | b"}
    assert rate_of_peer(rows[1], rows) is None and "| a / b |" in table(rows)


def test_a_contestant_that_learns_something_else_is_noticed():
    expected = numbers_of(1.0)["first_losses"]
    assert disagreement([{"box": 1.01, "cls": 3.0}, *expected[1:]], expected) is None
    assert disagreement([expected[0], {"box": 1.1, "cls": 1.0}], expected) == "step 1: loss 2.1, eager 2"
    assert disagreement([{"box": float("nan")}], expected) is not None


def test_waits_are_found_by_line():
    x = torch.arange(6.0)
    with host_waits(CPU) as waits:
        positive = x > 2
        x[positive] = torch.ones(3)
        (x[positive], x.nonzero(), x.sum().item())
        (x[positive.long()], torch.where(positive, x, 0), x.topk(2), x.cumsum(0))
        x[positive] = 0.0  # a masked_fill
        x.clamp(max=torch.tensor([3.0]))  # the list is copied
    lines = {int(key.split(":")[1]): count for key, count in waits.items()}
    assert lines == {min(lines): 1, min(lines) + 1: 3, min(lines) + 4: 1}
    assert all(key.startswith("tests/benchmarks/test_gpu_train.py:") for key in waits)


def test_copies_that_wait_are_found():
    x, elsewhere = torch.arange(3.0), torch.empty(3, device="meta")
    with host_waits(elsewhere.device) as waits:
        (
            x.to("meta", non_blocking=True),
            x.to(elsewhere, non_blocking=True),
            elsewhere.double(),
            x.double(),
            x.nonzero(),
        )
        (x.to(elsewhere), x.double().to("meta"))
    assert list(waits.values()) == [2]


@pytest.mark.parametrize("settings", [AugmentConfig(), AugmentConfig(mosaic=0.0, mixup=1.0, degrees=5.0)])
def test_augmentation_makes_no_copy_that_waits(settings):
    """The host draws and moves boxes; the device has the pictures."""
    _, targets = next(gpu_train.batches(Setting("yolov8n", False, "eager", CPU, 64, 4)))
    images = torch.empty(4, 3, 64, 64, device="meta")
    with host_waits(images.device) as waits:
        augment(images, targets, generator=torch.Generator().manual_seed(0), settings=settings)
    assert not waits
