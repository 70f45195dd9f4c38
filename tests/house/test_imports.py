"""The walls of the house: who may import whom, and the calls that appear nowhere."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = {"yolo", "frcnn", "teachers", "distill", "datasets", "metrics", "kernels", "onnx_files"}
BASE = {"structures", "boxes", "errors", "yaml_files"}
ALLOWED = {  # of the project's own modules
    "structures": BASE,
    "boxes": BASE,
    "errors": set(),
    "yaml_files": {"errors"},
    "config": BASE,
    "weights": BASE | {"weight_files", "weight_places", "weight_families", "inert_pickle"},
    "weight_places": {"weight_files", "inert_pickle"},
    "weight_families": set(),
    "weight_files": BASE | {"inert_pickle"},
    "inert_pickle": BASE,
    "fusion": set(),
    "transformer": set(),
    "kernels": BASE,
    "datasets": BASE,
    "metrics": BASE,
    "yolo": BASE | {"weights", "kernels", "transformer", "fusion"},
    "frcnn": BASE | {"weights", "kernels", "transformer", "fusion"},
    "teachers": BASE | {"weights", "kernels", "transformer", "fusion"},
    "onnx_files": BASE | {"kernels", "checkpoint"},
    "distill": BASE | {"kernels"},
    "distill.criterion": BASE | {"kernels", "config"},
}
CORE = {"torch", "numpy", "PIL", "yaml", "triton"} | set(sys.stdlib_module_names)
EXTRAS = {"matplotlib", "tqdm", "tensorboard", "onnx", "onnxruntime", "onnxscript", "av"}  # never at the top level
SCRIPTS = {"app.py": {"streamlit", "starlette"}}  # that nothing imports, and that are nothing without these
SOURCES = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "runs", "data"} & set(p.relative_to(ROOT).parts))
HOUSE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in {"tests", "benchmarks"}]
ROOT_MODULES = {p.stem for p in ROOT.glob("*.py")}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(full dotted module, line, at the top level of the file) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: relative import"
            found.append((node.module, node.lineno, id(node) in top))
    return found


def unit(path: Path) -> str:
    """The row of the table a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    dotted = ".".join(parts)
    return dotted if dotted in ALLOWED else parts[0]


@pytest.mark.parametrize("path", HOUSE, ids=name)
def test_import_table(path):
    row = unit(path)
    for module, line, top_level in imports(path):
        first = module.split(".")[0]
        if first in FOLDERS | ROOT_MODULES:
            if row in ALLOWED:
                allowed = first == row.split(".")[0] or first in ALLOWED[row]
                assert allowed, f"{name(path)}:{line}: {row} may not import {module}"
        elif top_level:
            assert first in CORE | SCRIPTS.get(name(path), set()), (
                f"{name(path)}:{line}: {module} is an extra: import it where it is used"
            )
            assert first not in EXTRAS


FORBIDDEN_CALLS = {
    ("pickle", "load"), ("pickle", "loads"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("torch", "hub"),
    ("os", "system"), ("hub", "load"), ("hub", "load_state_dict_from_url"),
}  # fmt: skip


@pytest.mark.parametrize("path", HOUSE, ids=name)
def test_no_call_that_runs_what_a_file_says(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        where = f"{name(path)}:{node.lineno}"
        function = node.func
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if isinstance(function, ast.Name):
            assert function.id not in {"eval", "exec"}, where
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            call = (function.value.id, function.attr)
            assert call not in FORBIDDEN_CALLS, where
            if call == ("torch", "load"):
                assert keywords.get("weights_only") is True, f"{where}: torch.load without weights_only=True"
            if call == ("yaml", "load"):
                assert name(path) == "yaml_files.py", f"{where}: read YAML through yaml_files"
            if call in {("np", "load"), ("numpy", "load")}:
                assert not keywords.get("allow_pickle"), where


def test_the_table_is_read_from_real_files():
    """The walk sees the folders it speaks of; an empty list would pass every test above."""
    seen = {p.relative_to(ROOT).parts[0] for p in HOUSE}
    assert {"yolo", "distill", "datasets", "metrics", "kernels", "config.py", "train.py"} <= seen
