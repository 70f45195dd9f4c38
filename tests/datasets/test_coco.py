"""datasets.coco against COCO's own labels, VOC's boxes as COCO files, and files with one fault each."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets import open_dataset
from datasets.coco import index_coco, read_coco, read_json
from datasets.images import read_image
from errors import UserError
from metrics.files import read_ground_truth
from tests.datasets.small_sets import coco, picture, text

INVALID_MASKS = (
    b"[1,,2] | [[1, 2], , [3]] | [[1 2]] | [[1, 2,]] | [[01]] | [[1.]] | [[.5]] | [[+1]] | [[1e]] | [[--1]] | [[1.2.3]]"
    b' | [[1, 2] | [[1]]] | [1]2 | [[0x10]] | [[\x0b1]] | {"counts": [1,,2], "size": [3, 4]} | {"counts": "a, "b": 1}'
).split(b" | ")


def tree_of(annotations=(), images=None, categories=None) -> dict:
    images = [{"id": 7, "file_name": "x.jpg", "width": 100, "height": 80}] if images is None else images
    return {
        "images": images,
        "annotations": list(annotations),
        "categories": [{"id": 90, "name": "no"}, {"id": 3, "name": "1e3"}] if categories is None else categories,
    }


def annotation(bbox=(10, 20, 30, 40), **changes) -> dict:
    return {"id": 1, "image_id": 7, "category_id": 90, "bbox": list(bbox), "area": 600.5, "iscrowd": 0} | changes


@pytest.fixture
def make(tmp_path):
    def build(tree):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "images" / "val").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "annotations" / "instances_val.json"
        path.write_bytes(tree if isinstance(tree, bytes) else json.dumps(tree).encode())
        if not (tmp_path / "images" / "val" / "x.jpg").exists():
            Image.new("RGB", (100, 80)).save(tmp_path / "images" / "val" / "x.jpg")
        return read_coco(tmp_path, "val")

    return build


def kinds(index) -> list[tuple[str, str]]:
    return [(fault.effect, fault.kind) for fault in index.faults]


def test_coco128(shared_data):
    root = shared_data / "coco128"
    index = open_dataset("coco", root, "train2017")
    tree = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert len(index) == 128 and len(index.names) == 80 and not index.faults
    assert index.category_ids[0] == 1 and index.category_ids[-1] == 90 and len(index.category_ids) == 80
    counts = sum(map(len, index.samples)), sum(int(sample.crowd.sum()) for sample in index.samples)
    assert counts == (939, 10)
    by_image: dict[int, list] = {}
    for row in tree["annotations"]:
        by_image.setdefault(row["image_id"], []).append(row)
    name_of = {row["id"]: row["name"] for row in tree["categories"]}
    for sample in index.samples:
        rows = by_image.get(sample.image_id, [])
        expected = np.array([row["bbox"] for row in rows], dtype=float).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_array_equal(sample.boxes_xyxy, expected)
        np.testing.assert_array_equal(sample.area, [row["area"] for row in rows])  # of the masks
        np.testing.assert_array_equal(sample.crowd, [row["iscrowd"] == 1 for row in rows])
        assert [index.names[label] for label in sample.labels] == [name_of[row["category_id"]] for row in rows]
        assert (sample.ignore == sample.crowd).all()
    assert {sample.image_id for sample in index.samples if not len(sample)} == {250, 508}
    labels = np.concatenate([sample.labels for sample in index.samples])
    assert len(set(labels[~np.concatenate([s.ignore for s in index.samples])].tolist())) == 71


@pytest.mark.parametrize("dialect, name", [("coco_v1", "default"), ("coco_v2", "v2")])
def test_voc_boxes_in_two_dialects(shared_data, tmp_path, dialect, name):
    root = shared_data / "voc2012_100"
    path = root / "same_labels_other_formats" / dialect / f"instances_{name}.json"
    index = index_coco(read_json(path), path, root / "JPEGImages")
    assert len(index) == 100 and sum(map(len, index.samples)) == 273 and not index.faults
    if dialect == "coco_v2":
        assert min(sample.image_id for sample in index.samples) > 2**31  # ids beyond 32 bits
    voc = {sample.image_path.name: sample for sample in open_dataset("voc", root, "default").samples}
    voc_names = open_dataset("voc", root, "default").names
    for sample in index.samples:
        mine = sorted((*box, index.names[k]) for box, k in zip(sample.boxes_xyxy.tolist(), sample.labels))
        other = voc[sample.image_path.name]
        corners = (other.boxes_xyxy + np.array([1.0, 1, 0, 0])).tolist()  # these files keep VOC's corners, unshifted
        assert mine == sorted((*box, voc_names[k]) for box, k in zip(corners, other.labels))


@pytest.mark.parametrize("place", ["images/val", "val", "images", "."])
@pytest.mark.parametrize("labels", ["annotations/instances_val.json", "annotations/val.json", "val.json"])
def test_layouts(tmp_path, place, labels):
    for path in (tmp_path / place, (tmp_path / labels).parent):
        path.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 80)).save(tmp_path / place / "x.jpg")
    (tmp_path / labels).write_text(json.dumps(tree_of([annotation()])))
    assert read_coco(tmp_path, "val").samples[0].image_path == tmp_path / place / "x.jpg"


def test_fields(make):
    rows = [annotation(), annotation(iscrowd=1, category_id=3), annotation(ignore=1), annotation(area=None)]
    index = make(tree_of(rows))
    sample = index.samples[0]
    assert index.names == ("1e3", "no") and index.category_ids == (3, 90) and not index.faults
    assert sample.image_id == 7 and sample.labels.tolist() == [1, 0, 1, 1]
    assert sample.crowd.tolist() == [False, True, False, False]
    assert sample.ignore.tolist() == [False, True, True, False]
    assert sample.area.tolist() == [600.5, 600.5, 600.5, 1200]
    np.testing.assert_array_equal(sample.boxes_xyxy, [[10, 20, 40, 60]] * 4)


def test_ids_beyond_32_bits(make):
    images = [{"id": 2**40 + 1, "file_name": "x.jpg", "width": 100, "height": 80}]
    index = make(
        tree_of(
            [annotation(image_id=2**40 + 1, id=9 * 10**12, category_id=2**35)], images, [{"id": 2**35, "name": "a"}]
        )
    )
    assert index.samples[0].image_id == 2**40 + 1 and index.category_ids == (2**35,) and len(index.samples[0]) == 1


def test_no_annotations(make):
    index = make(tree_of())
    assert len(index.samples[0]) == 0 and index.samples[0].boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize(
    "bad, kind",
    [
        (annotation((10, 20, 0, 40)), "zero-size box"),
        (annotation((10, 20, -5, 40)), "box turned inside out"),
        (annotation((100, 20, 5, 40)), "box outside the picture"),
        (annotation((10, 20, 30)), "malformed object"),
        (annotation(("10", "20", "30", "wide")), "malformed object"),
        (annotation(iscrowd=2), "malformed object"),
        (annotation(ignore="maybe"), "malformed object"),
        (annotation((10, 20, 30, True)), "malformed object"),
        (annotation((10, 20, 30, 10**400)), "malformed object"),
        (annotation((10, 20, 1e308, 1e308)), None),  # past the edge: clipped
        (annotation(bbox=()), "malformed object"),
        (annotation(area="large"), "malformed object"),
        (annotation(image_id=8), "label without picture"),
        (annotation(image_id="8"), "label without picture"),
        (annotation(image_id=[7]), "label without picture"),
        (annotation(category_id=4), "unknown class"),
        (annotation(category_id=None), "unknown class"),
        ({}, "label without picture"),
    ],
)
def test_a_bad_annotation_is_dropped_and_listed(make, bad, kind):
    index = make(tree_of([annotation(), bad, annotation((1, 2, 3, 4))]))
    if kind is None:
        assert kinds(index) == [("noted", "box past the edge")]
        np.testing.assert_array_equal(index.samples[0].boxes_xyxy[1], [10, 20, 100, 80])
    else:
        effect = "left out" if kind == "label without picture" else "object dropped"
        assert kinds(index) == [(effect, kind)] and len(index.samples[0]) == 2


@pytest.mark.parametrize(
    "key, value", [("iscrowd", 2), ("ignore", "maybe"), ("area", "large"), ("bbox", [1, 2, 3, "x"])]
)
def test_the_key_of_a_value_that_means_nothing_is_named(make, key, value):
    (fault,) = make(tree_of([annotation(**{key: value})])).faults
    assert f": {key}: found " in fault.reason


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"id": 7, "file_name": "y.jpg"}, "taken by x.jpg"),
        ({"id": 8.5, "file_name": "y.jpg"}, "expected a whole number"),
        ({"id": 8}, "file_name None"),
        ({"id": 8, "file_name": "../../etc/passwd"}, "leaves"),
        ({"id": 8, "file_name": "/etc/passwd"}, "leaves"),
        ({"id": 8, "file_name": "..\\..\\passwd"}, "leaves"),
        ({"id": 8, "file_name": "none.jpg"}, "no such file"),
    ],
)
def test_a_bad_image_record_is_dropped_and_listed(make, bad, words):
    index = make(tree_of([annotation()], [{"id": 7, "file_name": "x.jpg"}, bad]))
    effect = "left out" if words == "no such file" else "picture dropped"
    assert [fault.effect for fault in index.faults] == [effect] and words in index.faults[0].reason
    assert len(index) == 1 and len(index.samples[0]) == 1


def test_a_size_that_lies(make):
    index = make(tree_of([annotation()], [{"id": 7, "file_name": "x.jpg", "width": 80, "height": 100}]))
    assert kinds(index) == [("noted", "wrong size stated")]
    assert (index.samples[0].width, index.samples[0].height) == (100, 80)
    with pytest.raises(UserError, match="1 of 1 have another size than their labels state"):
        make(tree_of([annotation()], [{"id": 7, "file_name": "x.jpg", "width": 50, "height": 40}]))


@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_labels_turn_with_exif_where_the_size_says_so(make, tmp_path, stated):
    make(tree_of())
    stored = np.zeros((80, 100, 3), dtype=np.uint8)
    stored[20:60, 10:40] = 255
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(stored).save(tmp_path / "images" / "val" / "x.jpg", exif=exif.tobytes())
    box, size = ((10, 20, 30, 40), (100, 80)) if stated == "stored" else ((20, 60, 40, 30), (80, 100))
    images = [{"id": 7, "file_name": "x.jpg", "width": size[0], "height": size[1]}]
    sample = make(tree_of([annotation(box)], images)).samples[0]
    x1, y1, x2, y2 = sample.boxes_xyxy[0].astype(int)
    assert (x1, y1, x2, y2) == (20, 60, 60, 90)
    assert read_image(sample.image_path)[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON: .*, expected a COCO file"),
        (b"[]", "no list of objects under 'images'"),
        (b'{"categories": [], "images": {}}', "under 'images'"),
        (b'{"categories": [], "images": []}', "no categories"),
        (b'{"categories": [{"id": 1}], "images": []}', "an id and a name"),
        (b"[" * 200_000, "nested too deeply|not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"images": [NaN]}', "NaN"),
        (b'{"images": [-Infinity]}', "-Infinity"),
        (b'{"annotations": [{"segmentation": [[NaN, 1]]}]}', "NaN"),
        *(
            (b'{"annotations": [{"segmentation": ' + mask + b"}]}", r"instances_val\.json:1: not valid JSON")
            for mask in INVALID_MASKS
        ),
        (b'{"images": [' + b"9" * 10_000 + b"]}", "not valid JSON: .*, expected a COCO file"),
        (
            json.dumps(tree_of(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])).encode(),
            "stands there twice",
        ),
        (
            json.dumps(tree_of(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}])).encode(),
            "stands there twice",
        ),
    ],
)
def test_broken_files(make, tmp_path, content, words):
    with pytest.raises(UserError, match=words) as caught:
        make(content)
    assert "instances_val.json" in str(caught.value)


def test_bom(make):
    assert len(make(b"\xef\xbb\xbf" + json.dumps(tree_of([annotation()])).encode()).samples[0]) == 1


def test_masks_are_skipped_and_nothing_else(tmp_path):
    """Cutting masks out of the text first gives what a plain parse gives, masks emptied."""
    tree = tree_of(
        [
            annotation(segmentation=[[1.5, -2, 3e2, 4.0], [5, 6, 7, 8]]),
            annotation(segmentation=[[0, -0.5, 1e-7, 2e3], []]),
            annotation(segmentation=[], extra='"segmentation": [[1, 2]]'),
            annotation(segmentation={"counts": [1, 2], "size": [3, 4]}),
            annotation(segmentation=[[1, 2]], last=[1, [2]]),
            annotation(**{'a "segmentation': [[1, 2]], "segmentation": None}),
        ]
    )
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps(tree, indent=indent))
        expected = json.loads(path.read_text())
        for row in expected["annotations"]:
            if isinstance(row["segmentation"], list):
                row["segmentation"] = None
        assert read_json(path) == expected


def test_the_line_of_a_fault_counts_those_of_masks(tmp_path):
    text = json.dumps(tree_of([annotation(segmentation=[[1, 2, 3, 4]])] * 2), indent=1)
    (tmp_path / "a.json").write_text(text + "\n,")
    with pytest.raises(UserError, match=rf"a\.json:{text.count(chr(10)) + 2}: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_missing_root_and_other_names(make, tmp_path, shared_data):
    with pytest.raises(UserError, match=r"instances_train\.json: no such file"):
        read_coco(tmp_path, "train")
    make(tree_of([annotation()]))
    assert len(open_dataset("coco", tmp_path, "val", names=("1e3", "no"))) == 1
    with pytest.raises(UserError, match="expected no, 1e3"):
        open_dataset("coco", tmp_path, "val", names=("no", "1e3"))
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match=r"no usable picture; .*1 x label without picture; first fault: .*no such file"):
        open_dataset("coco", tmp_path, "val")


def test_a_file_as_root_is_refused(tmp_path):
    (tmp_path / "instances_train.json").write_text("{}")
    with pytest.raises(UserError, match=r"instances_train\.json: a file, expected the folder with annotations/"):
        read_coco(tmp_path / "instances_train.json", "train")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_list_that_is_given_twice_is_refused(tmp_path, key):
    """Two files joined by hand: the parser keeps the last list, and half of the labels would be gone."""
    picture(tmp_path / "images" / "x.png")
    whole = coco()
    part = f'"{key}": {json.dumps(json.loads(whole)[key])}'
    text(tmp_path / "train.json", f"{{{part}, {whole[1:]}")
    with pytest.raises(UserError, match=f"train.json: key '{key}' is given twice, expected once"):
        read_coco(tmp_path, "train")
    with pytest.raises(UserError, match=f"train.json: key '{key}' is given twice, expected once"):
        read_ground_truth(tmp_path / "train.json")
    text(tmp_path / "train.json", f'{{"info": {{"{key}": 1}}, {whole[1:]}')
    assert len(read_coco(tmp_path, "train")) == len(read_ground_truth(tmp_path / "train.json").pictures) == 1


@pytest.mark.parametrize(("key", "holder"), [("bbox", "annotations"), ("file_name", "images"), ("name", "categories")])
def test_a_key_that_an_object_gives_twice_is_refused(tmp_path, key, holder):
    """A parser keeps the last value, and nobody knows which one is meant."""
    picture(tmp_path / "images" / "x.png")
    tree = json.loads(coco())
    tree[holder][0]["id"] = 7
    row = json.dumps(tree[holder][0])
    whole = json.dumps(tree)
    assert whole.count(row) == 1
    text(tmp_path / "train.json", whole.replace(row, f'{{"{key}" : 0, {row[1:]}'))
    for read in (lambda: read_coco(tmp_path, "train"), lambda: read_ground_truth(tmp_path / "train.json")):
        with pytest.raises(UserError, match=f"json: key '{key}' is given twice by the object with id 7, expected once"):
            read()


def test_an_area_below_0_is_no_area(tmp_path):
    """COCO's evaluation would ignore its object in every range of areas."""
    picture(tmp_path / "images" / "x.png")
    tree = json.loads(coco(objects=((1, 1), (1, 1), (1, 1))))
    for row, area, left in zip(tree["annotations"], (-1, 0, 9.5), (1, 2, 3)):
        row |= {"area": area, "bbox": [left, 1, 5, 6]}
    text(tmp_path / "train.json", json.dumps(tree))
    assert read_coco(tmp_path, "train").samples[0].area.tolist() == [30, 0, 9.5]
    assert read_ground_truth(tmp_path / "train.json").ground_truth.area.tolist() == [30, 0, 9.5]
