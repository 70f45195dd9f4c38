"""The walls of the house: who may import whom, and the calls that appear nowhere."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BASE = {"structures", "boxes", "errors", "yaml_files", "random_streams"}
MODEL = BASE | {"weights", "kernels", "layers"}
RUN = BASE | {"config", "checkpoint", "datasets", "engine.runtime", "engine.drawing"}
ALLOWED = {  # of the project's own modules; a folder's files may import one another, unless they have rows of their own
    "structures": BASE,
    "boxes": BASE,
    "errors": set(),
    "yaml_files": {"errors"},
    "random_streams": set(),
    "config": BASE,
    "weights": BASE,
    "weights.containers": BASE | {"weights.inert_pickle", "weights.shared_file"},
    "weights.shared_file": BASE | {"weights.inert_pickle"},
    "weights.places": {"weights.containers", "weights.inert_pickle"},
    "weights.class_rows": set(),
    "weights.families": set(),
    "weights.inert_pickle": BASE,
    "layers.transformer": set(),
    "layers.fusion": set(),
    "layers.int8": {"layers.fusion", "layers.eval_mode"},
    "layers.channel_groups": {"layers.int8"},
    "layers.widths": {"layers.channel_groups", "layers.eval_mode"},
    "layers.precision": set(),
    "layers.eval_mode": set(),
    "layers.over_processes": {"layers.precision"},
    "kernels": BASE | {"layers.precision"},
    "datasets": BASE,
    "metrics": BASE | {"datasets"},
    "yolo": MODEL,
    "frcnn": MODEL,
    "rtdetr": MODEL,
    "teachers": MODEL,
    "models": {"structures", "errors", "layers", "yolo", "frcnn", "rtdetr", "teachers"},
    "checkpoint": {"layers", "errors", "config", "models", "weights", "datasets.class_names", "datasets.download"},
    "fine_tuning": {"checkpoint", "layers", "errors", "models", "weights", "datasets.class_names"},
    "engine.onnx_files": BASE | {"kernels", "checkpoint", "layers"},
    "distill.losses": BASE | {"kernels", "layers"},
    "distill.condense": BASE,
    "distill": BASE | {"kernels", "layers"},
    "distill.checks": BASE | {"distill", "config"},
    "distill.probing": BASE | {"distill", "layers", "config"},
    "distill.trained_parts": BASE | {"distill", "config"},
    "distill.criterion": BASE | {"distill", "kernels", "layers", "config", "datasets.class_names"},
    "engine.runtime": BASE | {"config", "checkpoint"},
    "engine.drawing": BASE | {"datasets", "metrics", "engine.runtime", "teachers.dinov2"},
    "engine.evaluation": BASE | {"datasets", "metrics", "layers", "engine.runtime"},
    "engine.prediction": BASE | {"datasets", "layers", "engine.runtime"},
    "engine.training": RUN
    | {"fine_tuning", "models", "weights", "layers", "frcnn", "teachers", "distill", "metrics", "engine.evaluation"},
    "engine.condensing": RUN | {"distill", "engine.training", "layers"},
    "engine.pruning": RUN | {"fine_tuning", "layers", "distill", "engine.training"},
    "engine.comparison": RUN | {"models", "engine.training", "engine.condensing", "engine.prediction"},
    "engine.search": RUN | {"models", "layers", "distill", "engine.training", "engine.comparison"},
    "engine.search.__main__": RUN | {"engine.search", "engine.training", "engine.comparison", "train"},  # it trains
    "engine.web_demo": RUN | {"weights", "distill", "engine.onnx_files", "engine.prediction"},
    "engine.command_line": RUN | {"models", "distill", "engine.training", "engine.condensing", "engine.comparison"},
    "engine.from_python": RUN | {"models", "engine.evaluation", "engine.onnx_files", "engine.prediction"},
}
COMMANDS = set(
    "train eval predict export compare condense app retort".split()
)  # they have no row, and import everything
CORE = {"torch", "numpy", "PIL", "yaml", "triton"} | set(sys.stdlib_module_names)
# never at the top level
EXTRAS = {"matplotlib", "tqdm", "tensorboard", "onnx", "onnxruntime", "onnxscript", "av", "openvino", "cv2", "submitit"}
SCRIPTS = {"app.py": {"streamlit", "starlette"}}  # that nothing imports, and that are nothing without these
SOURCES = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "runs", "data"} & set(p.relative_to(ROOT).parts))
HOUSE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in {"tests", "benchmarks", "docs"}]
OWN = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in HOUSE}


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
            folder = ROOT.joinpath(*node.module.split("."))  # `from distill import canvas` imports distill.canvas
            modules = {
                f"{node.module}.{a.name}" if (folder / f"{a.name}.py").is_file() else node.module for a in node.names
            }
            found += [(module, node.lineno, id(node) in top) for module in sorted(modules)]
    return found


def unit(path: Path) -> str:
    """The row of the table a file belongs to: the longest that begins its name, else its first folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return next((name for name in reversed(names) if name in ALLOWED), parts[0])


def is_allowed(row: str, module: str) -> bool:
    """Whether a row names the module or a folder that it is in."""
    parts = module.split(".")
    names = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return bool(names & (ALLOWED[row] | {row}))


@pytest.mark.parametrize("path", HOUSE, ids=name)
def test_import_table(path):
    row = unit(path)
    assert row in ALLOWED or row in COMMANDS or path.name == "__init__.py", f"{name(path)}: has no row in the table"
    for module, line, top_level in imports(path):
        first = module.split(".")[0]
        if first in OWN:
            file = ROOT.joinpath(*module.split("."))
            assert file.with_suffix(".py").is_file() or (file / "__init__.py").is_file(), (
                f"{name(path)}:{line}: no module {module}"
            )
            assert row not in ALLOWED or is_allowed(row, module), f"{name(path)}:{line}: {row} may not import {module}"
        elif top_level:
            assert first in CORE | SCRIPTS.get(name(path), set()), (
                f"{name(path)}:{line}: {module} is an extra: import it where it is used"
            )
            assert first not in EXTRAS


@pytest.mark.parametrize(
    ("row", "module", "expected"),
    [
        ("yolo", "yolo.layers", True),
        ("yolo", "layers.fusion", True),
        ("yolo", "weights", True),
        ("weights.places", "weights.load", False),
        ("yolo", "frcnn.resnet", False),
        ("distill", "config", False),
        ("distill.losses", "distill.criterion", False),
        ("distill.losses", "distill.term_inputs", False),
        ("distill.criterion", "config", True),
        ("distill.checks", "config", True),
        ("distill.checks", "datasets.class_names", False),
        ("weights.inert_pickle", "weights.containers", False),
        ("checkpoint", "datasets.class_names", True),
        ("checkpoint", "engine.evaluation.measuring", False),
        ("engine.training", "train", False),
        ("engine.training", "engine.comparison.study", False),
    ],
)
def test_the_table_tells(row, module, expected):
    assert is_allowed(row, module) == expected


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
    assert {"yolo", "distill", "datasets", "metrics", "kernels", "engine", "config.py", "train.py"} <= seen
    assert {row.split(".")[0] for row in ALLOWED} | COMMANDS == OWN, "a row of the table is about nothing"
