"""B1 to B4: rows and files of labels with one fault each, in the four formats.

A row stands between two good ones, a file beside a good one. Read as training does, exactly the bad row or picture is
dropped, and everything else equals the set without it; read with --max-bad-fraction 0, the first drop is an error that
names its file and line.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets import DatasetIndex, open_dataset, scan
from tests.faults.label_tables import (
    COCO_FILES,
    COCO_GOOD,
    COCO_ROWS,
    DROPPED,
    KITTI_GOOD,
    KITTI_ROWS,
    LEFT,
    SIZE,
    UNREADABLE,
    VOC_FILES,
    VOC_GOOD,
    VOC_ROWS,
    YOLO_FILES,
    YOLO_GOOD,
    YOLO_ROWS,
    coco_tree,
    voc_xml,
)
from tests.faults.matrix import Case, Outcome, refusal


class LabelSet:
    """A set of two pictures in one format: the labels of the first are given, those of the second are good."""

    format = split = ""
    kind = ""  # of the matrix
    good: tuple[Any, Any]

    def __init__(self, root: Path) -> None:
        self.root = root
        for path in self.pictures():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE).save(path)

    def pictures(self) -> list[Path]:
        raise NotImplementedError

    def label_path(self) -> Path:
        raise NotImplementedError

    def text_of(self, rows: list) -> bytes:
        raise NotImplementedError

    def place_of(self, row: int) -> str:
        """How a message names a row: the file, and the line or what stands for it."""
        return f"{self.label_path()}:{row + 1}"

    def write(self, data: bytes) -> None:
        path = self.label_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def open(self) -> DatasetIndex:
        return open_dataset(self.format, self.root, self.split)


class YoloSet(LabelSet):
    format, split, kind = "yolo", "train", "B1"
    good = YOLO_GOOD

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (root / "labels/train").mkdir(parents=True, exist_ok=True)
        (root / "labels/train/good.txt").write_text(self.good[0])
        (root / "data.yaml").write_text("names: [cell, 'no', 1e3]\ntrain: images/train\n")

    def pictures(self) -> list[Path]:
        return [self.root / f"images/train/{name}.png" for name in ("good", "x")]

    def label_path(self) -> Path:
        return self.root / "labels/train/x.txt"

    def text_of(self, rows: list) -> bytes:
        return "\n".join(rows).encode()


class KittiSet(YoloSet):
    format, split, kind = "kitti", "all", "B4"
    good = KITTI_GOOD

    def __init__(self, root: Path) -> None:
        LabelSet.__init__(self, root)
        (root / "label_2").mkdir(exist_ok=True)
        (root / "label_2/good.txt").write_text(self.good[0])

    def pictures(self) -> list[Path]:
        return [self.root / f"image_2/{name}.png" for name in ("good", "x")]

    def label_path(self) -> Path:
        return self.root / "label_2/x.txt"


class VocSet(LabelSet):
    format, split, kind = "voc", "train", "B2"
    good = VOC_GOOD

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations/good.xml").write_bytes(self.text_of([self.good[0]]))
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets/Main/train.txt").write_text("good\nx\n")
        (root / "classes.txt").write_text("cell\nno\n")

    def pictures(self) -> list[Path]:
        return [self.root / f"JPEGImages/{name}.png" for name in ("good", "x")]

    def label_path(self) -> Path:
        return self.root / "Annotations/x.xml"

    def text_of(self, rows: list) -> bytes:
        return voc_xml("\n".join(rows)).encode()

    def place_of(self, row: int) -> str:
        return f"{self.label_path()}:{row + 2}"


class CocoSet(LabelSet):
    format, split, kind = "coco", "train", "B3"
    good = COCO_GOOD

    def pictures(self) -> list[Path]:
        return [self.root / f"images/{name}.png" for name in ("good", "x")]

    def label_path(self) -> Path:
        return self.root / "train.json"

    def text_of(self, rows: list) -> bytes:
        own = {"id": 9, "image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 20]}
        return json.dumps(coco_tree([own, *rows])).encode()

    def place_of(self, row: int) -> str:
        return str(self.label_path())


def same_samples(a: DatasetIndex, b: DatasetIndex) -> bool:
    fields = ("boxes_xyxy", "labels", "ignore", "crowd", "area")
    return (a.names, len(a)) == (b.names, len(b)) and all(
        (x.image_id, x.width, x.height) == (y.image_id, y.width, y.height)
        and all(np.array_equal(getattr(x, field), getattr(y, field)) for field in fields)
        for x, y in zip(a.samples, b.samples)
    )


def run_row(labels: LabelSet, row: Any, effect: str, kind: str, strict: bool) -> Outcome:
    """effect and kind: those of the one fault in its place; "" for a row that is right, if unusual."""
    first, last = labels.good
    labels.write(labels.text_of([first, last]))
    expected = labels.open()
    labels.write(labels.text_of([first, row, last]))
    if strict:
        command = [labels.format, str(labels.root), labels.split, "--max-bad-fraction", "0"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if effect == DROPPED:
                return refusal(lambda: scan.main(command), labels.place_of(1))
            assert scan.main(command) == 0
        assert kind in said.getvalue()
        return "counted" if kind else "correct"
    index = labels.open()
    assert [(fault.effect, fault.kind) for fault in index.faults] == ([(effect, kind)] if kind else []), index.faults
    if not kind or effect == "noted":
        assert sum(map(len, index.samples)) == sum(map(len, expected.samples)) + (kind != "unknown class")
        return "counted" if kind else "correct"
    assert same_samples(index, expected), "the other rows changed"
    (fault,) = index.faults
    where = fault.path if fault.line is None else f"{fault.path}:{fault.line}"
    assert where == labels.place_of(1), f"{where}, expected {labels.place_of(1)}"
    return "counted"


def row_cases(labels: LabelSet, rows: dict[str, tuple[Any, str, str]]) -> Iterator[Case]:
    for name, given in rows.items():
        for strict in (False, True):
            case = f"{labels.format}-{name}-{'strict' if strict else 'lenient'}"
            yield Case(labels.kind, case, lambda g=given, s=strict: run_row(labels, *g, s))


def run_file(labels: LabelSet, data: bytes, outcome: Outcome, words: str) -> Outcome:
    """words: of the refusal, or the kind of the one fault, for which the picture or nothing is dropped."""
    labels.write(data)
    before = sorted(path for path in labels.root.rglob("*"))
    if outcome == "refused":
        return refusal(labels.open, labels.label_path(), words)
    index = labels.open()
    assert [fault.kind for fault in index.faults] == ([words] if words else []), index.faults
    assert len(index) == 2 - (words == UNREADABLE)
    assert all(len(sample) == 1 for sample in index.samples if sample.image_path.stem == "good")
    assert sorted(path for path in labels.root.rglob("*")) == before, "a file was made"
    return outcome


def file_cases(labels: LabelSet, files: dict[str, tuple[bytes, Outcome, str]]) -> Iterator[Case]:
    for name, given in files.items():
        yield Case(labels.kind, f"{labels.format}-{name}", lambda g=given: run_file(labels, *g), 5)


def yolo(folder: Path) -> Iterator[Case]:
    labels = YoloSet(folder)
    yield from row_cases(labels, YOLO_ROWS)
    yield from file_cases(labels, YOLO_FILES)
    yield from odd_partners(labels)


def voc(folder: Path) -> Iterator[Case]:
    labels = VocSet(folder)
    yield from row_cases(labels, VOC_ROWS)
    yield from file_cases(labels, VOC_FILES)
    yield from odd_partners(labels)


def coco(folder: Path) -> Iterator[Case]:
    labels = CocoSet(folder)
    yield from row_cases(labels, COCO_ROWS)
    yield from file_cases(labels, COCO_FILES)


def kitti(folder: Path) -> Iterator[Case]:
    labels = KittiSet(folder)
    yield from row_cases(labels, KITTI_ROWS)
    yield from odd_partners(labels)


def odd_partners(labels: LabelSet) -> Iterator[Case]:
    """A label file that is a folder, a link to nothing or to itself; a picture that is gone or is none."""
    gone, spare = labels.label_path(), labels.root / "spare"

    def run(change: Any, kinds: set[str]) -> Outcome:
        gone.unlink(missing_ok=True)
        labels.write(labels.text_of(list(labels.good)))
        change()
        try:
            index = labels.open()
        finally:
            gone.rmdir() if gone.is_dir() and not gone.is_symlink() else gone.unlink(missing_ok=True)
            if spare.exists():
                labels.pictures()[1].unlink(missing_ok=True)
                spare.rename(labels.pictures()[1])
        found = {fault.kind for fault in index.faults}
        assert found and found <= kinds, index.faults
        assert [len(sample) for sample in index.samples if sample.image_path.stem == "good"] == [1]
        return "counted"

    without = {"no label file", "picture without label file", UNREADABLE}
    picture = labels.pictures()[1]
    changes = {
        "label is a folder": (lambda: (gone.unlink(), gone.mkdir()), without),
        "label links to nothing": (lambda: (gone.unlink(), gone.symlink_to("nowhere")), without),
        "label links to itself": (lambda: (gone.unlink(), gone.symlink_to(gone.name)), without),
        "no label": (gone.unlink, without),
        "no picture": (lambda: picture.rename(spare), {LEFT}),
        "picture is empty": (lambda: (picture.rename(spare), picture.write_bytes(b"")), {"unreadable picture"}),
        "picture is text": (lambda: (picture.rename(spare), picture.write_text("no")), {"unreadable picture"}),
        "picture is a pipe": (lambda: (picture.rename(spare), os.mkfifo(picture)), {LEFT, "unreadable picture"}),
    }
    for name, (change, kinds) in changes.items():
        yield Case(labels.kind, f"{labels.format}-{name}", lambda c=change, k=kinds: run(c, k))
