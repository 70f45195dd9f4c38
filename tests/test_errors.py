"""What a command says of arguments that it cannot use, and of Ctrl-C while it starts: one line."""

import os
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


COMMANDS = sorted({path.name for path in ROOT.glob("*.py") if "run_script(main)" in path.read_text(encoding="utf-8")})
MODULES = ["weights", "engine.search", "engine.pruning"]
MODULES += sorted(
    f"datasets.{p.stem}" for p in ROOT.glob("datasets/*.py") if "run_script(main)" in p.read_text("utf-8")
)


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), *(["-m", name] for name in MODULES)], ids=" ".join)
def test_an_interrupt_while_torch_is_imported_is_one_line(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    own = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command, "a"], cwd=ROOT, env=own, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_other_programs_keep_their_traceback_of_an_interrupt(tmp_path):
    script = tmp_path / "own.py"
    script.write_text("import errors, weights\nraise KeyboardInterrupt")
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=own, capture_output=True, text=True)
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("KeyboardInterrupt\n")


def test_one_is_singular():
    assert [counted(n, "picture") for n in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
    assert [counted(n, "class") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [counted(2, noun) for noun in ("epoch", "batch", "box")] == ["2 epochs", "2 batches", "2 boxes"]


def test_a_long_list_of_names_is_cut():
    assert [shortened(names, 2) for names in ([], "a", "ab", "abc", range(5))] == [
        "", "a", "a, b", "a, b and 1 more", "0, 1 and 3 more",
    ]  # fmt: skip
    assert shortened(range(99)).endswith("10, 11 and 87 more")
