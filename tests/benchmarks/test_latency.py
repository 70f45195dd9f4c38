"""The benchmark of latency still runs, counts what it says it counts, and compares like with like."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import latency
from errors import UserError
from tests.exporting import save_model


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_onnx(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_prints_its_table(capsys, without_onnx):
    latency.main(["--image-size", "64", "--rounds", "1", "--threads", "1"])
    said = capsys.readouterr().out
    assert "yolov8n: 3.157 M parameters, 0.09 GFLOP at 64 px" in said and "their rows are missing" in said
    assert all(name in said for name in latency.FORMS)


def test_times_a_checkpoint(tmp_path, capsys, without_onnx):
    path = save_model(tmp_path / "model.pt", "yolov5nu")
    latency.main(["--checkpoint", str(path), "--image-size", "64", "--rounds", "1", "--cpu-time"])
    assert "model.pt" in (said := capsys.readouterr().out) and "CPU ms" in said


def test_detectors_in_one_run(tmp_path, capsys, monkeypatch, exported):
    """The ratio is that of the rounds: a machine that is ten times slower in one round does not change it.

    No graph is run, so one for both will do.
    """
    import onnx

    trace = lambda *args, **options: onnx.load(exported.fixed)
    monkeypatch.setattr(latency, "onnx_graph", SimpleNamespace(trace=trace))
    trained = str(save_model(tmp_path / "model.pt", "yolov5nu"))
    times = {"yolov8_narrow": [1.0, 10.0, 1.0], trained: [2.0, 20.0, 2.0]}
    monkeypatch.setattr(latency, "take_turns", lambda calls, args: {call: times[call[0]] for call in calls})
    output = tmp_path / "times.json"
    latency.main(["--models", ",".join(times), "--image-size", "64", "--output", str(output)])
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("64 px, torch ") and head.split()[:6] == [
        "detector",
        "M",
        "parameters",
        "GFLOP",
        "pytorch",
        "ms",
    ]
    assert [row.split()[0] for row in rows] == list(times)
    assert [row.split()[3:5] for row in rows] == [["1000.0", "1.00"], ["2000.0", "2.00"]]
    costs = json.loads(output.read_text())["models"]
    assert [cost["pytorch_ratio"] for cost in costs] == [1, 2] and all(cost["flops"] > 0 for cost in costs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models"], "argument --models: expected one argument"),
        (["--rounds", "many"], "argument --rounds: found 'many', expected a whole number"),
        (["--rounds", "0"], "--rounds: found 0, expected at least 1"),
        (["--image-size", "33"], "--image-size: found 33, expected a multiple of 32"),
        (["--models", "yolov8n", "--output", "."], r"--output: found \., expected a file in a folder that is there"),
        (["--output", "a.json"], r"--output: found a\.json, expected .*, with --models"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_timed(words, message):
    with pytest.raises(UserError, match=message) as caught:
        latency.main(words)
    assert "\n" not in str(caught.value)


def test_flops_are_two_a_multiplication():
    """A convolution 3 -> 4, 3x3, on 8 x 8 pixels: 2 * 4 * 8 * 8 * 3 * 9."""
    model = nn.Conv2d(3, 4, 3, padding=1)
    model.decode = lambda output: output
    assert latency.count_flops(model, torch.zeros(1, 3, 8, 8)) == 2 * 4 * 8 * 8 * 3 * 9


def test_the_best_forms_are_compared(capsys):
    seconds = {("ours", name): [0.001 * (number + 1)] for number, name in enumerate(latency.FORMS)}
    seconds |= {("peer", name): [0.002 * (number + 1)] for number, name in enumerate(reversed(latency.FORMS))}
    latency.print_table(seconds, list(latency.FORMS))
    said = capsys.readouterr().out.splitlines()
    first, *_, last = latency.FORMS
    best_peer = list(latency.FORMS)[-2]
    assert said[-2] == f"our best of these / its best: {first} / {best_peer}: 4.00"
    assert said[-1] == f"our best of these / its best: {last} / {last}: 0.40"
