"""Ground truth and detections from files: every dialect gives the same boxes, every mistake one line."""

import json

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from metrics import coco
from metrics.annotations import edge_note
from metrics.coco_files import write_coco_detections
from metrics.files import read_detections, read_ground_truth, read_names
from metrics.picture_names import split_name
from metrics.tables import GroundTruth
from tests.reference.random_detections import as_tables, random_coco_set

XML = """<annotation><size><width>60</width><height>40</height></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>{xmax}</xmax><ymax>30</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""


def coco_files(folder, dataset, results):
    (folder / "gt.json").write_text(json.dumps(dataset))
    (folder / "dt.json").write_text(json.dumps(results))
    return folder / "gt.json", folder / "dt.json"


def assert_same_tables(got, expected):
    for table, other in zip(got, expected):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(getattr(table, name), value, err_msg=name)


@pytest.mark.parametrize("seed", [0, 3, 23])
def test_coco_json(tmp_path, seed):
    dataset, results = random_coco_set(seed)
    ground_truth, detections = coco_files(tmp_path, dataset, results)
    annotations = read_ground_truth(ground_truth)
    assert_same_tables(read_detections(detections, annotations), as_tables(dataset, results))


def test_coco_detections_survive_writing(tmp_path):
    dataset, results = random_coco_set(3)
    ground_truth, detections = coco_files(tmp_path, dataset, results)
    annotations = read_ground_truth(ground_truth)
    tables = read_detections(detections, annotations)
    write_coco_detections(tmp_path / "again.json", tables[1], annotations.image_ids, annotations.category_ids)
    again = read_detections(tmp_path / "again.json", annotations)
    assert_same_tables(again, tables)
    assert coco.evaluate(*again).numbers == coco.evaluate(*tables).numbers


def test_four_dialects_of_the_same_detections(shared_data):
    folder = shared_data / "voc2012_100"
    annotations = read_ground_truth(folder / "Annotations")
    assert annotations.ground_truth.names[14] == "person" and annotations.ground_truth.difficult.sum() == 38
    expected = read_detections(folder / "detections" / "abs_xyx2y2", annotations)[1]
    assert len(expected) == 452
    for name, boxes, tolerance in (("abs_xywh", "xywh", 0), ("rel_xywh", "cxcywhn", 6e-4)):  # 6 decimals of 500 pixels
        table = read_detections(folder / "detections" / name, annotations, text_boxes=boxes)[1]
        np.testing.assert_array_equal(table.labels, expected.labels)
        np.testing.assert_array_equal(table.image, expected.image)
        np.testing.assert_allclose(table.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=tolerance)
    # The COCO file numbers its images and classes anew: images meet by file name, classes by name.
    table = read_detections(folder / "detections" / "coco_format" / "coco_dets.json", annotations)[1]
    order, other = (np.lexsort((t.scores.round(6), t.labels, t.image)) for t in (table, expected))
    np.testing.assert_array_equal(table.labels[order], expected.labels[other])
    np.testing.assert_array_equal(table.image[order], expected.image[other])
    np.testing.assert_allclose(table.boxes_xyxy[order], expected.boxes_xyxy[other], rtol=0, atol=1e-9)


def test_ground_truth_dialects_agree(shared_data):
    folder = shared_data / "voc2012_100"
    ours = read_ground_truth(folder / "Annotations")
    key = lambda a, t: sorted(
        (split_name(a.pictures[i])[0], t.names[k], *map(float, box))
        for i, k, box in zip(t.image, t.labels, t.boxes_xyxy)
    )
    for other in ("coco_v1/instances_default.json", "coco_v2/instances_v2.json"):
        theirs = read_ground_truth(folder / "same_labels_other_formats" / other)
        assert key(theirs, theirs.ground_truth) == key(ours, ours.ground_truth)


def test_voc_xml(tmp_path):
    objects = OBJECT.format(name="dog", difficult=1, xmax=20) + OBJECT.format(name="cat", difficult=0, xmax=20.5)
    (tmp_path / "b.xml").write_text(XML.format(objects=objects))
    (tmp_path / "a.xml").write_bytes(b"\xef\xbb\xbf" + XML.format(objects="").encode())
    annotations = read_ground_truth(tmp_path)
    ground_truth = annotations.ground_truth
    assert annotations.pictures == ("a", "b") and annotations.sizes == ((60, 40), (60, 40))
    assert ground_truth.num_images == 2 and ground_truth.image.tolist() == [1, 1]
    assert ground_truth.boxes_xyxy.tolist() == [[1, 2, 20, 30], [1, 2, 20.5, 30]]
    assert [ground_truth.names[k] for k in ground_truth.labels] == ["dog", "cat"]
    assert len(ground_truth.names) == 20 and ground_truth.difficult.tolist() == [True, False]
    named = read_ground_truth(tmp_path, names=["cat", "dog"]).ground_truth
    assert named.labels.tolist() == [1, 0]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text(tmp_path, newline):
    truth, found, pictures = tmp_path / "gt", tmp_path / "dt", tmp_path / "images"
    for folder in (truth, found, pictures):
        folder.mkdir()
    for stem in ("a", "b"):
        Image.new("RGB", (80, 40)).save(pictures / f"{stem}.jpg")
    (truth / "a.txt").write_bytes(b"\xef\xbb\xbf" + f"7 0.5 0.5 0.25 0.5{newline}\t2  0 0 1 1{newline}".encode())
    (found / "a.txt").write_text(f"cow 0.5 0.5 0.25 0.5 0.9{newline}{newline}07 0.5 0.5 0.25 0.5 0.8", newline="")
    annotations = read_ground_truth(truth, text_boxes="cxcywhn", images=pictures)
    assert annotations.ground_truth.num_images == 2  # b has a picture and no text file
    ground_truth, detections = read_detections(found, annotations, text_boxes="cxcywhn", score_last=True)
    assert ground_truth.names == ("2", "7", "cow")
    assert ground_truth.labels.tolist() == [1, 0] and detections.labels.tolist() == [2, 1]
    assert ground_truth.boxes_xyxy[0].tolist() == detections.boxes_xyxy[0].tolist() == [30, 10, 50, 30]
    assert detections.scores.tolist() == [0.9, 0.8]


def test_names_beside_the_labels_are_used(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "a.txt").write_text("1 0 0 4 4\n")
    annotations = read_ground_truth(tmp_path)
    assert annotations.ground_truth.names == ("cat", "dog") and annotations.pictures == ("a",)
    assert annotations.ground_truth.labels.tolist() == [1]


def test_names(tmp_path):
    (tmp_path / "a.yaml").write_text("names: {0: no, 1: 1e3}\n")
    (tmp_path / "b.yaml").write_text("names: [no, 1e3]\n")
    (tmp_path / "c.names").write_text("no\r\n1e3\r\n")
    for name in ("a.yaml", "b.yaml", "c.names"):
        assert read_names(tmp_path / name) == ("no", "1e3")
    for text in ("names: {1: a}", "train: x", "names: [a, a]"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            read_names(tmp_path / "bad.yaml")


IMAGE, CATEGORY = {"id": 5, "file_name": "x.jpg", "width": 9, "height": 9}, {"id": 3, "name": "a"}
ROW = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"gt\.json:1: not valid JSON: .*, expected a COCO file"),
        ("[" * 100000, "nested too deeply"),
        ("[1, NaN]", "NaN in the file, expected finite numbers"),
        ("[]", "expected COCO ground truth"),
        (
            json.dumps({"images": [IMAGE, IMAGE | {"file_name": "z.jpg"}], "categories": [CATEGORY]}),
            "images: id 5 is given to two",
        ),
        (
            json.dumps({"images": [{"id": None}], "categories": [CATEGORY]}),
            r"images\[0\]: id: found None, expected",
        ),
        (json.dumps({"images": [IMAGE], "categories": [CATEGORY, {"id": 4, "name": "a"}]}), "stands there twice"),
        (json.dumps({"images": [IMAGE, {"id": "6"}], "categories": [CATEGORY]}), "numbers and text"),
    ],
)
def test_bad_coco_ground_truth(tmp_path, text, message):
    (tmp_path / "gt.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_ground_truth(tmp_path / "gt.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 6}, r"\[1\]: image_id: found 6, expected one of"),
        ({"image_id": None}, r"\[1\]: image_id: found None"),
        ({"image_id": [5]}, r"\[1\]: image_id: found \[5\]"),
        ({"category_id": 1}, r"\[1\]: category_id: found 1,"),
        ({"bbox": [0, 0, 1]}, r"\[1\]: bbox: found \[0, 0, 1\], expected 4 numbers"),
        ({"bbox": [0, 0, 1, "x"]}, r"\[1\]: bbox: found .*, expected 4 numbers"),
        ({"bbox": [0, 0, 1, 1e999]}, "Infinity in the file, expected finite numbers"),
    ],
)
def test_bad_coco_rows(tmp_path, change, message):
    dataset = {"images": [IMAGE], "categories": [CATEGORY], "annotations": [ROW, ROW | change]}
    (tmp_path / "bad.json").write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=message):
        read_ground_truth(tmp_path / "bad.json")
    (tmp_path / "gt.json").write_text(json.dumps(dataset | {"annotations": [ROW]}))
    (tmp_path / "bad.json").write_text(json.dumps([ROW | {"score": 0.5}, ROW | {"score": 0.5} | change]))
    with pytest.raises(UserError, match=message):
        read_detections(tmp_path / "bad.json", read_ground_truth(tmp_path / "gt.json"))


@pytest.mark.parametrize("score", [None, "0.5x"])
def test_bad_scores(tmp_path, score):
    (tmp_path / "gt.json").write_text(json.dumps({"images": [IMAGE], "categories": [CATEGORY], "annotations": []}))
    (tmp_path / "dt.json").write_text(json.dumps([ROW | {"score": 0.5}, ROW | {"score": score}]))
    annotations = read_ground_truth(tmp_path / "gt.json")
    with pytest.raises(UserError, match=r"results\[1\]: score: found .*, expected a finite number"):
        read_detections(tmp_path / "dt.json", annotations)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation>&b;</annotation>', "DOCTYPE"),
        ("<annotation>", "no element found"),
        ("", "no element found"),
        (XML.format(objects=OBJECT.format(name="a", difficult=0, xmax="nan")), r"a\.xml:1: found '1 2 nan 30'"),
        (XML.format(objects=OBJECT.format(name="a", difficult=0, xmax="")), r"a\.xml:1: found '1 2  30'"),
        (XML.format(objects="<object><name>a</name></object>"), r"a\.xml:1: found 'None None None None'"),
    ],
)
def test_bad_voc_xml(tmp_path, text, message):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_ground_truth(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 0.5 1 1 2\n", r"x\.txt:1: found 5 columns, expected class, score and 4 numbers"),
        ("\na 0.5 1 1 2 2 7\n", r"x\.txt:2: found 7 columns"),
        ("a 0.5 1 1 two 2\n", r"x\.txt:1: found '0.5 1 1 two 2', expected finite numbers"),
        ("a inf 1 1 2 2\n", r"x\.txt:1: found 'inf 1 1 2 2', expected finite numbers"),
        ("b 0.5 1 1 2 2\n", r"x\.txt:1: found class 'b', expected one of a, or the place"),
        ("7 0.5 1 1 2 2\n", r"x\.txt:1: found class '7'"),
    ],
)
def test_bad_text_detections(tmp_path, text, message):
    (tmp_path / "gt.json").write_text(json.dumps({"images": [IMAGE], "categories": [CATEGORY], "annotations": []}))
    (tmp_path / "dt").mkdir()
    (tmp_path / "dt" / "x.txt").write_text(text)
    annotations = read_ground_truth(tmp_path / "gt.json")
    with pytest.raises(UserError, match=message):
        read_detections(tmp_path / "dt", annotations)


def test_bad_places(tmp_path):
    (tmp_path / "gt").mkdir()
    with pytest.raises(UserError, match=r"gt: found neither"):
        read_ground_truth(tmp_path / "gt")
    with pytest.raises(UserError, match="absent: No such file"):
        read_ground_truth(tmp_path / "absent")
    (tmp_path / "gt" / "x.txt").write_text("a 0 0 1 1")
    annotations = read_ground_truth(tmp_path / "gt")
    with pytest.raises(UserError, match=r"unknown size: name the folder of images"):
        read_ground_truth(tmp_path / "gt", text_boxes="cxcywhn")
    with pytest.raises(UserError, match="found no pictures"):
        read_ground_truth(tmp_path / "gt", images=tmp_path / "gt")
    (tmp_path / "dt").mkdir()
    assert len(read_detections(tmp_path / "dt", annotations)[1]) == 0  # nothing detected anywhere
    (tmp_path / "dt" / "y.txt").write_text("a 0.5 0 0 1 1")
    with pytest.raises(UserError, match="no image of the ground truth is called 'y'"):
        read_detections(tmp_path / "dt", annotations)
    (tmp_path / "dt" / "y.txt").rename(tmp_path / "dt" / "y.csv")
    with pytest.raises(UserError, match=r"found no \.txt files"):
        read_detections(tmp_path / "dt", annotations)
    (tmp_path / "gt" / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_ground_truth(tmp_path / "gt")


def test_objects_past_the_edge_are_noted():
    columns = {"image": [0, 0, 1, 1], "labels": [0] * 4, "num_images": 2, "names": ("a",)}
    boxes = [[-0.9, 0, 10, 20.9], [5, 5, 10, 22], [5, 5, 90, 90], [-9, 5, 10, 20]]
    truth = GroundTruth(boxes_xyxy=np.array(boxes, float), **columns)
    assert edge_note(truth, ((10, 20), None))[0].startswith("1 of 4 objects pass the edge of their picture; taken")
    assert edge_note(truth, ((10, 20), (90, 90)))[0].startswith("2 of 4 ") and edge_note(truth, (None, None)) == ()
