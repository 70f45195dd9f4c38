"""The figures of docs/ show the numbers that the reports have now."""

import runpy

import pytest

from engine.comparison.study import load_study
from engine.training.flops import step_flops
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "figures"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "svg")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_drawn_from_its_reports(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    drawn = runpy.run_path(str(FOLDER / f"{name}.py"))["picture"]()
    assert drawn == (FOLDER / f"{name}.svg").read_text(encoding="utf-8"), f"draw it anew: python docs/figures/{name}.py"


def test_the_curve_of_patience_counts_flops_as_a_study_does(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    counted = runpy.run_path(str(FOLDER / "patience.py"))["FLOPS"]
    rows = {row.name: row.config for row in load_study(ROOT / "configs" / "studies" / "bccd_patience.yaml").rows}
    names = {"alone": "alone_30", "taught": "taught_30", "teacher": "teacher_yolov8s"}
    flops = {kind: step_flops(rows[name]) for kind, name in names.items()}
    assert counted == {kind: pytest.approx(value / flops["alone"], abs=0.005) for kind, value in flops.items()}


def test_every_script_is_found():
    assert {"few_labels", "gains", "patience", "smaller_models"} <= set(SCRIPTS)
