"""README.md keeps its promises: its example runs and prints what it shows, its paths exist, and it stays short."""

import ast
import os
import re
import subprocess
import sys

import pytest

from distill.terms import LOSSES
from tests.conftest import ROOT

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
    assert folders - {"benchmarks/"} <= set(named)
    assert all((ROOT / name).exists() for name in named)
