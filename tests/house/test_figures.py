"""The figures of docs/ show the numbers that the reports have now."""

import runpy

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "figures"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "svg")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_drawn_from_its_reports(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    drawn = runpy.run_path(str(FOLDER / f"{name}.py"))["picture"]()
    assert drawn == (FOLDER / f"{name}.svg").read_text(encoding="utf-8"), f"draw it anew: python docs/figures/{name}.py"


def test_every_script_is_found():
    assert {"few_labels", "gains", "smaller_models"} <= set(SCRIPTS)
