"""The parts of the time to the first step; and that a run does without torch's compiler, which is slow to import."""

import pytest

from benchmarks import start
from config import to_tree
from tests.tiny_training import tiny_config
from yaml_files import dump_yaml


def test_prints_its_parts(tiny_data, tmp_path, capsys):
    config = tiny_config(tiny_data, tmp_path / "runs", student={"arch": "yolov8_narrow"})
    (tmp_path / "tiny.yaml").write_text(dump_yaml(to_tree(config)))
    assert start.main([str(tmp_path / "tiny.yaml"), "epochs=3", "--seconds", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [
        "start Python", "import torch", "import train", "read the set, build the models"
    ]  # fmt: skip
    seconds = [float(line.rsplit("  ", 1)[1].split(" s")[0]) for line in lines]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.05)
    assert lines[-1].startswith("together") and lines[-1].endswith("without torch's compiler")
    assert not (tmp_path / "runs").exists()


def test_a_limit_that_is_broken_is_an_exit_code(monkeypatch):
    done = lambda code: type("Done", (), {"returncode": code, "stdout": '{"parts": {"a": 2.0}, "compiler": false}'})
    monkeypatch.setattr(start.subprocess, "run", lambda *_, **__: done(0))
    assert start.main(["c.yaml"]) == 0 and start.main(["c.yaml", "--seconds", "1.5"]) == 1
    monkeypatch.setattr(start.subprocess, "run", lambda *_, **__: done(2))
    assert start.main(["c.yaml"]) == 2
