"""What a command says of arguments that it cannot use: one line, with what was found and what was expected."""

import subprocess
import sys
from pathlib import Path

import pytest

from errors import ArgumentParser, UserError, counted, shortened
from tests.forked_processes import run_as_main, run_forked

ROOT = Path(__file__).resolve().parent.parent


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("tool.py", "A tool.", epilog="Example: tool.py a")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--count", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--kind", choices=["one", "two"])
    return parser


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "found no config; tool.py --help has an example"),
        ("a --count x", "argument --count: found 'x', expected a whole number"),
        ("a --share x", "argument --share: found 'x', expected a number"),
        ("a --count", "argument --count: expected one argument"),
        ("a --kind three", "argument --kind: found 'three', expected one of one, two"),
        ("a b=1 --wrong 3", "argument --wrong: no such argument; tool.py --help lists them"),
    ],
)
def test_each_mistake_is_one_line(line, said):
    with pytest.raises(UserError) as error:
        make_parser().parse_intermixed_args(line.split())
    assert str(error.value) == said and error.value.exit_code == 2


def test_a_command_without_its_arguments_ends_in_one_line():
    done = subprocess.run([sys.executable, "compare.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: found no ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["condense.py", "predict.py", "weights", "datasets.split"])
def test_so_does_every_other(command, tmp_path):
    done = run_forked(run_as_main, command, folder=tmp_path)
    assert done.code == 2, done.text
    assert done.text.startswith("error: found no ") and done.text.count("\n") == 1


def test_one_is_singular():
    assert [counted(n, "picture") for n in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
    assert [counted(n, "class") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [counted(2, noun) for noun in ("epoch", "batch", "box")] == ["2 epochs", "2 batches", "2 boxes"]


def test_a_long_list_of_names_is_cut():
    assert [shortened(names, 2) for names in ([], "a", "ab", "abc", range(5))] == [
        "", "a", "a, b", "a, b and 1 more", "0, 1 and 3 more",
    ]  # fmt: skip
    assert shortened(range(99)).endswith("10, 11 and 87 more")
