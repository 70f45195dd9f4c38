"""datasets.convert: round trips of real data, what each format loses, and a destination that is whole or not there."""

import shutil

import numpy as np
import pytest
from PIL import Image

from datasets import ANY_CLASS, open_dataset
from datasets.convert import convert, data_yaml, main
from errors import UserError
from metrics.files import read_ground_truth
from tests.datasets.small_sets import boxes, coco, picture, text, xml
from yaml_files import parse_yaml


def rows_of(index, *, ignored=True, flags=True) -> dict[str, list]:
    """Per picture stem, the sorted rows (class name, box, flags) of an index."""
    result = {}
    for sample in index.samples:
        rows = []
        for box, label, ignore, crowd in zip(sample.boxes_xyxy.tolist(), sample.labels, sample.ignore, sample.crowd):
            if ignored or not ignore:
                name = "(any)" if label == ANY_CLASS else index.names[label]
                rows.append((name, *([bool(ignore), bool(crowd)] if flags else []), box))
        result[sample.image_path.stem] = sorted(rows)
    return result


def assert_same(a: dict[str, list], b: dict[str, list], *, in_order: bool = True) -> None:
    assert (list(a) == list(b)) if in_order else (set(a) == set(b))
    for stem, rows in a.items():
        assert [row[:-1] for row in rows] == [row[:-1] for row in b[stem]]
        if rows:
            expected, found = np.array([row[-1] for row in rows]), np.array([row[-1] for row in b[stem]])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


SOURCES = {"voc": ("voc2012_100", "default"), "coco": ("coco128", "train2017")}


@pytest.mark.parametrize("source", ["voc", "coco"])
@pytest.mark.parametrize("via", ["voc", "coco", "yolo", "kitti"])
def test_there_and_back(shared_data, tmp_path, source, via):
    """source -> via -> source: what `via` can hold comes back."""
    folder, split = SOURCES[source]
    before = open_dataset(source, shared_data / folder, split)
    convert(source, shared_data / folder, [split], via, tmp_path / "via")
    between = open_dataset(via, tmp_path / "via", split)
    convert(via, tmp_path / "via", [split], source, tmp_path / "back")
    after = open_dataset(source, tmp_path / "back", split)
    assert not between.faults and not after.faults
    expected_names = before.names
    if via == "kitti":
        expected_names = tuple(name.replace(" ", "_") for name in before.names)
    assert between.names == after.names == expected_names

    def renamed(rows):
        return {stem: sorted((name.replace(" ", "_"), *rest) for name, *rest in r) for stem, r in rows.items()}

    keep_ignored = via in ("voc", "coco")
    first, second = rows_of(before, ignored=keep_ignored), rows_of(after, ignored=keep_ignored)
    if via == "kitti":
        first = renamed(first)
    if source == "coco" and via == "voc":  # crowd becomes difficult
        first, second = (rows_of(index, flags=False) for index in (before, after))
    assert_same(first, second, in_order=via != "yolo")
    if via == "yolo":
        assert not any(sample.ignore.any() for sample in after.samples)
    if via == "kitti":
        old = sum(int(sample.ignore.sum()) for sample in before.samples)
        assert sum(int((s.labels == ANY_CLASS).sum()) for s in between.samples) == old
    if source == via == "coco":
        assert after.category_ids == before.category_ids
        assert [s.image_id for s in after.samples] == [s.image_id for s in before.samples]
        for a, b in zip(before.samples, after.samples):
            np.testing.assert_array_equal(a.area, b.area)
    pictures = {sample.image_path.name: sample.image_path.read_bytes() for sample in before.samples}
    assert pictures == {sample.image_path.name: sample.image_path.read_bytes() for sample in after.samples}


def test_kitti_regions_survive_coco(shared_data, tmp_path):
    before = open_dataset("kitti", shared_data / "kitti_mini", "frames")
    convert("kitti", shared_data / "kitti_mini", ["frames"], "coco", tmp_path / "coco")
    coco = open_dataset("coco", tmp_path / "coco", "frames")
    assert sum(int(sample.crowd.sum()) for sample in coco.samples) == 15 * 8  # one a class
    convert("coco", tmp_path / "coco", ["frames"], "kitti", tmp_path / "kitti")
    assert_same(rows_of(before), rows_of(open_dataset("kitti", tmp_path / "kitti", "frames")))


def test_losses_are_counted(shared_data, tmp_path, capsys):
    voc, coco = str(shared_data / "voc2012_100"), str(shared_data / "coco128")
    assert main(["voc", voc, "default", "yolo", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "default: 100 pictures, 273 objects" in text and "not kept: 38 ignored objects (left out)" in text
    assert "areas" not in text
    assert main(["coco", coco, "train2017", "voc", str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "not kept: 10 crowd flags" in text and "numeric image ids" in text and "mask areas" in text
    assert main(["voc", voc, "default", "coco", str(tmp_path / "c")]) == 0
    assert "not kept" not in capsys.readouterr().out


def test_voc_cannot_hold_objects_of_one_pixel(odd_root, tmp_path):
    for path in (odd_root / "labels").rglob("*.txt"):
        path.write_text("0 0.5 0.5 0.05 0.5\n1 0.5 0.5 0.06 0.5\n")  # of 17 pixels: 0.85 and 1.02 wide
    _, losses = convert("yolo", odd_root, ["train"], "voc", tmp_path / "out")
    assert losses["objects at most one pixel wide or high (left out)"] == 5
    index = open_dataset("voc", tmp_path / "out", "train")
    assert [sample.labels.tolist() for sample in index.samples] == [
        [1]
    ] * 5 and not index.faults  # the stated size tells


def test_yolo_holds_an_object_that_passes_both_edges(tmp_path):
    picture(tmp_path / "voc" / "JPEGImages" / "x.png", (48, 40))
    text(tmp_path / "voc" / "Annotations" / "x.xml", xml(size=(48, 40), box=(0, 0, 49, 41)))  # -1..49 of 48
    convert("voc", tmp_path / "voc", ["all"], "yolo", tmp_path / "out")
    index = open_dataset("yolo", tmp_path / "out", "all")
    assert boxes(index) == [[[-1, -1, 49, 41]]] and not index.faults
    found = read_ground_truth(tmp_path / "out/labels/all", text_boxes="cxcywhn", images=tmp_path / "out/images")
    assert found.ground_truth.boxes_xyxy.round(6).tolist() == [[-1, -1, 49, 41]]


def test_splits_together_share_pictures(shared_data, tmp_path):
    convert("voc", shared_data / "bccd", ["val", "test", "trainval"], "voc", tmp_path / "out")
    assert len(list((tmp_path / "out" / "JPEGImages").iterdir())) == 292 + 72
    assert len(open_dataset("voc", tmp_path / "out", "val")) == 87
    assert open_dataset("voc", tmp_path / "out", "test").names == ("Platelets", "RBC", "WBC")


NAMES = ["no", "1e3", "null", "a & b <c>", "naïve ☃", 'it\'s "q"', "010", "# x", "a: b", "- y", "[z]", "true"]


@pytest.fixture
def odd_root(tmp_path):
    """A YOLO folder with odd class names, odd file names, an EXIF-turned picture and thirds of pixels."""
    root = tmp_path / "odd"
    for folder in ("images/a", "images/b", "labels/a", "labels/b"):
        (root / folder).mkdir(parents=True)
    stems = ("a/pic & <1>", "b/naïve ☃ 'x'", "a/same", "b/SAME", "a/x.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, stem in enumerate(stems):
        Image.new("RGB", (31 + number, 17)).save(root / "images" / f"{stem}.jpg", exif=exif.tobytes())
        rows = [f"{k} {(k + 1) / 30} {1 / 3} {3 / 31 + k / 500} 0.1234567" for k in range(len(NAMES))]
        (root / "labels" / f"{stem}.txt").write_text("\n".join(rows))
    from yaml_files import dump_yaml

    (root / "data.yaml").write_text(dump_yaml({"names": NAMES, "train": "images"}))
    return root


@pytest.mark.parametrize("via", ["voc", "coco", "yolo", "kitti"])
def test_special_characters_and_exif(odd_root, tmp_path, via):
    before = open_dataset("yolo", odd_root, "train")
    assert before.names == tuple(NAMES) and len(before) == 5
    convert("yolo", odd_root, ["train"], via, tmp_path / "via")
    after = open_dataset(via, tmp_path / "via", "train")
    names = tuple(name.replace(" ", "_") for name in NAMES) if via == "kitti" else tuple(NAMES)
    assert after.names == names
    expected = ("pic & <1>.jpg", "same.jpg", "x.jpg.jpg", "SAME_2.jpg", "naïve ☃ 'x'.jpg")
    found = {sample.image_path.name: sample for sample in after.samples}
    assert (set(found) == set(expected)) if via == "yolo" else (tuple(found) == expected)
    assert all(fault.kind == "EXIF orientation" for fault in after.faults)
    for a, b in zip(before.samples, (found[name] for name in expected)):
        assert (a.width, a.height) == (b.width, b.height) and a.width == 17
        np.testing.assert_allclose(b.boxes_xyxy, a.boxes_xyxy, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(b.labels, a.labels)


def test_names_that_cannot_be_written(tmp_path, shared_data):
    def source(names):
        root = tmp_path / "src"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        import json

        images = [{"id": 1, "file_name": "x.png"}]
        objects = [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 5, 5]}]
        categories = [{"id": k, "name": name} for k, name in enumerate(names)]
        tree = {"images": images, "annotations": objects, "categories": categories}
        (root / "instances_t.json").write_text(json.dumps(tree))
        Image.new("RGB", (9, 9)).save(root / "x.png")
        return root

    for names, formats in (
        (["a\nb"], ("voc", "yolo")),
        ([" a"], ("voc", "yolo")),
        (["\x01"], ("voc", "yolo", "kitti")),
        (["DontCare"], ("kitti",)),
        (["a b", "a_b"], ("kitti",)),
    ):
        for format in formats:
            with pytest.raises(UserError, match="class"):
                convert("coco", source(names), ["t"], format, tmp_path / "out")
            assert not (tmp_path / "out").exists()
    convert("coco", source([" a\n"]), ["t"], "coco", tmp_path / "out")
    assert open_dataset("coco", tmp_path / "out", "t").names == (" a\n",)


def test_the_destination_is_whole_or_not_there(shared_data, tmp_path, monkeypatch):
    voc = shared_data / "voc2012_100"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").touch()
    with pytest.raises(UserError, match="not empty"):
        convert("voc", voc, ["default"], "yolo", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    copied = []

    def failing_copy(source, target):
        copied.append(source)
        if len(copied) == 5:
            raise OSError(28, "No space left on device")
        return target

    with monkeypatch.context() as patch:
        patch.setattr("datasets.convert.shutil.copyfile", failing_copy)
        with pytest.raises(UserError, match="No space left") as caught:
            convert("voc", voc, ["default"], "yolo", tmp_path / "empty")
    assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert not list((tmp_path / "empty").iterdir())
    convert("voc", voc, ["default"], "yolo", tmp_path / "empty")
    assert len(open_dataset("yolo", tmp_path / "empty", "default")) == 100


def test_bad_samples_stop_a_conversion(shared_data, tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "data.yaml").write_text("names: [a]\ntrain: images\n")
    for number in range(10):
        Image.new("RGB", (20, 10)).save(tmp_path / "in" / "images" / f"{number}.png")
        (tmp_path / "in" / "images" / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n" + "0 1\n" * (number < 3))
    with pytest.raises(
        UserError, match=r"3 objects are bad.*--max-bad-fraction 0.5, in a config data.max_bad_fraction=0.5"
    ):
        convert("yolo", tmp_path / "in", ["train"], "voc", tmp_path / "out")
    convert("yolo", tmp_path / "in", ["train"], "voc", tmp_path / "out", max_bad_fraction=0.5)
    assert len(open_dataset("voc", tmp_path / "out", "train")) == 10


@pytest.mark.parametrize("via", ["voc", "kitti", "yolo", "coco"])
def test_a_picture_with_other_objects_in_each_split_keeps_both_or_is_refused(tmp_path, capsys, via):
    """VOC and KITTI have one label file a picture: the second split would take the first one's objects."""
    source = tmp_path / "source"
    picture(source / "images" / "x.png")
    for split, category in (("train", 1), ("test", 2)):
        text(source / "annotations" / f"instances_{split}.json", coco(("cell", "cup"), ((1, category),)))
    arguments = ["coco", str(source), "train,test", via, str(tmp_path / "said")]
    if via in ("voc", "kitti"):
        with pytest.raises(UserError, match=r"x\.png: has other objects in split 'test' than in one before it"):
            convert("coco", source, ["train", "test"], via, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    convert("coco", source, ["train", "test"], via, tmp_path / "out")
    found = [open_dataset(via, tmp_path / "out", split).samples[0].labels.tolist() for split in ("train", "test")]
    assert found == [[0], [1]]
    main(arguments)
    assert "1 of 1 pictures of test are also in train (1 the same file)" in capsys.readouterr().out


def test_splits_that_clash(shared_data, tmp_path):
    with pytest.raises(UserError, match="share a name"):
        convert("voc", shared_data / "bccd", ["val", "val"], "voc", tmp_path / "out")


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["default"], {"train": "images/default", "default": "images/default"}),
        (["train", "test"], {"train": "images/train", "val": "images/test", "test": "images/test"}),
        (["train2017", "val2017"], {"train": "images/train2017", "val": "images/val2017"}),
        (["a_trainval", "b_trainval"], {"train": ["images/a_trainval", "images/b_trainval"]}),
        (["train", "valid", "test"], {"train": "images/train", "val": "images/valid", "test": "images/test"}),
        (["test"], {"val": "images/test", "test": "images/test"}),
        (["trainval", "train"], {"train": "images/train"}),
    ],
)
def test_a_data_yaml_has_the_keys_that_other_trainers_read(splits, expected):
    tree = parse_yaml(data_yaml({split: f"images/{split}" for split in splits}, ["a", "b"]), "text")
    assert tree["nc"] == 2 and tree["names"] == {0: "a", 1: "b"}
    assert "path" not in tree  # which some trainers take relative to the working directory
    assert {key: tree[key] for key in tree if key in expected} == expected
    for key in ("train", "val", "test"):
        assert (key in tree) == (key in expected or key in splits)
    assert all(tree[split] == f"images/{split}" for split in splits)


def test_a_converted_yolo_set_is_found_from_every_folder(odd_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert("yolo", odd_root, ["train"], "yolo", "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = tmp_path / "out" / "data.yaml"
    folder = data.parent / parse_yaml(data.read_text(encoding="utf-8"), "text")["train"]  # as other trainers join them
    assert len(list(folder.iterdir())) == len(open_dataset("yolo", data, "train")) > 0


def test_category_ids_that_are_numbers_and_texts_stay(tmp_path):
    """In the file's order, as the reader has them."""
    picture(tmp_path / "images" / "x.png")
    categories = [{"id": "b", "name": "x"}, {"id": 3, "name": "y"}, {"id": 1, "name": "z"}]
    text(tmp_path / "train.json", coco(objects=((1, 3), (1, "b")), categories=categories))
    before = convert("coco", tmp_path, ["train"], "coco", tmp_path / "new")[0]["train"]
    after = open_dataset("coco", tmp_path / "new", "train")
    assert after.names == before.names == ("x", "y", "z") and after.category_ids == before.category_ids == ("b", 3, 1)
    assert after.samples[0].labels.tolist() == before.samples[0].labels.tolist() == [1, 0]
