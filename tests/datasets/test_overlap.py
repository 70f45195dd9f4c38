"""datasets.overlap: which pictures two splits share, by file and by bytes."""

import os
from types import SimpleNamespace

import pytest

from datasets.overlap import HEAD, find_overlap
from datasets.scan import main


def index(*paths):
    return SimpleNamespace(samples=[SimpleNamespace(image_path=path) for path in paths])


@pytest.fixture
def write(tmp_path):
    def make(name: str, data: bytes):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return make


def test_one_file_under_several_names(write, tmp_path):
    a, b = write("a.png", b"a"), write("b.png", b"b")
    os.symlink(a, tmp_path / "soft.png")
    os.link(a, tmp_path / "hard.png")
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path, tmp_path / "folder" / "linked")
    for name in ("a.png", "soft.png", "hard.png", "folder/linked/a.png"):
        overlap = find_overlap(index(tmp_path / name, b), index(a), ("test", "train"))
        assert overlap.shared == ((tmp_path / name, (a,), True),) and not overlap.is_whole
    assert str(overlap).startswith("1 of 2 pictures of test are also in train (1 the same file), such as ")


def test_equal_bytes_and_no_others(write):
    long = bytes(range(256)) * (HEAD // 128)
    train = [write("a", b"one"), write("b", long), write("c", b""), write("d", long[:-1] + b"x"), write("e", long)]
    test = [
        write("x", b"two"),
        write("y", long),
        write("z", b""),
        write("w", long[:-1] + b"y"),
        write("v", b"x" + long),
    ]
    overlap = find_overlap(index(*test), index(*train), ("test", "train"))
    assert overlap.shared == ((test[1], (train[1], train[4]), False), (test[2], (train[2],), False))
    assert str(overlap) == (
        f"2 of 5 pictures of test are also in train (2 the same bytes), such as {test[1]} and {train[1]}"
    )
    assert overlap.within(index(train[4])).shared == overlap.shared[:1]
    assert overlap.within(index(train[0])).shared == ()
    assert str(overlap.within(index())) == "test and train share no picture"


def test_a_split_without_a_picture_of_its_own(write):
    a, b, c = (write(name, name.encode()) for name in "abc")
    assert find_overlap(index(a, b), index(c, b, a), ("test", "train")).is_whole
    assert not find_overlap(index(a, b, c), index(a, b), ("test", "train")).is_whole
    assert not find_overlap(index(), index(a), ("test", "train")).is_whole


def test_a_file_that_cannot_be_read_is_shared_by_none(write, tmp_path):
    absent = tmp_path / "absent"
    assert not find_overlap(index(absent), index(absent), ("test", "train")).shared


def test_each_file_is_read_once(write, monkeypatch):
    """Files of one size: two readings of the head of each, and none of the rest, which no two heads ask for."""
    import builtins

    paths = [write(str(number), f"{number:04}".encode() * HEAD) for number in range(40)]
    opened = []
    monkeypatch.setattr("datasets.overlap.open", lambda *args: opened.append(1) or builtins.open(*args), raising=False)
    assert not find_overlap(index(*paths[:20]), index(*paths[20:]), ("test", "train")).shared
    assert len(opened) == 40


def test_the_scan_of_several_splits_names_what_they_share(shared_data, tmp_path, capsys):
    assert main(["voc", str(shared_data / "bccd"), "trainval,val", "--out", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.split("\nvoc ")
    assert "also in" not in first
    assert "87 of 87 pictures of val are also in trainval (87 the same file), such as " in second
    assert "also in trainval" in (tmp_path / "val" / "dataset_report.txt").read_text()
