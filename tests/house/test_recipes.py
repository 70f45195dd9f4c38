"""CONTRIBUTING.md's recipes, followed to the letter: a model, a teacher, a dataset format, an augmentation.

The recipe of a loss is walked in tests/distill/test_recipe.py.
"""

import dataclasses
import re
import types
import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import config
import models
import structures
import train
from boxes import distances_to_xyxy, xyxy_to_cxcywh
from datasets import augment, open_dataset
from datasets.index import DatasetIndex
from datasets.open import READERS
from datasets.rows import FaultLog, LabelRows, make_sample, read_frame
from datasets.scan import scan
from datasets.text_lines import read_lines, read_names
from datasets.values import read_number
from kernels.nms import select_detections
from structures import Detections, Targets
from tests.conftest import ROOT
from weights import ClassRows
from yolo.assigners import make_points
from yolo.layers import ConvBNAct
from yolo.losses import ciou_loss

IMPORTS = {
    value.__name__: value
    for value in (
        *(Path, Tensor, Targets, Detections, ClassRows, ConvBNAct, DatasetIndex, FaultLog, LabelRows),
        *(make_points, distances_to_xyxy, xyxy_to_cxcywh, select_detections, ciou_loss, dataclasses.dataclass),
        *(make_sample, read_frame, read_lines, read_names, read_number),
    )
} | {"torch": torch, "nn": nn, "F": F}

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(title: str) -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"## How to add {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def run_block(source: str) -> dict:
    """The names that a block defines, with the imports of the files it belongs to."""
    names = dict(IMPORTS)
    exec(compile(source, "CONTRIBUTING.md", "exec"), names)
    return names


def row_of(block: str, names: dict) -> dict:
    """A line of a table of the code as a dict."""
    return eval("{" + block.strip() + "}", names)


def changed(module: types.ModuleType, *edits: tuple[str, str]) -> types.SimpleNamespace:
    """The module as it would be with `new` in place of `old`, which stands there once, for each edit."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
        source = source.replace(old, new)
    new = types.ModuleType(module.__name__)
    exec(compile(source, module.__file__, "exec"), vars(new))
    return new


def test_a_model(monkeypatch, make_tiny):
    code, row = blocks("a model")
    for arch, build in row_of(row, run_block(code)).items():
        monkeypatch.setitem(models.ARCHITECTURES, arch, build)
    detector = models.build("cells", 2)
    assert isinstance(detector, structures.Detector)
    output = detector(torch.rand(2, 3, 64, 96))
    box = torch.tensor([[10.0, 10.0, 50.0, 60.0]])
    assert detector.class_logits_at(output, [box, box[:0]]).shape == (1, 2)
    assert all(loss.isfinite() for loss in detector.losses(output, Targets.empty()).values())
    terms = [{"teacher": "t", "loss": "mse", "weight": 1.0, "student_maps": ["p5"]}]
    taught = make_tiny(student={"arch": "cells"}, epochs=1, terms=terms, teachers=[{"name": "t", "arch": "ema"}])
    report = train.run(taught, quiet=True)
    assert 0 <= report["test"]["mAP50"] <= 1


def test_a_teacher(monkeypatch, make_tiny, tmp_path):
    code, row = blocks("a teacher")
    for name, build in row_of(row, run_block(code)).items():
        monkeypatch.setitem(models.TEACHERS, name, build)
    torch.save({"sobel.weight": torch.randn(2, 1, 3, 3)}, tmp_path / "released.pth")
    (term,) = re.findall(r"\{teacher: t, loss: pkd.*?\}", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    taught = make_tiny(
        epochs=1,
        terms=[config.parse_yaml(term, "the recipe")],
        teachers=[{"name": "t", "arch": "edges", "weights": str(tmp_path / "released.pth")}],
    )
    assert train.run(taught, quiet=True)["distillation"]["pkd_t"]


def test_a_dataset_format(monkeypatch, tmp_path):
    code, row = blocks("a dataset format")
    for name, read in row_of(row, run_block(code)).items():
        monkeypatch.setitem(READERS, name, read)
    source = Path(config.__file__).read_text(encoding="utf-8")
    assert source.count('["voc", "coco", "yolo", "kitti", "shapes"]') == 3  # the lists of formats
    assert set(typing.get_args(typing.get_type_hints(config.DataConfig)["format"])) == set(READERS) - {"csv"}
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "train.csv").write_text(
        "a.png,dog,1,2,30,20\na.png,cow,1,2,3,4\nb.png,cat,5,5,500,25\nb.png,cat,x,1,2,3\n"
    )
    index = open_dataset("csv", tmp_path, "train")
    assert [sample.labels.tolist() for sample in index.samples] == [[1], [0]]
    assert index.samples[1].boxes_xyxy.tolist() == [[5, 5, 40, 25]]  # clipped, and noted
    assert sorted(fault.effect for fault in index.faults) == ["noted", "object dropped", "object dropped"]
    assert scan(index, title="csv", decode=True).dropped_objects == 2


def test_an_augmentation():
    key, field, drawn, step, function = blocks("an augmentation")
    (value,) = re.findall(r"`(use_grayscale=.*?)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    settings = changed(config, ("    close_mosaic_epochs: int", key + "    close_mosaic_epochs: int"))
    module = changed(
        augment,
        ('"flip_horizontal", "flip_vertical")\nGEOMETRY', '"flip_horizontal", "flip_vertical", "grayscale")\nGEOMETRY'),
        ("    value_gain: Tensor\n\n", f"    value_gain: Tensor\n{field}\n"),
        ("\n    # Sorted, each row", drawn + "\n    # Sorted, each row"),
        ("        value_gain=1 +", f"        {value},\n        value_gain=1 +"),
        (
            "    return images, targets\n\n\ndef check_settings",
            f"{step}    return images, targets\n\n\n{function}\n\ndef check_settings",
        ),
    )
    none = dict.fromkeys((f.name for f in dataclasses.fields(config.AugmentConfig)), 0)
    images, targets = torch.rand(3, 3, 32, 32), Targets.empty()

    def run(functions, made):
        return functions.augment(images, targets, generator=torch.Generator().manual_seed(0), settings=made)[0]

    gray = run(module, settings.AugmentConfig(**none, grayscale=1.0))
    assert (gray.std(1) < 1e-6).all()
    assert torch.equal(run(module, settings.AugmentConfig(**none)), images)
    mixed = none | {"mosaic": 1.0, "scale": 0.5, "hue": 0.1}  # what was drawn before stays what it was
    assert torch.equal(run(module, settings.AugmentConfig(**mixed)), run(augment, config.AugmentConfig(**mixed)))
