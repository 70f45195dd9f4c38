"""Faster R-CNN in the one training loop: student, teacher, from an ImageNet backbone, evaluated and resumed."""

import re

import pytest
import torch

import checkpoint
import models
import train
from datasets.open import open_dataset
from engine.evaluation import measuring
from engine.runtime import run_folder
from engine.training import building
from errors import UserError
from frcnn import faster_rcnn
from structures import DetectionSettings
from tests.engine.training.test_distilled_training import save_teacher
from tests.tiny_training import SIZE, tiny_config, write_dataset

SGD = {"learning_rate": 0.01, "sum_over_batch": False, "warmup_epochs": 0.0}
STUDENT = {"arch": "fasterrcnn_mobilenet_v3_small"}

pytestmark = pytest.mark.usefixtures("small_second_stage")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pictures") / "data", train=8, test=2)


@pytest.mark.slow
def test_a_two_stage_student_learns_from_a_dense_and_a_two_stage_teacher(data, tmp_path):
    dense = save_teacher(tmp_path / "dense.pt")
    staged = save_teacher(tmp_path / "staged.pt", arch="fasterrcnn_mobilenet_v3_large")
    config = tiny_config(
        data, tmp_path / "runs", student=STUDENT, optimizer=SGD,
        teachers=[
            {"name": "dense", "arch": "yolov8_narrow", "weights": str(dense)},
            {"name": "staged", "arch": "fasterrcnn_mobilenet_v3_large", "weights": str(staged)},
        ],
        terms=[
            {"teacher": "dense", "loss": "box_classes", "weight": 0.5},
            {"teacher": "staged", "loss": "softmax_kl", "weight": 0.5, "parameters": {"boxes": "proposals"}},
            {"teacher": "staged", "loss": "decoupled_kl", "weight": 0.5},
            {"teacher": "staged", "loss": "pkd", "weight": 0.5, "student_maps": ["p5"]},
        ],
    )  # fmt: skip
    report = train.run(config, quiet=True)
    rows = run_folder.read_metrics(tmp_path / "runs" / "tiny" / "metrics.csv")
    detection = ["rpn_objectness", "rpn_box", "roi_class", "roi_box"]
    assert set(report["distillation"]) == {
        "box_classes_dense",
        "softmax_kl_staged",
        "decoupled_kl_staged",
        "pkd_staged",
    }
    assert all(float(row[f"train/{name}"]) > 0 for row in rows for name in [*report["distillation"], "roi_class"])
    assert all(f"train/{name}" in rows[0] for name in detection)
    model, info = checkpoint.load_model(tmp_path / "runs" / "tiny" / "weights" / "last.pt")
    assert info.arch == STUDENT["arch"]
    with torch.no_grad():
        model.detect(model(torch.rand(1, 3, SIZE, SIZE)), score_threshold=0.0, iou_threshold=0.5, max_detections=5)


def test_a_dense_student_learns_from_a_two_stage_teacher(data, tmp_path):
    staged = save_teacher(tmp_path / "staged.pt", arch="fasterrcnn_mobilenet_v3_large")
    teacher = {"name": "staged", "arch": "fasterrcnn_mobilenet_v3_large", "weights": str(staged)}
    terms = [
        {"teacher": "staged", "loss": "box_classes", "weight": 1.0, "parameters": {"at": "assigned"}},
        {"teacher": "staged", "loss": "pkd", "weight": 1.0, "student_maps": ["p5"], "adapter": "conv1x1"},
    ]
    config = tiny_config(data, tmp_path / "runs", teachers=[teacher], terms=terms, epochs=1)
    report = train.run(config, quiet=True)
    assert all(found["lowest"] > 0 for found in report["distillation"].values())


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes(data, tmp_path):
    changes = dict(student=STUDENT, optimizer=SGD, epochs=2)
    train.run(tiny_config(data, tmp_path / "whole", **changes), quiet=True)
    config = tiny_config(data, tmp_path / "parts", **changes)
    original = train.finish_epoch

    def stop_after_the_first(parts, position, *rest):
        original(parts, position, *rest)
        if position.epoch == 1:
            raise KeyboardInterrupt

    train.finish_epoch = stop_after_the_first
    try:
        with pytest.raises(KeyboardInterrupt):
            train.run(config, quiet=True)
    finally:
        train.finish_epoch = original
    train.run(config, resume=True, quiet=True)
    states = [checkpoint.load(tmp_path / name / "tiny" / "weights" / "last.pt") for name in ("whole", "parts")]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())


def test_what_is_no_imagenet_backbone_is_refused(data, tmp_path):
    config = tiny_config(data, tmp_path / "runs", student=STUDENT | {"backbone_weights": str(tmp_path / "none.pth")})
    with pytest.raises(UserError, match=r"backbone_weights': .*none.pth: no such file"):
        building.build_student(config, ("green", "red"))
    wrong = tiny_config(data, tmp_path / "runs", student={"arch": "yolov8n", "backbone_weights": "x.pth"})
    with pytest.raises(UserError, match="yolov8n has no released backbone"):
        building.build_student(wrong, ("green", "red"))


def test_a_backbone_starts_from_an_imagenet_file(data, tmp_path):
    """A file as released: the backbone under its public names, with a classifier that the detector has no use for."""
    torch.manual_seed(5)
    donor = models.build("fasterrcnn_resnet18", 2).backbone
    state = public_state(donor)
    torch.save(state, tmp_path / "resnet18.pth")
    student = {"arch": "fasterrcnn_resnet18", "backbone_weights": str(tmp_path / "resnet18.pth")}
    config = tiny_config(data, tmp_path / "runs", student=student)
    built = building.build_student(config, ("green", "red")).backbone.state_dict()
    assert all(torch.equal(value, built[name]) for name, value in donor.state_dict().items())


def test_frozen_stages_and_norms_stay_while_the_rest_learns(data, tmp_path):
    start = save_teacher(tmp_path / "start.pt", arch="fasterrcnn_resnet18")
    before = checkpoint.load_model(start)[0].state_dict()
    fresh = {"arch": "fasterrcnn_resnet18", "trainable_stages": 2, "frozen_norms": True}
    student = fresh | {"weights": str(start)}
    config = tiny_config(data, tmp_path / "runs", student=student, optimizer=SGD, epochs=1)
    train.run(config, quiet=True)
    after = checkpoint.load(tmp_path / "runs" / "tiny" / "weights" / "last.pt")["model"]
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert all(
        name in same for name in before if name.startswith(("backbone.stem", "backbone.stage2", "backbone.stage3"))
    )
    assert not any(name in same for name in before if name.startswith("backbone.stage5") and "conv.weight" in name)
    assert all(name in same for name in before if name.startswith("backbone") and "running" in name)
    assert not all(name in same for name in before if name.startswith("rpn."))
    for changes, message in (
        (dict(student=fresh), "frozen_norms': found true without weights"),
        (dict(student=student | {"trainable_stages": 9}), "9 trainable stages: expected 0 to 5"),
        (dict(student={"arch": "yolov8n", "frozen_norms": True}), "frozen_norms': yolov8n learns as a whole"),
        (dict(student={"arch": "yolov8n", "roi_samples": 64}), "roi_samples': found 64, expected none"),
        (dict(student=student | {"roi_samples": 0}), "roi_samples': found 0, expected at least 1"),
        (
            dict(student=student | {"trainable_stages": 0}, optimizer=SGD | {"backbone_factor": 0.1}),
            "backbone_factor': found 0.1, but no backbone of fasterrcnn_resnet18 learns, expected 1",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train.run(tiny_config(data, tmp_path / "refused", **changes), quiet=True)


def test_the_second_stage_learns_from_as_many_boxes_as_the_config_says(data, tmp_path, monkeypatch):
    counts = []
    compare = faster_rcnn.roi_losses
    monkeypatch.setattr(
        faster_rcnn, "roi_losses", lambda **inputs: counts.append(len(inputs["labels"])) or compare(**inputs)
    )
    student = {"arch": "fasterrcnn_mobilenet_v3_small", "roi_samples": 3}
    train.run(tiny_config(data, tmp_path / "runs", student=student, optimizer=SGD, epochs=1, batch_size=2), quiet=True)
    assert set(counts) == {2 * 3}


def public_state(backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its entries under the names of the released file, its table read from right to left."""
    rows = [(old, new) for old, new in backbone.public_layouts[0].table if new is not None]
    state = {}
    for name, value in backbone.state_dict().items():
        for old, new in sorted(rows, key=lambda row: len(row[1]), reverse=True):
            if match := re.match(re.escape(new).replace(r"\{\}", r"(\d+)"), name):
                state[old.format(*match.groups()) + name[match.end() :]] = value
                break
    return state


def test_two_stage_models_are_evaluated(data, tmp_path):
    path = save_teacher(tmp_path / "model.pt", arch="fasterrcnn_mobilenet_v3_small")
    model, _ = checkpoint.load_model(path)
    index = open_dataset("yolo", data, "test")
    result = measuring.evaluate_model(model, index, DetectionSettings(), image_size=SIZE, batch_size=2, device="cpu")
    assert 0 <= result.numbers["mAP50-95"] <= 1


def test_the_detection_weight_scales_the_students_own_losses(data, tmp_path):
    staged = save_teacher(tmp_path / "t.pt")
    rows = []
    for name, weight in (("one", 1.0), ("half", 0.5)):
        config = tiny_config(
            data, tmp_path / "runs", name=name, epochs=1, batch_size=8, detection_weight=weight,
            teachers=[{"name": "t", "arch": "yolov8_narrow", "weights": str(staged)}],
            terms=[{"teacher": "t", "loss": "cwd", "weight": 1.0, "student_maps": ["p3"]}],
        )  # fmt: skip
        train.run(config, quiet=True)
        rows += run_folder.read_metrics(tmp_path / "runs" / name / "metrics.csv")
    assert float(rows[1]["train/box"]) == pytest.approx(0.5 * float(rows[0]["train/box"]), rel=1e-5)
    assert float(rows[1]["train/cwd_t"]) == pytest.approx(float(rows[0]["train/cwd_t"]), rel=1e-5)
    with pytest.raises(UserError, match="detection_weight': found 0"):
        train.run(tiny_config(data, tmp_path / "runs", detection_weight=0.0), quiet=True)
