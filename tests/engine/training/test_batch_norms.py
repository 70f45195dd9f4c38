"""Batches that give a BatchNorm one value per channel are refused before a run, and no others."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import condense
import models
from config import Config, DataConfig, ModelConfig
from datasets.loader import Loader
from engine.training import batch_norms
from engine.training.batch_norms import check_batches, norm_of_one_value, smallest_batch
from errors import UserError
from frcnn.norm import freeze_norms
from structures import Targets
from tests.tiny_training import write_dataset

ARCHS = ("yolov5n", "yolov8n", "fasterrcnn_resnet18", "fasterrcnn_mobilenet_v3_small")


class Index:
    def __init__(self, count: int) -> None:
        self.samples = range(count)


def fails(student, images: int, image_size: int) -> bool:
    """Whether one training step of the detector meets PyTorch's refusal."""
    none = torch.empty(0, dtype=torch.long)
    targets = Targets(torch.empty(0, 4), none, none, none.bool())
    try:
        student.train().losses(student(torch.rand(images, 3, image_size, image_size)), targets)
    except ValueError as error:
        assert "more than 1 value per channel" in str(error)
        return True
    return False


@pytest.mark.parametrize("arch", ARCHS)
def test_it_is_found_exactly_where_a_training_step_fails(arch):
    torch.manual_seed(0)
    student = models.build(arch, 2)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    for image_size in (32, 64) if arch == "yolov8n" else (32,):
        found = norm_of_one_value(student.train(), image_size) is not None
        assert student.training and found == (image_size == 32)
        assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
        assert fails(student, 1, image_size) == found
        student.load_state_dict(state)
    if arch == "yolov8n":  # what the networks of gradient matching are trained on is checked alike
        condense.refuse_one_value(SimpleNamespace(image_size=64), student)
        with pytest.raises(UserError, match=r"key 'condense.real_batch': one picture of 32 px gives BatchNorm"):
            condense.refuse_one_value(SimpleNamespace(image_size=32), student)
    if arch == "fasterrcnn_mobilenet_v3_small":
        freeze_norms(student)
        assert norm_of_one_value(student, 32) is None and not fails(student, 1, 32)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_smallest_batch_is_that_of_the_loaders(processes):
    for count in range(1, 14):
        for on_one in (1, 2, 3, 5):
            for per_epoch in (0, 1, 7):
                loaders = (
                    Loader(
                        Index(count),
                        image_size=32,
                        batch_size=on_one,
                        seed=0,
                        rank=rank,
                        world_size=processes,
                        pictures_per_epoch=per_epoch,
                    )
                    for rank in range(processes)
                )
                expected = min(len(batch) for loader in loaders for batch in loader.batches(3))
                assert smallest_batch(per_epoch or count, on_one * processes, processes) == expected


def test_the_line_names_the_batch(monkeypatch):
    student = None
    monkeypatch.setattr(batch_norms, "norm_of_one_value", lambda *args: "stage.bn" if args[-1] == 32 else None)
    config = Config("x", DataConfig("yolo", "root"), ModelConfig("yolov8n"), batch_size=4, image_size=32)
    check_batches(config, 6, student)
    with pytest.raises(UserError, match=r"'batch_size': found 4: the last of 9 pictures in batches of 4 is one image"):
        check_batches(config, 9, student)
    with pytest.raises(UserError, match=r"'batch_size': found 4: the last of 6 pictures in batches of 2 on each of 2"):
        check_batches(config, 6, student, processes=2)
    check_batches(dataclasses.replace(config, image_size=64), 9, student)
    in_epochs = dataclasses.replace(config, data=DataConfig("yolo", "root", pictures_per_epoch=5))
    with pytest.raises(UserError, match="image_size of 64"):
        check_batches(in_epochs, 8, student)
    with pytest.raises(
        UserError, match=r"found 1: a batch is one image, which at image_size 32 gives BatchNorm \(stage.bn\)"
    ):
        check_batches(dataclasses.replace(config, batch_size=1), 8, student)


def test_a_run_is_refused_before_anything_is_written(tmp_path):
    import train

    data = DataConfig("yolo", str(write_dataset(tmp_path / "data", train=3)), cache=False)
    config = Config("x", data, ModelConfig("yolov8n"), batch_size=2, image_size=32, runs=str(tmp_path / "runs"))
    with pytest.raises(UserError, match="key 'batch_size': found 2: the last of 3 pictures"):
        train.run(config, quiet=True)
    assert not (tmp_path / "runs").exists()
