"""A config with `weights: random` runs without files of teachers, and everything that it writes says what it is."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import models
import predict
import train
from config import load_config
from engine.drawing.stamp import stamp_file, stamped
from engine.runtime import run_folder
from engine.training import reporting, run_pictures
from engine.training.dry_run import dry_run
from engine.training.teaching import build_random
from errors import UserError
from teachers.clip import CLIP
from teachers.dinov2 import DINOv2
from tests.conftest import ROOT
from tests.tiny_training import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
DINO = {"name": "dino", "arch": "dinov2_vits14", "weights": "random"}
CLIP_TEACHER = {"name": "clip", "arch": "clip_vit_b32", "weights": "random", "vocabulary": "gone.txt.gz"}
YOLO = {"name": "big", "arch": "yolov5nu", "weights": "random"}
TERMS = [
    {"teacher": "dino", "loss": "cosine", "weight": 1.0, "student_maps": ["p3"], "teacher_maps": ["patches"],
     "adapter": "conv1x1"},
    {"teacher": "clip", "loss": "image_kl", "weight": 1.0, "student_maps": ["p5"]},
]  # fmt: skip
SOFT = {"teacher": "big", "loss": "soft_class", "weight": 1.0, "student_maps": ["class_logits"]}
OF_A = SOFT | {"teacher": "a"}
INHERIT = {"teacher": "big"}
MARK = "plumbing, not a measurement: random weights in "
RED = (176, 0, 32)


@pytest.fixture
def small_teachers(monkeypatch):
    """DINOv2 and CLIP of one block."""
    dino = partial(DINOv2, width=384, depth=1, heads=6)
    clip = partial(CLIP, patch=32, image_width=64, text_width=64, embedding_width=32, depth=1)
    monkeypatch.setitem(models.TEACHERS, "dinov2_vits14", dino)
    monkeypatch.setitem(models.TEACHERS, "clip_vit_b32", clip)


@pytest.mark.usefixtures("small_teachers")
def test_every_output_is_marked(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "draw", run_pictures.draw)
    config = tiny_config(
        tiny_data, tmp_path / "runs", teachers=[DINO, CLIP_TEACHER], terms=TERMS, epochs=1, batch_size=4,
        student={"arch": "yolov8_narrow"}, data={"max_samples": 4},
    )  # fmt: skip
    report = train.run(config)
    mark, run = MARK + "dino, clip", tmp_path / "runs" / "tiny"
    lines = capsys.readouterr().out.splitlines()
    for begin in ("yolo ", str(run), "epoch 1/1", "test: ", "cosine_dino"):
        assert any(line.startswith(f"[{mark}] {begin}") for line in lines), begin
        assert not any(line.startswith(begin) for line in lines), begin
    assert report["plumbing"] == json.loads((run / "report.json").read_text())["plumbing"] == mark
    (row,) = run_folder.read_metrics(run / "metrics.csv")
    assert row["plumbing"] == "1" and float(row["train/cosine_dino"]) > 0 and float(row["train/image_kl_clip"]) > 0
    for name in run_pictures.FILES:
        with Image.open(run / name) as picture:
            corner = picture.convert("RGB").getpixel((picture.width - 2, 2))
        assert np.allclose(corner, RED, atol=12), (name, corner)
    assert not list(run.glob(".*")), "a picture that was stamped leaves nothing beside it"
    weights = str(run / "weights" / "student.safetensors")
    for key in ("student", "teachers"):  # nor does another run begin from it, or learn from it, without the mark
        begin = {"arch": "yolov8_narrow", "weights": weights}
        other = {"student": begin} if key == "student" else {"teachers": [begin | {"name": "a"}], "terms": [OF_A]}
        with pytest.raises(UserError, match=r"student.safetensors: plumbing, .*; expected weights of a run whose"):
            train.run(tiny_config(tiny_data, tmp_path / "other", **other), quiet=True)
    eval.main([weights, "yolo", str(tiny_data), "test", "--json", str(tmp_path / "found.json")])
    assert f"\n{mark}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["mark"] == mark
    picture = str(next((tiny_data / "images" / "test").iterdir()))
    predict.main([weights, picture, "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith(mark + "\n")


def test_a_measurement_has_no_mark(tmp_path):
    config = tiny_config(tmp_path, tmp_path, teachers=[YOLO | {"weights": "./random"}], terms=[SOFT])
    assert config.plumbing == ""
    run_folder.append_metrics(tmp_path / "metrics.csv", {"epoch": 1, "time": 2.0, "lr": 0.1})
    assert next(csv.reader(io.StringIO((tmp_path / "metrics.csv").read_text())))[-1] == "lr"
    picture = Image.new("RGB", (90, 40), "white")
    assert stamped(picture, "") is picture and stamped(picture, "a").height > 40


def test_a_picture_that_cannot_be_stamped_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    Image.new("RGB", (90, 40), "white").save(path)
    before = path.read_bytes()

    def fail(image, file, *_, **__):
        getattr(file, "write", getattr(file, "write_bytes", None))(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        stamp_file(path, "a mark")
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before


def test_random_weights_are_the_same_each_time(tmp_path):
    (teacher,) = tiny_config(tmp_path, tmp_path, teachers=[YOLO], terms=[SOFT]).teachers
    before = torch.get_rng_state()
    (first, names), (second, _) = (build_random(teacher, ("cat", "dog", "cow")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and names == ("cat", "dog", "cow")
    assert first.num_classes == 3
    again = second.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())


@pytest.mark.usefixtures("small_teachers")
def test_clip_needs_no_vocabulary_and_has_the_prompts(tmp_path):
    changed = CLIP_TEACHER | {"aliases": {"dog": "a dog"}}
    (teacher,) = tiny_config(tmp_path, tmp_path, teachers=[changed]).teachers
    model, names = build_random(teacher, ("cat", "dog"))
    assert names == model.class_names == ("cat", "a dog")
    assert model(torch.rand(1, 3, 224, 224)).image_logits.isfinite().all()


def test_the_shipped_config_is_tried_without_a_file(tiny_data, tmp_path, small_teachers, capsys):
    """By the line in its comments."""
    path = ROOT / "configs" / "voc_fasterrcnn_resnet18_dinov2_clip.yaml"
    (line,) = [line for line in path.read_text().splitlines() if "=random" in line]
    overrides = [word for word in line.split() if "=" in word]
    small = [
        f"data.root={tiny_data}", "data.format=yolo", "data.train=train", "data.test=test", "teachers.1.aliases={}",
        "student.arch=fasterrcnn_mobilenet_v3_small",
        "image_size=64", "batch_size=2", "device=cpu", "data.workers=0", f"runs={tmp_path}",
    ]  # fmt: skip
    dry_run(load_config(path, [*overrides, *small]))
    printed = capsys.readouterr().out
    assert printed.startswith(MARK + "dinov2, clip\n") and "cosine_dinov2" in printed and not list(tmp_path.iterdir())


def test_pseudo_boxes_are_marked_too(tiny_data, tmp_path, capsys):
    unlabelled = {"rest": True, "pseudo": {"teacher": "big", "threshold": 0.011}}
    config = tiny_config(
        tiny_data, tmp_path, teachers=[YOLO], epochs=1, student={"arch": "yolov8_narrow"},
        data={"max_samples": 8, "unlabelled": unlabelled},
    )  # fmt: skip
    assert train.run(config)["plumbing"] == MARK + "big"
    assert f"[{MARK}big] pseudo boxes of teacher 'big'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teachers": [YOLO | {"arch": "yolov8n"}], "student": {"arch": "yolov8_half", "inherit": INHERIT}},
            r"'student.inherit.teacher': 'big' has random weights, expected a file to begin from",
        ),
        ({"student": {"weights": "random"}}, "'student.weights': random: no such file, expected null, which"),
        (
            {"teachers": [YOLO | {"arch": "ema"}], "terms": [SOFT]},
            "found 'random', the student's average has no file",
        ),
        ({"teachers": [DINO | {"image_size": 15}], "terms": TERMS[:1]}, "image_size': found 15, expected a multiple"),
    ],
)  # fmt: skip
def test_where_it_would_pretend_it_is_refused(make_tiny, changes, message):
    with pytest.raises(UserError, match=message):
        train.run(make_tiny(**changes), quiet=True)
    assert not Path(make_tiny().runs).exists()
