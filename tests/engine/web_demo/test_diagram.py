"""The drawing of a run's training: well-formed, with every teacher and term, each arrow from its own teacher."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from config import Config, from_tree
from engine.web_demo import diagram
from tests.conftest import ROOT
from yaml_files import read_yaml

ONE = {"name": "t", "arch": "yolov8s", "weights": "w.pt"}
TWO = {"name": "<b>", "arch": "yolov8m", "weights": "w.pt"}


def config(**changes) -> Config:
    tree = {
        "name": "a",
        "data": {"format": "yolo", "root": "r"},
        "student": {"arch": "yolov8n"},
        "teachers": [ONE, TWO],
        "terms": [
            {"teacher": "<b>", "loss": "cwd", "weight": 2.0, "student_maps": ["p3", "p4"], "adapter": "conv1x1"},
            {"teacher": "t", "loss": "soft_class", "weight": {"share": 0.1}, "student_maps": ["class_logits"]},
            {"teacher": "<b>", "loss": "box_classes", "weight": 1.0},
        ],
    }
    return from_tree(Config, tree | changes, source="test")


def texts(drawing: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(drawing).iter() if node.tag.endswith("text")]


def test_teachers_terms_and_student_are_drawn():
    drawing = diagram.draw_training(config())
    assert {"student", "teacher t", "teacher <b>", "yolov8m, weights fixed", "detection losses"} <= set(texts(drawing))
    assert {"cwd, weight 2", "soft_class, 10% of the gradient", "box_classes, weight 1"} <= set(texts(drawing))
    assert {"p3, p4, adapter conv1x1", "class_logits", "boxes or whole outputs"} <= set(texts(drawing))
    assert drawing.count(f'stroke="{diagram.TEACHER_LINE}" stroke-width="1.6" marker-end') == 3
    assert drawing.count(f'stroke="{diagram.STUDENT_LINE}" stroke-width="1.6" marker-end') == 4


def test_a_student_that_teaches_itself_has_a_term_and_no_teacher():
    drawing = diagram.draw_training(config(terms=[{"teacher": "student", "loss": "last_layer", "weight": 1.0}]))
    assert {"last_layer, weight 1", "its own layers"} <= set(texts(drawing))
    assert not any(text.startswith("teacher") for text in texts(drawing))


def test_a_teacher_of_pseudo_boxes_alone_is_drawn():
    pseudo = {"format": "yolo", "root": "r", "unlabelled": {"rest": True, "pseudo": {"teacher": "t"}}, "max_samples": 9}
    drawing = diagram.draw_training(config(data=pseudo, terms=[]))
    assert "teacher t" in texts(drawing) and "pseudo boxes" in texts(drawing) and "teacher <b>" not in texts(drawing)


def test_a_run_without_a_teacher_has_its_labels_alone():
    drawing = diagram.draw_training(config(teachers=[], terms=[]))
    assert [text for text in texts(drawing) if text.startswith("teacher")] == []
    assert drawing.count("marker-end") == 3  # pictures, student, detection losses, sum


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_our_studies_stays_inside_its_frame(path):
    tree = read_yaml(path)
    for row in (tree.get("rows") or {"only": None}).values():
        terms = (row or {}).get("terms", tree.get("terms", []))
        if not all(isinstance(term, dict) and "teacher" in term for term in terms):
            continue
        names = {term["teacher"] for term in terms}
        teachers = [{"name": name, "arch": "yolov8s", "weights": "w.pt"} for name in sorted(names)]
        drawing = diagram.draw_training(config(teachers=teachers, terms=terms))
        height = int(re.search(r'height="(\d+)"', drawing)[1])  # type: ignore[index]
        boxes = [
            (float(y), float(h))
            for y, h in re.findall(r'<rect x="\d+" y="([-\d.]+)" width="\d+" height="(\d+)"', drawing)
        ]
        assert len(boxes) == 4 + len(teachers) + len(terms)
        assert all(0 <= y and y + h <= height for y, h in boxes)
