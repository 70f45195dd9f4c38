"""Class names that are numbers, beside a list in which numbers are places; and two kinds of files in one folder."""

import json

import pytest
from PIL import Image

from errors import UserError
from metrics.annotations import find_labels
from metrics.files import read_detections, read_ground_truth

NAMES = ("1", "2", "0")


def write_digits(folder, form):
    """Ground truth with an object of each class 1, 2 and 0, and text detections of class 0, 1 and 2, their places."""
    boxes = [(10 * n, 0, 10 * n + 5, 8) for n in range(3)]
    (folder / "dt").mkdir()
    for n, box in enumerate(boxes):
        (folder / "dt" / f"{n}.txt").write_text(f"{n} 0.9 {' '.join(map(str, box))}\n")
    truth = folder / "gt"
    if form == "coco":
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)]
        rows = [{"image_id": n, "category_id": n, "bbox": [10 * n, 0, 5, 8]} for n in range(3)]
        categories = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
        truth.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
        return truth
    truth.mkdir()
    for n, (box, name) in enumerate(zip(boxes, NAMES)):
        corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        if form == "voc":
            found = f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>"
            (truth / f"{n}.xml").write_text(found)
        else:
            (truth / f"{n}.txt").write_text(f"{n} {10 * n} 0 5 8\n")  # its numbers are places in the list, too
    return truth


@pytest.mark.parametrize("given", ["names", "classes.txt", "fractions"])
def test_places_in_text_are_taken_once(tmp_path, given):
    """The places become names of digits, which are no places again."""
    truth = write_digits(tmp_path, "text")
    names, options = NAMES, {}
    if given == "classes.txt":
        names = None
        for folder in (truth, tmp_path / "dt"):
            (folder / "classes.txt").write_text("\n".join(NAMES))
    if given == "fractions":
        (tmp_path / "images").mkdir()
        for n in range(3):
            Image.new("RGB", (100, 50)).save(tmp_path / "images" / f"{n}.png")
            (truth / f"{n}.txt").write_text(f"{n} 0.5 0.5 0.1 0.1\n")
        options = {"text_boxes": "cxcywhn", "images": tmp_path / "images"}
    annotations = read_ground_truth(truth, names=names, **options)
    assert annotations.ground_truth.labels.tolist() == [0, 1, 2]
    assert read_detections(tmp_path / "dt", annotations)[1].labels.tolist() == [0, 1, 2]


def test_numbers_beside_words_are_names(tmp_path):
    names = (*NAMES, "cat")
    truth = write_digits(tmp_path, "coco")
    tree = json.loads(truth.read_text())
    truth.write_text(json.dumps(tree | {"categories": [{"id": n, "name": name} for n, name in enumerate(names)]}))
    for n, name in enumerate(("cat", *NAMES[:2])):
        (tmp_path / "dt" / f"{n}.txt").write_text(f"{name} 0.9 0 0 5 8\n")
    annotations = read_ground_truth(truth, names=names)
    assert read_detections(tmp_path / "dt", annotations)[1].labels.tolist() == [3, 0, 1]


@pytest.mark.parametrize("form", ["coco", "voc", "text"])
def test_numbers_are_places_in_the_list_that_is_given(tmp_path, form):
    truth = write_digits(tmp_path, form)
    notes: list[str] = []
    annotations = read_ground_truth(truth, names=NAMES)
    ground_truth, detections = read_detections(tmp_path / "dt", annotations, notes=notes)
    assert ground_truth.names == NAMES and ground_truth.labels.tolist() == [0, 1, 2] == detections.labels.tolist()
    assert notes == ["numbers of classes are read as 0 = 1, 1 = 2, 2 = 0"]
    if form == "coco":  # without the list it is unclear what they are
        with pytest.raises(UserError, match="class '2' may be '2' and '0'"):
            read_detections(tmp_path / "dt", read_ground_truth(truth))


def test_a_number_that_is_no_place_in_the_list_is_a_name(tmp_path):
    truth = write_digits(tmp_path, "coco")
    content = truth.read_text().replace('"name": "0"', '"name": "7"')
    truth.write_text(content)
    annotations = read_ground_truth(truth, names=("1", "2", "7"))
    for n, name in enumerate("127"):
        (tmp_path / "dt" / f"{n}.txt").write_text(f"{name} 0.9 0 0 5 8\n")
    assert read_detections(tmp_path / "dt", annotations)[1].labels.tolist() == [0, 1, 2]
    from_0, from_1 = {"0": 0, "1": 1}, {"1": 0, "2": 1}  # a place by one of two ways to count is none for sure
    with pytest.raises(UserError, match=r"a\.txt:1: class '2' may be '2' and '0'"):
        find_labels({"2": "a.txt:1"}, ("2", "0"), (from_0, from_1), is_listed=True)


def test_names_in_coco_results_stay_names(tmp_path):
    truth = write_digits(tmp_path, "coco")
    rows = [{"image_id": n, "category_name": name, "bbox": [0, 0, 5, 8], "score": 0.5} for n, name in enumerate(NAMES)]
    (tmp_path / "dt.json").write_text(json.dumps(rows))
    for names in (None, NAMES):
        detections = read_detections(tmp_path / "dt.json", read_ground_truth(truth, names=names))[1]
        assert detections.labels.tolist() == [0, 1, 2]


def test_text_files_with_boxes_beside_xml_are_refused(tmp_path):
    truth = write_digits(tmp_path, "voc")
    (truth / "notes.txt").write_bytes("boîtes\n".encode("latin-1"))
    (truth / "ImageSets").mkdir()
    (truth / "ImageSets" / "one_test.txt").write_text("0 1\n1 -1\n")
    (truth / "0.txt").write_text("0 0.1 0.1 0.1 0.1\n")  # the same picture in another format
    assert len(read_ground_truth(truth).ground_truth) == 3
    (truth / "4.txt").write_text("0 0.1 0.1 0.1 0.1\n")
    with pytest.raises(UserError, match=r"gt/4\.txt: boxes of a picture without an XML file, beside 3 VOC XML files;"):
        read_ground_truth(truth)
