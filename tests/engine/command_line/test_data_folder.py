"""look(): the layouts that tools export, by their files; and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from engine.command_line.data_folder import choices, look
from errors import UserError
from tests.datasets.small_sets import ROW, coco, picture, text, xml


def many(root, labels: str, pictures: str, content, splits=("",), count: int = 10) -> None:
    """`count` labelled pictures for each split; {} in a path is the split's name."""
    for split in splits:
        for number in range(count):
            name = f"{split or 'all'}{number}"
            noise(root / pictures.format(split) / f"{name}.png", number)
            if content is not None:
                text(root / labels.format(split) / f"{name}{'.xml' if content is xml else '.txt'}", content())


def noise(path, seed: int) -> None:
    """A picture of 100 x 80 that is no near-duplicate of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(coarse.repeat(10, 0).repeat(10, 1)).save(path)


def row() -> str:
    return ROW


def found(root) -> tuple:
    result = look(root)
    assert result is not None
    place = result.root.relative_to(root).as_posix()
    return result.format, place, result.train, result.test, len(result.train_index), len(result.test_index)


def test_yolo_with_a_yaml_and_roboflows_folders(tmp_path):
    many(tmp_path, "{}/labels", "{}/images", row, ("train", "valid", "test"), 3)
    text(tmp_path / "data.yaml", "train: train/images\nval: valid/images\ntest: test/images\nnames: [cell]\n")
    text(tmp_path / "README.roboflow.txt", "This dataset was exported\n")
    assert found(tmp_path) == ("yolo", ".", "train", "test", 3, 3)
    assert look(tmp_path).notes == ("not used: val",)
    shutil.rmtree(tmp_path / "test")
    text(tmp_path / "data.yaml", "train: train/images\nval: valid/images\nnames: [cell]\n")
    assert found(tmp_path) == ("yolo", ".", "train", "val", 3, 3)


def test_roboflow_voc_and_coco(tmp_path):
    many(tmp_path / "voc", "{}", "{}", xml, ("train", "valid"), 3)
    assert found(tmp_path / "voc") == ("voc", ".", "train", "valid", 3, 3)
    for split in ("train", "valid", "test"):
        text(tmp_path / "coco" / split / "_annotations.coco.json", coco())
        picture(tmp_path / "coco" / split / "x.png")
    assert found(tmp_path / "coco") == ("coco", ".", "train", "test", 1, 1)


def test_coco_whose_test_split_has_no_labels(tmp_path):
    for name, content in (
        ("train2017", coco()),
        ("val2017", coco()),
        ("test2017", '{"images": [], "annotations": []}'),
    ):
        text(tmp_path / "annotations" / f"instances_{name}.json", content)
        picture(tmp_path / "images" / name / "x.png")
    assert found(tmp_path) == ("coco", ".", "train2017", "val2017", 1, 1)


def test_vocs_own_layout_of_two_years(tmp_path):
    for year in ("2007", "2012"):
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        many(folder, "Annotations", "JPEGImages", xml, count=3)
        text(folder / "classes.txt", "cell\n")
        text(folder / "ImageSets" / "Main" / "trainval.txt", "all0\nall1\n")
        text(folder / "ImageSets" / "Main" / "cell_trainval.txt", "all0 1\nall1 1\n")
    text(tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "test.txt", "all2\n")
    expected = ("2007/trainval+2012/trainval", "2007/test", 4, 1)
    assert found(tmp_path / "VOCdevkit") == ("voc", ".", *expected)
    assert found(tmp_path)[2:] == expected


@pytest.mark.parametrize("kind", ["voc", "labelimg voc", "yolo", "labelimg yolo", "coco", "kitti"])
def test_one_pile_is_divided_once(tmp_path, kind):
    """Lists are written beside the pictures, in the reader's own form; a second look finds them."""
    if kind == "coco":
        images = [{"id": i, "file_name": f"{i}.png"} for i in range(10)]
        text(tmp_path / "labels.json", coco(objects=[(i, 1) for i in range(10)], images=images))
        for i in range(10):
            noise(tmp_path / f"{i}.png", i)
    elif kind == "kitti":
        line = f"Car 0 0 0 {1} 2 9 9 0 0 0 0 0 0 0\n"
        many(tmp_path, "label_2", "image_2", lambda: line)
        text(tmp_path / "ImageSets" / "frames.txt", "".join(f"all{i}\n" for i in range(10)))
    elif "voc" in kind:
        many(tmp_path, "." if "labelimg" in kind else "annotations", "." if "labelimg" in kind else "images", xml)
    else:
        many(tmp_path, "." if "labelimg" in kind else "labels", "." if "labelimg" in kind else "images", row)
        text(tmp_path / "classes.txt", "cell\n")
    first = look(tmp_path)
    assert first.format == kind.split()[-1] and (len(first.train_index), len(first.test_index)) == (8, 2)
    assert first.written and all(path.is_file() for path in first.written) and "was one pile" in first.notes[0]
    assert first.train_index.names in (
        ("cell",),
        ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc"),
    )
    again = look(tmp_path)
    assert (len(again.train_index), len(again.test_index), again.written) == (8, 2, ())
    assert [s.image_id for s in again.test_index.samples] == [s.image_id for s in first.test_index.samples]


def test_a_single_split_is_divided_under_new_names(tmp_path):
    many(tmp_path, "labels/train", "images/train", row)
    text(tmp_path / "data.yaml", "train: images/train\nnames: [cell]\n")
    for written in (2, 0):
        result = look(tmp_path)
        assert (result.root.name, result.train, result.test) == ("own_split.yaml", "own_train", "own_test")
        assert (len(result.train_index), len(result.test_index)) == (8, 2) and len(result.written) == (written and 3)


def test_a_split_that_the_yaml_names_and_nobody_exported(tmp_path):
    """Without any to test on the pile is divided; without one to train on the line names it."""
    many(tmp_path, "{}/labels", "{}/images", row, ("train", "valid"))
    text(tmp_path / "data.yaml", "train: train/images\nval: valid/images\ntest: test/images\nnames: [cell]\n")
    assert found(tmp_path)[2:] == ("train", "val", 10, 10)
    assert look(tmp_path).notes == ("no pictures where its yaml file has test",)
    shutil.rmtree(tmp_path / "valid")
    for _ in range(2):
        assert found(tmp_path)[1:] == ("own_split.yaml", "own_train", "own_test", 8, 2)
    (tmp_path / "train").rename(tmp_path / "valid")
    (tmp_path / "other").mkdir()  # the only folder would be taken as the set
    with pytest.raises(UserError, match=r"'train/images' leads to .*, no such folder"):
        look(tmp_path)


@pytest.mark.parametrize("kind", ["yolo", "coco"])
def test_one_pile_under_two_names_is_divided(tmp_path, kind):
    """The set that tutorials begin with names one folder train and val: train.py refuses to measure on it."""
    many(tmp_path, "labels/a", "images/a", row if kind == "yolo" else None, ("",))
    if kind == "yolo":
        text(tmp_path / "data.yaml", "train: images/a\nval: images/a\nnames: [cell]\n")
    else:
        images = [{"id": n, "file_name": f"a/all{n}.png", "width": 100, "height": 80} for n in range(10)]
        for split in ("train", "val"):
            text(tmp_path / f"instances_{split}.json", coco(objects=[(n, 1) for n in range(10)], images=images))
    for written in (True, False):
        result = look(tmp_path)
        assert (result.train, result.test, bool(result.written)) == ("own_train", "own_test", written)
        pictures = [
            {sample.image_path for sample in index.samples} for index in (result.train_index, result.test_index)
        ]
        assert (len(pictures[0]), len(pictures[1])) == (8, 2) and not pictures[0] & pictures[1]


def test_a_set_in_the_only_folder(tmp_path):
    many(tmp_path / "raccoons-master", "{}", "{}", xml, ("train", "test"), 2)
    text(tmp_path / "notes.md", "unpacked here")
    result = look(tmp_path)
    assert result.root == tmp_path / "raccoons-master" and result.train == "train"


def test_two_kinds_of_labels_are_said(tmp_path):
    many(tmp_path, "annotations", "images", xml)
    many(tmp_path, "labels", "images", row)
    assert look(tmp_path).format == "voc" and "labels that look like yolo lie there, too" in look(tmp_path).notes[-1]


def test_pictures_alone_and_what_is_refused(tmp_path):
    picture(tmp_path / "alone" / "x.png")
    text(tmp_path / "alone" / "notes.txt", "nothing about 5 boxes")
    assert look(tmp_path / "alone") is None
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "empty", "found no picture"),
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "alone" / "x.png", "a file, expected the folder of a set"),
    ):
        with pytest.raises(UserError, match=message):
            look(folder)
    text(tmp_path / "alone" / "x.xml", "<annotation")
    with pytest.raises(UserError, match=r"no labels that can be read; as voc: .*"):
        look(tmp_path / "alone")
    for name in ("a.json", "b.json"):
        text(tmp_path / "two" / name, coco())
    picture(tmp_path / "two" / "x.png")
    with pytest.raises(UserError, match=r"as coco: .*found a.json, b.json; expected one, or instances_train.json"):
        look(tmp_path / "two")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "val", "test"], ("train", "test")),
        (["test", "train", "trainval", "val"], ("trainval", "test")),
        (["train", "trainval", "val"], ("train", "val")),
        (["train", "valid"], ("train", "valid")),
        (["train2014", "train2017", "val2014", "val2017"], ("train2017", "val2017")),
        (["own_test", "own_train", "train"], ("own_train", "own_test")),
        (["training", "testing"], ("training", "testing")),
    ],
)
def test_choices(names, expected):
    assert choices(names)[0] == expected


def test_no_choice():
    assert choices(["train"]) == choices(["test"]) == choices([]) == []
