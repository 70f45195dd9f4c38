"""datasets.yolo_txt against real YOLO folders, and against rows and yaml files with one fault each."""

import numpy as np
import pytest
from PIL import Image

from datasets import open_dataset
from datasets.images import read_image
from datasets.yolo_txt import read_yolo
from errors import UserError

ROW = "0 0.5 0.5 0.2 0.4"  # 40..60 x 24..56 of 100 x 80


@pytest.fixture
def make(tmp_path):
    def build(labels, yaml="names: [cell, 'no', 1e3]\ntrain: images/train\n"):
        for folder in ("images/train", "labels/train"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data.yaml").write_text(yaml)
        if not (tmp_path / "images/train/x.jpg").exists():
            Image.new("RGB", (100, 80)).save(tmp_path / "images/train/x.jpg")
        if labels is not None:
            data = labels if isinstance(labels, bytes) else labels.encode()
            (tmp_path / "labels/train/x.txt").write_bytes(data)
        return read_yolo(tmp_path, "train")

    return build


def kinds(index) -> list[tuple[str, str]]:
    return [(fault.effect, fault.kind) for fault in index.faults]


def test_coco128(shared_data):
    root = shared_data / "coco128"
    index = open_dataset("yolo", root, "train")
    assert len(index) == 128 and sum(map(len, index.samples)) == 929 and len(index.names) == 80
    found = [(fault.picture, fault.kind, fault.effect) for fault in index.faults]
    expected = ("label without picture", "left out")
    assert found[:2] == [("000000000656", *expected), ("000000000659", *expected)]
    empty = {sample.image_id for sample in index.samples if not len(sample)}
    assert empty == {"000000000250", "000000000508"}  # no label file: a picture without objects
    assert found[2:] == [(f"{name}.jpg", "no label file", "noted") for name in sorted(empty)]
    coco = {s.image_path.name: s for s in open_dataset("coco", root, "train2017").samples}
    for sample in index.samples:
        other = coco[sample.image_path.name]
        assert (sample.width, sample.height) == (other.width, other.height)
        boxes = other.boxes_xyxy[~other.crowd]
        assert np.sort(sample.labels).tolist() == np.sort(other.labels[~other.crowd]).tolist()
        scale = max(sample.width, sample.height)
        for box in sample.boxes_xyxy:
            assert np.abs(boxes - box).max(1).min() < 2e-6 * scale  # rounded to six digits


def test_darknet(shared_data, tmp_path):
    """obj.names is not alphabetical; train.txt names a folder of another machine."""
    source = shared_data / "voc2012_100"
    darknet = source / "same_labels_other_formats" / "yolo_darknet"
    for name in ("obj.names", "train.txt"):
        (tmp_path / name).write_bytes((darknet / name).read_bytes())
    (tmp_path / "obj_train_data").mkdir()
    for path in (darknet / "obj_train_data").iterdir():
        (tmp_path / "obj_train_data" / path.name).symlink_to(path)
    for path in (source / "JPEGImages").iterdir():
        (tmp_path / "obj_train_data" / path.name).symlink_to(path)
    index = read_yolo(tmp_path, "train")
    assert index.names[:3] == ("person", "cat", "boat") and len(index) == 100
    assert sum(map(len, index.samples)) == 273 and not index.faults
    voc = open_dataset("voc", source, "default")
    by_id = {sample.image_id: sample for sample in voc.samples}
    for sample in index.samples:
        other = by_id[sample.image_id]
        corners = other.boxes_xyxy + np.array([1.0, 1, 0, 0])
        for box, label in zip(sample.boxes_xyxy, sample.labels):
            distance = np.abs(corners - box).max(1)
            assert distance.min() < 1e-3
            assert index.names[label] in {voc.names[k] for k in other.labels[distance < 1e-3]}


def test_a_row(make):
    sample = make(ROW + "\n1.0 0.5 0.5 1 1\n").samples[0]
    np.testing.assert_allclose(sample.boxes_xyxy, [[40, 24, 60, 56], [0, 0, 100, 80]], atol=1e-12)
    assert sample.labels.tolist() == [0, 1] and not sample.ignore.any()
    np.testing.assert_allclose(sample.area, [640, 8000])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_crlf_bom_tabs_and_blank_lines(make, start, end):
    index = make(start + end.join((ROW, "", "1\t0.5  0.5 0.1\t0.1 ", "")))
    assert index.samples[0].labels.tolist() == [0, 1] and not index.faults


@pytest.mark.parametrize("labels", [None, "", "\n\r\n", "\ufeff"])
def test_a_picture_without_objects(make, labels):
    index = make(labels)
    assert len(index.samples[0]) == 0
    assert kinds(index) == ([("noted", "no label file")] if labels is None else [])


def test_polygons_become_boxes(make):
    index = make("0 0.1 0.1 0.5 0.2 0.3 0.9\n" + "1 " + " ".join(["0.25 0.5", "0.75 0.5", "0.75 0.75", "0.3 0.6"]))
    np.testing.assert_allclose(index.samples[0].boxes_xyxy, [[10, 8, 50, 72], [25, 40, 75, 60]])


def test_duplicates(make):
    near = "0 0.5 0.5 0.2 0.4001"
    index = make("\n".join((ROW, ROW, near, "1 0.5 0.5 0.2 0.4", "0 0.50 0.5 0.2 0.4")))
    assert kinds(index) == [("duplicate dropped", "duplicate box")] * 2
    assert [fault.line for fault in index.faults] == [2, 5]
    assert index.samples[0].labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "bad, kind",
    [
        ("0 0.5 0.5 0.2", "malformed row"),
        ("0 0.5 0.5 0.2 0.4 0.9", "malformed row"),  # a detection with its score
        ("0 0.1 0.1 0.5 0.2 0.3 0.9 0.1", "malformed row"),
        ("0 0.5 0.5 0.2 wide", "malformed row"),
        ("0 0,5 0,5 0,2 0,4", "malformed row"),
        ("cell 0.5 0.5 0.2 0.4", "unknown class"),
        ("3 0.5 0.5 0.2 0.4", "unknown class"),
        ("-1 0.5 0.5 0.2 0.4", "unknown class"),
        ("0.5 0.5 0.5 0.2 0.4", "unknown class"),
        ("99999999999 0.5 0.5 0.2 0.4", "unknown class"),
        ("0 nan 0.5 0.2 0.4", "not a number"),
        ("0 0.5 inf 0.2 0.4", "not a number"),
        ("0 50 40 20 32", "not normalised"),
        ("0 0.5 0.5 1.03 0.4", "not normalised"),
        ("0 0.5 0.5 0 0.4", "zero-size box"),
        ("0 0.5 0.5 -0.005 0.4", "box turned inside out"),
        ("0 0.1 0.1 0.1 0.2 0.1 0.9", "zero-size box"),  # a polygon that is a line
        ("0 1.005 0.5 0.002 0.1", "box outside the picture"),
    ],
)
def test_a_bad_row_is_dropped_and_listed(make, bad, kind):
    index = make("\n".join((ROW, bad, "2 0.5 0.5 0.2 0.4")))
    assert kinds(index) == [("object dropped", kind)]
    assert index.faults[0].line == 2 and index.faults[0].path.endswith("x.txt")
    assert index.samples[0].labels.tolist() == [0, 2]


def test_past_the_edge(make):
    index = make("0 0.0 0.5 0.2 0.4\n0 0.5 0.5 1.000001 1.0")
    assert kinds(index) == [("noted", "box past the edge")]
    np.testing.assert_allclose(index.samples[0].boxes_xyxy[0], [0, 24, 10, 56])


@pytest.mark.parametrize("labels", [b"\xff\xfe0 0.5", b"\x00\x80\x81"])
def test_a_label_file_that_is_no_text_drops_its_picture(make, labels, tmp_path):
    Image.new("RGB", (9, 9)).save(
        (tmp_path / "images" / "train").mkdir(parents=True) or tmp_path / "images/train/y.png"
    )
    index = make(labels)
    assert (
        kinds(index) == [("picture dropped", "unreadable label file"), ("noted", "no label file")] and len(index) == 1
    )


def test_labels_mean_the_upright_picture(make, tmp_path):
    make(ROW)
    upright = np.zeros((100, 80, 3), dtype=np.uint8)
    upright[30:70, 32:48] = 255  # ROW, of 80 x 100
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "images/train/x.jpg", exif=exif.tobytes())
    index = read_yolo(tmp_path, "train")
    assert kinds(index) == [("noted", "EXIF orientation")]
    sample = index.samples[0]
    assert (sample.width, sample.height) == (80, 100)
    x1, y1, x2, y2 = sample.boxes_xyxy[0].round().astype(int)
    assert (x1, y1, x2, y2) == (32, 30, 48, 70)
    assert read_image(sample.image_path)[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200


def test_class_names_stay_text(make):
    yaml = "train: images/train\nnames:\n  0: no\n  1: 1e3\n  2: null\n  3: 010\n  4: on\n  5: 12:30\n"
    assert make(ROW, yaml).names == ("no", "1e3", "null", "010", "on", "12:30")
    assert make(ROW, "names: [no, 1e3]\nnc: 2\ntrain: images/train\n").names == ("no", "1e3")
    assert make(ROW, "nc: 2\ntrain: images/train\n").names == ("0", "1")


@pytest.mark.parametrize(
    "entry",
    [
        "images/train",
        "./images/train",
        "images",
        "list.txt",
        "[images/train]",
        "[list.txt, images/train]",
        "../images/train",
        "images\\train",
        "..\\images\\train",
    ],
)
def test_entries(make, tmp_path, entry):
    (tmp_path / "list.txt").write_text("./images/train/x.jpg\r\nimages/train/x.jpg\n")
    index = make(ROW, f"names: [a]\ntrain: {entry}\n")
    assert len(index) == 1 and len(index.samples[0]) == 1


def test_paths_are_relative_to_the_yaml_file(make, tmp_path, monkeypatch):
    make(ROW)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("path: ..\nnames: [a]\ntrain: images/train\ndownload: rm -rf /\n")
    monkeypatch.chdir(tmp_path / "labels")
    assert len(read_yolo(tmp_path / "configs" / "mine.yaml", "train")) == 1
    assert len(read_yolo(tmp_path / "configs", "train")) == 1
    (tmp_path / "configs" / "other.yaml").write_text("")
    with pytest.raises(UserError, match=r"mine\.yaml, other\.yaml"):
        read_yolo(tmp_path / "configs", "train")


@pytest.mark.parametrize(
    "yaml, words",
    [
        ("names: [a]\ntrain: images/none\n", r"yaml: 'images/none' leads to .*images/none, no such folder or list"),
        ("names: [a]\nval: images/train\n", "no split 'train', found val"),
        ("names: [a]\npath: elsewhere\ntrain: images/train\n", "elsewhere.*is no folder"),
        ("names: [a, b]\nnc: 3\ntrain: images/train\n", "nc is 3, but there are 2"),
        ("names: [a, a]\ntrain: images/train\n", "'a' is named twice"),
        ("names: {0: a, 2: b}\ntrain: images/train\n", "expected 0..1"),
        ("names: []\ntrain: images/train\n", "no class names"),
        ("names: a\ntrain: images/train\n", "expected a list"),
        ("names: [[a]]\ntrain: images/train\n", "expected a list"),
        ("nc: many\ntrain: images/train\n", "expected the number"),
        ("train: images/train\n", "expected a list of class names"),
        ("names: [a]\ntrain: {a: b}\n", "expected a folder"),
        ("names: [a]\ntrain: []\n", "expected a folder"),
        ("names: [a]\ntrain: images/train\ntrain: images\n", "given twice"),
        ("- a\n", "found a list"),
        ("names: *x\n", "undefined alias|aliases"),
        ("names: !!python/object:os.system {}\n", "could not determine a constructor|not valid YAML"),
        ("names: [a]\ntrain: labels\n", "no pictures in this folder"),
    ],
)
def test_bad_yaml(make, yaml, words):
    with pytest.raises(UserError, match=words):
        make(ROW, yaml)


def test_missing_partners(make, tmp_path):
    make(ROW)
    (tmp_path / "labels/train/gone.txt").write_text(ROW)
    (tmp_path / "list.txt").write_text("images/train/x.jpg\nimages/train/gone.jpg\n")
    assert kinds(read_yolo(tmp_path, "train")) == [("left out", "label without picture")]
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: list.txt\n")
    index = read_yolo(tmp_path, "train")
    assert kinds(index) == [("left out", "label without picture")] and index.faults[0].line == 2


def test_subfolders_and_equal_stems(make, tmp_path):
    make(ROW)
    for name in ("a", "b"):
        (tmp_path / "images/train" / name).mkdir()
        (tmp_path / "labels/train" / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / "images/train" / name / "same.png")
        (tmp_path / "labels/train" / name / "same.txt").write_text(ROW)
    index = read_yolo(tmp_path, "train")
    assert len(index) == 3 and len({sample.image_id for sample in index.samples}) == 3 and not index.faults
    assert [len(sample) for sample in index.samples] == [1, 1, 1]


def test_hidden_files_are_no_pictures(make, tmp_path):
    make(ROW)
    for name in ("images/train/._x.jpg", "labels/train/._x.txt", "images/train/.DS_Store"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    index = read_yolo(tmp_path, "train")
    assert len(index) == 1 and not index.faults


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_yolo(tmp_path / "none", "train")
    with pytest.raises(UserError, match=r"no data\.yaml"):
        read_yolo(tmp_path, "train")
