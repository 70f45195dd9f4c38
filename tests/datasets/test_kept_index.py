"""datasets.kept_index: what is kept is what was read, and whatever changes afterwards is noticed."""

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import kept_index, open_dataset
from datasets import open as opening
from datasets.coco import read_coco
from datasets.kept_index import DIGEST_BYTES, KeptSets, Sources
from datasets.scan import scan
from tests.datasets.small_sets import picture

AGO = time.time() - 1000
SIZE = {"width": 100, "height": 80}
NAMES = ("a.png", "turned.jpg", "sub\\b.png", "gone.png", "broken.png", "empty.png", "ü.png", "a.png", "small.png")


def tree(category=1):
    images = [{"id": n, "file_name": name, **SIZE} for n, name in enumerate(NAMES)]
    images[6]["id"] = "six"
    box = {"category_id": category, "bbox": [40, 24, 20, 32]}
    rows = [{"id": n, "image_id": image, **box} for n, image in enumerate((0, 1, 2, 3, 4, "six", 8))]
    rows += [
        rows[0] | {"id": 20},
        {"id": 21, "image_id": 0, "category_id": 1, "bbox": [5, 5, 0, 0]},
        {"id": 22, "image_id": 0, "category_id": 1, "bbox": [1.5, 2, 90, 60], "iscrowd": 1, "area": 7.25},
        {"id": 23, "image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4]},
        {"id": 24, "image_id": 1, "category_id": 1, "bbox": [1, 2, 300, 4], "ignore": 1},
    ]
    # Enough good boxes that those which pass the edge, also of a smaller picture, are not the most.
    rows += [{"id": 30 + n, "image_id": 2, "category_id": 1, "bbox": [n, 2, 9, 9]} for n in range(9)]
    categories = [{"id": 0, "name": "things"}, {"id": 1, "name": "cell", "supercategory": "things"}]
    return {"images": images, "annotations": rows, "categories": categories}


def settle(root: Path) -> None:
    """Let all of it have been there for a while."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (AGO, AGO))


@pytest.fixture
def root(tmp_path):
    """A set with a fault of every kind: pictures that are missing, broken, turned, listed twice; a root category."""
    root = tmp_path / "set"
    for name in ("a.png", "sub/b.png", "empty.png", "ü.png"):
        picture(root / "train" / name)
    picture(root / "train" / "small.png", (50, 30))  # of another shape than stated: noted, not dropped
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(root / "train" / "turned.jpg", exif=exif.tobytes())
    (root / "train" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (root / "annotations").mkdir()
    (root / "annotations" / "train.json").write_text(json.dumps(tree()))
    settle(root)
    return root


@pytest.fixture
def start(root, tmp_path, monkeypatch):
    """start(...) opens the set as a new process would, and keeps what it read. Returns (index, whether it was read)."""
    reads = []

    def read(*arguments):
        reads.append(arguments)
        return read_coco(*arguments)

    monkeypatch.setattr(opening, "read_coco", read)

    def open_set(split="train", **options):
        kept = KeptSets(tmp_path / "kept")
        reads.clear()
        index = open_dataset("coco", root, split, kept=kept, **options)
        for path, parts in kept.new_files():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(parts))
        return index, bool(reads)

    return open_set


def only_file(tmp_path) -> Path:
    (path,) = (tmp_path / "kept").iterdir()
    return path


def assert_same(a, b):
    assert len(a) == len(b)
    for field in dataclasses.fields(a):
        if field.name != "samples":
            assert getattr(a, field.name) == getattr(b, field.name), field.name
    for one, other in zip(a.samples, b.samples):
        for field in dataclasses.fields(one):
            x, y = getattr(one, field.name), getattr(other, field.name)
            assert type(x) is type(y), field.name
            if isinstance(x, np.ndarray):
                assert x.dtype == y.dtype and x.flags.writeable == y.flags.writeable, field.name
                np.testing.assert_array_equal(x, y)
            else:
                assert x == y, field.name
    assert scan(a).table() == scan(b).table()


@pytest.mark.parametrize("classes", [(), ("cell",)])
def test_the_second_start_reads_nothing_and_finds_the_same(root, start, classes):
    (first, was_read), (second, is_read) = start(classes=classes), start(classes=classes)
    assert was_read and not is_read
    assert_same(first, second)
    assert_same(second, open_dataset("coco", root, "train", classes=classes))
    assert {fault.effect for fault in second.faults} == {
        "picture dropped", "object dropped", "duplicate dropped", "left out", "noted",
    }  # fmt: skip
    assert [len(sample) for sample in second.samples] == [2, 2, 10, 0, 1, 1]
    second.samples[0].boxes_xyxy[0] = 1  # an array of its own, as that of a reader is


def replace_without_a_new_time(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, (AGO, AGO))


def use_the_root_category(root: Path) -> None:
    (root / "annotations" / "other.json").write_text(json.dumps(tree(category=0)))


CHANGES = {
    "a picture of other bytes": lambda root: picture(root / "train" / "a.png"),
    "a picture of another size and the same time": lambda root: replace_without_a_new_time(
        root / "train" / "a.png", (root / "train" / "small.png").read_bytes()
    ),
    "a picture that is gone": lambda root: (root / "train" / "a.png").unlink(),
    "a picture that was missing": lambda root: picture(root / "train" / "gone.png"),
    "a picture that was broken": lambda root: picture(root / "train" / "broken.png"),
    "a folder instead of a picture": lambda root: [
        (root / "train" / "empty.png").unlink(),
        (root / "train" / "empty.png").mkdir(),
    ],
    "a picture under the name that is tried first": lambda root: picture(root / "train" / "sub\\b.png", (60, 60)),
    "a link to another picture": lambda root: [
        (root / "train" / "a.png").unlink(),
        (root / "train" / "a.png").symlink_to("small.png"),
    ],
    "labels of as many bytes": lambda root: (root / "annotations" / "train.json").write_text(
        json.dumps(tree()).replace("[40, 24,", "[41, 24,")
    ),
    "labels of the same time": lambda root: replace_without_a_new_time(
        root / "annotations" / "train.json", json.dumps(tree(), indent=1).encode()
    ),
    "labels of as many bytes and the same time": lambda root: replace_without_a_new_time(
        root / "annotations" / "train.json",
        (root / "annotations" / "train.json").read_bytes().replace(b"[40, 24,", b"[41, 24,"),
    ),
    "labels that are found first": lambda root: shutil.copy(
        root / "annotations" / "train.json", root / "annotations" / "instances_train.json"
    ),
    "pictures in the folder that is tried first": lambda root: picture(root / "images" / "train" / "a.png"),
    "another split with objects of the root category": use_the_root_category,
}


@pytest.mark.parametrize("has_root_category", [True, False], ids=["with a root category", "without"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(root, start, change, has_root_category):
    if not has_root_category:  # then no folder is listed
        labels = root / "annotations" / "train.json"
        labels.write_text(json.dumps(tree() | {"categories": [{"id": 1, "name": "cell"}]}))
        settle(root)
    start()
    change(root)
    index, is_read = start()
    assert is_read or (change is use_the_root_category and not has_root_category)
    assert_same(index, open_dataset("coco", root, "train"))
    settle(root)
    start()  # it is kept anew
    assert not start()[1]


def test_other_settings_have_an_index_of_their_own(root, start, monkeypatch):
    shutil.copy(root / "annotations" / "train.json", root / "annotations" / "test.json")
    shutil.copytree(root / "train", root / "test")
    settle(root)
    assert start()[1] and start("test")[1] and start(names=("cell",))[1] and not start()[1]
    monkeypatch.chdir(root.parent)
    assert_same(open_dataset("coco", "set", "train", kept=KeptSets(Path("kept"))), open_dataset("coco", "set", "train"))
    monkeypatch.setattr(kept_index, "code_version", lambda: "another")
    assert start()[1] and not start()[1]


def test_a_damaged_index_is_no_index(start, tmp_path):
    first, _ = start()
    path = only_file(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in (0, 1, DIGEST_BYTES, 40, len(whole) // 2, len(whole) - 1)]
    for place in rng.integers(len(whole), size=40).tolist():
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1 :])
    for data in [*damaged, whole + b"\0", b"PK\3\4" + whole, b"\0" * 1000]:
        path.write_bytes(data)
        index, is_read = start()
        assert is_read
        assert_same(index, first)
    assert path.read_bytes() == whole  # it was replaced
    path.unlink()
    path.mkdir()
    assert_same(KeptSets(tmp_path / "kept").open({"other": 1}, lambda sources: first), first)


def test_what_has_just_changed_is_not_kept(root, start, tmp_path):
    """Another change within a step of the file system's clock would leave the time as it was."""
    os.utime(root / "train" / "a.png")
    assert start()[1] and not (tmp_path / "kept").exists() and start()[1]


def test_every_file_that_is_read_and_every_folder_that_is_listed_is_a_source(root):
    use_the_root_category(root)
    seen: set[str] = set()
    is_on = [True]

    def hear(event, arguments):
        if is_on[0] and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | os.PathLike):
            seen.add(os.fspath(arguments[0]))

    sys.addaudithook(hear)  # it stays for the rest of the process
    sources = Sources()
    try:
        read_coco(root, "train", None, sources)
    finally:
        is_on[0] = False
    inside = {path for path in seen if path.startswith(str(root))}
    assert len(inside) >= 9 and inside <= set(sources.states), inside - set(sources.states)
