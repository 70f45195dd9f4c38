"""datasets.scan: the numbers in the table, what counts as bad, and what is written."""

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import DatasetIndex, Fault, Sample, open_dataset
from datasets.scan import ScanReport, check, main, scan
from errors import UserError


def sample(path, boxes, labels, ignore=None, size=(640, 480)) -> Sample:
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    ignore = np.zeros(len(boxes), bool) if ignore is None else np.array(ignore)
    return Sample(Path(path), str(path), *size, boxes, np.array(labels, dtype=np.int64), ignore, area)


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [line.split() for line in table.splitlines() if line and not line.startswith("count")]
    return {line[0]: line[1:] for line in lines}


def test_counts():
    squares = [[0, 0, 31, 32], [0, 0, 32, 32], [0, 0, 96, 95.9], [0, 0, 96, 96]]  # small, medium, medium, large
    samples = (
        sample("a", squares, [0, 0, 1, 1]),
        sample("b", [[0, 0, 5, 5], [0, 0, 5, 5]], [0, -1], [True, True]),
        sample("c", [], [], size=(20, 30)),
    )
    rows = rows_of(ScanReport(DatasetIndex(("cat", "a" * 40), samples), "title", decoded=False).table())
    assert rows["cat"] == ["2", "2", "1", "1", "1", "0"]
    assert rows["a" * 23 + "…"] == ["1", "2", "0", "0", "1", "1"]
    assert rows["(of"][-6:] == ["1", "0", "1", "0", "0", "0"]
    assert rows["all"] == ["2", "4", "2", "1", "2", "1"]
    assert rows["3"][:2] == ["pictures", "of"] and "1 without objects" in scan(DatasetIndex((), samples)).table()


def test_empty_index():
    report = scan(DatasetIndex((), ()), decode=True)
    assert report.bad_fraction == 0 and "0 pictures" in report.table()
    check(report)


def fault(effect) -> Fault:
    return Fault("x.txt", 3, "why", "kind", effect, "x")


def test_bad_fraction_and_check():
    samples = tuple(sample(f"{i}", [[0, 0, 9, 9]] * 2, [0, 0]) for i in range(99))

    def report(*effects):
        return scan(DatasetIndex(("cat",), samples, tuple(map(fault, effects))))

    assert report("noted", "duplicate dropped").bad_fraction == 0
    assert report("object dropped", "object dropped").bad_fraction == 2 / 200
    assert report("picture dropped", "object dropped").bad_fraction == 1 / 100
    assert report("left out").bad_fraction == 0
    check(report("picture dropped", "picture dropped"), 0.01)  # 1.98 %, but two alone stop nothing
    check(report("picture dropped", "picture dropped", "object dropped", "object dropped"), 0.001)
    with pytest.raises(UserError, match="1 picture and 0 objects are bad"):
        check(report("picture dropped"), 0)  # unless none at all was asked for
    with pytest.raises(UserError, match=r"no picture of 1 can be used; first: x.txt:3: why"):
        check(scan(DatasetIndex(("cat",), (), (fault("picture dropped"),))))
    three = ("noted", *["picture dropped"] * 3)
    with pytest.raises(UserError, match=r"3 pictures and 0 objects are bad \(2.94 %\).*first: x.txt:3: why") as caught:
        check(report(*three))
    assert str(caught.value).endswith(" data.max_bad_fraction=0.05")
    check(report(*three), 0.05)
    with pytest.raises(UserError, match=r"--max-bad-fraction 0.1, in a config data.max_bad_fraction=0.1$"):
        check(report(*["picture dropped"] * 9), flag="--max-bad-fraction")


@pytest.fixture
def yolo_root(tmp_path):
    """Ten pictures, of which one is truncated and one was swapped for another after the index was read."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.jpg")
        (tmp_path / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images\n")
    path = tmp_path / "images" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-800])
    return tmp_path


@pytest.mark.parametrize("fraction", [float("nan"), -0.01, 1.5])
def test_a_fraction_out_of_range_is_refused(yolo_root, fraction):
    """Nothing is more than nan: every set would pass."""
    with pytest.raises(UserError, match=f"^--max-bad-fraction: found {fraction}, expected a number in 0..1$"):
        check(scan(open_dataset("yolo", yolo_root, "train")), fraction, flag="--max-bad-fraction")


def test_decoding_finds_truncated_pictures(yolo_root, tmp_path):
    index = open_dataset("yolo", yolo_root, "train")
    assert len(index) == 10 and scan(index).bad_fraction == 0
    Image.new("RGB", (30, 30)).save(yolo_root / "images" / "7.jpg")
    report = scan(index, decode=True, workers=3)
    assert [Path(f.path).name for f in report.index.faults] == ["3.jpg", "7.jpg"]
    assert "truncated" in report.index.faults[0].reason and "30 x 30" in report.index.faults[1].reason
    assert [s.image_id for s in report.index.samples] == [str(n) for n in range(10) if n not in (3, 7)]
    assert report.bad_fraction == 0.2
    one_thread = scan(index, decode=True, workers=1)
    assert list(map(str, one_thread.index.faults)) == list(map(str, report.index.faults))
    report.write(tmp_path / "runs" / "a")
    assert (tmp_path / "runs" / "a" / "dataset_report.txt").read_text() == report.table() + "\n"
    with open(tmp_path / "runs" / "a" / "dataset_report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["effect"], row["kind"], row["picture"]) for row in rows] == [
        ("picture dropped", "unreadable picture", "3.jpg"),
        ("picture dropped", "unreadable picture", "7.jpg"),
    ]


def test_a_folder_that_cannot_be_written(yolo_root):
    (yolo_root / "file").touch()
    with pytest.raises(UserError) as caught:
        scan(open_dataset("yolo", yolo_root, "train")).write(yolo_root / "file")
    assert caught.value.exit_code == 5


def test_bccd_table(shared_data):
    report = scan(open_dataset("voc", shared_data / "bccd", "trainval"))
    rows = rows_of(report.table())
    assert rows["Platelets"][1:3] == ["292", "0"] and rows["RBC"][1] == "3348" and rows["WBC"][1] == "301"
    assert rows["all"][:2] == ["292", "3941"] and "BloodImage_00338.xml:158" in report.table()
    check(report)  # two zero-size boxes among 3943 do not stop a run


def test_labels_without_a_picture_are_named_and_stop_nothing(shared_data, capsys):
    assert main(["yolo", str(shared_data / "coco128"), "train"]) == 0
    out = capsys.readouterr().out
    assert "2 without objects (2 of them without a label file)" in out and "bad: 0 pictures" in out
    assert [line.split()[:6] for line in out.splitlines() if "label without" in line] == [
        ["2", "left", "out", "label", "without", "picture"]
    ]


def test_bad_pictures_stop_and_may_be_told_otherwise(yolo_root, tmp_path):
    for number in (4, 5):
        (yolo_root / "images" / f"{number}.jpg").write_bytes(b"")
    command = ["yolo", str(yolo_root), "train", "--decode", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"3 pictures and 0 objects are bad \(30.00 %\)"):
        main(command)
    assert (tmp_path / "out" / "dataset_report.csv").exists()  # the report is there all the same
    assert main([*command, "--max-bad-fraction", "0.5"]) == 0


@pytest.mark.filterwarnings("ignore:'datasets.scan' found in sys.modules")
def test_command_line(yolo_root, capsys, monkeypatch):
    """python -m datasets.scan: one line on stderr and exit code 2."""
    arguments = ["yolo", str(yolo_root), "train", "--decode", "--max-bad-fraction", "0"]
    monkeypatch.setattr(sys, "argv", ["datasets.scan", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("datasets.scan", run_name="__main__")
    printed, said = capsys.readouterr()
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: yolo ")
    assert "truncated picture" in said and printed.startswith("yolo ")
