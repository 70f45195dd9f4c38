"""README.md keeps its promises: its example runs and prints what it shows, its paths exist, and it stays short."""

import ast
import inspect
import re
import subprocess
import sys

import pytest
import torch

import retort
import train
from distill.losses.localization import localization_kl
from distill.terms import LOSSES
from tests.conftest import ROOT
from tests.distill.losses.test_mutants import MUTANTS
from tests.exporting import save_model
from tests.tiny_training import write_dataset

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_it_fits_a_first_look():
    assert len(TEXT.splitlines()) <= 140


def test_the_step_of_ones_own_prints_what_it_shows(capsys):
    code, printed = re.search(r"```python\n((?:(?!```).)*?)```\n +(\{.*?\})\n", TEXT, re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line]) <= 15
    exec(code, {})
    assert ast.literal_eval(capsys.readouterr().out) == pytest.approx(ast.literal_eval(printed), abs=0.02)


def test_the_one_loss_runs():
    (call,) = re.findall(r"`(retort\.losses\..*?)`", TEXT)
    assert eval(call, {"retort": retort, "a": torch.ones(1, 2, 4, 4), "b": torch.zeros(1, 2, 4, 4)}) == 1.0


def test_the_first_example_runs(tmp_path, monkeypatch, capsys):
    """With its files in place: a model, a picture, and a set of pictures, of which it trains one epoch at 64 px."""
    monkeypatch.setattr("engine.training.reporting.draw", lambda *args: None)
    data = write_dataset(tmp_path / "data" / "mine", train=8, test=2)
    (data / "images" / "test" / "000.png").rename(tmp_path / "photo.jpg")
    save_model(tmp_path / "data" / "weights" / "yolov8n" / "yolov8n.pt", "yolov8_narrow")
    monkeypatch.chdir(tmp_path)
    train.main(["--init", "own.yaml", "--data", str(data)])
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    smaller = dict(student={"arch": "yolov8_narrow"}, image_size=64, batch_size=8, device="cpu", data={"workers": 0})
    assert "epochs=10)" in code
    exec(code.replace("epochs=10)", f"epochs=1, **{smaller})") + 'print(report["test"]["mAP50"])', {})
    assert "photo.jpg: 64 x 64, " in capsys.readouterr().out
    assert (tmp_path / "out.jpg").is_file() and (tmp_path / "runs" / "own" / "report.json").is_file()


@pytest.mark.slow  # a process of its own imports PyTorch
def test_python_finds_it_from_elsewhere(tmp_path):
    path = re.search(r"`(sys\.path\.insert.*?)`", TEXT)[1].replace("path/to/retort", str(ROOT))
    code = f"import sys; {path}; import retort; print(len(retort.ARCHITECTURES))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout) > 20, result.stderr


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
    """To a file that exists, and to a heading of it."""
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    links = [(page.parent / target if target else page, anchor) for target, anchor in links if "://" not in target]
    assert not [target for target, _ in links if not target.exists()]
    assert not [(target.name, anchor) for target, anchor in links if anchor and anchor not in anchors(target)]


def anchors(page):
    """What GitHub makes of the headings: lower case, hyphens for spaces, other punctuation left out."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    headings = [re.sub(r"\]\([^)]*\)", "", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
