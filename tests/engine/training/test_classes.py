"""data.classes through the commands: a run's splits, and a checkpoint that carries them."""

import dataclasses
import json

import pytest

import checkpoint
import eval
import models
from engine.training.splits import count_training_pictures
from engine.training.state import describe_model
from errors import UserError
from tests.tiny_training import open_splits, tiny_config, write_dataset
from yaml_files import dump_yaml


def test_a_run_trains_and_tests_on_the_classes(tmp_path):
    root = write_dataset(tmp_path / "data", train=6, test=4)
    said = []
    config = tiny_config(root, tmp_path, data={"classes": ["red"], "max_samples": -1})
    splits = open_splits(config, said.append)
    assert splits.names == splits.train.names == splits.test.names == ("red",) and len(splits.train) == 6
    assert all("left out: " in table and "(green " in table for table in said)
    kept = sum(len(sample) for sample in splits.train.samples)
    left_out = sum(len(sample.left_out) for sample in splits.train.samples)
    rows = sum(len(path.read_text().splitlines()) for path in (root / "labels/train").iterdir())
    assert 0 < kept < rows and kept + left_out == rows
    for classes, message in ((["red", "blue"], "found 'blue', expected some of green, red"), (["red"] * 2, "twice")):
        with pytest.raises(UserError, match=message):
            open_splits(tiny_config(root, tmp_path, data={"classes": classes}), said.append)


@pytest.mark.parametrize(("max_samples", "expected"), [(-1, 6), (0, 6), (4, 4), (9, 6)])
def test_all_pictures_or_some(tmp_path, max_samples, expected):
    root = write_dataset(tmp_path / "data", train=6, test=4)
    config = tiny_config(root, tmp_path, data={"max_samples": max_samples})
    assert len(open_splits(config, lambda table: None).train) == expected == count_training_pictures(config)


def test_an_evaluation_takes_the_classes_of_the_checkpoint_of_the_config_or_of_the_flag(tmp_path):
    """Three classes, of which `car` and `van` are near each other: only data.classes makes a van plain background."""
    root = write_dataset(tmp_path / "data", train=1, test=2)
    (root / "data.yaml").write_text("train: images/train\ntest: images/test\nnames: [van, car]\n")
    config = tiny_config(root, tmp_path, data={"classes": ["car"]}, image_size=32)
    model = models.build("yolov8_narrow", 1)
    state = {"epoch": 1, "step": 1, "ema": model.state_dict()}
    checkpoint.save(tmp_path / "part.pt", describe_model(config, ("car",)) | state)
    everything = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=()))
    checkpoint.save(tmp_path / "whole.pt", describe_model(everything, ("car",)) | state)
    tree = {"name": "x", "student": {"arch": "yolov8_narrow"}, "image_size": 32}
    tree["data"] = {"format": "yolo", "root": str(root), "classes": ["car"]}
    (tmp_path / "c.yaml").write_text(dump_yaml(tree))
    place = ["yolo", str(root), "test"]

    def measured(weights: str, *arguments: str) -> dict:
        eval.main([str(tmp_path / weights), *arguments, "--json", str(tmp_path / "out.json")])
        tree = json.loads((tmp_path / "out.json").read_text())
        return {key: tree[key] for key in ("numbers", "per_class", "class_map", "confusion")}

    expected = measured("part.pt", *place)
    assert list(expected["per_class"]) == ["car"] and expected["class_map"] is None
    assert measured("part.pt", "--config", str(tmp_path / "c.yaml")) == expected
    assert measured("whole.pt", *place, "--classes", "car") == expected
    assert measured("whole.pt", *place)["class_map"] is not None  # vans as regions that absorb detections
    with pytest.raises(UserError, match="found 'bus', expected some of van, car"):
        measured("whole.pt", *place, "--classes", "bus")
