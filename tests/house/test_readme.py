"""README.md keeps its promises: its example runs and prints what it shows, its paths exist, and it stays short."""

import ast
import inspect
import os
import re
import subprocess
import sys

import pytest

from distill.losses.localization import localization_kl
from distill.terms import LOSSES
from tests.conftest import ROOT
from tests.distill.losses.test_mutants import MUTANTS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_it_fits_a_first_look():
    assert len(TEXT.splitlines()) <= 140


def test_the_example_prints_what_it_shows():
    code, printed = re.search(r"```python\n(.*?)```\n +(\{.*?\})\n", TEXT, re.DOTALL).groups()
    assert len(code.splitlines()) <= 22
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert ast.literal_eval(result.stdout) == pytest.approx(ast.literal_eval(printed), abs=0.02)


def test_the_loss_it_shows_is_the_one_of_the_code():
    """But for the annotations of its signature."""
    shown = re.search(r"  ```python\n(  def localization_kl.*?)  ```", TEXT, re.DOTALL)[1]
    source = {line.strip() for line in inspect.getsource(localization_kl).splitlines()}
    assert not [line for line in map(str.strip, shown.splitlines()[2:]) if line not in source]
    arguments = inspect.signature(localization_kl).parameters
    assert re.findall(r"(\w+)(?:=[\w.]+)?[,)]", shown.splitlines()[0].split("*, ")[1]) == list(arguments)


@pytest.mark.parametrize("page", ["README.md", "docs/verification.md"])
def test_wrong_variants_are_counted(page):
    assert f"{len(MUTANTS)} of {len(MUTANTS)}" in (ROOT / page).read_text(encoding="utf-8")


def test_it_names_every_loss_once():
    table = TEXT.split("## Losses\n")[1].split("\n## ")[0].split("|---|---|")[1]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(LOSSES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_that_are_named_exist(page):
    named = set(re.findall(r"configs/[\w/]+\.yaml", page.read_text(encoding="utf-8")))
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_the_map_of_the_code_is_whole():
    """Every command and every folder of the checkout that holds code or settings, and nothing that is not there."""
    named = re.findall(r"(?<![\w/.])[a-z_]+(?:/|\.py)(?=\s)", TEXT.split("## Map of the code\n")[1].split("```")[1])
    folders = {path.parent.name + "/" for path in ROOT.glob("*/__init__.py")} | {"configs/", "tests/"}
    assert folders <= set(named)
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_named_exist(page):
    """Files that `python` is given, and modules of -m that are ours."""
    text = page.read_text(encoding="utf-8")
    modules = [name.replace(".", "/") for name in re.findall(r"python -m ([a-z_.]+\w)", text)]
    ours = [name for name in modules if (ROOT / name.split("/")[0]).is_dir()]
    missing = [name for name in re.findall(r"python ([\w/]+\.py)", text) if not (ROOT / name).is_file()]
    missing += [m for m in ours if not (ROOT / f"{m}.py").is_file() and not (ROOT / m / "__main__.py").is_file()]
    assert not missing


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_paths_in_backticks_exist(page):
    """Those that begin with a folder of the checkout; recipes name files that are to be written."""
    text = page.read_text(encoding="utf-8").split("## How to add")[0]
    named = re.findall(r"`((?:[a-z_]+/)+(?:[\w.]+\.(?:py|md|yaml))?)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]
