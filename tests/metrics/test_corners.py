"""Files with corners where a point and a size are read: each box alone may be one, most of them together cannot."""

import json

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from metrics.files import read_detections, read_ground_truth

WIDTH, HEIGHT = 96, 64
RIGHT = [(10, 10, 60, 40), (50, 30, 90, 60), (40, 8, 92, 62), (44, 4, 80, 50), (2, 4, 30, 30)]  # corners, one an image
BARELY = [(-12, 10, 30, 40), (70, 20, 110, 50), (40, -9, 80, 20), (50, 40, 90, 73), (80, 50, 110, 74)]  # past the edge


def sized(box):
    return box[0], box[1], box[2] - box[0], box[3] - box[1]


def centered(box):
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT


def fractions(box):
    return box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT


def write_coco(path, boxes):
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(len(boxes))]
    rows = [{"image_id": n, "category_id": 1, "bbox": list(box)} for n, box in enumerate(boxes)]
    path.write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": rows}))
    return path


def write_results(path, boxes):
    rows = [{"image_id": n, "category_id": 1, "bbox": list(box), "score": 0.5} for n, box in enumerate(boxes)]
    path.write_text(json.dumps(rows))
    return path


def write_text(folder, boxes, score=""):
    folder.mkdir(exist_ok=True)
    for n, box in enumerate(boxes):
        (folder / f"{n}.txt").write_text(f"a {score}{' '.join(map(str, box))}\n")
    return folder


def test_coco_files(tmp_path):
    truth = read_ground_truth(write_coco(tmp_path / "gt.json", map_to(sized, RIGHT)))
    for boxes in (RIGHT, BARELY):
        found = read_detections(write_results(tmp_path / "dt.json", map_to(sized, boxes)), truth)[1]
        np.testing.assert_allclose(found.boxes_xyxy, boxes)
    with pytest.raises(UserError, match=r"results\[1\]: 3 of 5 boxes leave their image, .* fit as corners"):
        read_detections(write_results(tmp_path / "dt.json", RIGHT), truth)
    with pytest.raises(UserError, match=r"annotations\[1\]: 3 of 5 boxes leave .* left, top, width and height"):
        read_ground_truth(write_coco(tmp_path / "gt.json", RIGHT))


def test_text_files(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(len(RIGHT)):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / f"{n}.png")
    for form, right, wrong in (("xywh", sized, tuple), ("cxcywhn", centered, fractions)):
        options = {"text_boxes": form, "images": tmp_path / "images", "names": ("a",)}
        truth = read_ground_truth(write_text(tmp_path / "gt", map_to(right, RIGHT)), **options)
        np.testing.assert_allclose(truth.ground_truth.boxes_xyxy, RIGHT)
        for boxes in (RIGHT, BARELY):
            found = write_text(tmp_path / "dt", map_to(right, boxes), "0.5 ")
            np.testing.assert_allclose(read_detections(found, truth, text_boxes=form)[1].boxes_xyxy, boxes)
        expected = r"\d\.txt:1: [34] of 5 boxes leave their image, .* fit as corners"
        with pytest.raises(UserError, match=expected):
            read_detections(write_text(tmp_path / "dt", map_to(wrong, RIGHT), "0.5 "), truth, text_boxes=form)
        with pytest.raises(UserError, match=expected):
            read_ground_truth(write_text(tmp_path / "gt", map_to(wrong, RIGHT)), **options)


def map_to(form, boxes):
    return [form(box) for box in boxes]


def test_boxes_that_would_be_corners_too_are_noted(tmp_path):
    """Of every form in which a size can be meant for a corner; no box of these leaves its picture."""
    for name in ("gt", "dt"):
        (tmp_path / name).mkdir()
    (tmp_path / "gt" / "0.txt").write_text("a 10 20 30 40\na 1 2 3 4")
    (tmp_path / "dt" / "0.txt").write_text("a 0.5 10 20 30 40")
    (note,) = read_ground_truth(tmp_path / "gt").notes
    assert note.startswith("boxes read as left, top, width, height; each would be one as left, top, right, bottom too")
    assert not read_ground_truth(tmp_path / "gt", text_boxes="xyxy").notes
    truth = read_ground_truth(write_coco(tmp_path / "gt.json", [(10, 20, 30, 40)]))
    assert truth.notes[-1] in note
    for found, boxes in ((tmp_path / "dt", "xywh"), (write_results(tmp_path / "dt.json", [(10, 20, 30, 40)]), None)):
        notes: list[str] = []
        read_detections(found, truth, text_boxes=boxes, notes=notes)
        assert truth.notes[-1] in notes[-1]
    (tmp_path / "gt" / "1.txt").write_text("a 10 20 10 40")  # no width as corners
    assert not read_ground_truth(tmp_path / "gt").notes
