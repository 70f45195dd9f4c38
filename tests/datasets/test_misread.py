"""Boxes that cannot be meant as they are read: of other pictures, or in another form than that of their format."""

import json

import numpy as np
import pytest
from PIL import Image

from datasets.open import open_dataset
from errors import UserError

WIDTH, HEIGHT = 96, 64
GOOD = [(38, 10, 60, 40), (50, 30, 90, 60), (40, 8, 92, 62), (2, 4, 30, 30)]  # corners, one object a picture


def write_set(root, form, boxes, *, size=(WIDTH, HEIGHT)):
    """A set in a format, whose label files hold four numbers an object as they are given, in pictures of a size."""
    places = {"voc": "JPEGImages", "coco": "images/all", "yolo": "images/all", "kitti": "image_2"}
    labels = {"voc": "Annotations", "yolo": "labels/all", "kitti": "label_2", "coco": "annotations"}
    pictures, folder = root / places[form], root / labels[form]
    pictures.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, (a, b, c, d) in enumerate(boxes):
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(pictures / f"{number}.png")
        if form == "voc":
            corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), (a, b, c, d)))
            text = f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
            (folder / f"{number}.xml").write_text(text)
        elif form == "yolo":
            (folder / f"{number}.txt").write_text(f"0 {a} {b} {c} {d}\n")
        elif form == "kitti":
            (folder / f"{number}.txt").write_text(f"Car 0 0 0 {a} {b} {c} {d} 0 0 0 0 0 0 0\n")
    if form == "yolo":
        (root / "classes.txt").write_text("cat\n")
    if form == "coco":
        images = [{"id": n, "file_name": f"{n}.png"} for n in range(len(boxes))]
        objects = [{"id": n, "image_id": n, "category_id": 1, "bbox": list(box)} for n, box in enumerate(boxes)]
        tree = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
        (folder / "instances_all.json").write_text(json.dumps(tree))
    return root


def in_form(form, corners):
    """Corners in pixels as a format writes them."""
    x1, y1, x2, y2 = corners
    if form == "coco":
        return x1, y1, x2 - x1, y2 - y1
    if form == "yolo":
        return as_fractions(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1))
    return (x1 + 1, y1 + 1, x2, y2) if form == "voc" else corners


def as_fractions(numbers):
    return tuple(number / side for number, side in zip(numbers, (WIDTH, HEIGHT) * 2))


@pytest.mark.parametrize("form", ["voc", "coco", "yolo", "kitti"])
def test_boxes_in_their_form_are_read(form, tmp_path):
    index = open_dataset(form, write_set(tmp_path, form, [in_form(form, box) for box in GOOD]), "all")
    for sample, box in zip(index.samples, GOOD, strict=True):
        np.testing.assert_allclose(sample.boxes_xyxy, [box], atol=1e-9)
    assert not index.faults


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_corners_in_place_of_a_size_are_refused(form, tmp_path):
    boxes = GOOD if form == "coco" else [as_fractions(box) for box in GOOD]
    with pytest.raises(UserError, match=r"3 of 4 boxes pass the edge of their picture, the first: .*") as error:
        open_dataset(form, write_set(tmp_path, form, boxes), "all")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_some_corners_among_sizes_are_refused(form, tmp_path):
    """Sets that were merged: most boxes are right, so fewer than half pass an edge."""
    right = [in_form(form, box) for box in GOOD * 10]
    wrong = [box if form == "coco" else as_fractions(box) for box in GOOD * 2]
    with pytest.raises(UserError, match=r"6 of 48 boxes pass the edge .* expected .* width and height: .* as corners"):
        open_dataset(form, write_set(tmp_path / "merged", form, right + wrong), "all")
    assert len(open_dataset(form, write_set(tmp_path / "two", form, right + wrong[:2]), "all")) == 42  # accidents


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_boxes_far_past_every_edge_are_no_corners(form, tmp_path):
    """Some of them fit as corners by chance; of a file of corners nearly all do."""
    wrong = [box if form == "coco" else as_fractions(box) for box in GOOD * 2]  # six leave their pictures
    beyond = [(60, 10, 120, 40)] * 2  # no corners in any form
    boxes = [in_form(form, box) for box in GOOD * 10 + beyond]
    index = open_dataset(form, write_set(tmp_path, form, boxes + wrong), "all")
    assert len(index) == 50


@pytest.mark.parametrize("form", ["coco", "yolo"])
def test_boxes_that_are_not_cut_at_the_edge_are_no_corners(form, tmp_path):
    past = [
        (-12, 10, 30, 40),
        (70, 20, 110, 50),
        (40, -9, 80, 20),
        (50, 40, 90, 73),
        (80, 50, 110, 74),
        (-10, -8, 14, 16),
    ]
    index = open_dataset(form, write_set(tmp_path, form, [in_form(form, box) for box in past + GOOD * 3]), "all")
    assert [fault.kind for fault in index.faults] == ["box past the edge"] * len(past)


@pytest.mark.parametrize("form", ["voc", "coco", "kitti"])
def test_smaller_pictures_than_those_that_were_labelled_are_refused(form, tmp_path):
    """Their label files state no size, so refuse_resized does not see it."""
    boxes = [in_form(form, box) for box in GOOD]
    with pytest.raises(UserError, match=r"3 of 4 boxes pass the edge of their picture"):
        open_dataset(form, write_set(tmp_path / "half", form, boxes, size=(WIDTH // 2, HEIGHT // 2)), "all")
    few = [in_form(form, box) for box in [*GOOD[3:] * 3, *GOOD[:3]]]  # half of them: noted and cut, as before
    index = open_dataset(form, write_set(tmp_path / "few", form, few, size=(WIDTH // 2, HEIGHT // 2)), "all")
    assert {fault.kind for fault in index.faults} <= {"box past the edge", "box outside the picture"}


@pytest.mark.parametrize("form", ["voc", "coco", "kitti"])
def test_fractions_in_a_format_of_pixels_are_refused(form, tmp_path):
    boxes = [as_fractions(in_form(form, box)) for box in GOOD]
    with pytest.raises(UserError, match=r"every box of 4 lies in 0\.\.1, expected pixels"):
        open_dataset(form, write_set(tmp_path / "all", form, boxes), "all")
    write_set(tmp_path / "one", form, [*boxes, GOOD[0]])  # one that is no fraction: pixels, and small objects
    assert len(open_dataset(form, tmp_path / "one", "all")) == 5
