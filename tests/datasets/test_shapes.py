"""The generated set: boxes tight to what is drawn, pure pictures, an atomic and idempotent folder."""

import json

import numpy as np
import pytest
from PIL import Image

from datasets import open_dataset, shapes
from errors import UserError


def test_pictures_are_a_pure_function_of_seed_split_and_index():
    seen = set()
    for key in [(0, "train", 0), (0, "train", 1), (0, "test", 0), (1, "train", 0)]:
        first, second = shapes.draw_picture(*key, 64), shapes.draw_picture(*key, 64)
        assert all(np.array_equal(a, b) for a, b in zip(first, second))
        seen.add(first[0].tobytes())
    assert len(seen) == 4


@pytest.mark.parametrize(
    "split, index, labels, box_sum, mean_colour",
    [
        ("train", 0, [3, 7, 6, 0, 3], [156.94, 258.16, 240.96, 352.38], [112.18, 118.52, 171.94]),
        ("test", 5, [3, 1, 4], [83.67, 41.21, 126.38, 77.05], [186.89, 226.19, 203.02]),
    ],
)
def test_a_change_of_the_drawing_needs_a_new_version(split, index, labels, box_sum, mean_colour):
    """When this fails on purpose, raise VERSION and record anew: folders of the old set are then told apart."""
    assert shapes.VERSION == 1
    picture, boxes, mine = shapes.draw_picture(0, split, index, 96)
    assert mine.tolist() == labels
    np.testing.assert_allclose(boxes.sum(0), box_sum, atol=0.02)
    np.testing.assert_allclose(picture.mean((0, 1)), mean_colour, atol=0.5)


@pytest.mark.parametrize("name", shapes.NAMES)
def test_boxes_are_tight_to_the_mask(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rings = shapes.place(shapes.outline(name), rng, 160)
        points = np.concatenate(rings)
        low, high = points.min(0), points.max(0)
        shifted = [ring - low + 5 for ring in rings]  # whole, in the picture
        mask, area = shapes.rasterize(shifted, int((high - low).max()) + 12)
        rows, columns = np.flatnonzero(mask.max(1) > 0.1), np.flatnonzero(mask.max(0) > 0.1)
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(found, [5, 5, *(high - low + 5)], atol=1.2)
        assert mask.sum() == pytest.approx(area) and area < (high - low).prod()


def test_area_of_known_outlines():
    for name, area in {"disk": np.pi, "ring": np.pi * (1 - 0.55**2), "square": 2.0, "triangle": 3**1.5 / 4}.items():
        mask, whole = shapes.rasterize([60 * ring + 80 for ring in shapes.outline(name)], 160)
        assert mask.sum() / 60**2 == pytest.approx(area, rel=0.02) and whole == pytest.approx(mask.sum())


def test_outlines_outside_the_picture_have_no_mask():
    mask, area = shapes.rasterize([10 * ring + 500 for ring in shapes.outline("star")], 96)
    assert not mask.any() and area > 0


def test_what_the_set_is_made_of():
    labels, sides, counts, means = [], [], [], []
    for index in range(60):
        picture, boxes, mine = shapes.draw_picture(0, "train", index, 160)
        assert picture.shape == (160, 160, 3) and picture.dtype == np.uint8 and picture.std() > 5
        assert (boxes >= 0).all() and (boxes <= 160).all() and (boxes[:, 2:] - boxes[:, :2] > 2).all()
        labels += mine.tolist()
        sides += np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)).tolist()
        counts.append(len(mine))
        means.append(picture.mean())
    shares = np.bincount(labels, minlength=len(shapes.NAMES)) / len(labels)
    assert len(shapes.NAMES) >= 6 and shares.min() > 0.5 / len(shapes.NAMES)
    assert min(counts) >= 1 and 3.5 < np.mean(counts) < 7
    assert 0.2 < np.mean(np.array(sides) < 24) < 0.7  # small objects, but not only
    assert np.std(means) > 20  # dark and bright grounds


def test_objects_overlap_but_none_is_hidden(monkeypatch):
    painted, paint = [], shapes.paint
    monkeypatch.setattr(shapes, "paint", lambda canvas, mask, rng: painted.append(mask) or paint(canvas, mask, rng))
    fractions = []
    for index in range(30):
        painted.clear()
        _, boxes, labels = shapes.draw_picture(0, "train", index, 96)
        masks = painted[-len(labels) :]  # the ground's own layers come first
        for i, mask in enumerate(masks):
            covered = np.prod([1 - later for later in masks[i + 1 :]], axis=0)
            fractions.append((mask * covered).sum() / mask.sum())
            centers = np.stack(np.nonzero(mask > 0.5)[::-1], axis=1) + 0.5
            assert (centers >= boxes[i, :2] - 0.5).all() and (centers <= boxes[i, 2:] + 0.5).all()
    assert min(fractions) > shapes.MIN_VISIBLE and np.mean(np.array(fractions) < 0.9) > 0.05


def test_the_folder_is_a_yolo_dataset(tmp_path):
    root = tmp_path / "set"
    assert shapes.make_shapes(root, train=5, test=3, image_size=64, seed=3) is True
    for split, count in {"train": 5, "test": 3, "val": 3}.items():
        index = open_dataset("yolo", root, split)
        assert index.names == shapes.NAMES and len(index.samples) == count and not index.faults
        for i, sample in enumerate(index.samples):
            picture, boxes, labels = shapes.draw_picture(3, "train" if split == "train" else "test", i, 64)
            np.testing.assert_allclose(sample.boxes_xyxy, boxes, atol=1e-4)
            assert sample.labels.tolist() == labels.tolist() and (sample.width, sample.height) == (64, 64)
            decoded = np.asarray(Image.open(sample.image_path)).astype(float)
            assert abs(decoded - picture).mean() < 4  # JPEG keeps what matters


def test_making_it_again_does_nothing(tmp_path):
    arguments = dict(train=2, test=1, image_size=64, seed=0)
    assert shapes.make_shapes(tmp_path / "set", **arguments)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "set").rglob("*")}
    assert not shapes.make_shapes(tmp_path / "set", **arguments)
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "set").rglob("*")}
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_another_set_or_other_files_are_never_replaced(tmp_path):
    root = tmp_path / "set"
    shapes.make_shapes(root, train=2, test=1, image_size=64, seed=0)
    with pytest.raises(UserError, match=r"set: found the set .*'seed': 0.*, expected .*'seed': 1"):
        shapes.make_shapes(root, train=2, test=1, image_size=64, seed=1)
    (root / "labels/train/000001.txt").unlink()
    with pytest.raises(UserError, match=r"000001\.txt: missing or changed"):
        shapes.make_shapes(root, train=2, test=1, image_size=64, seed=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="mine: found other files"):
        shapes.make_shapes(tmp_path / "mine", train=2, test=1, image_size=64, seed=0)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "draw_picture", full_disk)
    with pytest.raises(UserError, match="set: No space left on device") as caught:
        shapes.make_shapes(tmp_path / "set", train=2, test=1, image_size=64, seed=0)
    assert caught.value.exit_code == 5 and not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    command = [str(tmp_path / "set"), "--train", "1", "--test", "0", "--image-size", "48", "--seed", "2"]
    shapes.main(command)
    shapes.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("1 training and 0 test pictures") and lines[1].endswith("already there")
    assert json.loads((tmp_path / "set" / shapes.MANIFEST).read_text())["recipe"]["seed"] == 2
    with pytest.raises(UserError, match="image size 8"):
        shapes.main([str(tmp_path / "tiny"), "--image-size", "8"])
