"""datasets.voc against the real folders, and against files with one fault each."""

import csv
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from datasets import open_dataset
from datasets.images import read_image
from datasets.voc import CLASSES, read_voc
from datasets.voc_xml import read_annotation
from errors import UserError

OBJECT = "<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>"


def box_xml(xmin, ymin, xmax, ymax) -> str:
    return f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"


def object_xml(box, name="cell", extra="") -> str:
    return OBJECT.format(name=name, extra=extra, box=box if isinstance(box, str) else box_xml(*box))


def annotation_xml(objects: str, size=(100, 80)) -> str:
    size_xml = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>\n<filename>x.jpg</filename>\n{size_xml}\n{objects}\n</annotation>"


@pytest.fixture
def make(tmp_path):
    """make(xml or bytes) -> the index of a dataset whose picture `x` has that label file, beside a good one."""

    def build(xml, names=("cell",), picture=True):
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        good = annotation_xml(object_xml((1, 1, 10, 10)))
        (tmp_path / "Annotations" / "good.xml").write_text(good)
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("good\nx\n")
        Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / "good.jpg")
        if picture:
            Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / "x.jpg")
        if xml is not None:
            (tmp_path / "Annotations" / "x.xml").write_bytes(xml if isinstance(xml, bytes) else xml.encode())
        return read_voc(tmp_path, "train", names)

    return build


def kinds(index) -> list[tuple[str, str]]:
    return [(fault.effect, fault.kind) for fault in index.faults]


def plain_boxes(path) -> list[list[float]]:
    """The corners of an XML file, read by ElementTree."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    return [[float(o.find(f"bndbox/{k}").text) for k in keys] for o in ElementTree.parse(path).iter("object")]


def test_bccd(shared_data):
    root = shared_data / "bccd"
    counts = {"train": (205, 2805), "val": (87, 1138), "trainval": (292, 3943), "test": (72, 945)}
    for split, (pictures, objects) in counts.items():
        index = open_dataset("voc", root, split)
        assert index.names == ("Platelets", "RBC", "WBC")
        assert len(index) == pictures
        dropped = [fault for fault in index.faults if fault.kind == "zero-size box"]
        assert len(dropped) == len(index.faults) and sum(map(len, index.samples)) == objects - len(dropped)
    index = open_dataset("voc", root, "all")
    places = [(fault.picture, fault.line, fault.effect) for fault in index.faults]
    assert [name for name, _, _ in places] == ["BloodImage_00338.jpg", "BloodImage_00343.jpg"]
    for fault in index.faults:
        lines = (root / "Annotations" / fault.picture.replace(".jpg", ".xml")).read_text().splitlines()
        assert "<object>" in lines[fault.line - 1]
    labels = np.concatenate([sample.labels for sample in index.samples])
    assert np.bincount(labels).tolist() == [361, 4153, 372]
    boxes = np.concatenate([sample.boxes_xyxy for sample in index.samples])
    assert boxes.min() == 0 and boxes[:, 2].max() == 640 and boxes[:, 3].max() == 480
    assert (boxes[:, 2] == 640).sum() > 100  # 1-based inclusive maxima touch the edge; none lies beyond


def test_bccd_near_duplicates_are_kept(shared_data):
    index = open_dataset("voc", shared_data / "bccd", "all")
    found = set()
    for sample in index.samples:
        x1, y1, x2, y2 = sample.boxes_xyxy.T
        width = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
        height = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
        overlap = width.clip(0) * height.clip(0)
        iou = overlap / (sample.area[:, None] + sample.area - overlap)
        if (np.triu(iou, 1) > 0.9).any():
            found.add(sample.image_id[-5:])
    assert found == {"00020", "00100", "00104", "00251", "00284", "00331", "00403"}


def test_bccd_equals_its_csv(shared_data):
    """The flat export of all boxes, whose columns run x x y y."""
    rows: dict[str, list] = {}
    with open(shared_data / "bccd" / "test.csv", newline="") as file:
        for row in csv.DictReader(file):
            corners = [float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")]
            if corners[0] < corners[2]:
                rows.setdefault(row["filename"].rsplit(".", 1)[0], []).append(corners)
    for sample in open_dataset("voc", shared_data / "bccd", "all").samples:
        assert np.add(sample.boxes_xyxy, (1, 1, 0, 0)).tolist() == rows[sample.image_id]


def test_voc2012(shared_data):
    root = shared_data / "voc2012_100"
    index = open_dataset("voc", root, "default")
    assert index.names == tuple(CLASSES) and len(index) == 100 and not index.faults
    assert sum(map(len, index.samples)) == 273
    assert sum(int(sample.ignore.sum()) for sample in index.samples) == 38
    assert not any(sample.crowd.any() for sample in index.samples)
    for sample in index.samples:
        expected = np.array(plain_boxes(root / "Annotations" / f"{sample.image_id}.xml")) - [1, 1, 0, 0]
        np.testing.assert_array_equal(sample.boxes_xyxy, expected)
        assert (sample.width, sample.height) == read_image(sample.image_path).shape[1::-1]


def test_raccoon_splits_by_csv(shared_data):
    train, test = (open_dataset("voc", shared_data / "raccoon", split) for split in ("train", "test"))
    assert sum(map(len, train.samples)) == 79 and sum(map(len, test.samples)) == 26
    assert len(train) + len(test) == 91 and train.names == ("raccoon",)
    assert not {s.image_id for s in train.samples} & {s.image_id for s in test.samples}
    assert not train.faults and not test.faults
    assert len(open_dataset("voc", shared_data / "raccoon", "all")) == 91


def test_voc_years_and_unions(tmp_path):
    for year, stems in (("2007", ("000001", "000002")), ("2012", ("2008_000001", "000001"))):
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        (folder / "ImageSets/Main/trainval.txt").write_text("\n".join(stems))
        for stem in stems:
            (folder / "Annotations" / f"{stem}.xml").write_text(annotation_xml(object_xml((1, 2, 3, 4), "dog")))
            Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / f"{stem}.jpg")
    union = "2007/trainval+2012/trainval"
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        index = open_dataset("voc", root, union)
        ids = [sample.image_id for sample in index.samples]
        assert ids == ["000001", "000002", "2008_000001", "VOC2012/000001"]
        assert index.names == tuple(CLASSES)  # VOC's own, though only dogs occur
        assert {int(sample.labels[0]) for sample in index.samples} == {CLASSES.index("dog")}
    assert len(open_dataset("voc", tmp_path / "VOCdevkit" / "VOC2007", "trainval")) == 2
    with pytest.raises(UserError, match="VOC2099"):
        open_dataset("voc", tmp_path, "2099/trainval")
    with pytest.raises(UserError, match="no list 'test', found trainval"):
        open_dataset("voc", tmp_path, "2007/test")


def test_one_based_inclusive_and_difficult(make):
    whole = object_xml((1, 1, 100, 80)) + object_xml((11, 21, 30, 40), extra="<difficult>1</difficult>")
    sample = make(annotation_xml(whole)).samples[1]
    np.testing.assert_array_equal(sample.boxes_xyxy, [[0, 0, 100, 80], [10, 20, 30, 40]])
    np.testing.assert_array_equal(sample.area, [8000, 400])
    assert sample.ignore.tolist() == [False, True] and not sample.crowd.any()


def test_parts_of_objects_are_not_read(make):
    part = f"<part><name>head</name><bndbox>{box_xml(1, 1, 2, 2)}</bndbox></part>"
    xml = annotation_xml(f"<object>{part}<name>cell</name><bndbox>{box_xml(5.5, 6, 20, 30)}</bndbox></object>")
    np.testing.assert_array_equal(make(xml).samples[1].boxes_xyxy, [[4.5, 5, 20, 30]])


@pytest.mark.parametrize(
    "bad, kind",
    [
        (object_xml((5, 5, 5, 9)), "zero-size box"),
        (object_xml((5, 9, 8, 9)), "zero-size box"),
        (object_xml((9, 5, 5, 9)), "box turned inside out"),
        (object_xml((5, 9, 9, 5)), "box turned inside out"),
        (object_xml(("nan", 5, 9, 9)), "malformed object"),
        (object_xml((5, 5, "inf", 9)), "malformed object"),
        (object_xml((5, 5, 9, 9), extra="<difficult>2</difficult>"), "malformed object"),
        (object_xml(("1e308", 5, "1.5e308", 9)), "box outside the picture"),
        (object_xml((200, 5, 210, 9)), "box outside the picture"),
        (object_xml((-20, 5, -2, 9)), "box outside the picture"),
        (object_xml(("ten", 5, 9, 9)), "malformed object"),
        (object_xml("<xmin>1</xmin><ymin>2</ymin><xmax>4</xmax>"), "malformed object"),
        (object_xml(""), "malformed object"),
        (object_xml((5, 5, 9, 9), name=""), "malformed object"),
    ],
)
def test_a_bad_object_is_dropped_and_listed(make, bad, kind):
    good, other = object_xml((3, 4, 50, 60)), object_xml((3, 4, 50, 61))
    index = make(annotation_xml(good + "\n" + bad + "\n" + other))
    assert kinds(index) == [("object dropped", kind)]
    assert index.faults[0].line == 5 and index.faults[0].path.endswith("x.xml")  # the line of the second <object>
    np.testing.assert_array_equal(index.samples[1].boxes_xyxy, [[2, 3, 50, 60], [2, 3, 50, 61]])


def test_the_tag_of_a_value_that_means_nothing_is_named(make):
    for bad, words in (
        (object_xml((5, 5, 9, 9), extra="<difficult>2</difficult>"), "difficult: found '2', expected 0 or 1"),
        (object_xml((5, 5, "wide", 9)), "xmax: found 'wide', expected a finite number"),
        (object_xml("<xmin>1</xmin><ymin>2</ymin><ymax>4</ymax>"), "object without xmax"),
    ):
        assert make(annotation_xml(bad)).faults[0].reason == words


def test_unknown_class(make):
    xml = annotation_xml(object_xml((1, 1, 9, 9), "virus"))
    assert kinds(make(xml)) == [("noted", "unknown class")]  # names were given: leaving others out was asked for
    assert len(make(xml).samples[1]) == 0
    index = make(xml, names=None)
    assert index.names == ("cell", "virus") and not index.faults


def test_box_past_the_edge_is_clipped_and_noted(make):
    index = make(annotation_xml(object_xml((90, 70, 140, 75)) + object_xml((0, 1, 101, 80))))
    assert kinds(index) == [("noted", "box past the edge")]
    np.testing.assert_array_equal(index.samples[1].boxes_xyxy, [[89, 69, 100, 75], [-1, 0, 101, 80]])


@pytest.mark.parametrize("size", [(50, 60), (0, 0), ("wide", 80), (80, 100), ("100.0", "8e1")])
def test_a_size_tag_that_lies_is_noted(make, size):
    index = make(annotation_xml(object_xml((1, 1, 9, 9)), size=size))
    assert kinds(index) == ([("noted", "wrong size stated")] if size in ((50, 60), (80, 100)) else [])
    assert (index.samples[1].width, index.samples[1].height) == (100, 80)


def test_no_size_tag_is_no_fault(make):
    assert not make(annotation_xml(object_xml((1, 1, 9, 9)), size=None)).faults


@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_labels_turn_with_exif_where_the_size_says_so(make, tmp_path, stated):
    make(annotation_xml(""))
    stored = np.zeros((80, 100, 3), dtype=np.uint8)
    stored[20:40, 10:30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "JPEGImages" / "x.jpg", exif=exif.tobytes())
    picture = read_image(tmp_path / "JPEGImages" / "x.jpg")
    assert picture.shape == (100, 80, 3)
    box = (11, 21, 30, 40) if stated == "stored" else (41, 11, 60, 30)
    size = (100, 80) if stated == "stored" else (80, 100)
    (tmp_path / "Annotations" / "x.xml").write_text(annotation_xml(object_xml(box), size=size))
    index = read_voc(tmp_path, "train", ("cell",))
    x1, y1, x2, y2 = index.samples[1].boxes_xyxy[0].astype(int)
    assert (x1, y1, x2, y2) == (40, 10, 60, 30)
    assert picture[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
    expected = [("noted", "boxes turned with EXIF")] if stated == "stored" else []
    assert kinds(index) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_crlf_and_bom(make, tmp_path, start, end):
    xml = annotation_xml(object_xml((1, 1, 9, 9))).replace("\n", end)
    make(start + xml.encode())
    list_path = tmp_path / "ImageSets" / "Main" / "train.txt"
    list_path.write_bytes(start + f"good{end}{end}x{end}".encode())
    index = read_voc(tmp_path, "train")
    assert [sample.image_id for sample in index.samples] == ["good", "x"] and not index.faults


@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_where_the_size_cannot_tell_labels_mean_the_upright_picture(make, tmp_path, orientation):
    make(annotation_xml(""))
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (80, 80) if orientation == 6 else (100, 80)
    Image.new("RGB", size).save(tmp_path / "JPEGImages" / "x.jpg", exif=exif.tobytes())
    (tmp_path / "Annotations" / "x.xml").write_text(annotation_xml(object_xml((11, 21, 30, 40)), size=size))
    index = read_voc(tmp_path, "train", ("cell",))
    np.testing.assert_array_equal(index.samples[1].boxes_xyxy, [[10, 20, 30, 40]])
    assert kinds(index) == [("noted", "EXIF orientation")]


def test_utf16_xml(make):
    xml = '<?xml version="1.0" encoding="utf-16"?>' + annotation_xml(object_xml((1, 1, 9, 9)))
    assert len(make(xml.encode("utf-16")).samples[1]) == 1


LAUGHS = "<!ENTITY a 'ha'>" + "".join(f"<!ENTITY {b} '&{a};&{a};&{a};&{a};'>" for a, b in zip("abcdefg", "bcdefgh"))


@pytest.mark.parametrize(
    "xml, words",
    [
        (b"", "no element"),
        (b"<annotation><object>", "no element found|unclosed"),
        (b"not xml", "syntax error"),
        (b"<html><body/></html>", "found <html>"),
        (b"\xff\xfe\x00", "not well-formed"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "encoding"),
        (annotation_xml("\x01"), "invalid token"),
        (f"<!DOCTYPE a [{LAUGHS}]>{annotation_xml('&h;')}", "DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/hostname"><annotation>&x;</annotation>', "DOCTYPE"),
        ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a []><annotation/>'.encode("utf-16"), "DOCTYPE"),
        (annotation_xml("&undefined;"), "undefined entity"),
        ("<annotation>" + "<a>" * 5000 + "</a>" * 5000 + "</annotation>", "deeper than"),
        ("<annotation>" + "x" * (5 << 20) + "</annotation>", "more than"),
    ],
)
def test_a_broken_annotation_drops_its_picture(make, tmp_path, xml, words):
    index = make(xml)
    assert kinds(index) == [("picture dropped", "unreadable label file")]
    assert [sample.image_id for sample in index.samples] == ["good"]
    with pytest.raises(UserError, match=words):
        read_annotation(tmp_path / "Annotations" / "x.xml")


def test_missing_partners(make, tmp_path):
    assert kinds(make(None)) == [("picture dropped", "picture without label file")]
    index = make(annotation_xml(""), picture=False) if (tmp_path / "JPEGImages/x.jpg").unlink() is None else None
    assert kinds(index) == [("left out", "label without picture")]
    Image.new("RGB", (9, 9)).save(tmp_path / "JPEGImages" / "orphan.jpg")
    assert ("picture dropped", "picture without label file") in kinds(read_voc(tmp_path, "all"))


def test_a_picture_that_its_annotation_names_is_labelled(make, tmp_path):
    """The file is x.xml, the picture photo.jpg: found by <filename>, so it does not lack an annotation file."""
    make(
        annotation_xml(object_xml((1, 1, 10, 10))).replace("<annotation>", "<annotation><filename>photo.jpg</filename>")
    )
    (tmp_path / "JPEGImages" / "x.jpg").rename(tmp_path / "JPEGImages" / "photo.jpg")
    index = read_voc(tmp_path, "all")
    assert "photo.jpg" in [sample.image_path.name for sample in index.samples] and not index.faults


def test_a_second_picture_of_one_annotation_is_named(make, tmp_path):
    make(annotation_xml(object_xml((1, 1, 10, 10))))
    Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / "x.bmp")
    Image.new("RGB", (100, 80)).save(tmp_path / "JPEGImages" / "unlisted.bmp")
    index = read_voc(tmp_path, "train", ("cell",))
    assert len(index) == 2 and kinds(index) == [("left out", "one label file for two pictures")]


def test_broken_picture(make, tmp_path):
    make(annotation_xml(""))
    (tmp_path / "JPEGImages" / "x.jpg").write_bytes(b"")
    index = read_voc(tmp_path, "train")
    assert kinds(index) == [("picture dropped", "unreadable picture")] and "empty file" in index.faults[0].reason


def test_lists(make, tmp_path):
    make(annotation_xml(""))
    list_path = tmp_path / "ImageSets" / "Main" / "train.txt"
    list_path.write_text("x.jpg\nx\n./good\ngood\n")
    index = read_voc(tmp_path, "train")
    assert [sample.image_id for sample in index.samples] == ["x", "good"]
    assert kinds(index) == [("noted", "listed twice")]
    for escape in ("../x", "/etc/x"):
        list_path.write_text(escape)
        with pytest.raises(UserError, match="leaves"):
            read_voc(tmp_path, "train")


def test_a_picture_in_two_joined_lists_counts_once(make, tmp_path):
    make(annotation_xml(object_xml((1, 1, 10, 10))))
    alone = read_voc(tmp_path, "train")
    joined = read_voc(tmp_path, "train+all")
    assert [sample.image_id for sample in joined.samples] == [sample.image_id for sample in alone.samples]
    assert ("noted", "listed twice") in kinds(joined) and ("noted", "listed twice") not in kinds(alone)


def test_class_names_stay_text(make, tmp_path):
    make(annotation_xml("".join(object_xml((1, 1, 9, 9), name) for name in ("no", "1e3", "null"))), names=None)
    assert read_voc(tmp_path, "train").names == ("1e3", "cell", "no", "null")
    (tmp_path / "classes.txt").write_text("no\nnull\n1e3\ncell\n")
    index = read_voc(tmp_path, "train")
    assert index.names == ("no", "null", "1e3", "cell")
    assert index.samples[1].labels.tolist() == [0, 2, 1]


def test_roots_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_voc(tmp_path / "none", "train")
    with pytest.raises(UserError, match="Annotations"):
        read_voc(tmp_path, "train")
    with pytest.raises(UserError, match="'pascal', expected one of voc"):
        open_dataset("pascal", tmp_path, "train")
