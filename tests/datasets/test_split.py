"""datasets.split: disjoint lists that the readers take, near-duplicates on one side, in every format."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from datasets import open_dataset
from datasets.convert import convert
from datasets.index import DatasetIndex, Sample
from datasets.near_duplicates import DISTANCE, count_bits, difference_hash, group_near_duplicates
from datasets.overlap import find_overlap
from datasets.split import divide, main, split_dataset
from errors import UserError

COUNT = 30


def draw(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A set of 30 pictures and two classes in every format; `rare` is in six of them, four are near-duplicates."""
    root = tmp_path_factory.mktemp("sources")
    for folder in ("images/all", "labels/all"):
        (root / "source" / folder).mkdir(parents=True)
    for number in range(COUNT):
        picture = draw(number if number >= 4 else 0)
        if 0 < number < 4:
            picture = ImageEnhance.Brightness(picture.resize((80, 60))).enhance(0.9 + number / 20)
        picture.save(root / f"source/images/all/p{number:02}.jpg", quality=90 - number)
        label = "1 0.5 0.5 0.2 0.3\n" if number % 5 == 4 else ""
        (root / f"source/labels/all/p{number:02}.txt").write_text(f"0 0.4 0.4 0.5 0.25\n{label}")
    (root / "source/data.yaml").write_text("all: images/all\nnames: [common, rare]\n")
    for format in ("voc", "coco", "yolo", "kitti"):
        convert("yolo", root / "source", ["all"], format, root / format)
    return root


def stems(index: DatasetIndex) -> set[str]:
    return {sample.image_path.stem for sample in index.samples}


PLACES = {"voc": "ImageSets/Main/{}.txt", "coco": "annotations/instances_{}.json", "kitti": "ImageSets/{}.txt"}


@pytest.mark.parametrize("format", ["voc", "coco", "yolo", "kitti"])
def test_every_reader_takes_the_lists(sources, tmp_path, capsys, format):
    root = tmp_path / "set"
    shutil.copytree(sources / format, root)
    before = {path for path in root.rglob("*") if path.is_file()}
    arguments = [format, str(root), "all", "--test", "0.2", "--val", "0.1", "--prefix", "my_"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 group of near-duplicates, 4 pictures, the largest of 4; each group is in one split" in printed
    names = ("my_train", "my_val", "my_test")
    place = root / "my_split.yaml" if format == "yolo" else root
    written = {path for path in root.rglob("*") if path.is_file()} - before
    expected = {root / PLACES.get(format, "{}.txt").format(name) for name in names}
    assert written == expected | ({place} if format == "yolo" else set())
    train, val, test = (open_dataset(format, place, name) for name in names)
    assert [len(index) for index in (train, val, test)] == [21, 3, 6]
    assert stems(train) | stems(val) | stems(test) == {f"p{number:02}" for number in range(COUNT)}
    for a, b in ((train, val), (train, test), (val, test)):
        assert not find_overlap(a, b, ("a", "b")).shared
        assert a.names == b.names == ("common", "rare")
    alike = {f"p{number:02}" for number in range(4)}
    assert sum(not alike.isdisjoint(stems(index)) for index in (train, val, test)) == 1
    rare = [sum(1 in sample.labels for sample in index.samples) for index in (train, val, test)]
    assert rare[0] in (4, 5) and rare[2] == 1 and sum(rare) == 6
    whole = {s.image_path.stem: s.boxes_xyxy.tolist() for s in open_dataset(format, root, "all").samples}
    assert {s.image_path.stem: s.boxes_xyxy.tolist() for i in (train, val, test) for s in i.samples} == whole
    if format == "yolo":
        assert (root / "my_train.txt").read_text().startswith("./images/all/p")
        assert stems(open_dataset(format, place, "val")) == stems(val)  # the key that other trainers read
        assert open_dataset(format, root, "all")  # the root is read as before
    with pytest.raises(UserError, match=r"my_train\.\w+, .*there already, expected new files; --prefix"):
        main(arguments)


def test_equal_seeds_give_equal_lists_and_others_do_not(sources, tmp_path):
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        shutil.copytree(sources / "kitti", tmp_path / str(number))
        main(["kitti", str(tmp_path / str(number)), "--test", "0.3", "--seed", str(seed)])
        texts.append((tmp_path / str(number) / "ImageSets/test.txt").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_masks_and_ids_of_coco_are_kept(sources, tmp_path):
    shutil.copytree(sources / "coco", tmp_path / "set")
    path = tmp_path / "set/annotations/instances_all.json"
    tree = json.loads(path.read_text())
    for row in tree["annotations"]:
        row["segmentation"] = [[1, 2, 3, 4, 5, row["id"]]]
    tree["info"] = {"year": 2012}
    path.write_text(json.dumps(tree))
    main(["coco", str(tmp_path / "set"), "--test", "0.3"])  # the one file of the folder
    parts = [json.loads(path.with_name(f"instances_{name}.json").read_text()) for name in ("train", "test")]
    rows = sorted((row for part in parts for row in part["annotations"]), key=lambda row: row["id"])
    assert rows == tree["annotations"]
    assert all(part["info"] == tree["info"] and part["categories"] == tree["categories"] for part in parts)
    for part in parts:
        assert {row["image_id"] for row in part["annotations"]} <= {record["id"] for record in part["images"]}


def test_ids_of_coco_that_are_texts_on_one_side(sources, tmp_path):
    """The reader takes "7" for 7, so the division does too."""
    shutil.copytree(sources / "coco", tmp_path / "set")
    path = tmp_path / "set/annotations/instances_all.json"
    tree = json.loads(path.read_text())
    for record in tree["images"][::2]:
        record["id"] = str(record["id"])
    path.write_text(json.dumps(tree))
    main(["coco", str(tmp_path / "set"), "--test", "0.3"])
    parts = [json.loads(path.with_name(f"instances_{name}.json").read_text()) for name in ("train", "test")]
    assert sorted(row["id"] for part in parts for row in part["annotations"]) == [r["id"] for r in tree["annotations"]]


def test_roboflow_coco_beside_its_pictures(sources, tmp_path):
    folder = tmp_path / "set/train"
    shutil.copytree(sources / "coco/images/all", folder)
    shutil.copy(sources / "coco/annotations/instances_all.json", folder / "_annotations.coco.json")
    with pytest.raises(UserError, match=r"split 'train' is there already \(30 pictures\), expected a new name"):
        main(["coco", str(tmp_path / "set"), "train", "--test", "0.2"])
    assert not (tmp_path / "set/annotations").exists() or not list((tmp_path / "set/annotations").iterdir())
    main(["coco", str(tmp_path / "set"), "train", "--test", "0.2", "--prefix", "new_"])
    counts = [len(open_dataset("coco", tmp_path / "set", f"new_{name}")) for name in ("train", "test")]
    assert counts == [24, 6] and len(open_dataset("coco", tmp_path / "set", "train")) == 30


def test_a_yolo_folder_without_a_yaml_file(sources, tmp_path):
    shutil.copytree(sources / "source/images/all", tmp_path / "set/images")
    shutil.copytree(sources / "source/labels/all", tmp_path / "set/labels")
    (tmp_path / "set/classes.txt").write_text("common\nrare\n")
    main(["yolo", str(tmp_path / "set"), "--test", "0.2"])
    for root in (tmp_path / "set", tmp_path / "set/split.yaml"):
        assert [len(open_dataset("yolo", root, name)) for name in ("train", "test")] == [24, 6]
    assert len(open_dataset("yolo", tmp_path / "set", "all")) == 30


def test_what_cannot_be_split_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    root = tmp_path / "set"
    shutil.copytree(sources / "voc", root)
    before = sorted(path for path in root.rglob("*") if path.is_file())
    for arguments, message in (
        (["--test", "0"], "expected fractions"),
        (["--test", "0.5", "--val", "0.5"], "expected fractions"),
        (["--test", "0.001"], "leave none for test"),
        (["--test", "0.2", "--prefix", "../x"], "--prefix: found"),
        (["--test", "0.2", "--group", "("], "no regular expression"),
        (["nothing", "--test", "0.2"], "nothing"),
    ):
        with pytest.raises(UserError, match=message):
            main(["voc", str(root), *arguments])
    from datasets import split

    monkeypatch.setattr(split, "_lines", lambda items: "absent\n")
    with pytest.raises(UserError, match=r"no usable picture|is read as 0 pictures"):
        main(["voc", str(root), "--test", "0.2"])
    assert sorted(path for path in root.rglob("*") if path.is_file()) == before


# ------------------------------------------------------------------------------------------------ near-duplicates


def test_versions_of_a_picture_are_near_and_others_are_not(tmp_path):
    picture = draw(7).resize((384, 288), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    versions = {
        "a": picture,
        "small": picture.resize((96, 72)),
        "bright": ImageEnhance.Brightness(picture).enhance(1.1),
        "other": draw(8).resize((384, 288)),
        "mirrored": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }
    for name, version in versions.items():
        version.save(tmp_path / f"{name}.jpg", quality=40)
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=turned.tobytes())
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    paths = [tmp_path / f"{name}.jpg" for name in (*versions, "turned", "broken")]
    assert group_near_duplicates(paths).tolist() == [0, 0, 0, 1, 2, 0, 3]
    assert difference_hash(paths[-1]) is None


def test_grey_of_16_bits_is_seen_as_it_is_read(tmp_path):
    """Not as white, which would make all such pictures one group."""
    paths = [tmp_path / f"{number}.{suffix}" for number in range(3) for suffix in ("png", "tif")]
    for number, path in enumerate(paths):
        small = np.random.default_rng(number // 2).integers(256, 65536, (8, 9))
        Image.fromarray(np.kron(small, np.ones((8, 8))).astype(np.uint16)).save(path)
    assert group_near_duplicates(paths).tolist() == [0, 0, 1, 1, 2, 2]


def test_names_join_versions_and_frames(tmp_path):
    names = ("a_jpg.rf.0a1B.jpg", "b.jpg", "a_jpg.rf.9f.jpg", "clip1_001.jpg", "clip1_002.jpg", "clip2_001.jpg")
    for number, name in enumerate(names):
        draw(20 + number).save(tmp_path / name)
    paths = [tmp_path / name for name in names]
    assert group_near_duplicates(paths).tolist() == [0, 1, 0, 2, 3, 4]
    assert group_near_duplicates(paths, pattern=r"^(.*)_\d+\.jpg$").tolist() == [0, 1, 0, 2, 2, 3]


def test_the_hash_by_hand(tmp_path):
    """A ramp that falls from left to right has all bits, one that rises has none, and one step has one column."""
    falling = np.tile(np.arange(8, -1, -1, dtype=np.uint8) * 20, (8, 1))
    step = np.where(np.arange(9) < 3, 200, 10).astype(np.uint8)
    expected = {0: (falling, 2**64 - 1), 1: (falling[:, ::-1], 0), 2: (np.tile(step, (8, 1)), 0x2020202020202020)}
    for number, (pixels, value) in expected.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{number}.png")
        assert difference_hash(tmp_path / f"{number}.png") == value


def test_bits_are_counted(monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    expected = [bin(int(value)).count("1") for value in values]
    assert count_bits(values).tolist() == expected and DISTANCE == 4
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert count_bits(values).tolist() == expected


def test_groups_stay_together_and_shares_are_kept():
    rng = np.random.default_rng(0)
    samples = []
    for number in range(400):
        labels = np.flatnonzero(rng.random(3) < (0.9, 0.3, 0.05))
        boxes, area = np.tile([0.0, 0, 1, 1], (len(labels), 1)), np.ones(len(labels))
        samples.append(Sample(f"{number}", number, 9, 9, boxes, labels, np.zeros(len(labels), bool), area))
    index = DatasetIndex(("a", "b", "c"), tuple(samples))
    groups = rng.integers(0, 250, 400)
    rows = divide(index, groups, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=3)
    assert sorted(row for found in rows.values() for row in found) == list(range(400))
    sides = [set(groups[found]) for found in rows.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    for label in range(3):
        total = sum(label in sample.labels for sample in samples)
        for name, fraction in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            found = sum(label in samples[row].labels for row in rows[name])
            assert abs(found - fraction * total) <= 2, (label, name)


def test_links_to_one_file_are_near(tmp_path):
    draw(1).save(tmp_path / "a.png")
    os.symlink(tmp_path / "a.png", tmp_path / "b.png")
    assert group_near_duplicates([tmp_path / "a.png", tmp_path / "b.png"]).tolist() == [0, 0]


def test_two_years_are_not_split_at_once(tmp_path):
    with pytest.raises(UserError, match="found several, expected one"):
        split_dataset("voc", tmp_path, "2007/trainval+2012/trainval", {"train": 0.8, "test": 0.2})
