"""The folders that tools export, read as they lie; and sets without one object, refused by every reader."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import DataConfig
from datasets import open_dataset
from datasets.coco import read_coco
from datasets.convert import convert
from datasets.kitti import read_kitti
from datasets.open import require_objects
from datasets.scan import main as scan_main
from datasets.scan import scan
from datasets.voc import read_voc
from datasets.yolo_txt import read_yolo
from engine.condensing.real_pictures import RealPictures
from errors import UserError
from tests.datasets.small_sets import BOX, ROW, boxes, coco, picture, text, xml

# -------------------------------------------------------------------------------------------- layouts, COCO and VOC


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("labels", ["{}/_annotations.coco.json", "{}/labels.json", "annotations/{}.json", "{}.json"])
@pytest.mark.parametrize("place", ["{}", "{}/images", "images/{}", "images"])
def test_coco_layouts(tmp_path, split, labels, place):
    text(tmp_path / labels.format(split), coco())
    picture(tmp_path / place.format(split) / "x.png")
    assert boxes(read_coco(tmp_path, split)) == [BOX]


def test_coco_that_is_not_there_names_what_is(tmp_path):
    text(tmp_path / "train" / "_annotations.coco.json", coco())
    with pytest.raises(UserError, match=r"no such file, found train/_annotations.coco.json; expected the labels of"):
        read_coco(tmp_path, "val")


def test_coco_paths_of_windows(tmp_path):
    images = [{"id": 1, "file_name": "sub\\x.png"}, {"id": 2, "file_name": "y\\z.png"}]
    picture(tmp_path / "images" / "sub" / "x.png")
    picture(tmp_path / "images" / "y\\z.png")  # a name may hold one
    text(tmp_path / "train.json", coco(objects=((1, 1), (2, 1)), images=images))
    assert boxes(read_coco(tmp_path, "train")) == [BOX, BOX]


@pytest.mark.parametrize(
    "annotations, pictures",
    [
        ("train", "train"),  # XML beside pictures, a folder per split
        ("train/labels", "train/images"),
        ("Annotations/train", "JPEGImages/train"),
        ("annotations/train", "images"),
        ("annots/train", "images/train"),
        ("xml/train", "imgs/train"),
    ],
)
def test_voc_layouts_with_a_folder_for_each_split(tmp_path, annotations, pictures):
    for split, name in (("train", "cell"), ("test", "virus")):
        text(tmp_path / annotations.replace("train", split) / f"{split}.xml", xml(name))
        picture(tmp_path / pictures.replace("train", split) / f"{split}.png")
    index = read_voc(tmp_path, "train")
    assert boxes(index) == [BOX] and not index.faults
    assert index.names == ("cell", "virus") == read_voc(tmp_path, "test").names  # of all splits


@pytest.mark.parametrize("labels", ["annots", "xml", "labels", "Annotations", ".", "images"])
@pytest.mark.parametrize("pictures", ["images", "JPEGImages", "photos", "."])
def test_voc_folders_by_what_is_in_them(tmp_path, labels, pictures):
    text(tmp_path / labels / "x.xml", xml())
    picture(tmp_path / pictures / "x.png")
    picture(tmp_path / "masks" / "x_mask.png")
    text(tmp_path / "ImageSets" / "Main" / "train.txt", "x\n")
    assert boxes(read_voc(tmp_path, "train")) == [BOX]


def test_voc_splits_that_are_not_there_are_told(tmp_path):
    for split in ("train", "valid"):
        text(tmp_path / split / "x.xml", xml())
        picture(tmp_path / split / "x.png")
    with pytest.raises(UserError, match=r"no split 'val', found XML files in train, valid"):
        read_voc(tmp_path, "val")


@pytest.mark.parametrize("encoding", ["GB2312", "gbk", "Shift_JIS", "Big5", "euc-kr", "windows-1252", "utf-16"])
def test_xml_in_any_encoding_that_python_knows(tmp_path, encoding):
    name = {"euc-kr": "개", "windows-1252": "Füße", "Big5": "貓", "Shift_JIS": "猫"}.get(encoding, "猫")
    picture(tmp_path / "images" / "x.png")
    (tmp_path / "labels").mkdir()
    content = xml(name, start=f'<?xml version="1.0" encoding="{encoding}"?>\n')
    (tmp_path / "labels" / "x.xml").write_bytes(content.encode(encoding))
    index = read_voc(tmp_path, "all")
    assert index.names == (name,) and boxes(index) == [BOX]
    if encoding == "utf-16":  # written by tools that declare it and write UTF-8
        (tmp_path / "labels" / "x.xml").write_bytes(content.encode())
        assert read_voc(tmp_path, "all").names == (name,)


@pytest.mark.parametrize("encoding", ["klingon", "unicode_escape", "idna", "zlib"])
def test_xml_in_no_encoding(tmp_path, encoding):
    picture(tmp_path / "images" / "x.png")
    text(tmp_path / "labels" / "x.xml", xml(start=f'<?xml version="1.0" encoding="{encoding}"?>\n'))
    fault = read_voc(tmp_path, "all").faults[0]
    assert fault.kind == "unreadable label file" and "encoding" in fault.reason


# ------------------------------------------------------------------------------------------------------ layouts, YOLO


def test_labelimg_and_label_studio(tmp_path):
    picture(tmp_path / "limg" / "train" / "x.png")
    text(tmp_path / "limg" / "train" / "x.txt", ROW)
    text(tmp_path / "limg" / "train" / "classes.txt", "cell\n")
    index = read_yolo(tmp_path / "limg", "train")
    assert boxes(index) == [BOX] and index.names == ("cell",) and not index.faults
    picture(tmp_path / "studio" / "images" / "x.png")
    text(tmp_path / "studio" / "labels" / "x.txt", ROW)
    text(tmp_path / "studio" / "classes.txt", "cell\nvirus\n")
    text(tmp_path / "studio" / "notes.json", "{}")
    index = read_yolo(tmp_path / "studio", "all")
    assert boxes(index) == [BOX] and index.names == ("cell", "virus") and not index.faults
    with pytest.raises(UserError, match=r"no data\.yaml.*found pictures in images \(`all` takes every one\)"):
        read_yolo(tmp_path / "studio", "train")


@pytest.mark.parametrize("images, labels", [("images/train", "labels/train"), ("train/images", "train/labels")])
def test_yolo_folders_without_a_yaml_file(tmp_path, images, labels):
    for split, row in (("train", ROW), ("test", ROW.replace("0 ", "2 ", 1))):
        picture(tmp_path / images.replace("train", split) / "x.png")
        text(tmp_path / labels.replace("train", split) / "x.txt", row)
    index = read_yolo(tmp_path, "train")
    assert boxes(index) == [BOX] and index.names == ("0", "1", "2")  # the classes of all splits
    assert [fault.kind for fault in index.faults] == ["classes without names"]
    assert read_yolo(tmp_path, "train", ("a", "b", "c")).names == ("a", "b", "c")
    text(tmp_path / "classes.txt", "a\nb\nc\n")
    assert read_yolo(tmp_path, "test").names == ("a", "b", "c")


@pytest.mark.parametrize("sister", [False, True])
def test_a_folder_images_above_the_set_does_not_move_the_labels(tmp_path, sister):
    root = tmp_path / "images" / "project"
    picture(root / "train" / "x.png")
    text(root / "train" / "x.txt", ROW)
    if sister:  # of another set
        text(tmp_path / "labels" / "project" / "train" / "x.txt", "0 0.1 0.1 0.1 0.1\n")
    text(root / "data.yaml", "names: [cell]\ntrain: train\nval: list.txt\ntest: [more]\n")
    text(root / "list.txt", f"train/x.png\n{root}/train/x.png\n")
    picture(root / "more" / "images" / "y.png")
    text(root / "more" / "labels" / "y.txt", ROW)
    assert [boxes(read_yolo(root, split)) for split in ("train", "val", "test")] == [[BOX]] * 3


def test_of_two_folders_images_the_inner_one_has_its_labels_beside_it(tmp_path):
    picture(tmp_path / "images" / "train" / "images" / "x.png")
    text(tmp_path / "images" / "train" / "labels" / "x.txt", ROW)
    text(tmp_path / "labels" / "train" / "images" / "x.txt", "0 0.1 0.1 0.1 0.1\n")
    text(tmp_path / "data.yaml", "names: [cell]\ntrain: images/train/images\n")
    assert boxes(read_yolo(tmp_path, "train")) == [BOX]


def test_labels_beside_pictures_in_a_folder_called_images(tmp_path):
    picture(tmp_path / "images" / "x.png")
    text(tmp_path / "images" / "x.txt", ROW)
    text(tmp_path / "data.yaml", "names: [cell]\ntrain: images\n")
    assert boxes(read_yolo(tmp_path, "train")) == [BOX]


def test_lists_of_windows_and_of_darknet(tmp_path, monkeypatch):
    picture(tmp_path / "sub" / "x.png")
    text(tmp_path / "sub" / "x.txt", ROW)
    text(tmp_path / "obj.names", "cell\n")
    text(tmp_path / "train.txt", "sub\\x.png\ndata/sub/x.png\n")
    index = read_yolo(tmp_path, "train")
    assert boxes(index) == [BOX] and [fault.kind for fault in index.faults] == ["listed twice"]
    monkeypatch.chdir(tmp_path)
    for spelled in ("sub/../sub/x.png", str(tmp_path / "sub" / "x.png")):
        text(tmp_path / "train.txt", f"sub/x.png\n{spelled}\n")
        index = read_yolo(Path("."), "train")
        assert boxes(index) == [BOX] and [fault.kind for fault in index.faults] == ["listed twice"]
    text(tmp_path / "train.txt", "sub/x.png\nother/sub/x.png\n")  # another folder is not the same picture
    assert [fault.kind for fault in read_yolo(tmp_path, "train").faults] == ["label without picture"]


def test_pictures_of_formats_that_are_not_read_are_named(tmp_path):
    picture(tmp_path / "images" / "x.png")
    for name in ("a.heic", "b.GIF"):
        (tmp_path / "images" / name).write_bytes(b"GIF89a" if "GIF" in name else b"\0\0\0\x18ftypheic")
        text(tmp_path / "labels" / f"{name[0]}.txt", ROW)
    text(tmp_path / "labels" / "x.txt", ROW)
    text(tmp_path / "data.yaml", "names: [cell]\ntrain: images\n")
    faults = read_yolo(tmp_path, "train").faults
    assert [(fault.effect, fault.kind) for fault in faults] == [("picture dropped", "unreadable picture")] * 2
    assert "HEIC format" in faults[0].reason and "GIF format" in faults[1].reason
    (tmp_path / "images" / "x.png").unlink()
    with pytest.raises(UserError, match=r"no pictures in this folder.*2 in formats that are not read"):
        read_yolo(tmp_path, "train")
    for name in ("a", "x"):
        text(tmp_path / "xml" / f"{name}.xml", xml())
    picture(tmp_path / "images" / "x.png")
    (tmp_path / "images" / "b.GIF").unlink()
    faults = read_voc(tmp_path, "all").faults
    assert [fault.kind for fault in faults] == ["unreadable picture"] and "HEIC" in faults[0].reason
    for split, pictures in (("train", "train"), ("test", "test/images")):  # XML beside its pictures, and no other
        text(tmp_path / "set" / split / "x.xml", xml())
        (tmp_path / "set" / pictures).mkdir(exist_ok=True)
        (tmp_path / "set" / pictures / "x.gif").write_bytes(b"GIF89a")
        index = read_voc(tmp_path / "set", split)
        assert not index.samples and "GIF format" in index.faults[0].reason


# --------------------------------------------------------------------------------------------------- without an object


@pytest.mark.parametrize(
    "images, labels, found",
    [
        ("images/train", None, ""),
        ("Images/train", "Labels/train/x.txt", "Labels/train/x.txt instead"),
        ("images/train", "annotations/train/x.txt", "annotations/train/x.txt instead"),
        ("photos", "labels/x.txt", "labels/x.txt instead"),
        ("images/train", "labels/train/x.TXT", None),
    ],
)
def test_yolo_without_an_object(tmp_path, images, labels, found):
    for name in ("x", "y"):
        picture(tmp_path / images / f"{name}.png")
    if labels is not None:
        text(tmp_path / labels, ROW)
    text(tmp_path / "data.yaml", f"names: [cell]\ntrain: {images}\n")
    with pytest.raises(UserError) as caught:
        open_dataset("yolo", tmp_path, "train")
    message = str(caught.value)
    if found is None:
        assert message.endswith("x.TXT: a label file with the suffix .TXT, expected .txt")
    else:
        assert "2 pictures and not one object" in message and "2 of 2 label files are missing" in message
        assert found in message and "\n" not in message
        assert len(open_dataset("yolo", tmp_path, "train", needs_objects=False)) == 2


def test_every_reader_refuses_a_set_without_an_object(tmp_path):
    def refused(format, split, words):
        with pytest.raises(UserError, match=words):
            open_dataset(format, tmp_path, split)

    picture(tmp_path / "images" / "x.png")
    text(tmp_path / "none.json", coco(objects=()))
    refused("coco", "none", r"not one object; labels were looked for in .*none\.json \(0 annotations\)")
    text(tmp_path / "lost.json", coco(objects=((9, 1), (1, 9))))
    refused("coco", "lost", r"lost\.json \(2 annotations\).*objects, labels or pictures that cannot be used: 2")
    refused("voc", "all", "no XML file in Annotations or in any other folder, for 1 picture")
    text(tmp_path / "Annotations" / "x.xml", xml(None))
    refused("voc", "all", "not one object; labels were looked for in .*Annotations")
    text(tmp_path / "ImageSets" / "Main" / "train.txt", "y\nz\n")
    refused(
        "voc", "train", "no usable picture; labels were looked for in .*Annotations; 2 x picture without label file"
    )
    picture(tmp_path / "image_2" / "x.png")
    text(tmp_path / "label_2" / "x.txt", "DontCare -1 -1 -10 1 1 9 9 -1 -1 -1 -1000 -1000 -1000 -10\n")
    refused("kitti", "all", r"not one object; labels were looked for in .*label_2.*; 1 box to be ignored")
    (tmp_path / "label_2" / "x.txt").unlink()
    refused("kitti", "all", "1 x picture without label file")


def test_difficult_objects_alone_can_be_measured_and_not_learnt(tmp_path):
    picture(tmp_path / "images" / "x.png")
    text(tmp_path / "xml" / "x.xml", xml().replace("</object>", "<difficult>1</difficult></object>"))
    index = open_dataset("voc", tmp_path, "all")
    with pytest.raises(UserError, match="; 1 box to be ignored, and no others"):
        require_objects(index, "set", tmp_path, with_difficult=False)


def test_missing_label_files_are_counted_apart_from_empty_ones(tmp_path):
    for name in "abcd":
        picture(tmp_path / "images" / f"{name}.png")
    text(tmp_path / "labels" / "a.txt", ROW)
    text(tmp_path / "labels" / "b.txt", "")
    text(tmp_path / "data.yaml", "names: [cell]\ntrain: images\n")
    report = scan(open_dataset("yolo", tmp_path, "train"))
    assert "3 without objects (2 of them without a label file)" in report.table() and report.bad_fraction == 0
    assert [fault.picture for fault in report.index.faults if fault.kind == "no label file"] == ["c.png", "d.png"]


# ---------------------------------------------------------------------------------------------------- resized pictures


def states(tmp_path, format, sizes):
    """A set whose pictures are 100 x 80, and whose labels state these sizes; its index."""
    for number in range(len(sizes)):
        picture(tmp_path / "images" / f"{number}.png")
    if format == "voc":
        for number, size in enumerate(sizes):
            text(tmp_path / "xml" / f"{number}.xml", xml(size=size))
        return read_voc(tmp_path, "all")
    images = [{"id": n, "file_name": f"{n}.png", "width": size[0], "height": size[1]} for n, size in enumerate(sizes)]
    text(tmp_path / "train.json", coco(objects=[(n, 1) for n in range(len(sizes))], images=images))
    return read_coco(tmp_path, "train")


@pytest.mark.parametrize("format", ["voc", "coco"])
@pytest.mark.parametrize(
    "sizes",
    [
        [(200, 160)],
        [(200, 160)] * 2,
        [(200, 160)] * 3 + [(100, 80)] * 3,
        [(50, 80)] * 5,  # a factor per axis
        [(200, 160), (400, 300), (50, 40)],  # all to one size
        [(200, 160)] * 3 + [(0, 0)] * 3,
        [(200, 160)] * 3 + [(100, 80)] * 12,
    ],
)
def test_pictures_resized_after_labelling_stop_the_run(tmp_path, format, sizes):
    with pytest.raises(UserError, match=r"were resized after labelling: . of \d+ have another size"):
        states(tmp_path, format, sizes)


@pytest.mark.parametrize("format", ["voc", "coco"])
@pytest.mark.parametrize(
    "sizes, count",
    [
        ([(200, 130)] + [(100, 80)] * 3, 1),
        ([(200, 130), (50, 60)] + [(100, 80)] * 3, 2),
        ([(103, 82)] + [(100, 80)] * 3, 1),  # boxes are off by three pixels at most
        ([(80, 100)] * 4, 4),  # width and height by each other's names
        ([(0, 0)] * 4, 0),
        ([(100.0, "80")] * 4, 0),
        ([(101, 80)] * 2 + [(99.6, 80.2)] * 2, 4),  # rounding
    ],
)
def test_single_wrong_sizes_are_noted(tmp_path, format, sizes, count):
    index = states(tmp_path, format, sizes)
    assert [fault.kind for fault in index.faults] == ["wrong size stated"] * count
    assert boxes(index) == [BOX] * len(sizes)


@pytest.mark.parametrize("format", ["voc", "coco"])
def test_a_few_resized_pictures_are_bad(tmp_path, format):
    index = states(tmp_path, format, [(200, 160), (33, 27)] + [(100, 80)] * 3)  # a third of 100 x 80, rounded
    assert [(fault.kind, fault.effect) for fault in index.faults] == [("resized picture", "picture dropped")] * 2
    assert boxes(index) == [BOX] * 3


def test_sizes_of_null_and_as_floats(tmp_path):
    assert not states(tmp_path, "coco", [(None, None), (100.0, 80.0), (None, 80), ("100", 80)]).faults


# ------------------------------------------------------------------------------------------------- rules of all readers


def test_exact_duplicates_are_one_object_for_every_reader(tmp_path):
    picture(tmp_path / "images" / "x.png")
    picture(tmp_path / "image_2" / "x.png")
    text(tmp_path / "labels" / "x.txt", ROW * 2)
    text(tmp_path / "classes.txt", "cell\n")
    item = xml().split("<object>")[1].split("</annotation>")[0]
    text(tmp_path / "Annotations" / "x.xml", xml().replace("</annotation>", f"<object>{item}</annotation>"))
    text(tmp_path / "all.json", coco(objects=((1, 1), (1, 1))))
    text(tmp_path / "label_2" / "x.txt", "cell 0 0 0 40 24 60 56 0 0 0 0 0 0 0\n" * 2)
    for format in ("yolo", "voc", "coco", "kitti"):
        index = open_dataset(format, tmp_path, "all")
        assert boxes(index) == [BOX], format
        assert [(f.effect, f.kind) for f in index.faults] == [("duplicate dropped", "duplicate box")], format
    np.testing.assert_array_equal(index.samples[0].area, [640])


def test_one_picture_of_two_xml_files_is_refused(tmp_path):
    picture(tmp_path / "images" / "x.png")
    for name in ("x", "y"):  # y.xml has no picture of its own, and states x.png
        text(tmp_path / "xml" / f"{name}.xml", xml())
    with pytest.raises(UserError, match=r"y\.xml: .*x\.png is the picture of x\.xml too"):
        read_voc(tmp_path, "all")


def test_labels_where_a_linked_folder_of_pictures_leads(tmp_path):
    picture(tmp_path / "store" / "images" / "a" / "x.png")
    text(tmp_path / "store" / "labels" / "a" / "x.txt", ROW)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to("../store/images")
    text(tmp_path / "set" / "data.yaml", "names: [cell]\ntrain: images\n")
    assert boxes(read_yolo(tmp_path / "set", "train")) == [BOX]
    text(tmp_path / "set" / "labels" / "a" / "x.txt", "0 0.1 0.1 0.1 0.1\n")  # the set's own come first
    assert boxes(read_yolo(tmp_path / "set", "train")) == [[[5, 4, 15, 12]]]


@pytest.mark.parametrize("labels", [None, "Labels/x.txt"])
def test_no_command_takes_a_set_without_an_object(tmp_path, labels):
    picture(tmp_path / "set" / "images" / "x.png")
    if labels:
        text(tmp_path / "set" / labels, ROW)
    text(tmp_path / "set" / "data.yaml", "names: [cell]\ntrain: images\n")
    for command in (
        lambda: convert("yolo", tmp_path / "set", ["train"], "coco", tmp_path / "out"),
        lambda: scan_main(["yolo", str(tmp_path / "set"), "train"]),
        lambda: RealPictures(DataConfig(format="yolo", root=str(tmp_path / "set"), train="train"), 64),
    ):
        with pytest.raises(
            UserError, match=r"not one object; labels were looked for in .*1 of 1 label files are missing"
        ):
            command()


def test_suffixes_in_capitals(tmp_path):
    text(tmp_path / "Annotations" / "x.XML", xml())
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / "x.Jpg", format="JPEG")
    assert boxes(read_voc(tmp_path, "all")) == [BOX]


def test_kitti_names_formats_that_are_not_read(tmp_path):
    for name in ("x", "y"):
        text(tmp_path / "label_2" / f"{name}.txt", "Car 0 0 0 40 24 60 56 0 0 0 0 0 0 0\n")
    picture(tmp_path / "image_2" / "x.png")
    (tmp_path / "image_2" / "y.heic").touch()
    index = read_kitti(tmp_path, "all")
    assert boxes(index) == [BOX] and [fault.kind for fault in index.faults] == ["unreadable picture"]


def test_a_label_file_of_two_pictures_is_noted(tmp_path):
    for name in ("x.png", "x.jpg", "y.png"):
        picture(tmp_path / "images" / name)
        text(tmp_path / "labels" / f"{name[0]}.txt", ROW)
    text(tmp_path / "data.yaml", "names: [cell]\ntrain: images\n")
    (fault,) = read_yolo(tmp_path, "train").faults
    assert fault.effect == "noted" and fault.reason == "the labels of x.jpg and of x.png"


@pytest.mark.parametrize("form", ["voc", "coco", "yolo"])
def test_classes_that_differ_in_case_alone_are_noted(tmp_path, form):
    """Two people labelled: a class written in two ways is learnt as two."""
    for stem, name in (("x", "Red cell"), ("y", "red_cell"), ("z", "cup")):
        picture(tmp_path / "images" / f"{stem}.png")
        text(tmp_path / "Annotations" / f"{stem}.xml", xml(name, filename=f"{stem}.png"))
        text(tmp_path / "labels" / f"{stem}.txt", ROW)
    text(tmp_path / "all.json", coco(("Red cell", "cup", "red_cell")))
    text(tmp_path / "classes.txt" if form == "yolo" else tmp_path / "names", "Red cell\ncup\nred_cell\n")
    index = open_dataset(form, tmp_path, "all")
    (fault,) = [fault for fault in index.faults if fault.kind == "classes of alike names"]
    assert fault.reason == "'Red cell' and 'red_cell' are counted as different classes" and fault.effect == "noted"
    assert len(index.names) == 3
