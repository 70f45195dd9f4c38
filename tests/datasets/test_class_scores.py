"""Soft labels: read beside the labels, and carried to the detector with each object, whatever moves or drops it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import AugmentConfig
from datasets import open_dataset
from datasets.augment import augment
from datasets.convert import convert
from datasets.loader import Loader
from datasets.scan import scan
from engine.training.state import fingerprint
from errors import UserError
from structures import Targets

EVERYTHING = AugmentConfig(mosaic=0.7, mixup=0.5, degrees=20.0, shear=8.0, flip_vertical=0.5)
FIRST, SECOND = "0 0.5 0.5 0.2 0.4", "2 0.3 0.3 0.2 0.2"


@pytest.fixture
def make(tmp_path):
    """make({picture: (label file, soft label file or None)}): the folder of a set of three classes."""

    def build(files):
        for kind in ("images", "labels"):
            (tmp_path / kind / "train").mkdir(parents=True, exist_ok=True)
        for name, (labels, soft) in files.items():
            Image.new("RGB", (100, 80)).save(tmp_path / f"images/train/{name}.png")
            (tmp_path / f"labels/train/{name}.txt").write_text(labels)
            if soft is not None:
                (tmp_path / "soft_labels/train").mkdir(parents=True, exist_ok=True)
                (tmp_path / f"soft_labels/train/{name}.txt").write_text(soft)
        (tmp_path / "data.yaml").write_text("names: [a, b, c]\ntrain: images/train\n")
        return tmp_path

    return build


# ---------------------------------------------------------------- reading


def test_rows_follow_label_rows(make):
    """Blank lines do not count; a duplicate and a broken label take theirs with them; a picture may be empty."""
    labels = f"{FIRST}\n\n{SECOND}\n{FIRST}\n{FIRST}\n9 0.5 0.5 0.1 0.1\n1 0.7 0.7 0.1 0.1\n"
    soft = "0.5 0.5 0\n0 0.25 0.75\n\n.5 .5 0\n1 0 0\n0.1 0.8 0.1\n2e-1 0.3 0.5\n"
    root = make({"x": (labels, soft), "y": ("", None)})
    index = open_dataset("yolo", root, "train")
    full, empty = index.samples
    assert sorted(fault.line for fault in index.faults) == [4, 6]
    assert full.labels.tolist() == [0, 2, 0, 1]  # the same box with other shares is another object
    np.testing.assert_allclose(full.class_scores, [[0.5, 0.5, 0], [0, 0.25, 0.75], [1, 0, 0], [0.2, 0.3, 0.5]])
    assert full.class_scores.dtype == np.float64 and empty.class_scores.shape == (0, 3)
    assert "3 classes, soft labels; " in scan(index).table()


def test_rounded_shares_are_divided_by_their_sum(make):
    root = make({"x": (FIRST, "0.3333 0.3333 0.3333")})
    scores = open_dataset("yolo", root, "train").samples[0].class_scores
    np.testing.assert_allclose(scores, [[1 / 3] * 3], rtol=1e-12)


def test_without_the_folder_there_are_none(make, tmp_path):
    index = open_dataset("yolo", make({"x": (FIRST, None)}), "train")
    assert index.samples[0].class_scores is None and "soft" not in scan(index).table()


@pytest.mark.parametrize(
    "soft, line, reason",
    [
        ("1 0", 1, "2 values, expected 3: a share for each class"),
        ("1 0 0 0", 1, "4 values, expected 3"),
        ("\n1 0 x", 2, "could not convert string to float: 'x', expected a number"),
        ("nan 0 1", 1, "a share of nan, expected 0 to 1"),
        ("inf 0 0", 1, "a share of inf, expected 0 to 1"),
        ("1.5 -0.5 0", 1, "a share of -0.5, expected 0 to 1"),
        ("0.5 0.4 0", 1, "shares with the sum 0.9, expected 1"),
        ("0 0 0", 1, "shares with the sum 0, expected 1"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(make, soft, line, reason):
    root = make({"x": (f"{FIRST}\n{SECOND}", f"{soft}\n0 0 1\n")})
    index = open_dataset("yolo", root, "train")
    (fault,) = index.faults
    assert str(fault).startswith(f"{root / 'soft_labels/train/x.txt'}:{line}: {reason}")
    assert fault.effect == "object dropped" and index.samples[0].labels.tolist() == [2]
    assert index.samples[0].class_scores.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    "soft, reason",
    [
        ("1 0 0", "1 row, expected 2: one for each of x.txt in "),
        ("1 0 0\n" * 3, "3 rows, expected 2"),
        (None, "no such file"),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(make, soft, reason):
    root = make({"x": (f"{FIRST}\n{SECOND}", None), "y": (FIRST, "1 0 0")})
    if soft is not None:
        (root / "soft_labels/train/x.txt").write_bytes(soft.encode(errors="surrogateescape"))
    index = open_dataset("yolo", root, "train")
    (fault,) = index.faults
    assert str(fault).startswith(f"{root / 'soft_labels/train/x.txt'}: {reason}")
    assert fault.effect == "picture dropped" and [sample.image_id for sample in index.samples] == ["y"]


def test_a_split_is_soft_or_not(make):
    root = make({"x": (FIRST, "1 0 0")})
    for kind in ("images", "labels"):
        (root / kind / "more").mkdir()
    Image.new("RGB", (100, 80)).save(root / "images/more/z.png")
    (root / "data.yaml").write_text("names: [a, b, c]\ntrain: [images/train, images/more]\n")
    with pytest.raises(UserError, match=r"data.yaml: split 'train': 1 of 2 pictures lie in folders with soft_labels"):
        open_dataset("yolo", root, "train")


def test_a_run_is_not_resumed_with_others_and_a_conversion_counts_them(make, tmp_path):
    soft, softer = ([open_dataset("yolo", make({"x": (FIRST, row)}), "train")] for row in ("1 0 0", ".9 .1 0"))
    hard = replace(soft[0], samples=(replace(soft[0].samples[0], class_scores=None),))
    assert len({fingerprint(index) for index in (soft[0], softer[0], hard)}) == 3
    _, losses = convert("yolo", tmp_path, ["train"], "coco", tmp_path.parent / f"{tmp_path.name}_coco")
    assert losses["soft labels"] == 1


# ---------------------------------------------------------------- carried along


def test_the_loader_hands_them_on(make):
    root = make({"x": (f"{FIRST}\n{SECOND}", "0.5 0.5 0\n0 0.25 0.75"), "y": ("", None), "z": (SECOND, "0 0 1")})
    loader = Loader(open_dataset("yolo", root, "train"), image_size=64, batch_size=3, seed=0)
    targets = loader.read([2, 1, 0]).targets
    assert targets.class_scores.dtype == torch.float32 and targets.image.tolist() == [0, 2, 2]
    assert targets.class_scores.tolist() == [[0, 0, 1], [0.5, 0.5, 0], [0, 0.25, 0.75]]
    assert loader.read([1]).targets.class_scores.shape == (0, 3)


def test_objects_keep_theirs_through_every_augmentation():
    """An object's label is its number, and its shares are those of the number."""
    count, generator = 40, torch.Generator().manual_seed(0)
    shares = torch.rand(count, 3, generator=generator).softmax(1)
    corner = 60 * torch.rand(count, 2, generator=generator)
    targets = Targets(
        torch.cat((corner, corner + 30), 1), torch.arange(count), torch.arange(count) % 6, torch.arange(count) % 7 == 0
    )
    images = torch.rand(6, 3, 96, 96, generator=generator)
    with_scores, without = (
        augment(images, given, generator=torch.Generator().manual_seed(1), settings=EVERYTHING)
        for given in (replace(targets, class_scores=shares), targets)
    )
    moved = with_scores[1]
    assert torch.equal(with_scores[0], without[0]) and torch.equal(moved.boxes_xyxy, without[1].boxes_xyxy)
    assert without[1].class_scores is None and len(moved) != count and len(moved.labels.unique()) > 10
    assert torch.equal(moved.class_scores, shares[moved.labels])


def test_samples_of_others_need_none(tmp_path):
    """A loader reads whatever has boxes and labels."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    sample = SimpleNamespace(
        image_path=tmp_path / "x.png", boxes_xyxy=np.zeros((0, 4)), labels=np.zeros(0), ignore=np.zeros(0)
    )
    loader = Loader(SimpleNamespace(samples=(sample,)), image_size=8, batch_size=1, seed=0)
    assert loader.read([0]).targets.class_scores is None
