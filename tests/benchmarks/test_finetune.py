"""benchmarks/finetune.py: its configs, and the peer's copy of the pictures. What it trains is left to its command."""

import argparse

import yaml
from PIL import Image

from benchmarks import finetune

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


def test_the_peer_gets_the_same_pictures_without_difficult_objects(tmp_path, monkeypatch):
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = OBJECT.format("cat", 0, 1, 1, 40, 20) + OBJECT.format("dog", 1, 5, 5, 9, 9)
    for name in "abc":
        Image.new("RGB", (80, 40)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\n")
    (root / "classes.txt").write_text("dog\ncat\n")
    monkeypatch.setattr(finetune, "NUM_PICTURES", 2)
    data = finetune.write_peer_data(argparse.Namespace(data=str(root)), tmp_path / "peer")
    labels = sorted((tmp_path / "peer" / "labels").iterdir())
    assert [path.read_text().split() for path in labels] == [["1", "0.25", "0.25", "0.5", "0.5"]] * 2
    assert sorted(p.stem for p in (tmp_path / "peer" / "images").iterdir()) == [path.stem for path in labels]
    assert list(yaml.safe_load(data.read_text())["names"].values()) == ["dog", "cat"]


def test_recipes_change_the_shared_protocol_and_nothing_else():
    args = argparse.Namespace(data="voc", weights="w.pt", out="out")
    asked = finetune.config_of(args, finetune.RECIPES["asked"], 1)
    assert (asked.optimizer.name, asked.optimizer.learning_rate, asked.augment.mosaic) == ("adamw", 0.001, 0.0)
    assert (asked.epochs, asked.image_size, asked.data.max_samples, asked.seed) == (10, 192, 1000, 1)
    kept = finetune.config_of(args, finetune.RECIPES["kept"], 1)
    assert kept.optimizer != asked.optimizer and kept.name != asked.name
    assert (kept.augment, kept.data, kept.student) == (asked.augment, asked.data, asked.student)
    assert finetune.mean_and_spread([0.5, 0.7]) == "0.6000 ± 0.1414"
