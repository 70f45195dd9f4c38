"""Rows of more than five columns: polygons stay polygons; boxes with keypoints or tracks are not taken for them."""

import numpy as np
import pytest
from PIL import Image

from datasets.yolo_txt import read_yolo
from errors import UserError

BOX = [0.4, 0.5, 0.4, 0.5]  # 20..60 x 20..60 of 100 x 80


@pytest.fixture
def make(tmp_path):
    def build(*files, yaml=""):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        for number, rows in enumerate(files):
            Image.new("RGB", (100, 80)).save(tmp_path / "images" / f"{number}.png")
            text = "".join(f"0 {' '.join(map(str, row))}\n" for row in rows)
            (tmp_path / "labels" / f"{number}.txt").write_text(text)
        (tmp_path / "data.yaml").write_text(f"names: [a]\ntrain: images\n{yaml}\n")
        return read_yolo(tmp_path, "train")

    return build


def pose(n, d, seed=0, visible=(0, 1, 2)):
    """A row of BOX and n keypoints in it, of d values each."""
    rng = np.random.default_rng(seed)
    row = list(BOX)
    for _ in range(n):
        row += (rng.uniform(0.2, 0.6, 2) * (1, 1.2)).round(4).tolist()
        row += [int(rng.choice(visible))] if d == 3 else []
    return row


SHAPES = [(1, 2), (2, 2), (4, 2), (8, 2), (17, 2), (2, 3), (4, 3), (8, 3), (1, 3), (17, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_keypoints_are_read_past_where_kpt_shape_says_so(make, shape, count):
    rows = [pose(*shape, seed) for seed in range(count)]
    rows[0][0] += 0.1
    index = make(rows, [BOX], yaml=f"kpt_shape: [{shape[0]}, {shape[1]}]")
    np.testing.assert_allclose(index.samples[0].boxes_xyxy[0], [30, 20, 70, 60])
    np.testing.assert_allclose(index.samples[1].boxes_xyxy, [[20, 20, 60, 60]])
    assert {fault.kind for fault in index.faults} <= {"duplicate box"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_without_kpt_shape_they_are_refused_or_dropped(make, shape, count):
    files = [[pose(*shape, 10 * file + row) for row in range(count)] for file in range(3)]
    if shape[0] * shape[1] % 2:  # an even number of columns, which no polygon has
        index = make([BOX], *files)
        assert sum(map(len, index.samples)) == 1 and {fault.kind for fault in index.faults} == {"malformed row"}
    else:
        with pytest.raises(UserError, match=r"0\.txt:1: \d+ columns in each of \d+ rows.*kpt_shape") as caught:
            make(*files)
        assert ("track id" in str(caught.value)) == (5 + shape[0] * shape[1] == 7)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_keypoints_with_a_confidence_are_refused_too(make, n):
    """As a model predicts them: x, y and a share instead of a visibility."""
    rng = np.random.default_rng(n)
    low, high = (0.3, 0.3, 0.8), (0.5, 0.5, 1.0)  # points in the box; shares that as coordinates lie beside it
    rows = [[*BOX, *rng.uniform(low, high, (n, 3)).round(4).flatten().tolist()] for _ in range(5)]
    with pytest.raises(UserError, match=rf"{5 + 3 * n} columns in each of 5 rows: class, box and keypoints"):
        make(rows)


def test_a_stray_row_does_not_make_polygons_of_keypoints(make):
    files = [[pose(4, 2, 10 * file + row) for row in range(4)] for file in range(5)]
    with pytest.raises(UserError, match=r"0\.txt:1: 13 columns in 20 of 21 long rows: class, box and keypoints"):
        make(*files, [pose(5, 2)])


@pytest.mark.parametrize("last", [1, 0, "1.0", 7])
def test_tracks_are_named(make, last):
    with pytest.raises(UserError, match=r"7 columns in each of 2 rows: class, box, confidence and track id"):
        make([[*BOX, 0.93, last]], [[0.5, 0.5, 0.2, 0.2, 0.4, last]])
    if last != 7:  # which is no fraction, so that the row is malformed
        with pytest.raises(UserError, match=r"class, box, confidence and track id"):
            make([[*BOX, last, 0.93]], [[0.5, 0.5, 0.2, 0.2, last, 0.4]])


def test_another_number_of_columns_than_kpt_shape_states_is_malformed(make):
    index = make([BOX, pose(4, 2)], yaml="kpt_shape: [4, 3]")
    assert [fault.kind for fault in index.faults] == ["malformed row"]
    assert "or those and the keypoints (17)" in index.faults[0].reason


@pytest.mark.parametrize("value", ["17", "[17]", "[17, 4]", "[0, 2]", "[a, 2]", "[1, 2, 3]", "{a: 1}"])
def test_kpt_shape_that_is_none(make, value):
    with pytest.raises(UserError, match=r"key 'kpt_shape': found .*, expected \[n, 2\] or \[n, 3\]"):
        make([BOX], yaml=f"kpt_shape: {value}")


@pytest.mark.parametrize("value", ["", " null", " ~"])
def test_kpt_shape_that_is_left_empty(make, value):
    assert len(make([BOX], yaml=f"kpt_shape:{value}").samples[0]) == 1


def outline(rng, n):
    """n points around a center, as an annotation tool writes a polygon, and the box around them in pixels."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    radius = rng.uniform(0.05, 0.15, n)
    center = rng.uniform(0.2, 0.8, 2)
    points = (center + radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)).round(6)
    box = np.concatenate((points.min(0), points.max(0))) * (100, 80, 100, 80)
    return points.ravel().tolist(), box


@pytest.mark.parametrize("counts", [(3,), (4,), (5,), (10,), (3, 4), (4, 7, 12)])
@pytest.mark.parametrize("seed", range(10))
def test_polygons_stay_polygons(make, counts, seed):
    rng = np.random.default_rng(seed)
    rows, boxes = zip(*(outline(rng, counts[k % len(counts)]) for k in range(12)))
    np.testing.assert_allclose(make(rows).samples[0].boxes_xyxy, boxes)


def test_turned_rectangles_stay_polygons(make):
    """Four corners near the center of the picture; [2, 2] keypoints would have as many columns."""
    rows = [[0.45, 0.5, 0.5, 0.45, 0.55, 0.5, 0.5, 0.55], [0.4, 0.4, 0.6, 0.4, 0.6, 0.6, 0.4, 0.6]]
    assert len(make(rows).samples[0]) == 2


def test_a_yaml_file_may_say_that_they_are_polygons(make):
    row = [0.5, 0.5, 0.52, 0.55, 0.45, 0.6, 0.48, 0.55, 0.5, 0.52]
    with pytest.raises(UserError, match="task: segment"):
        make([row])
    np.testing.assert_allclose(make([row], yaml="task: segment").samples[0].boxes_xyxy, [[45, 40, 52, 48]])
