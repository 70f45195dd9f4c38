"""The help of every command has an example, all its exit codes, and a text and the default of each argument."""

import argparse
import importlib
import re

import pytest

CODES = {  # what each command may exit with, besides 0, 2 for a mistake, 5 for the disk and 130 after Ctrl-C
    "train": {1, 3, 4, 143},
    "eval": {3, 4},
    "predict": {1, 4, 143},
    "export": {4},
    "compare": {3, 4, 143},
    "condense": {4, 143},
    "engine.pruning": set(),
    "engine.search.__main__": {4, 143},
    "weights.__main__": {4},
    "datasets.download": set(),
    "datasets.shapes": set(),
    "datasets.scan": set(),
    "datasets.split": set(),
    "datasets.convert": set(),
}


@pytest.mark.parametrize("name", CODES)
def test_help_is_complete(name, monkeypatch, capsys):
    parsers = []
    write = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: (parsers.append(self), write(self)))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Example" in text
    listed = " ".join(text.split("Exit codes: ", 1)[1].split())
    codes = {int(code) for code in re.findall(r"(?:^|, )(\d+) ", listed)}
    assert codes == {0, 2, 5, 130} | CODES[name]
    for action in parsers[0]._actions:
        assert action.help, action.dest
        if action.default not in (None, False, argparse.SUPPRESS) and action.default not in ([], ()):
            shown = parsers[0]._get_formatter()._expand_help(action)
            is_said = str(action.default) in shown or "default" in shown
            assert is_said or isinstance(action.default, tuple), f"{name} {action.option_strings}: {shown}"
