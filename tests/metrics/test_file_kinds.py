"""Files that people have, kind by kind: what is understood is right, the rest is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from errors import UserError
from metrics.files import read_detections, read_ground_truth

FLAGS = {True: ("1", "true", "True", "1.0"), False: ("0", "", "0.0", "false", "False", "Unspecified", " no ")}
OBJECT = (
    "<object><name>{name}</name>{difficult}<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>"
    "<ymax>{3}</ymax></bndbox></object>"
)


def write_text(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def write_xml(path, *boxes, name="a", difficult=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(OBJECT.format(*box, name=name, difficult=difficult) for box in boxes)
    path.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")


def write_coco(path, files=("a.jpg",), rows=(), names=("cat", "dog"), first_id=1):
    """Categories 10, 20, ..; images first_id and so on."""
    rows = [{"image_id": first_id, "category_id": 10, "bbox": [1, 2, 3, 4]} | row for row in rows]
    images = [{"id": first_id + n, "file_name": name} for n, name in enumerate(files)]
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": rows}))
    return path


def write_rows(path, *rows):
    path.write_text(json.dumps([{"bbox": [1, 2, 3, 4], "score": 0.5} | row for row in rows]))
    return path


# ---------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("expected", "word"), [(key, word) for key, words in FLAGS.items() for word in words])
def test_flags_in_words(tmp_path, expected, word):
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 3, 4), difficult=f"<difficult>{word}</difficult>")
    assert read_ground_truth(tmp_path / "voc").ground_truth.difficult.tolist() == [expected]
    for key, column in (("iscrowd", "crowd"), ("ignore", "difficult")):
        for value in (word, expected, int(expected), float(expected)):
            path = write_coco(tmp_path / "gt.json", rows=[{key: value}])
            assert getattr(read_ground_truth(path).ground_truth, column).tolist() == [expected]


def test_flags_that_are_missing_or_mean_nothing(tmp_path):
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 3, 4))
    assert not read_ground_truth(tmp_path / "voc").ground_truth.difficult.any()
    assert not read_ground_truth(write_coco(tmp_path / "gt.json", rows=[{"ignore": None}])).ground_truth.difficult.any()
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 3, 4), difficult="<difficult>perhaps</difficult>")
    with pytest.raises(UserError, match=r"a\.xml:1: difficult: found 'perhaps', expected 0 or 1"):
        read_ground_truth(tmp_path / "voc")
    with pytest.raises(UserError, match=r"annotations\[1\]: iscrowd: found 2, expected 0 or 1"):
        read_ground_truth(write_coco(tmp_path / "gt.json", rows=[{}, {"iscrowd": 2}]))


# ---------------------------------------------------------------------------------------------- boxes and scores


@pytest.mark.parametrize("box", [(3, 2, 1, 4), (1, 4, 3, 2), (3, 4, 1, 2)])
def test_boxes_turned_inside_out_are_refused(tmp_path, box):
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 3, 4), box)
    with pytest.raises(UserError, match=r"a\.xml:1: box turned inside out: "):
        read_ground_truth(tmp_path / "voc")
    text = " ".join(map(str, box))
    write_text(tmp_path / "gt", {"a.txt": f"a 1 2 3 4\na {text}"})
    with pytest.raises(UserError, match=r"a\.txt:2: box turned inside out: .*--ground-truth-boxes is xyxy"):
        read_ground_truth(tmp_path / "gt", text_boxes="xyxy")
    sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    truth = write_coco(tmp_path / "gt.json", rows=[{}, {"bbox": sides}])
    with pytest.raises(UserError, match=r"annotations\[1\]: bbox: found .*turned inside out"):
        read_ground_truth(truth)
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json"))
    rows = write_rows(tmp_path / "dt.json", {"image_id": 1, "category_id": 10, "bbox": sides})
    with pytest.raises(UserError, match=r"results\[0\]: bbox: found .*turned inside out"):
        read_detections(rows, annotations)
    found = write_text(tmp_path / "dt", {"a.txt": f"cat 0.5 {text}"})
    with pytest.raises(UserError, match=r"a\.txt:1: box turned inside out: .*--detection-boxes is xyxy"):
        read_detections(found, annotations)
    write_text(tmp_path / "dt", {"a.txt": "cat 0.5 1 2 -3 4"})
    with pytest.raises(UserError, match=r"a\.txt:1: box turned inside out: .*--detection-boxes is xywh"):
        read_detections(found, annotations, text_boxes="xywh")


def test_fractions_read_as_corners_are_named_even_if_they_are_inside_out(tmp_path):
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json"))
    found = write_text(tmp_path / "dt", {"a.txt": "cat 0.5 0.5 0.3 0.2 0.9"})  # a row of predict.py --txt
    with pytest.raises(
        UserError, match=r"a\.txt:1: all boxes lie in 0\.\.1, .*--detection-boxes cxcywhn, .*--score-last"
    ):
        read_detections(found, annotations)


def test_boxes_without_a_side_are_left_out_as_in_training_and_noted(tmp_path):
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 1, 4), (1, 2, 3, 4), (5, 5, 9, 5))
    write_text(tmp_path / "gt", {"a.txt": "a 1 2 0 2\na 1 2 2 2\na 5 5 4 0"})
    sides = ([1, 2, 0, 2], [1, 2, 2, 2], [5, 5, 4, 0])
    truth = write_coco(tmp_path / "gt.json", rows=[{"bbox": box, "area": 7} for box in sides])
    for path in (tmp_path / "voc", tmp_path / "gt", truth):
        annotations = read_ground_truth(path)
        assert annotations.ground_truth.boxes_xyxy.tolist() == [[1, 2, 3, 4]]
        assert len(annotations.notes) == 1 and annotations.notes[0].startswith(
            "2 objects left out: zero-size box, first"
        )
    rows = write_rows(tmp_path / "dt.json", {"image_id": 1, "category_id": 10, "bbox": [1, 2, 0, 0]})
    assert len(read_detections(rows, annotations)[1]) == 1  # a wrong answer is an answer


@pytest.mark.parametrize("score", [1.5, 90, -0.1, 206])
def test_scores_outside_0_to_1_are_refused(tmp_path, score):
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json"))
    rows = write_rows(tmp_path / "dt.json", {"image_id": 1, "category_id": 10, "score": score})
    with pytest.raises(UserError, match=rf"results\[0\]: score: found {score:g}, expected 0 to 1"):
        read_detections(rows, annotations)
    for text, last in ((f"cat {score} 1 2 3 4", False), (f"cat 1 2 3 4 {score}", True)):
        found = write_text(tmp_path / "dt", {"a.txt": f"cat 0.5 0.5 0.5 1 1\n{text}"})
        with pytest.raises(UserError, match=rf"a\.txt:2: score: found {score:g}, expected 0 to 1 .*--score-last"):
            read_detections(found, annotations, score_last=last)


def test_a_score_at_the_other_end_of_fractions_is_met(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    truth = write_text(tmp_path / "gt", {"a.txt": "0 0.5 0.5 0.3 0.2"})
    annotations = read_ground_truth(truth, text_boxes="cxcywhn", images=tmp_path)
    rows = np.array([[0.5, 0.5, 0.3, 0.2, 0.9], [0.2, 0.1, 0.4, 0.2, 0.01]])
    for last in (True, False):
        columns = rows if last else rows[:, [4, 0, 1, 2, 3]]
        text = "\n".join("0 " + " ".join(map(str, row)) for row in columns)
        found = write_text(tmp_path / "dt", {"a.txt": text})
        table = read_detections(found, annotations, text_boxes="cxcywhn", score_last=last)[1]
        assert table.scores.tolist() == [0.9, 0.01]
        with pytest.raises(UserError, match=r"a\.txt:\d: read as .*the box leaves its picture: expected it with"):
            read_detections(found, annotations, text_boxes="cxcywhn", score_last=not last)


def test_fractions_for_pixels_and_pixels_for_fractions_are_refused(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    truth = write_text(tmp_path / "gt", {"a.txt": "0 0.5 0.5 0.3 0.2"})
    with pytest.raises(UserError, match=r"all boxes lie in 0\.\.1, expected pixels \(.*--ground-truth-boxes cxcywhn"):
        read_ground_truth(truth)
    annotations = read_ground_truth(truth, text_boxes="cxcywhn", images=tmp_path)
    found = write_text(tmp_path / "dt", {"a.txt": "0 20 10 12 4 0.9"})
    with pytest.raises(UserError, match=r"a\.txt:1: not normalised: 20 10 12 4"):
        read_detections(found, annotations, text_boxes="cxcywhn", score_last=True)
    write_text(tmp_path / "gt", {"a.txt": "0 20 10 12 4"})
    with pytest.raises(UserError, match=r"a\.txt:1: not normalised: 20 10 12 4"):
        read_ground_truth(truth, text_boxes="cxcywhn", images=tmp_path)


def test_fractions_in_json_and_xml_are_refused(tmp_path):
    fractions, pixels = {"bbox": [0.2, 0.1, 0.4, 0.3]}, {"bbox": [2, 1, 4, 3]}
    truth = read_ground_truth(write_coco(tmp_path / "gt.json", rows=[fractions, pixels]))  # one is in pixels: all are
    write_xml(tmp_path / "voc" / "a.xml", (0.2, 0.1, 0.4, 0.3))
    row = fractions | {"image_id": 1, "category_id": 10}
    for read in (
        lambda: read_ground_truth(write_coco(tmp_path / "gt.json", rows=[fractions])),
        lambda: read_ground_truth(tmp_path / "voc"),
        lambda: read_detections(write_rows(tmp_path / "dt.json", row), truth),
    ):
        with pytest.raises(UserError, match=r"all boxes lie in 0\.\.1, expected pixels$"):
            read()


def test_a_text_file_without_a_picture_is_left_out_and_noted(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 20)).save(tmp_path / "c.png")
    truth = write_text(tmp_path / "gt", {"a.txt": "0 20 10 12 4", "b.txt": "0 20 10 12 4"})
    annotations = read_ground_truth(truth, images=tmp_path)
    assert annotations.pictures == ("a.png", "c.png") and len(annotations.ground_truth) == 1
    assert annotations.notes == (f"1 text file without a picture left out, first: {truth / 'b.txt'}",)
    assert len(read_ground_truth(truth).ground_truth) == 2


def test_equal_rows_are_one_object(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    truth = write_text(tmp_path / "gt", {"a.txt": "0 0.5 0.5 0.3 0.2\n0 0.5 0.5 0.30 0.2\n1 0.5 0.5 0.3 0.2\n"})
    annotations = read_ground_truth(truth, text_boxes="cxcywhn", images=tmp_path)
    assert annotations.ground_truth.labels.tolist() == [0, 1]
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 5))
    truth = write_coco(tmp_path / "gt.json", rows=[{}, {"iscrowd": 1}, {}, {"area": 5}])
    for other, count in ((tmp_path / "voc", 2), (truth, 3)):
        assert len(read_ground_truth(other).ground_truth) == count
    assert len(annotations.notes) == 1 and "1 object left out: equal to another in all, first: " in annotations.notes[0]


# --------------------------------------------------------------------------------------------------------- folders


def test_subfolders_links_and_hidden_files(tmp_path):
    write_xml(tmp_path / "voc" / "p.xml", (1, 2, 3, 4))
    write_xml(tmp_path / "voc" / "sub" / "p.xml", (1, 2, 5, 6))
    write_xml(tmp_path / "elsewhere" / "q.xml", (1, 2, 7, 8))
    write_text(tmp_path / "gt", {"p.txt": "a 1 2 2 2", "sub/p.txt": "a 1 2 4 4", ".hidden/x.txt": "x"})
    write_text(tmp_path / "elsewhere_text", {"q.txt": "a 1 2 6 6"})
    for kind, folder, suffix in (("voc", "elsewhere", "xml"), ("gt", "elsewhere_text", "txt")):
        (tmp_path / kind / "link").symlink_to(tmp_path / folder)
        (tmp_path / kind / "sub" / "round").symlink_to(tmp_path / kind)
        for name in (f"._p.{suffix}", ".DS_Store", f"sub/._p.{suffix}"):
            (tmp_path / kind / name).write_bytes(b"\x00\x05\x16\x07Mac")
        annotations = read_ground_truth(tmp_path / kind)
        assert annotations.pictures == ("link/q", "p", "sub/p")
        widths = annotations.ground_truth.boxes_xyxy[:, 2] - annotations.ground_truth.boxes_xyxy[:, 0]
        assert widths.tolist() == [6, 2, 4]
        rows = {"p.txt": "a 0.5 0 0 1 1", "sub/p.txt": "a 0.6 0 0 1 1", "link/q.txt": "a 0.7 0 0 1 1"}
        found = write_text(tmp_path / f"dt_{kind}", rows | {"._p.txt": "\x00"})
        table = read_detections(found, annotations)[1]
        assert dict(zip(table.image.tolist(), table.scores.tolist())) == {0: 0.7, 1: 0.5, 2: 0.6}
        flat = write_text(tmp_path / f"flat_{kind}", {"q.txt": "a 0.7 0 0 1 1", "p.txt": "a 0.5 0 0 1 1"})
        assert read_detections(flat, annotations)[1].image.tolist() == [1, 0]


def test_two_spellings_of_one_text_file_are_refused(tmp_path):
    truth = write_text(tmp_path / "gt", {"a.txt": "a 1 2 3 4", "a.TXT": "a 1 2 3 4"})
    with pytest.raises(UserError, match=r"a\.txt: named as a\.TXT is"):
        read_ground_truth(truth)


# -------------------------------------------------------------------------------------- which picture, which class


def test_rows_of_json_go_by_file_name_and_category_name(tmp_path):
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", ["b.png", "a.png"], first_id=0))
    rows = [{"image_id": 0, "file_name": "imgs/a.png", "category_id": 1, "category_name": "cat"}]
    rows += [{"image_id": 1, "file_name": "imgs/b.png", "category_id": 0, "category_name": "dog"}]
    table = read_detections(write_rows(tmp_path / "dt.json", *rows), annotations)[1]
    assert table.image.tolist() == [1, 0] and table.labels.tolist() == [0, 1]
    for change, message in (
        ({"file_name": "imgs/c.png"}, r"results\[1\]: no image of the ground truth is called 'imgs/c.png'"),
        ({"file_name": None}, r"results\[1\]: no file_name, which other rows have"),
        ({"file_name": "more/a.png"}, r"results\[1\]: 'more/a.png' and 'imgs/a.png' both fit the image 'a.png'"),
        ({"category_name": "cow"}, r"results\[1\]: found class 'cow', expected one of cat, dog"),
    ):
        with pytest.raises(UserError, match=message):
            read_detections(write_rows(tmp_path / "dt.json", rows[0], rows[1] | change), annotations)


def test_a_coco_file_of_detections_with_names_of_its_own(tmp_path):
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", ["x/a.jpg", "y/a.jpg"]))
    tree = {
        "images": [{"id": 7, "file_name": "y/a.png"}, {"id": 8, "file_name": "x/a.png"}, {"id": 9, "file_name": "z"}]
    }
    tree["categories"] = [{"id": 10, "name": "dog"}, {"id": 11, "name": "cat"}, {"id": 12, "name": "cow"}]
    row = {"bbox": [1, 2, 3, 4], "score": 0.5}
    tree["annotations"] = [row | {"image_id": 7, "category_id": 11}, row | {"image_id": 8.0, "category_id": 10}]
    (tmp_path / "dt.json").write_text(json.dumps(tree))
    table = read_detections(tmp_path / "dt.json", annotations)[1]
    assert table.image.tolist() == [1, 0] and table.labels.tolist() == [0, 1]
    for change, message in (({"image_id": 5}, "the file's images"), ({"category_id": 5}, "the file's categories")):
        bad = tree | {"annotations": [tree["annotations"][0] | change]}
        (tmp_path / "dt.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=rf"annotations\[0\]: .*_id: found 5, expected one of {message}"):
            read_detections(tmp_path / "dt.json", annotations)


def test_one_picture_under_two_ids_is_one(tmp_path):
    rows = [{}, {"image_id": 3, "bbox": [5, 5, 1, 1]}, {"image_id": 2}]
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", ["a.jpg", "b.jpg", "./a.jpg"], rows))
    assert annotations.ground_truth.num_images == 2 and annotations.ground_truth.image.tolist() == [0, 0, 1]
    rows = [{"image_id": i, "category_id": 10, "score": 0.3 * i} for i in (1, 2, 3)]
    assert read_detections(write_rows(tmp_path / "dt.json", *rows), annotations)[1].image.tolist() == [0, 1, 0]
    rows, notes = [{"image_id": i, "category_id": 10} for i in (1, 2, 3, 3)], []  # a model looked at a.jpg twice
    detections = read_detections(write_rows(tmp_path / "dt.json", *rows), annotations, notes=notes)[1]
    assert detections.image.tolist() == [0, 1] and "2 detections left out: equal to one of the same" in notes[-1]
    rows = [{"image_id": 1, "category_id": 10}] * 2  # of one id, all rows count
    assert len(read_detections(write_rows(tmp_path / "dt.json", *rows), annotations)[1]) == 2


def test_a_category_that_only_groups_others_is_no_class(tmp_path):
    tree = json.loads(write_coco(tmp_path / "gt.json", rows=[{"category_id": 20}]).read_text())
    tree["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}] + [
        category | {"supercategory": "pets"} for category in tree["categories"]
    ]
    (tmp_path / "gt.json").write_text(json.dumps(tree))
    annotations = read_ground_truth(tmp_path / "gt.json")
    assert annotations.ground_truth.names == ("cat", "dog") and "supercategory" in annotations.notes[0]
    found = write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4"})
    assert read_detections(found, annotations)[1].labels.tolist() == [1]


@pytest.mark.parametrize(
    ("names", "tokens", "expected"),
    [
        (("1", "2", "0"), ("1", "2", "0"), None),  # names or places: two answers
        (("0", "1", "2"), ("1", "2", "0"), (1, 2, 0)),  # one answer
        (("1", "2", "3"), ("3", "1"), (2, 0)),  # no place 3
        (("1", "2", "3"), ("1", "0"), (1, 0)),  # no name 0
        (("1", "2", "3"), ("1", "2"), None),
        (("1", "2", "cat"), ("1", "cat"), (0, 2)),  # a file that names classes
        (("1", "2", "cat"), ("0", "cat"), (0, 2)),  # no name 0
        (("cat", "dog"), ("1", "00", "1.0"), (1, 0, 1)),
        (("cat", "dog"), ("cat", "1"), (0, 1)),
        (("007", "7"), ("007", "7"), (0, 1)),
        (("traffic light", "dog 2"), ("traffic light", "dog 2", "1"), (0, 1, 1)),
    ],
)
def test_names_and_places(tmp_path, names, tokens, expected):
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", names=names))
    text = write_text(tmp_path / "dt", {"a.txt": "\n".join(f"{token} 0.5 1 2 3 4" for token in tokens)})
    if expected is None:
        with pytest.raises(UserError, match=r"a\.txt:\d: (class '\d' may be '.*' and '.*'|found class '\d', expected)"):
            read_detections(text, annotations)
    else:
        assert tuple(read_detections(text, annotations)[1].labels) == expected
    write_text(tmp_path / "dt", {"classes.txt": "\n".join(reversed(names))})  # numbers are places in this list
    numbers = [n for n in range(len(names)) if str(n) in tokens]
    write_text(tmp_path / "dt", {"a.txt": "".join(f"{n} 0.5 1 2 3 4\n" for n in numbers)})
    assert read_detections(text, annotations)[1].labels.tolist() == [len(names) - 1 - n for n in numbers]


def test_places_and_ids_of_coco(tmp_path):
    truth = write_coco(tmp_path / "gt.json", names=("cat", "dog", "cow"))
    tree = json.loads(truth.read_text())
    for number, category in enumerate(tree["categories"], 1):
        category["id"] = number
    truth.write_text(json.dumps(tree | {"annotations": []}))
    found = write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4\n0 0.5 1 2 3 4"})
    assert read_detections(found, read_ground_truth(truth))[1].labels.tolist() == [1, 0]  # no id 0
    write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4\n3 0.5 1 2 3 4"})
    assert read_detections(found, read_ground_truth(truth))[1].labels.tolist() == [0, 2]  # no place 3
    write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4\n2 0.5 1 2 3 4"})
    with pytest.raises(UserError, match=r"class '2' may be 'cow' and 'dog': .*--names FILE"):
        read_detections(found, read_ground_truth(truth))
    declared = read_ground_truth(truth, names=["sheep", "cow", "cat"])
    assert read_detections(found, declared)[1].labels.tolist() == [2, 0]


def test_numbers_without_a_list_of_names_are_refused(tmp_path):
    annotations = read_ground_truth(write_text(tmp_path / "gt", {"a.txt": "cat 1 2 3 4\ndog 1 2 3 4"}))
    found = write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4"})
    with pytest.raises(UserError, match=r"a\.txt:1: found class '1', and none of the ground truth's, cat, dog"):
        read_detections(found, annotations)
    rows = write_rows(tmp_path / "dt.json", {"image_id": "a", "category_id": 1})
    with pytest.raises(UserError, match=r"found class '1', and none of the ground truth's, cat, dog.*--names FILE"):
        read_detections(rows, annotations)
    write_text(tmp_path / "dt", {"classes.txt": "dog\ncat"})
    assert read_detections(found, annotations)[1].labels.tolist() == [0]


def test_numbers_against_voc_names_that_were_guessed(tmp_path):
    write_xml(tmp_path / "voc" / "a.xml", (1, 2, 3, 4), name="dog")
    write_xml(tmp_path / "voc" / "b.xml", (1, 2, 3, 4), name="cat")
    annotations = read_ground_truth(tmp_path / "voc")
    found = write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4"})
    with pytest.raises(UserError, match="class '1' may be 'bicycle' and 'dog'"):
        read_detections(found, annotations)
    write_text(tmp_path / "dt", {"a.txt": "11 0.5 1 2 3 4\n1 0.5 1 2 3 4"})  # no twelve classes in the files
    table = read_detections(found, annotations)[1]
    assert [annotations.ground_truth.names[k] for k in table.labels] == ["dog", "bicycle"]
    write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4"})
    for names, expected in ((("cat", "dog"), "dog"), (("dog", "cat"), "cat")):
        declared = read_ground_truth(tmp_path / "voc", names=names)
        assert names[read_detections(found, declared)[1].labels[0]] == expected
    write_text(tmp_path / "voc", {"classes.txt": "dog\ncat\n"})
    declared = read_ground_truth(tmp_path / "voc")
    assert declared.ground_truth.names == ("dog", "cat")
    assert read_detections(found, declared)[1].labels.tolist() == [1]


def test_numbers_that_may_be_ids_or_names_of_files_are_refused(tmp_path):
    path = write_coco(tmp_path / "gt.json", files=("0002.jpg", "0001.jpg"))
    annotations = read_ground_truth(path)  # 0002.jpg has the id 1
    for name in ("1", "2"):
        write_text(tmp_path / "dt", {f"{name}.txt": "cat 0.5 1 2 4 6\n"})
    with pytest.raises(UserError, match=r"1\.txt: '1' may be the image of this id, '0002\.jpg', and '0001\.jpg'"):
        read_detections(tmp_path / "dt", annotations)
    path = write_coco(tmp_path / "gt.json", files=("2.jpg", "1.jpg"))
    rows = write_rows(tmp_path / "dt.json", {"image_id": "1", "category_id": 10}, {"image_id": "2", "category_id": 10})
    with pytest.raises(UserError, match=r"results\[0\]: '1' may be the image of this id"):
        read_detections(rows, read_ground_truth(path))
    path = write_coco(tmp_path / "gt.json", files=("0001.jpg", "0002.jpg"))  # one picture by both
    assert read_detections(tmp_path / "dt", read_ground_truth(path))[1].image.tolist() == [0, 1]


def test_an_image_listed_twice_is_one_and_an_id_of_two_pictures_is_refused(tmp_path):
    path = write_coco(tmp_path / "gt.json", files=("a.jpg",), rows=[{}])
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"images": tree["images"] * 2}))
    assert read_ground_truth(path).ground_truth.num_images == 1
    path.write_text(json.dumps(tree | {"images": [*tree["images"], {"id": 1, "file_name": "b.jpg"}]}))
    with pytest.raises(UserError, match=r"images: id 1 is given to two pictures"):
        read_ground_truth(path)


def test_classes_of_detections_alone_join_names_that_were_not_declared(tmp_path):
    write_text(tmp_path / "gt", {"a.txt": "b 1 2 3 4\n"})
    names = ("b", "c", "a")
    rows = [{"file_name": "a.jpg", "image_id": 0, "category_id": k, "category_name": n} for k, n in enumerate(names)]
    ground_truth, detections = read_detections(
        write_rows(tmp_path / "dt.json", *rows), read_ground_truth(tmp_path / "gt")
    )
    assert ground_truth.names == ("a", "b", "c") and ground_truth.labels.tolist() == [1]
    assert detections.labels.tolist() == [1, 2, 0]
    write_text(tmp_path / "gt", {"a.txt": "03 1 2 3 4\n"})  # numbers stand for themselves
    rows = [{"file_name": "a.jpg", "category_id": number} for number in (3, 10)]
    ground_truth, detections = read_detections(
        write_rows(tmp_path / "dt.json", *rows), read_ground_truth(tmp_path / "gt")
    )
    assert ground_truth.names == ("3", "10") and detections.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"results\[0\]: found class 'x', and none of the ground truth's, 3"):
        rows = write_rows(tmp_path / "dt.json", {"file_name": "a.jpg", "category_name": "x"})
        read_detections(rows, read_ground_truth(tmp_path / "gt"))


def test_numbers_that_predict_writes_for_a_model_without_names_are_places(tmp_path):
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", names=("cat", "dog")))  # ids 10 and 20
    rows = [{"image_id": 1, "category_id": k, "category_name": str(k)} for k in (1, 0)]
    assert read_detections(write_rows(tmp_path / "dt.json", *rows), annotations)[1].labels.tolist() == [1, 0]
    digits = read_ground_truth(write_coco(tmp_path / "digits.json", names=("1", "0")))
    with pytest.raises(UserError, match=r"results\[0\]: class '1' may be '1' and '0'"):
        read_detections(tmp_path / "dt.json", digits)
    rows[0]["category_id"] = 5  # a name beside another id is a name
    assert read_detections(write_rows(tmp_path / "dt.json", *rows), digits)[1].labels.tolist() == [0, 1]


def test_places_in_voc_order_against_coco_files_of_another(tmp_path):
    names = ("person", "cat", "boat")  # by place 0, 1, 2; by VOC's order 14, 7, 3
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", names=names))
    for numbers, expected in (("0 2", [0, 2]), ("14 7", [0, 1])):
        rows = "\n".join(f"{number} 0.5 1 2 3 4" for number in numbers.split())
        found = write_text(tmp_path / "dt", {"a.txt": rows})
        assert read_detections(found, annotations)[1].labels.tolist() == expected
    names = ("car", "bird", "bicycle")  # bicycle is 1 in VOC's order, bird is 2
    annotations = read_ground_truth(write_coco(tmp_path / "gt.json", names=names))
    write_text(tmp_path / "dt", {"a.txt": "1 0.5 1 2 3 4"})
    with pytest.raises(UserError, match=r"class '1' may be 'bird' and 'bicycle'.*--names FILE"):
        read_detections(found, annotations)
    annotations = read_ground_truth(tmp_path / "gt.json", names=("aeroplane", "bicycle", "bird"))
    assert read_detections(found, annotations)[1].labels.tolist() == [2]
