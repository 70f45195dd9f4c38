"""The tables of a GPU where there is none: they are rehearsed, the step is the training loop's, cells are right."""

import json
import os
import types

import pytest
import torch

from benchmarks import gpu, kernel_cases
from benchmarks.gpu import REHEARSAL, Report, Setting, markdown
from benchmarks.host_waits import host_waits
from benchmarks.kernel_cases import Case, Sizes, blob_mask, measure_kernel, require_equal
from benchmarks.timing import random_batch
from config import AugmentConfig
from datasets.augment import augment
from yolo import assigners

CPU = torch.device("cpu")
PARTS = "upload augment teacher student detection distillation backward clip wait update".split()


@pytest.mark.slow
def test_the_rehearsal_writes_every_table(tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setenv("KERNELS", "auto")
    monkeypatch.setattr(gpu, "TEACHER", "yolov8n")
    monkeypatch.setattr(gpu.gc, "collect", lambda: None)  # of 22 rows: half of the time
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "results")]) == 0
    assert os.environ["KERNELS"] == "auto"
    report = json.loads((tmp_path / "results" / "gpu.json").read_text(encoding="utf-8"))
    assert list(report) == ["heading", "training", "kernels", "agreement"]  # what matters most comes first
    (agreement,) = report["agreement"]
    assert agreement["largest difference"] == agreement["difference at the end"] == 0 < agreement["last loss"]
    taught, alone = (row for row in report["training"] if row["contestant"] == "eager")
    assert (taught["taught"], alone["taught"]) == ("yes", "no")
    for row in (taught, alone):
        assert row["images/s"] > 0 and [key for key in row if key.endswith(" %")] == [f"{part} %" for part in PARTS]
        assert sum(row[f"{part} %"] for part in PARTS) == pytest.approx(100)
        assert all(line.startswith("yolo/") for line in row["waits by line"])  # none of augmentation or distillation
    assert taught["teacher %"] > alone["teacher %"] and taught["losses"][0] > alone["losses"][0]
    written = (tmp_path / "results" / "gpu.md").read_text(encoding="utf-8")
    for name in ("kl (2, 50, 80) bfloat16", "cwd", "masked mse", "nms, 50 boxes", "roi align", "deformable"):
        assert f"\n| {name}" in written
    assert all(row["eager ms"] > 0 and "kernel ms" not in row for row in report["kernels"])
    assert f"written to {tmp_path}" in capsys.readouterr().out


def test_the_step_has_the_losses_of_the_training_loop_and_no_wait(one_thread, monkeypatch):
    student, _, forward = gpu.our_forward(Setting("yolov8n", False, "eager", CPU))
    images, targets = random_batch(2, 64)
    marks: list[str] = []
    with monkeypatch.context() as patch, host_waits(CPU) as waits:
        patch.setattr(assigners, "is_asynchronous", lambda device: True)
        found = forward(images, targets, marks.append)
    assert not waits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = student(images)
    expected = student.losses(expected, targets)
    assert set(found) == {"box", "cls", "dfl"} and marks == ["teacher", "student", "detection", "distillation"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_rows_that_fail_or_come_too_late_cost_the_others_nothing(tmp_path, capsys):
    def fail(error):
        raise error

    report = Report(tmp_path, "a GPU", minutes=1)
    report.measure("training", {"contestant": "peer"}, lambda rows: fail(ImportError("no", name="ultralytics")))
    report.measure("training", {"contestant": "graphs"}, lambda rows: fail(RuntimeError("no memory\nat all | ever")))
    report.measure("training", {"contestant": "eager"}, lambda rows: {"images/s": 10.0, "before": len(rows)})
    assert report.failures() == 1
    report.end = 0.0
    report.measure("kernels", {"case": "kl"}, lambda rows: fail(AssertionError("begun")))
    assert report.failures() == 1
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [row.get("error") for row in found["training"]] == [
        "not installed: ultralytics", "RuntimeError: no memory", None
    ]  # fmt: skip
    assert found["training"][2]["before"] == 2 and found["kernels"] == [{"case": "kl", "error": "left out: no time"}]
    assert "no memory" in capsys.readouterr().out


def test_cells_of_a_table():
    rows = [{"case": "a|b", "GB": 0.258048, "waits": 3, "by line": {}}, {"case": "c", "GB": None, "of copy": 0.5}]
    assert markdown(rows).splitlines()[2:] == ["| a/b | 0.258 | 3 |  |", "| c |  |  | 0.5 |"]


def test_losses_that_differ_from_those_of_eager_are_noticed(monkeypatch):
    rows = [
        {"student": "yolov8n", "taught": "no", "contestant": "peer", "images/s": 1e-9, "losses": [9.0]},
        {"student": "yolov8n", "taught": "no", "contestant": "eager", "images/s": 1.0, "losses": [3.0]},
    ]
    setting = Setting("yolov8n", False, "compile", CPU, REHEARSAL)
    step = lambda value: lambda setting: lambda number, mark: mark("update") or {"box": 1.0, "cls": value}
    monkeypatch.setattr(gpu, "build_step", step(2.01))
    assert gpu.measure_training(setting, rows)["of peer"] > 1
    for value in (2.1, float("nan")):
        monkeypatch.setattr(gpu, "build_step", step(value))
        with pytest.raises(ValueError, match="losses: off by"):
            gpu.measure_training(setting, rows)


def test_registers_are_read_from_what_was_compiled(monkeypatch):
    form = types.SimpleNamespace(n_regs=40, n_spills=0, metadata=types.SimpleNamespace(shared=512))
    kernel = types.SimpleNamespace(device_caches={0: ({"key": form},)})
    monkeypatch.setattr("kernels.masked_mse._mse_kernel", kernel, raising=False)
    row = {"kernel": "kernels.masked_mse._mse_kernel", "registers": 40, "spilled bytes": 0, "shared bytes": 512}
    assert list(gpu.resources()) == [row]


def test_bytes_of_the_full_size():
    """Three passes over 32 x 8,400 x 80 float32 are 258 MB; over 32 x 256 x 80 x 80 bfloat16, 315 MB."""
    gigabytes = {case.name: case.gigabytes for case in kernel_cases.loss_cases(Sizes())}
    assert gigabytes["kl (32, 8400, 80) float32"] == pytest.approx(0.258048)
    assert gigabytes["cwd (32, 256, 80, 80) bfloat16"] == pytest.approx(0.3145728)
    assert gigabytes["masked mse, 20% marked, (32, 256, 80, 80) float32"] == pytest.approx(1.4 * 0.2097152)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_masks_cover_their_share(share):
    assert blob_mask((3, 5, 80, 80), share).float().mean().item() == pytest.approx(share, abs=0.01)


def test_a_contestant_that_is_wrong_is_not_timed():
    case = Case("b", lambda generator: (torch.ones(3),), lambda x: x, peer=lambda x: 2 * x)
    row = measure_kernel(case, REHEARSAL.kernels, CPU, 1.0)
    assert "peer ms" not in row and row["eager ms"] > 0 and row["error"].startswith("ValueError: peer: off by 1")
    row = measure_kernel(Case("b", case.make, case.run, peer=lambda x: 1.01 * x), REHEARSAL.kernels, CPU, 1.0)
    assert row["peer ms"] > 0 and "error" not in row


def test_results_agree_in_shape_number_and_size():
    x = torch.tensor([100.0, 0.001])
    require_equal((x + 1, [x]), (x, [x]), 0.02, "close")
    for found, tolerance in (((x + 3, [x]), 0.02), ((x, [x[:1]]), 0.02), ((x,), 0.02), ((x + 1e-4, [x]), 0.0)):
        with pytest.raises(ValueError, match="what"):
            require_equal(found, (x, [x]), tolerance, "what")
    with pytest.raises(ValueError, match="what"):
        require_equal(x * float("nan"), x, 0.02, "what")


def test_what_is_compiled_is_what_is_timed():
    for case in (c for c in kernel_cases.kernel_cases(REHEARSAL.kernels) if c.specification):
        inputs = case.make(torch.Generator().manual_seed(0))
        require_equal(case.around(case.specification)(*inputs), case.run(*inputs), 1e-5, case.name)


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
    assert all(key.startswith("tests/benchmarks/test_gpu.py:") for key in waits)


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
    _, targets = random_batch(4, 64)
    images = torch.empty(4, 3, 64, 64, device="meta")
    with host_waits(images.device) as waits:
        augment(images, targets, generator=torch.Generator().manual_seed(0), settings=settings)
    assert not waits
