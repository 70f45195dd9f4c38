"""benchmarks/open_set.py: the generated set is read without a fault, and every object of it, both times."""

import re
from types import SimpleNamespace

from benchmarks import open_set
from tests.forked_processes import run_forked


def test_every_object_of_the_set_is_read(capsys, monkeypatch, tmp_path):
    def fork(command, **_):
        done = run_forked(open_set.main, command[2:], folder=tmp_path)
        return SimpleNamespace(returncode=done.code, stdout=done.text)

    monkeypatch.setattr(open_set.subprocess, "run", fork)
    assert open_set.main(["--pictures", "20"]) == 0
    said = capsys.readouterr().out
    line = r" time: opened in \S+ CPU seconds \(\S+ by the clock\), counted in \S+, kept in \S+, [1-9]\d* MB at most\n"
    assert re.fullmatch(rf"20 pictures, \d+ objects\nfirst{line}second{line}", said)
