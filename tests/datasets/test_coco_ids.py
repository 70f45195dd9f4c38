"""COCO's ids and categories: one picture under two ids, ids as numbers and texts, categories that only group others."""

import json

import pytest

from datasets.coco import read_coco
from errors import UserError
from tests.datasets.small_sets import BOX, boxes, coco, picture, text


def test_one_picture_under_two_ids_is_one(tmp_path):
    names = ("x.png", "./x.png")
    images = [{"id": n, "file_name": name, "width": 100, "height": 80} for n, name in enumerate(names, 1)]
    picture(tmp_path / "images" / "x.png")
    other = {"id": 8, "image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4]}
    rows = [other | {"image_id": 1, "bbox": [40, 24, 20, 32]}, other, other | {"bbox": [40, 24, 20, 32]}]
    text(tmp_path / "train.json", coco(images=images, annotations=rows))
    index = read_coco(tmp_path, "train")
    assert boxes(index) == [[*BOX, [1, 2, 4, 6]]]  # both halves, and what stands in both once
    assert [fault.kind for fault in index.faults] == ["listed twice", "duplicate box"]
    images[1]["width"] = 50
    text(tmp_path / "train.json", coco(images=images, annotations=rows))
    with pytest.raises(UserError, match=r"has the ids 1 and 2 and two sizes"):
        read_coco(tmp_path, "train")


@pytest.mark.parametrize("image, category", [(1.0, 1), ("1", 1), (1, "1"), (1, 1.0), ("1", "1")])
@pytest.mark.parametrize("own", [int, float, str])
def test_ids_as_numbers_and_texts(tmp_path, image, category, own):
    picture(tmp_path / "images" / "x.png")
    tree = json.loads(coco(objects=((image, category),)))
    tree["images"][0]["id"] = own(1)
    tree["categories"][0]["id"] = own(1)
    text(tmp_path / "train.json", json.dumps(tree))
    if own is float or image != 1.0 or not isinstance(image, float) or own is int:
        assert boxes(read_coco(tmp_path, "train")) == [BOX]


def test_text_ids_of_categories(tmp_path):
    picture(tmp_path / "images" / "x.png")
    categories = [{"id": "zebra", "name": "Zebra"}, {"id": "ant", "name": "Ant"}]
    text(tmp_path / "train.json", coco(objects=((1, "ant"),), categories=categories))
    index = read_coco(tmp_path, "train")
    assert index.names == ("Zebra", "Ant") and index.category_ids == ("zebra", "ant")  # the file's own order
    assert index.samples[0].labels.tolist() == [1]


def categories_of(*rows):
    return [{"id": n, "name": name, "supercategory": above} for n, (name, above) in enumerate(rows)]


@pytest.mark.parametrize(
    "rows, used, expected",
    [
        ((("cells", "none"), ("RBC", "cells"), ("WBC", "cells")), {1}, ("RBC", "WBC")),
        ((("raccoon", "none"), ("raccoon", "raccoon")), {1}, ("raccoon",)),
        ((("cells", "none"), ("RBC", "cells"), ("WBC", "cells")), {0, 1}, ("cells", "RBC", "WBC")),
        ((("person", "person"), ("car", "vehicle")), {1}, ("person", "car")),
        ((("cells", None), ("RBC", "other")), {1}, ("cells", "RBC")),
        ((("a", "none"), ("b", "a"), ("c", "b")), {2}, ("c",)),
        ((("_background_", None), ("RBC", None)), {1}, ("RBC",)),
        ((("cells", None), ("_background_", None), ("RBC", "cells")), {2}, ("RBC",)),
        ((("Background", None), ("RBC", None)), {0, 1}, ("Background", "RBC")),
    ],
)
def test_root_categories_are_no_classes(tmp_path, rows, used, expected):
    picture(tmp_path / "train" / "x.png")
    content = coco(objects=[(1, category) for category in sorted(used)], categories=categories_of(*rows))
    text(tmp_path / "train" / "_annotations.coco.json", content)
    index = read_coco(tmp_path, "train")
    assert index.names == expected
    noted = sum(fault.kind == "supercategory" for fault in index.faults)
    assert noted == len(rows) - len(expected)
    assert {index.names[label] for label in index.samples[0].labels} <= {rows[k][0] for k in used}


def test_a_category_with_objects_in_another_split_is_a_class_of_all(tmp_path):
    categories = categories_of(("vehicle", "none"), ("car", "vehicle"))
    for split, category in (("train", 0), ("test", 1)):
        picture(tmp_path / split / "x.png")
        text(tmp_path / split / "_annotations.coco.json", coco(objects=((1, category),), categories=categories))
        text(tmp_path / "annotations" / f"{split}.json", coco(objects=((1, category),), categories=categories))
    assert read_coco(tmp_path, "train").names == read_coco(tmp_path, "test").names == ("vehicle", "car")
    for split in ("train", "test"):
        (tmp_path / "annotations" / f"{split}.json").unlink()
    assert read_coco(tmp_path, "train").names == read_coco(tmp_path, "test").names == ("vehicle", "car")
