"""train.py --init: a config that train.py and compare.py take, its rules, and that nothing is overwritten."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from config import Config, load_config
from datasets.index import DatasetIndex, Sample
from engine.command_line import first_config
from engine.command_line.first_config import Measured, choose_batch_size, choose_image_size
from engine.command_line.keys import keys_of
from engine.training.checks import check_config
from errors import UserError
from tests.tiny_training import write_dataset

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a set in data/; no training step is measured."""
    write_dataset(tmp_path / "data", train=24, test=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_config, "measure", lambda *args: Measured(0.5, 0.1, 1.0))
    return tmp_path


def test_the_config_is_one_that_trains(folder, capsys):
    train.main(["--init", "own.yaml", "--data", "data"])
    printed = capsys.readouterr().out
    assert "data: yolo, 24 pictures to train on (train), 8 to test on (test)" in printed and "green, red" in printed
    assert printed.endswith("written: own.yaml\nnext: python train.py own.yaml\n")
    config = load_config("own.yaml")
    check_config(config)
    assert (config.name, config.data.root, config.student.arch) == ("own", "data", "yolov8n")
    assert (config.image_size, config.batch_size) == (64, 2)  # as large as the pictures; an eighth of 24
    lines = (folder / "own.yaml").read_text().splitlines()
    keys = [line for line in lines if ":" in line and not line.lstrip().startswith("#") and not line.endswith(":")]
    assert all("  # " in line for line in keys)
    assert "epochs: 100  # about 20 min here for the student alone" in "\n".join(lines)


def test_nothing_is_overwritten_and_mistakes_write_nothing(folder):
    (folder / "own.yaml").write_text("mine")
    for arguments, message in (
        (["own.yaml", "--data", "data"], "own.yaml is there already"),
        (["own.txt", "--data", "data"], "found own.txt, expected the name of a new YAML file"),
        (["no/own.yaml", "--data", "data"], "no: no such folder"),
        (["new.yaml"], "expected --init FILE.yaml --data FOLDER"),
        (["new.yaml", "--data", "nothing"], "nothing: no such folder"),
        (["new.yaml", "--data", "data", "epoch=3"], "unknown key 'epoch', did you mean 'epochs'"),
        (["new.yaml", "--data", "nothing", "epochs=ten"], "key 'epochs': found 'ten', expected an integer"),
        (["new.yaml", "--data", "nothing", "batch_size=0"], "key 'batch_size': found 0, expected at least 1"),
        (["new.yaml", "--data", "data", "data.classes=[blue]"], "data: classes: found 'blue', expected"),
        (["new.yaml", "--data", "nothing", "student.arch=yolov9"], "'student.arch': .* did you mean"),
        (["new.yaml", "--data", "nothing", "--teacher", "yolov9"], "argument --teacher: .* did you mean"),
        (["new.yaml", "--data", "data", "--teacher", "rtdetr_l"], "rtdetr_l does not learn from scratch"),
    ):
        with pytest.raises(UserError, match=message):
            train.main(["--init", *arguments])
    assert (folder / "own.yaml").read_text() == "mine" and not (folder / "new.yaml").exists()


def test_keys_that_are_given_stand_in_the_file(folder):
    train.main(["--init", "own.yaml", "--data", "data", "student.arch=yolov5n", "epochs=7", "optimizer.momentum=0.8"])
    config = load_config("own.yaml")
    assert (config.student.arch, config.epochs, config.optimizer.momentum) == ("yolov5n", 7, 0.8)


def test_no_reason_stands_beside_a_value_that_was_given(folder):
    train.main(["--init", "own.yaml", "--data", "data", "image_size=96", "batch_size=16", "epochs=7"])
    lines = (folder / "own.yaml").read_text().splitlines()
    beside = {line.split(":")[0]: line.partition("  # ")[2] for line in lines}
    comments = {key.name: key.comment for key in keys_of("", Config)}
    assert all(beside[key] == comments[key] for key in ("image_size", "batch_size"))
    assert beside["epochs"].startswith("about 1 min here")  # 7 x 24 pictures of half a second
    train.main(["--init", "other.yaml", "--data", "data", "optimizer.name=sgd"])
    assert "few steps" in "\n".join(lines) and "few steps" not in (folder / "other.yaml").read_text()


@pytest.mark.parametrize(
    ("teacher", "maps"), [("yolov8s", ("p3", "p4", "p5")), ("fasterrcnn_mobilenet_v3_large", ("p5",))]
)
def test_a_teacher_comes_with_a_term_on_maps_of_equal_strides(folder, teacher, maps, capsys):
    train.main(["--init", "own.yaml", "--data", "data", "--teacher", teacher])
    assert capsys.readouterr().out.endswith("next: python compare.py own.yaml\n")
    config = load_config("own.yaml")
    check_config(config, without_weights=["teacher"])
    (term,) = config.terms
    assert (term.loss, term.student_maps, term.weight.share) == ("cwd", maps, 0.1)


def test_bad_labels_are_counted_and_their_share_is_allowed_in_the_file(folder, capsys):
    for number in range(4):
        with open(folder / "data" / "labels" / "train" / f"{number:03}.txt", "a") as file:
            file.write("7 0.5 0.5 0.1 0.1\n")
    train.main(["--init", "own.yaml", "--data", "data"])
    assert "4 faults in labels or pictures, the first: " in capsys.readouterr().out
    assert load_config("own.yaml").data.max_bad_fraction == 0.1
    share = 4 / (4 + sum(len(p.read_text().splitlines()) for p in (folder / "data/labels/train").iterdir()) - 4)
    assert f"# {share:.1%} of the pictures or objects cannot be used" in (folder / "own.yaml").read_text()


def test_pictures_alone_get_the_setting_without_labels(folder, capsys):
    (folder / "alone").mkdir()
    (folder / "data" / "images" / "train" / "000.png").rename(folder / "alone" / "a.png")
    train.main(["--init", "own.yaml", "--data", "alone"])
    printed = capsys.readouterr().out
    assert "alone: 1 picture without labels" in printed
    assert printed.endswith("python train.py own.yaml data.format=FORMAT data.root=LABELLED_SET data.test=test\n")
    assert "next: python -m datasets.download yolov8s --root data, then\n" in printed
    config = load_config("own.yaml", ["data.format=yolo", "data.root=data"])
    assert config.teachers[0].weights == "data/weights/yolov8s/yolov8s.pt"  # where that command puts them
    assert config.data.train is None and config.data.unlabelled.root == "alone"
    assert config.data.unlabelled.pseudo.teacher == config.teachers[0].name
    check_config(config, without_weights=["teacher"])


def index_of(side: float, size: tuple[int, int], count: int = 10) -> DatasetIndex:
    """`count` objects of one side in a picture of (width, height)."""
    boxes, labels = np.array([[0.0, 0.0, side, side]] * count), np.zeros(count, dtype=np.int64)
    sample = Sample(Path("a.png"), "a", *size, boxes, labels, labels.astype(bool), np.full(count, side**2))
    return DatasetIndex(("a",), (sample,), (), None, "yolo", "")


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        (100, (1000, 500), 320),  # 32 px at 320
        (20, (1000, 500), 416),  # 8.3 px at 416, 6.4 at 320
        (14, (1000, 500), 640),
        (2, (1000, 500), 640),  # hopeless at any size: the largest
        (10, (200, 150), 224),  # no larger than the pictures
    ],
)
def test_image_size_by_the_size_of_the_objects(side, size, expected):
    found, reason = choose_image_size([index_of(side, size)], "cpu")
    assert found == expected and f"at {expected} px one object in ten is smaller than" in reason


@pytest.mark.parametrize(
    ("gigabytes", "pictures", "free", "expected"),
    [(0.1, 1000, 100.0, 16), (0.1, 1000, 1.0, 4), (0.1, 40, 100.0, 4), (5.0, 1000, 1.0, 1), (None, 1000, 1.0, 16),
     (0.1, 3, 100.0, 1)],
)  # fmt: skip
def test_batch_by_memory_and_pictures(gigabytes, pictures, free, expected, monkeypatch):
    monkeypatch.setattr(first_config, "free_gigabytes", lambda device: free)
    assert choose_batch_size(Measured(1.0, gigabytes, gigabytes), pictures, CPU)[0] == expected


def test_a_step_is_measured():
    measured = first_config.measure("yolov8_narrow", 2, 64, CPU)
    assert 0 < measured.seconds_per_image < 30 and first_config.free_gigabytes(CPU) > 0
