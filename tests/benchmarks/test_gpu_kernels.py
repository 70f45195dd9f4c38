"""The GPU benchmark where there is no GPU: its cases are what they say, and what it computes from times is right."""

import json
import os

import pytest
import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import Case, assert_agree, blob_mask, measure, row, size_of, table, to

CPU = torch.device("cpu")


def test_it_runs_on_a_cpu_and_writes_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KERNELS", "auto")
    gpu_kernels.main(["--device", "cpu", "--small", "--rounds", "1", "--output", str(tmp_path / "results")])
    said, written = capsys.readouterr().out, (tmp_path / "results" / "gpu_kernels.md").read_text(encoding="utf-8")
    assert os.environ["KERNELS"] == "auto"
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and lines[2] in said
    for name in ("kl (2, 50, 80) bfloat16", "cwd", "masked mse", "nms, 50 boxes", "roi align", "deformable"):
        assert any(line.startswith(f"| {name}") for line in lines)
    report = json.loads((tmp_path / "results" / "gpu_kernels.json").read_text(encoding="utf-8"))
    assert len(report["milliseconds"]) == len(lines) - 2
    assert all(len(times["eager"]) == 1 and "kernel" not in times for times in report["milliseconds"].values())


def test_bytes_of_the_full_size():
    """Three passes over 32 x 8,400 x 80 float32 are 258 MB; over 32 x 256 x 80 x 80 bfloat16, 315 MB."""
    gigabytes = {case.name: case.gigabytes for case in gpu_kernels.loss_cases(small=False)}
    assert gigabytes["kl (32, 8400, 80) float32"] == pytest.approx(0.258048)
    assert gigabytes["cwd (32, 256, 80, 80) bfloat16"] == pytest.approx(0.3145728)
    assert gigabytes["masked mse (32, 256, 80, 80) float32, 1/5"] == pytest.approx(1.4 * 0.2097152)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_masks_cover_their_share(share):
    assert blob_mask((3, 5, 80, 80), share).float().mean().item() == pytest.approx(share, abs=0.01)


def test_a_line_of_the_table():
    targets = {"of copy": 0.8, "eager": 5.0, "compile": 1.5, "ms": 0.07}
    case = Case("a", lambda generator: (), lambda: None, gigabytes=0.24, targets=targets)
    times = {"kernel": [0.09, 0.06, 0.05], "eager": [0.6, 0.6, 0.7], "compile": [0.06, 0.06, 0.06]}
    numbers = row(case, times, copy=4.0)
    assert numbers["TB/s"] == pytest.approx(4.0) and numbers["of copy"] == pytest.approx(1.0)
    assert numbers["targets"] == "missed: compile"
    times["compile"] = [0.1] * 3
    assert row(case, times, copy=4.0)["targets"] == "met"
    assert row(case, times, copy=6.0)["targets"] == "missed: of copy"
    slow = {"kernel": [0.08], "eager": [1.0], "compile": [1.0]}
    assert row(case, slow, copy=3.0)["targets"] == "missed: ms"
    alone = {"name": "a", "GB": 0.24, "TB/s": None, "of copy": None, "eager": 1.0}
    assert row(case, {"eager": [1.0]}, copy=4.0) == alone
    line = "| a | 0.240 | 4.000 | 100% | 0.060 | 0.600 | 0.060 |  | missed: compile |"
    assert table([numbers]).splitlines()[2] == line


def test_a_contestant_that_is_wrong_is_not_timed():
    case = Case("b", lambda generator: (torch.ones(3),), lambda x: x, peer=lambda x: 2 * x)
    with pytest.raises(AssertionError, match="b, peer"):
        measure(case, 1, CPU)
    times = measure(Case("b", case.make, case.run, peer=lambda x: 1.01 * x), 4, CPU)
    assert set(times) == {"eager", "peer"} and len(times["peer"]) == 4


def test_results_agree_in_shape_number_and_size():
    x = torch.tensor([100.0, 0.001])
    assert_agree((x, [x]), (x + 1, [x]), 0.02, "close")
    for found, tolerance in (((x + 3, [x]), 0.02), ((x, [x[:1]]), 0.02), ((x,), 0.02), ((x + 1e-4, [x]), 0.0)):
        with pytest.raises(AssertionError, match="what"):
            assert_agree(found, (x, [x]), tolerance, "what")


def test_what_is_compiled_is_what_is_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for case in (c for c in gpu_kernels.loss_cases(small=True) + gpu_kernels.pooling_cases(small=True) if c.compiled):
        inputs = case.make(torch.Generator().manual_seed(0))
        assert_agree(case.compiled()(*inputs), case.run(*inputs), 1e-5, case.name)


def test_inputs_keep_their_leaves():
    given = ([torch.ones(2, requires_grad=True) * 1], torch.ones(3), "word", [(2, 2)])
    moved = to(([torch.ones(2, requires_grad=True)], *given[1:]), CPU)
    assert moved[0][0].is_leaf and moved[0][0].requires_grad and not moved[1].requires_grad
    assert moved[2:] == ("word", [(2, 2)]) and size_of(moved) == 20
