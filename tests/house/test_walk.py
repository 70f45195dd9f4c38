"""docs/walk.md is run line by line: a comment that is a shape is the shape of what stands before it."""

import ast
import re

import torch

import models
from boxes import distances_to_xyxy
from kernels.roi_align import assign_levels, roi_align
from rtdetr.denoising import make_noisy_objects
from rtdetr.losses import to_fractions
from rtdetr.matching import match_queries
from structures import Targets
from tests.conftest import ROOT
from yolo.assigners import make_points
from yolo.yolov8 import LEVEL_STRIDES, level_sizes

NAMES = {
    "torch": torch,
    "models": models,
    "distances_to_xyxy": distances_to_xyxy,
    "assign_levels": assign_levels,
    "roi_align": roi_align,
    "Targets": Targets,
    "make_points": make_points,
    "LEVEL_STRIDES": LEVEL_STRIDES,
    "level_sizes": level_sizes,
    "to_fractions": to_fractions,
    "match_queries": match_queries,
    "make_noisy_objects": make_noisy_objects,
}
SHAPE = re.compile(r"  # (\([\d, ]*\))$")


def shapes_of(text: str) -> list[tuple[str, str, str]]:
    """Run the Python of a page; (line, shape in its comment, shape of the tensor) of each line that has one."""
    names, found = dict(NAMES), []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        lines = block.splitlines()
        for statement in ast.parse(block).body:
            line = lines[statement.end_lineno - 1]
            value = None
            if isinstance(statement, ast.Expr):
                value = eval(compile(ast.Expression(statement.value), line, "eval"), names)
            else:
                exec(compile(ast.Module([statement], []), line, "exec"), names)
                if isinstance(target := statement.targets[0], ast.Name):
                    value = names[target.id]
            if comment := SHAPE.search(line):
                found.append((line, comment[1], str(tuple(value.shape))))
    return found


def test_the_shapes_of_the_page():
    with torch.no_grad():
        found = shapes_of((ROOT / "docs" / "walk.md").read_text(encoding="utf-8"))
    assert len(found) > 50
    assert not [row for row in found if row[1] != row[2]]


def test_a_wrong_shape_is_noticed():
    ((_, comment, shape),) = shapes_of("```python\ntorch.zeros(2, 3)  # (3, 2)\n```")
    assert (comment, shape) == ("(3, 2)", "(2, 3)")
