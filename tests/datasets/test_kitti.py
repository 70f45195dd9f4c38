"""datasets.kitti against the real frames and against lines with one fault each."""

import numpy as np
import pytest
from PIL import Image

from datasets import ANY_CLASS, open_dataset
from datasets.kitti import CLASSES, read_kitti
from errors import UserError


def line(name="Car", box=(10, 20, 30, 40), columns=15) -> str:
    tail = [1.5, 1.6, 3.9, 1, 2, 30, 0.1, 0.99][: columns - 8]
    return " ".join(map(str, [name, 0.0, 0, -1.5, *box, *tail]))


@pytest.fixture
def make(tmp_path):
    def build(content, split="all", **options):
        (tmp_path / "training" / "image_2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "training" / "label_2").mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "training" / "label_2" / "000000.txt").write_bytes(data)
        Image.new("RGB", (200, 100)).save(tmp_path / "training" / "image_2" / "000000.png")
        return read_kitti(tmp_path, split, **options)

    return build


def kinds(index) -> list[tuple[str, str]]:
    return [(fault.effect, fault.kind) for fault in index.faults]


def test_real_frames(shared_data):
    root = shared_data / "kitti_mini"
    index = open_dataset("kitti", root, "frames")
    assert index.names == CLASSES and not index.faults
    assert [sample.image_id for sample in index.samples] == ["000000", "000001", "000002", "000004", "000007", "000008"]
    assert [(s.width, s.height) for s in index.samples] == [(1224, 370)] + [(1242, 375)] * 5
    labels = np.concatenate([sample.labels for sample in index.samples])
    counts = {name: int((labels == k).sum()) for k, name in enumerate(CLASSES)}
    assert counts == dict.fromkeys(CLASSES, 0) | {"Car": 13, "Cyclist": 2, "Pedestrian": 1, "Truck": 1, "Misc": 1}
    ignore = np.concatenate([sample.ignore for sample in index.samples])
    assert ((labels == ANY_CLASS) == ignore).all() and ignore.sum() == 15
    assert [int(sample.crowd.sum()) == 0 for sample in index.samples][0::2][:2] == [True, True]  # 000000 and 000002
    np.testing.assert_array_equal(index.samples[1].boxes_xyxy[0], [599.41, 156.40, 629.75, 189.25])  # as it is


def test_all_takes_every_frame(shared_data):
    assert len(open_dataset("kitti", shared_data / "kitti_mini", "all")) == 6


def test_other_class_lists(make, tmp_path):
    content = "\n".join((line(), line("Van"), line("DontCare")))
    index = make(content, names=("Van",))
    assert index.samples[0].labels.tolist() == [0, ANY_CLASS] and kinds(index) == [("noted", "unknown class")]
    (tmp_path / "classes.txt").write_text("Van\nCar\n")
    assert make(content).samples[0].labels.tolist() == [1, 0, ANY_CLASS]


def test_crlf_bom_and_score_column(make):
    index = make(b"\xef\xbb\xbf" + f"{line()}\r\n\r\n{line('Van', columns=16)}\r\n".encode())
    assert not index.faults and index.samples[0].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "bad, kind",
    [
        (line(columns=14), "malformed row"),
        (line() + " 1 2", "malformed row"),
        (line(box=("a", 1, 2, 3)), "malformed row"),
        (line("Spaceship"), "unknown class"),
        (line(box=(30, 20, 10, 40)), "box turned inside out"),
        (line(box=(30, 20, 30, 40)), "zero-size box"),
        (line(box=("nan", 20, 30, 40)), "malformed row"),
        (line("DontCare", box=(300, 20, 330, 40)), "box outside the picture"),
    ],
)
def test_a_bad_line_is_dropped_and_listed(make, bad, kind):
    index = make("\n".join((line(), bad, line("Van"))))
    assert kinds(index) == [("object dropped", kind)] and index.faults[0].line == 2
    assert index.samples[0].labels.tolist() == [0, 1]


def test_missing_partners_and_lists(make, tmp_path):
    make(line())
    (tmp_path / "training/label_2/000001.txt").write_text(line())
    Image.new("RGB", (20, 10)).save(tmp_path / "training/image_2/000002.png")
    index = read_kitti(tmp_path, "all")
    expected = {("left out", "label without picture"), ("picture dropped", "picture without label file")}
    assert set(kinds(index)) == expected and len(index) == 1
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("000000\r\n000000\r\n")
    index = read_kitti(tmp_path, "train")
    assert len(index) == 1 and kinds(index) == [("noted", "listed twice")]
    with pytest.raises(UserError, match="found train"):
        read_kitti(tmp_path, "val")
    (tmp_path / "ImageSets" / "train.txt").write_text("../000000\n")
    with pytest.raises(UserError, match="name of a frame"):
        read_kitti(tmp_path, "train")


def test_a_second_picture_of_one_frame_is_named(make, tmp_path):
    make(line())
    Image.new("RGB", (20, 10)).save(tmp_path / "training/image_2/000000.bmp")
    index = read_kitti(tmp_path, "all")
    assert len(index) == 1 and kinds(index) == [("left out", "one label file for two pictures")]


def test_train_and_val_where_there_are_no_lists(make, tmp_path):
    make(line())
    for number in range(1, 12):
        (tmp_path / f"training/label_2/{number:06}.txt").write_text(line())
        Image.new("RGB", (200, 100)).save(tmp_path / f"training/image_2/{number:06}.png")
    stems = {split: [sample.image_id for sample in read_kitti(tmp_path, split).samples] for split in ("train", "val")}
    assert stems["val"] == ["000004", "000009"] and len(stems["train"]) == 10
    assert not set(stems["train"]) & set(stems["val"])
    with pytest.raises(UserError, match="found none"):
        read_kitti(tmp_path, "test")
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "mine.txt").write_text("000001\n")
    with pytest.raises(UserError, match="found mine"):  # half of somebody's lists is not completed by ours
        read_kitti(tmp_path, "val")


def test_not_a_kitti_folder(tmp_path):
    with pytest.raises(UserError, match="image_2 and label_2"):
        read_kitti(tmp_path, "all")
