"""docs/coming_from.md: every command of another project is answered as the page says, and what it gives runs here."""

import re
import shlex

import pytest

import eval
import export
import predict
import train
from config import Config, from_tree, load_config, read_tree
from engine.command_line.keys import SECTIONS, keys_of
from engine.command_line.translation import PROJECTS, RENAMED, keys_by_name
from engine.comparison.study import load_study
from errors import UserError
from tests.conftest import ROOT

PATH = ROOT / "docs" / "coming_from.md"
PAGE = PATH.read_text(encoding="utf-8")
COMMANDS = {"train.py": train, "eval.py": eval, "predict.py": predict}
ROWS = re.findall(r"^\| `((?:python|yolo) [^`]+)` \| `(python [^`]+)`", PAGE, re.MULTILINE)
KEYS = re.findall(r"`([^`]+)` \| `([^`]+)`(?= \|)", PAGE.split("## Keys\n")[1].split("\n\n`python train.py")[0])


def test_it_is_short_and_linked():
    assert len(PAGE.splitlines()) <= 150
    for page in ("README.md", "docs/README.md"):
        assert "coming_from.md" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(("there", "here"), ROWS, ids=[there for there, _ in ROWS])
def test_each_command_is_answered(there, here):
    _, script, *argv = shlex.split(there)
    if there.startswith("python "):
        with pytest.raises(UserError) as error:
            COMMANDS[script].main(argv)
        assert str(error.value).split("expected: ")[-1] == here
    check_command(here)


def check_command(line: str) -> None:
    """UserError for a command that would not begin."""
    _, script, *argv = shlex.split(line)
    if script == "export.py":
        assert export.parse_arguments(argv)
    elif script in ("eval.py", "predict.py"):
        assert COMMANDS[script].parse_arguments(argv)
    else:
        config, *overrides = argv
        config = ROOT / ("configs/own_data.yaml" if config == "CONFIG" else config)
        if script == "compare.py":
            load_study(config, overrides)
        elif config.name == "own_data.yaml":
            from_tree(Config, read_tree(config, overrides), source=str(config))
        else:
            load_config(config, overrides)


def test_the_published_projects_are_all_there():
    assert len(ROWS) >= 13
    shown = " ".join(there for there, _ in ROWS)
    for project in PROJECTS:
        assert all(f"--{flag}" in shown for flag in project.flags)


def test_the_keys_are_those_that_a_flag_is_answered_with():
    assert len(KEYS) == 20
    answers = {name: f"{key}={{}}" for name, key in keys_by_name().items()} | RENAMED
    for there, here in KEYS:
        assert answers[there].split("=")[0] == here, there
    keys = {key.name for _, prefix, cls in SECTIONS for key in keys_of(prefix, cls)}
    named = {name for name in re.findall(r"`((?:optimizer|data|augment|evaluation)\.\w+)[`=]", PAGE)}
    assert not named - keys - {"data.yaml"}


def test_numbers_of_losses_are_those_of_arithmetic():
    import math

    assert f"{math.log(21):.2f} for VOC" in PAGE and f"ln 2 = {math.log(2):.2f}" in PAGE
