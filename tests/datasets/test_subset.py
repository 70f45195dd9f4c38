"""datasets.subset: some of a set's classes, in a given order, in every format."""

import numpy as np
import pytest
from PIL import Image

from config import DataConfig
from datasets import ANY_CLASS, open_dataset
from datasets.convert import convert
from datasets.convert import main as convert_main
from datasets.scan import check, main, scan
from errors import UserError

NAMES = ("cat", "dog", "cow", "hen")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """One set of five pictures in every format: cat, cat + dog + hen, none, hen, dog + dog."""
    root = tmp_path_factory.mktemp("sets")
    yolo = root / "source"
    for folder in ("images/train", "labels/train"):
        (yolo / folder).mkdir(parents=True)
    for number, labels in enumerate([[0], [0, 1, 3], [], [3], [1, 1]]):
        Image.new("RGB", (60, 40)).save(yolo / f"images/train/{number}.png")
        rows = [f"{label} 0.{3 + place} 0.5 0.2 0.{4 + label}" for place, label in enumerate(labels)]
        (yolo / f"labels/train/{number}.txt").write_text("\n".join(rows))
    (yolo / "data.yaml").write_text(f"train: images/train\nnames: [{', '.join(NAMES)}]\n")
    for format in ("voc", "coco", "yolo", "kitti"):
        convert("yolo", yolo, ["train"], format, root / format)
    return root


def objects(index):
    """By picture, the (class name, box) rows."""
    return {
        sample.image_path.stem: [
            (index.names[label], *np.round(box, 6).tolist()) for label, box in zip(sample.labels, sample.boxes_xyxy)
        ]
        for sample in index.samples
    }


@pytest.mark.parametrize("format", ["voc", "coco", "yolo", "kitti"])
def test_only_objects_of_the_classes_remain_in_their_order(roots, format):
    whole = open_dataset(format, roots / format, "train")
    part = open_dataset(format, roots / format, "train", classes=("hen", "cat"))
    assert whole.names == NAMES and part.names == ("hen", "cat")
    expected = {stem: [row for row in rows if row[0] in part.names] for stem, rows in objects(whole).items()}
    assert objects(part) == expected and len(part) == 5
    assert {sample.image_path.stem: sample.left_out for sample in part.samples} == {
        "0": (), "1": ("dog",), "2": (), "3": (), "4": ("dog", "dog")
    }  # fmt: skip
    for sample in part.samples:
        assert len(sample.area) == len(sample.ignore) == len(sample.crowd) == len(sample) and not sample.ignore.any()
    assert part.category_ids == ((4, 1) if format == "coco" else None)
    assert not part.faults and scan(part).bad_fraction == 0
    assert objects(open_dataset(format, roots / format, "train", classes=NAMES)) == objects(whole)


@pytest.mark.parametrize("format", ["voc", "coco", "yolo", "kitti"])
def test_names_that_are_not_there(roots, format):
    with pytest.raises(UserError, match=r"classes: found 'dgo', expected some of cat, dog, cow, hen"):
        open_dataset(format, roots / format, "train", classes=("cat", "dgo"))
    with pytest.raises(UserError, match=r"classes: found 'cat' twice"):
        open_dataset(format, roots / format, "train", classes=("cat", "dog", "cat"))


def test_the_scan_counts_what_is_left_out(roots, capsys):
    main(["coco", str(roots / "coco"), "train", "--classes", "hen,cat"])
    printed = capsys.readouterr().out
    assert "left out: 3 objects of other classes (dog 3); 1 picture without others, kept as background" in printed
    assert "2 without objects, 2 classes" in printed and "bad: 0 pictures, 0 objects" in printed
    main(["coco", str(roots / "coco"), "train"])
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(UserError, match="found 'pig'"):
        main(["yolo", str(roots / "yolo"), "train", "--classes", "pig"])


@pytest.mark.parametrize("via", ["voc", "coco", "yolo", "kitti"])
def test_a_conversion_writes_the_classes_in_their_order(roots, tmp_path, capsys, via):
    place = ["coco", str(roots / "coco"), "train", via, str(tmp_path / "out")]
    assert convert_main([*place, "--classes", "hen,cat"]) == 0
    assert "not kept: 3 objects of other classes" in capsys.readouterr().out
    written = open_dataset(via, tmp_path / "out", "train")
    assert written.names == ("hen", "cat")
    assert objects(written) == objects(open_dataset("coco", roots / "coco", "train", classes=("hen", "cat")))


def test_regions_and_flags_go_with_their_objects(tmp_path):
    """KITTI's DontCare belongs to no class and stays; a class that the list lacks is another class, and no fault."""
    for folder in ("image_2", "label_2"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "image_2/0.png")
    rest = "-1 -1 -1 -1000 -1000 -1000 -10"
    kinds = ("Car", "DontCare", "Pedestrian", "Scooter")
    lines = [f"{kind} -1 -1 -10 {5 * i} 5 {5 * i + 9} 30 {rest}" for i, kind in enumerate(kinds)]
    (tmp_path / "label_2/0.txt").write_text("\n".join(lines))
    (sample,) = (part := open_dataset("kitti", tmp_path, "all", classes=("Pedestrian",))).samples
    assert sample.labels.tolist() == [ANY_CLASS, 0] and sample.ignore.tolist() == [True, False]
    assert sample.boxes_xyxy[:, 0].tolist() == [5, 10] and sample.left_out == ("Car",)
    assert [(fault.kind, fault.effect) for fault in part.faults] == [("unknown class", "left out")]
    check(scan(part), 0.0)
    with pytest.raises(UserError, match="bad"):
        check(scan(open_dataset("kitti", tmp_path, "all")), 0.0)


def test_shares_of_soft_labels_are_those_among_the_classes(tmp_path):
    for folder in ("images/train", "labels/train", "soft_labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (60, 40)).save(tmp_path / "images/train/0.png")
    (tmp_path / "labels/train/0.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.4 0.5 0.2 0.2\n2 0.3 0.5 0.2 0.2\n")
    (tmp_path / "soft_labels/train/0.txt").write_text("0.5 0.2 0.3\n0.1 0.6 0.3\n0 1 0\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [a, b, c]\n")
    (sample,) = open_dataset("yolo", tmp_path, "train", classes=("c", "a")).samples
    assert sample.labels.tolist() == [1, 0]
    np.testing.assert_allclose(sample.class_scores, [[0.375, 0.625], [1, 0]], rtol=1e-12)  # 0.3 and 0.5 of 0.8


def test_a_run_and_a_condensed_set_take_the_classes(roots):
    from engine.condensing.config import CondenseConfig, Task
    from engine.condensing.real_pictures import RealPictures

    data = DataConfig("voc", str(roots / "voc"), classes=("hen", "cat"), cache=False)
    real = RealPictures(data, 32)
    assert real.index.names == ("hen", "cat")
    assert real.class_counts().sum(0).tolist() == [2, 2]
    tasks = [Task(DataConfig("voc", "x", **changes), 32, "yolov8n", CondenseConfig("random", 1))
             for changes in ({}, {"max_samples": -1}, {"classes": ("hen",)})]  # fmt: skip
    assert tasks[0].settings() == tasks[1].settings() != tasks[2].settings()
