"""The help of every command has an example, the exit codes and a text for each argument."""

import argparse
import importlib

import pytest

COMMANDS = ("train", "eval", "predict", "export", "compare", "condense", "engine.pruning.__main__", "weights.__main__")
TOOLS = ("datasets.download", "datasets.shapes", "datasets.scan", "datasets.split", "datasets.convert")


@pytest.mark.parametrize("name", COMMANDS + TOOLS)
def test_help_is_complete(name, monkeypatch, capsys):
    parsers = []
    write = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: (parsers.append(self), write(self)))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Example" in text and "Exit codes: 0 " in text
    assert [action.dest for action in parsers[0]._actions if not action.help] == []
