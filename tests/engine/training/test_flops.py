"""FLOPs against numbers worked out by hand and those that the models are published with."""

import pytest

import checkpoint
import models
from distill.pruning.files import widths_text
from engine.training.flops import forward_flops, pseudo_flops, step_flops
from engine.training.pseudo_boxes import pseudo_image_size
from layers.channel_groups import find_groups
from tests.tiny_training import tiny_config, write_dataset


@pytest.mark.parametrize(("arch", "published"), [("yolov8n", 8.7), ("yolov8s", 28.6), ("yolov5n", 4.5)])
def test_flops_are_the_published_ones(arch, published):
    """GFLOPs at 640 px and 80 classes, in the tables of the releases."""
    assert forward_flops(arch, 640, 80) / 1e9 == pytest.approx(published, rel=0.015)
    assert forward_flops(arch, 160, 80) == forward_flops(arch, 640, 80) / 16


def test_a_student_of_two_stages_runs_its_second_on_512_boxes():
    """Two fully connected layers of 1024 on 256 x 7 x 7 values, then 81 classes and four edges for each of 80."""
    first, both = (forward_flops("fasterrcnn_resnet18", 160, 80, is_trained=flag) for flag in (False, True))
    assert both - first == 2 * 512 * (256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 81))
    fewer = forward_flops("fasterrcnn_resnet18", 160, 80, is_trained=True, roi_samples=128)
    assert 4 * (fewer - first) == both - first
    assert forward_flops("yolov8n", 160, 80, is_trained=True) == forward_flops("yolov8n", 160, 80)


def test_a_step_is_three_passes_of_the_student_and_one_of_each_teacher(tmp_path):
    """Of those that terms name, at their own sizes; the average costs as much as the student."""
    teachers = [
        {"name": "large", "arch": "yolov8s", "weights": "s.pt", "image_size": 96},
        {"name": "dino", "arch": "dinov2_vits14", "weights": "d.pth"},
        {"name": "mean", "arch": "ema"},
        {"name": "idle", "arch": "yolov8x", "weights": "x.pt"},
    ]
    term = {"loss": "mse", "weight": 1.0, "student_maps": ["p3"]}
    names = ("large", "mean", "dino", "large")
    terms = [term | {"teacher": name, "name": f"t{number}"} for number, name in enumerate(names)]
    alone = tiny_config(tmp_path, tmp_path, data={"classes": ["a", "b"]})
    student = forward_flops("yolov8_narrow", 64, 2)
    assert step_flops(alone) == 3 * student
    taught = tiny_config(tmp_path, tmp_path, data={"classes": ["a", "b"]}, teachers=teachers, terms=terms)
    passes = forward_flops("yolov8s", 96, 2) + forward_flops("dinov2_vits14", 70, 2) + student
    assert step_flops(taught) == 3 * student + passes
    assert forward_flops("dinov2_vits14", 64, 2) == forward_flops("dinov2_vits14", 70, 2)  # a multiple of 14


def test_pseudo_boxes_cost_one_pass_over_their_pictures(tmp_path):
    root = write_dataset(tmp_path / "set", train=6, test=3)
    unlabelled = {"split": "train", "pseudo": {"teacher": "t", "image_size": 96}}
    config = tiny_config(
        root,
        tmp_path / "runs",
        teachers=[{"name": "t", "arch": "yolov8s", "weights": "s.pt"}],
        data={"max_samples": 2, "unlabelled": unlabelled},
    )
    assert pseudo_flops(config) == 4 * forward_flops("yolov8s", 96, 80)
    assert step_flops(config) == 3 * forward_flops("yolov8_narrow", 64, 80)
    assert pseudo_flops(tiny_config(root, tmp_path / "runs")) == 0


def test_a_pruned_student_costs_what_its_layers_do(tmp_path):
    """From a file of widths, from its weights, and as the student's own average; as long as there is no file: whole."""
    widths = {name: width // 2 for name, width in find_groups(models.build("yolov8_narrow", 80)).widths().items()}
    half = forward_flops("yolov8_narrow", 64, 80, widths=tuple(widths.items()))
    assert half < 0.3 * forward_flops("yolov8_narrow", 64, 80)
    narrow, file = tmp_path / "narrow.pt", tmp_path / "narrow.yaml"
    terms = [{"teacher": "mean", "loss": "mse", "weight": 1.0, "student_maps": ["p3"]}]
    from_file = tiny_config(tmp_path, tmp_path, student={"widths": str(file)})
    taught = {"teachers": [{"name": "mean", "arch": "ema"}], "terms": terms}
    from_weights = tiny_config(tmp_path, tmp_path, student={"weights": str(narrow)}, **taught)
    assert step_flops(from_file) == 3 * forward_flops("yolov8_narrow", 64, 80)
    file.write_text(widths_text("yolov8_narrow", widths))
    state = models.build("yolov8_narrow", 80, widths=widths).state_dict()
    about = {"arch": "yolov8_narrow", "names": [str(k) for k in range(80)], "image_size": 64}
    checkpoint.save(narrow, about | {"ema": state})
    assert step_flops(from_file) == 3 * half
    assert step_flops(from_weights) == 4 * half


def test_weights_given_as_a_run_are_read_for_their_widths_and_their_image_size(tmp_path):
    """Pseudo boxes are made at the size that their teacher was trained at, not at the student's 64 px."""
    root = write_dataset(tmp_path / "set", train=6, test=3)
    widths = {name: width // 2 for name, width in find_groups(models.build("yolov8_narrow", 80)).widths().items()}
    about = {"arch": "yolov8_narrow", "names": [str(k) for k in range(80)], "image_size": 96}
    run = tmp_path / "pruned"
    (run / "weights").mkdir(parents=True)
    state = models.build("yolov8_narrow", 80, widths=widths).state_dict()
    checkpoint.save(run / "weights" / "last.pt", about | {"ema": state})
    config = tiny_config(
        root,
        tmp_path / "runs",
        student={"weights": str(run)},
        teachers=[{"name": "t", "arch": "yolov8_narrow", "weights": str(run)}],
        data={"max_samples": 2, "unlabelled": {"split": "train", "pseudo": {"teacher": "t"}}},
    )
    shape = tuple(widths.items())
    assert pseudo_image_size(config) == 96
    assert pseudo_flops(config) == 4 * forward_flops("yolov8_narrow", 96, 80, widths=shape)
    assert step_flops(config) == 3 * forward_flops("yolov8_narrow", 64, 80, widths=shape)
