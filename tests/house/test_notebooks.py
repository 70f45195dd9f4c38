"""docs/notebooks: their cells run in order, without Jupyter, and they are small.

As a part of the suite they take a few steps where a reader's copy takes hundreds. NOTEBOOKS=whole (`make notebooks`)
runs them as they are.
"""

import ast
import json
import os

import pytest

from tests.conftest import ROOT
from tests.forked_processes import run_forked

FOLDER = ROOT / "docs" / "notebooks"
SHORTER = {  # what each notebook does less of in the suite
    "distill_by_hand": {
        "steps=200": "steps=2", "steps=150": "steps=2", "range(256)": "range(20)", "range(64)": "range(4)"
    },
    "what_a_loss_looks_at": {"range(120)": "range(2)", "step == 30": "step == 1"},
}  # fmt: skip
IS_WHOLE = os.environ.get("NOTEBOOKS") == "whole"


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_of(notebook: dict) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def run_cells(code: str) -> None:
    os.chdir(FOLDER)
    os.environ["MPLBACKEND"] = "agg"
    exec(code, {"__name__": "__main__"})


def test_every_notebook_is_run():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SHORTER)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHORTER)
def test_its_cells_run_in_order(name, tmp_path):
    pytest.importorskip("matplotlib")
    code = code_of(read(name))
    for text, shorter in SHORTER[name].items():
        assert text in code, f"{name}: no {text}"
        code = code if IS_WHOLE else code.replace(text, shorter)
    done = run_forked(run_cells, code, folder=tmp_path)
    assert done.code == 0, done.text[-2000:]
    expected = {"distill_by_hand": "student taught   mAP", "what_a_loss_looks_at": "masked_mse                    100%"}
    assert expected[name] in done.text


@pytest.mark.parametrize("name", SHORTER)
def test_it_is_small_and_was_run_from_top_to_bottom(name):
    path, notebook = FOLDER / f"{name}.ipynb", read(name)
    assert path.stat().st_size < 600_000
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


def test_the_training_loop_fits_a_page():
    (loop,) = [
        node
        for node in ast.walk(ast.parse(code_of(read("distill_by_hand"))))
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]
    assert loop.end_lineno - loop.lineno < 60
