"""docs/losses/ holds a section for every loss a config can name, and each says what the code says."""

import inspect
import json
import re
import sys

import pytest
import yaml

from config import TermConfig, from_tree
from distill.checks import check_term
from distill.terms import LOSSES
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "losses"
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
SECTIONS = [
    (page, *section.split("\n", 1))
    for page, text in TEXTS.items()
    if page != "README"
    for section in text.split("\n## ")[1:]
]
BY_NAME = {name: section for _, name, section in SECTIONS}
ROWS = {row["name"]: row for row in json.loads((ROOT / "docs/reports/bccd_study.json").read_text())["rows"]}


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", BY_NAME[name], re.DOTALL)


def line_after(name: str, label: str) -> str:
    """The bullet of a section that begins so, on one line."""
    (found,) = re.findall(rf"^- {label}: (.*(?:\n  .*)*)", BY_NAME[name], re.MULTILINE)
    return " ".join(found.split())


def holds(text: str, part: str) -> bool:
    """Whether the lines of `part` stand in `text` one after the other, whatever their indent."""
    text_lines, lines = ([line.strip() for line in t.strip().splitlines()] for t in (text, part))
    return any(text_lines[start : start + len(lines)] == lines for start in range(len(text_lines)))


def docstrings(loss) -> list[str]:
    """That of a loss; of a class also those of its file, which may be about one method."""
    module = sys.modules[loss.__module__]
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    parts = (module, *functions, loss) if inspect.isclass(loss) else (loss,)
    return [inspect.getdoc(part) or "" for part in parts]


def test_every_loss_has_one_section_and_one_row():
    assert sorted(name for _, name, _ in SECTIONS) == sorted(LOSSES)
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md#(\w+)\)", TEXTS["README"], re.MULTILINE)
    assert sorted((page, name) for name, page, _ in rows) == sorted((page, name) for page, name, _ in SECTIONS)
    assert all(name == anchor for name, _, anchor in rows)


@pytest.mark.parametrize("name", LOSSES)
def test_equation_and_lines_are_those_of_the_code(name):
    (equation,) = blocks(name, "text")
    assert re.match(r"L\s*=", equation)
    assert any(holds(text, equation) for text in docstrings(LOSSES[name].loss))
    (lines,) = blocks(name, "python")
    sources = re.findall(r"\(\.\./\.\./([\w/]+\.py)\)", line_after(name, "Source"))
    assert inspect.getsourcefile(inspect.unwrap(LOSSES[name].loss)) == str(ROOT / sources[0])
    assert holds((ROOT / sources[-1]).read_text(encoding="utf-8"), lines)


@pytest.mark.parametrize("name", LOSSES)
def test_the_config_line_is_a_term(name):
    (line,) = blocks(name, "yaml")
    term = from_tree(TermConfig, yaml.safe_load(line), source="the page")
    assert term.loss == name
    check_term(term, "terms.0", (term.teacher,))


@pytest.mark.parametrize("name", LOSSES)
def test_parameters_are_those_of_the_signature(name):
    told = line_after(name, "Parameters")
    expected = {key: argument.default for key, argument in LOSSES[name].parameters().items()}
    found = yaml.safe_load("\n".join(re.findall(r"`(.*?)`", told))) or {}
    assert found == {key: list(value) if isinstance(value, tuple) else value for key, value in expected.items()}
    assert list(found) == list(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_what_was_measured_is_what_the_report_has(name):
    told = line_after(name, "Measured here")
    row = ROWS.get(name)
    if row is None:
        assert told == "not yet"
        return
    difference = row["differences"][0]
    assert told.startswith(f"{difference['mAP_mean']:+.3f}")
    assert f"({len(difference['seeds'])} seed" in told and told.endswith(f"{row['cost_per_step']:.2f}x")
    assert f"{difference['mAP_mean']:+.3f}" in re.search(rf"`{name}`.*", TEXTS["README"])[0]


def test_a_wrong_line_is_noticed():
    text = "a = 1\n    b = 2\n    c = 3\n"
    assert holds(text, "b = 2\nc = 3\n")
    assert not holds(text, "b = 2\nc = 4\n") and not holds(text, "a = 1\nc = 3\n")
