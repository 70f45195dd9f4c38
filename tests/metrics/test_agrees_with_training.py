"""Ground truth read for evaluation from files is the ground truth that training reads: one answer to every oddity."""

import json
import os

import numpy as np
from PIL import Image

from datasets.open import open_dataset
from metrics.files import read_ground_truth
from metrics.picture_names import split_name
from metrics.tables import ground_truth_from_samples, inclusive_to_continuous

ROWS = (  # left, top, width, height (continuous), flag
    ((2, 3, 10, 8), "Unspecified"),
    ((2, 3, 10, 8), "Unspecified"),  # the same again
    ((4, 4, 9, 9), "1.0"),
    ((5, 5, 6, 7), "False"),
    ((6, 6, 4, 5), "TRUE"),
    ((7, 7, 0, 5), "0"),  # no width
)


def write_pictures(folder, hidden=True):
    for name in ("a.png", "sub/a.png", "linked/b.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    (folder / "._a.png").write_bytes(b"\x00Mac")


def link_in(folder, name, outside):
    """Move folder/name outside and leave a link, and a link that goes round."""
    os.replace(folder / name, outside)
    (folder / name).symlink_to(outside)
    (folder / "sub" / "round").symlink_to(folder)


def assert_same(annotations, index):
    theirs = ground_truth_from_samples(index.samples, index.names)
    ours = inclusive_to_continuous(annotations.ground_truth) if annotations.pixels == "inclusive" else (
        annotations.ground_truth
    )  # fmt: skip
    assert ours.num_images == theirs.num_images == 3

    def rows(truth, pictures):
        columns = zip(truth.image, truth.labels, truth.boxes_xyxy, truth.difficult, truth.crowd, truth.area)
        return sorted(
            (pictures[i], truth.names[k], tuple(np.round(box, 9)), bool(d), bool(c), round(a, 9))
            for i, k, box, d, c, a in columns
        )

    ours = rows(ours, ["/".join(split_name(name)[0][-2:]) for name in annotations.pictures])
    short = {"images/a": "a", "JPEGImages/a": "a"}
    pictures = ["/".join(split_name(str(sample.image_path))[0][-2:]) for sample in index.samples]
    assert ours == rows(theirs, [short.get(name, name) for name in pictures]) and len(ours) == 3 * 4


def test_voc(tmp_path):
    write_pictures(tmp_path / "JPEGImages")
    objects = ""
    for (x, y, width, height), flag in ROWS:
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + max(width, 1)}</xmax><ymax>{y + height}</ymax>"
        objects += f"<object><name>cat</name><difficult>{flag}</difficult><bndbox>{corners}</bndbox></object>"
    for name in ("a", "sub/a", "linked/b"):
        path = tmp_path / "Annotations" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<annotation>{objects}</annotation>")
    link_in(tmp_path / "Annotations", "linked", tmp_path / "outside")
    (tmp_path / "Annotations" / "._a.xml").write_bytes(b"\x00Mac")
    index = open_dataset("voc", tmp_path, "all")
    annotations = read_ground_truth(tmp_path / "Annotations")
    assert_same(annotations, index)
    assert annotations.ground_truth.difficult.sum() == 3 * 2


def test_coco(tmp_path):
    write_pictures(tmp_path / "images")
    names = ("a.png", "sub/a.png", "linked\\b.png", "./a.png")  # the last is the first once more
    images = [{"id": n + 1, "file_name": name, "width": 40.0, "height": None} for n, name in enumerate(names)]
    annotations = []
    for image_id in (1.0, 2, "3"):
        for (box, flag), key in zip(ROWS, ("ignore", "ignore", "iscrowd", "ignore", "ignore", "ignore")):
            row = {"image_id": image_id, "category_id": 7, "bbox": [str(box[0]), *box[1:]], key: flag, "area": None}
            annotations.append(row)
    annotations[5]["image_id"], annotations[0]["image_id"] = 4, 4
    tree = {"images": images, "annotations": annotations}
    tree["categories"] = [{"id": 7, "name": "cat", "supercategory": "pets"}, {"id": 0, "name": "pets"}]
    (tmp_path / "all.json").write_text(json.dumps(tree))
    index = open_dataset("coco", tmp_path, "all")
    annotations = read_ground_truth(tmp_path / "all.json")
    assert_same(annotations, index)
    assert annotations.ground_truth.names == ("cat",) and annotations.ground_truth.crowd.sum() == 3


def test_yolo(tmp_path):
    write_pictures(tmp_path / "images")
    lines = []
    for (x, y, width, height), _ in ROWS:
        values = ((x + width / 2) / 40, (y + height / 2) / 30, width / 40, height / 30)
        lines.append("00 " + " ".join(f"{value:.12f}" for value in values))
    for name in ("a", "sub/a", "linked/b"):
        path = tmp_path / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\r\n".join(lines))
    (tmp_path / "labels" / "._a.txt").write_bytes(b"\x00Mac")
    link_in(tmp_path / "labels", "linked", tmp_path / "outside")
    (tmp_path / "data.yaml").write_text("all: images\nnames: [cat]\n")
    index = open_dataset("yolo", tmp_path, "all")
    assert_same(
        read_ground_truth(tmp_path / "labels", text_boxes="cxcywhn", images=tmp_path / "images", names=["cat"]), index
    )
