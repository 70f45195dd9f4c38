"""benchmarks/open_set.py: the generated set is read without a fault, and every object of it, both times."""

import contextlib
import io
import re
from types import SimpleNamespace

from benchmarks import open_set
from datasets import kept_index


def test_every_object_of_the_set_is_read(capsys, monkeypatch):
    """In this process, and without the wait for files that are no longer new."""

    def run_here(command, **_):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = open_set.main(command[2:])
        return SimpleNamespace(returncode=code, stdout=said.getvalue())

    monkeypatch.setattr(open_set.subprocess, "run", run_here)
    for module in (open_set, kept_index):
        monkeypatch.setattr(module, "RECENT_NS", 0)
    assert open_set.main(["--pictures", "20"]) == 0
    said = capsys.readouterr().out
    line = r" time: opened in \S+ CPU seconds \(\S+ by the clock\), counted in \S+, kept in \S+, [1-9]\d* MB at most\n"
    assert re.fullmatch(rf"20 pictures, \d+ objects\nfirst{line}second{line}", said)
