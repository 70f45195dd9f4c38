"""The benchmark of gradient matching still runs, and its exit code says whether its limits hold."""

from types import SimpleNamespace

from benchmarks import condense
from tests.forked_processes import run_forked

TINY = ["--arch", "yolov8_narrow", "--image-size", "32", "--stored", "2", "--steps", "1", "--threads", "1"]


def test_prints_its_table_and_keeps_its_limits(capsys, monkeypatch, tmp_path):
    """Each row in a process of its own, for its peak of memory."""
    fork = lambda command, **_: SimpleNamespace(stdout=run_forked(condense.main, command[2:], folder=tmp_path).text)
    monkeypatch.setattr(condense.subprocess, "run", fork)
    assert condense.main([*TINY, "--seconds", "100"]) == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "32 px, 16 real images" in title and head.split()[-2:] == ["peak", "GB"] and len(rows) == 1
    arch, stored, in_step, seconds, _, gigabytes = rows[0].split()
    assert (arch, stored, in_step) == ("yolov8_narrow", "2", "2") and float(seconds) > 0 and 0.1 < float(gigabytes) < 2


def test_a_limit_that_is_broken_is_an_exit_code(monkeypatch, capsys):
    found = {"seconds": 1.0, "cpu": 1.0, "gigabytes": 1.0}
    monkeypatch.setattr(
        condense.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": condense.json.dumps(found)})
    )
    assert condense.main([*TINY]) == 0
    assert condense.main([*TINY, "--seconds", "0.5"]) == 1 and condense.main([*TINY, "--gigabytes", "0.5"]) == 1
