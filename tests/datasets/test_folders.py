"""One walk for every reader: links followed, circles left, what systems leave beside the data left out."""

import json
import unicodedata

import pytest
from PIL import Image

from datasets.folders import list_files
from datasets.open import open_dataset
from datasets.split import default_split
from engine.prediction.sources import find_pictures, find_sources
from errors import UserError


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names_of(root, paths):
    return [path.relative_to(root).as_posix() for path in paths]


def test_order_is_by_parts_and_suffixes_have_no_case(tmp_path):
    make(tmp_path, "b.JPG", "a/z.jpg", "a.jpg", "a/b/c.jpg", "a-b/x.jpg", "note.txt", "a/x.jpg.bak")
    assert names_of(tmp_path, list_files(tmp_path, (".jpg",))) == [
        "a/b/c.jpg", "a/z.jpg", "a-b/x.jpg", "a.jpg", "b.JPG"
    ]  # fmt: skip


def test_what_systems_leave_behind_is_left_out(tmp_path):
    make(tmp_path, "x.jpg", "._x.jpg", ".DS_Store", "__MACOSX/x.jpg", ".ipynb_checkpoints/x.jpg", "@eaDir/x.jpg/t.jpg")
    assert names_of(tmp_path, list_files(tmp_path, (".jpg",))) == ["x.jpg"]
    hidden = tmp_path / ".ipynb_checkpoints"  # the folder that is asked for may have any name
    assert names_of(hidden, list_files(hidden, (".jpg",))) == ["x.jpg"]


def test_hidden_files_beside_lists_are_no_lists(tmp_path):
    """What macOS leaves beside a data.yaml, a list of frames and a COCO file."""
    yolo, kitti, coco = tmp_path / "yolo", tmp_path / "kitti", tmp_path / "coco"
    for path in (yolo / "images" / "p.png", kitti / "image_2" / "p.png"):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(path)
    make(yolo, "._my.yaml", ".hidden.yml", "labels/p.txt", "my.yaml")
    (yolo / "labels" / "p.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (yolo / "my.yaml").write_text("train: images\nnames: [a]\n")
    assert len(open_dataset("yolo", yolo, "train")) == 1
    make(kitti, "ImageSets/._train.txt", "label_2/p.txt")
    (kitti / "label_2" / "p.txt").write_text("Car 0 0 0 1 2 9 8 0 0 0 0 0 0 0\n")
    assert len(open_dataset("kitti", kitti, "train")) == 1  # there are no lists, so the reader makes up train and val
    make(coco, "annotations/._instances_all.json", "annotations/instances_all.json", "annotations/notes.txt")
    assert default_split("coco", coco) == "all"


def test_a_link_to_itself_is_a_broken_link(tmp_path):
    make(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    assert names_of(tmp_path, list_files(tmp_path, (".jpg",))) == ["a.jpg", "b.jpg"]  # for its reader to report
    (tmp_path / "b").symlink_to("b")
    with pytest.raises(UserError, match="b: a link to b, where nothing is"):
        list_files(tmp_path, (".jpg",))


def test_links_to_folders_are_followed_once(tmp_path):
    make(tmp_path, "set/a.jpg", "set/real/b.jpg", "elsewhere/deep/c.jpg")
    (tmp_path / "set" / "one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "two").symlink_to("../elsewhere")
    (tmp_path / "set" / "again").symlink_to("real")  # lies in the folder itself: its own path counts
    found = list_files(tmp_path / "set", (".jpg",))
    assert names_of(tmp_path / "set", found) == ["a.jpg", "one/deep/c.jpg", "real/b.jpg"]


@pytest.mark.parametrize("target", [".", "..", "../..", "inner", "../other"])
def test_circles_end(tmp_path, target):
    make(tmp_path, "top/set/a.jpg", "top/set/inner/b.jpg", "top/other/o.jpg", "top/unrelated.jpg")
    (tmp_path / "top" / "set" / "link").symlink_to(target)
    (tmp_path / "top" / "other" / "back").symlink_to("../set")
    expected = ["a.jpg", "inner/b.jpg", *(["link/o.jpg"] if "other" in target else [])]
    assert names_of(tmp_path / "top" / "set", list_files(tmp_path / "top" / "set", (".jpg",))) == expected


def test_a_link_to_nothing_is_met_by_the_caller_or_refused(tmp_path):
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    assert names_of(tmp_path, list_files(tmp_path, (".jpg",))) == ["gone.jpg"]
    (tmp_path / "more").symlink_to("/no/such/folder")
    with pytest.raises(UserError, match=r"more: a link to /no/such/folder, where nothing is"):
        list_files(tmp_path, (".jpg",))


def test_every_reader_follows_links(tmp_path):
    yolo, voc, kitti = tmp_path / "yolo", tmp_path / "voc", tmp_path / "kitti"
    away = tmp_path / "away"
    for name in ("pictures/p.png", "pictures/._p.png"):
        (away / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(away / name)
    make(away, "txt/p.txt", "xml/p.xml", "kitti/p.txt", "xml/._p.xml", "kitti/._p.txt")
    (away / "txt" / "p.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (away / "kitti" / "p.txt").write_text("Car 0 0 0 1 2 9 8 0 0 0 0 0 0 0\n")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    (away / "xml" / "p.xml").write_text(f"<annotation><object><name>a</name>{box}</object></annotation>")
    links = [
        (yolo / "images/train/more", "pictures"), (yolo / "labels/train/more", "txt"),
        (voc / "JPEGImages/more", "pictures"), (voc / "Annotations/more", "xml"),
        (kitti / "image_2/more", "pictures"), (kitti / "label_2/more", "kitti"),
    ]  # fmt: skip
    for link, target in links:
        link.parent.mkdir(parents=True)
        link.symlink_to(away / target)
    (yolo / "data.yaml").write_text("train: images/train\nnames: [a]\n")
    for format, root, split in (("yolo", yolo, "train"), ("voc", voc, "all"), ("kitti", kitti, "all")):
        index = open_dataset(format, root, split)
        assert [len(sample) for sample in index.samples] == [1] and not index.faults, format


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path, form):
    """macOS writes é in two characters, and other systems keep that when they unpack its archives."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    stem, label = (unicodedata.normalize(f, "café") for f in (form, other))
    for place in ("y/images", "v/JPEGImages", "c/train", "k/image_2"):
        path = tmp_path / place / f"{stem}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(path)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    row = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    tree = {"images": [{"id": 1, "file_name": f"{label}.png"}], "categories": [{"id": 1, "name": "a"}]}
    for place, content in (
        ("y/data.yaml", "train: images\nlisted: list.txt\nnames: [a]\n"),
        ("y/list.txt", f"images/{label}.png\n"),
        (f"y/labels/{label}.txt", "0 0.5 0.5 0.5 0.5\n"),
        (f"v/Annotations/{label}.xml", f"<annotation><object><name>a</name>{box}</object></annotation>"),
        ("v/ImageSets/Main/train.txt", f"{stem}\n"),
        (f"k/label_2/{label}.txt", "Car 0 0 0 1 2 9 8 0 0 0 0 0 0 0\n"),
        ("k/ImageSets/train.txt", f"{stem}\n"),
        ("c/train.json", json.dumps(tree | {"annotations": [row]})),
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(content, encoding="utf-8")
    splits = {"yolo": ("train", "listed"), "voc": ("train", "all"), "coco": ("train",), "kitti": ("train", "all")}
    for format, names in splits.items():
        for split in names:
            index = open_dataset(format, tmp_path / format[0], split)
            assert [len(sample) for sample in index.samples] == [1] and not index.faults, (format, split)


def test_sources_of_predictions_follow_the_same_rule(tmp_path):
    make(tmp_path, "in/a.png", "in/._a.png", "in/__MACOSX/a.png", "away/b.png", "away/c.mp4")
    (tmp_path / "in" / "more").symlink_to("../away")
    (tmp_path / "in" / "more2").symlink_to(".")
    folder = str(tmp_path / "in")
    assert [str(source.name) for source in find_sources([folder])] == ["a", "more/b", "more/c"]
    assert [str(source.name) for source in find_pictures([folder])] == ["a", "more/b"]
    assert [str(source.name) for source in find_pictures([f"{folder}/**/a.png"])] == ["a"]
    make(tmp_path, "in/inner/d.png", "in/inner/._d.png")
    for pattern in ("*", "**"):  # folders that match are walked, as where a shell replaces the pattern
        found = find_pictures([f"{folder}/{pattern}"])
        assert [source.path.name for source in found] == ["a.png", "d.png", "b.png"], pattern
    assert [str(source.name) for source in find_pictures([f"{folder}/[im]*"])] == ["inner/d", "more/b", "more2/a"]


def test_pictures_of_formats_that_are_not_read_are_sources_too(tmp_path):
    """So that predict.py refuses each by name; a folder or a pattern of no others is refused at once."""
    make(tmp_path, "in/a.png", "in/b.HEIC", "heic/c.heic", "heic/d.gif")
    assert [source.path.name for source in find_sources([str(tmp_path / "in")])] == ["a.png", "b.HEIC"]
    for source in ("heic", "heic/*", "heic/**/*.gif"):
        with pytest.raises(
            UserError, match=r"holds no picture .*; [12] in formats that are not read, the first .*heic"
        ):
            find_pictures([str(tmp_path / source)])
    assert len(find_pictures([str(tmp_path / "heic" / "c.heic")])) == 1  # by its own name: reading says what it is


def test_links_that_became_texts(tmp_path):
    """As git leaves them on Windows: predict.py follows them, a reader of labels refuses them by name."""
    make(tmp_path, "in/a.png", "away/b.png")
    (tmp_path / "in" / "more").write_text("../away")
    (tmp_path / "in" / "README").write_text("see ../away")
    assert [source.path.name for source in find_sources([str(tmp_path / "in")])] == ["b.png", "a.png"]
    with pytest.raises(UserError, match=r"in/more: a text file with the path of a folder, expected a link to .*/away"):
        list_files(tmp_path / "in", (".png",))
