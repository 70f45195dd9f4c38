"""drawing: labels inside the picture and off one another, colours that tell classes apart, odd boxes."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from engine.drawing.detections import class_color, draw_detections, place_label
from structures import Detections


def detections(rows: list[tuple]) -> Detections:
    """Rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return Detections(table[:, :4].float(), table[:, 4].float(), table[:, 5].long())


def grey(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 114, dtype=np.uint8)


def test_draws_the_box_where_it_is_and_leaves_the_input_alone():
    image = Image.fromarray(grey(200, 160))
    drawn = np.asarray(draw_detections(image, detections([(40, 60, 120, 130, 0.5, 2)]), ["a", "b", "c"]))
    color = np.array(class_color(2))
    assert (drawn[60, 60:120] == color).all() and (drawn[129, 40:120] == color).all()
    assert (drawn[60:130, 40] == color).all() and (drawn[60:130, 119] == color).all()
    assert (drawn[100, 60:100] == 114).all() and (drawn[140:] == 114).all()
    assert (np.asarray(image) == 114).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_picture_mode_gives_rgb(mode):
    drawn = draw_detections(Image.new(mode, (64, 48)), detections([(5, 5, 30, 30, 0.5, 0)]), ["a"])
    assert drawn.mode == "RGB" and drawn.size == (64, 48)


@pytest.mark.parametrize(
    "box",
    [(-50, -50, 30, 30), (50, 30, 500, 500), (10, 10, 10, 10), (0, 0, 64, 48), (63.5, 47.5, 64, 48), (-1e9, 0, 1e9, 9)],
)
@pytest.mark.parametrize("size", [(64, 48), (8, 8), (1, 1), (3000, 20)])
def test_boxes_beyond_the_picture_and_tiny_pictures(box, size):
    drawn = draw_detections(grey(*size), detections([(*box, 0.9, 0)]), ["a rather long class name"])
    assert drawn.size == size


@pytest.mark.parametrize(
    "box",
    [
        (math.nan, 0, 10, 10),
        (math.nan, 1, 10, 10),
        (1, 1, math.inf, 10),
        (0, 0, math.inf, 10),
        (30, 30, 20, 20),
        (-9, -9, -1, -1),
        (70, 0, 90, 9),
        (0, 48, 9, 60),
    ],
)
def test_boxes_with_nothing_to_see_are_left_out(box):
    drawn = draw_detections(grey(64, 48), detections([(*box, 0.9, 0)]), ["a"])
    assert (np.asarray(drawn) == 114).all()


def test_no_detections_and_unnamed_classes():
    assert (np.asarray(draw_detections(grey(9, 9), detections([]), [])) == 114).all()
    draw_detections(grey(90, 90), detections([(1, 1, 50, 50, 0.5, 7)]), ["only one name"])


def test_lines_grow_with_the_picture():
    def line_width(side: int) -> int:
        row = detections([(side / 4, side / 4, side / 2, side * 3 / 4, 0.5, 0)])
        return int((np.asarray(draw_detections(grey(side, side), row, ["a"]))[side * 5 // 8] != 114).any(-1).sum()) // 2

    assert line_width(100) == 1 and line_width(600) == 2 and line_width(3000) >= 8


def test_labels_stay_inside_and_apart_where_there_is_room():
    rng = np.random.default_rng(0)
    for _ in range(200):
        picture = (int(rng.integers(120, 400)), int(rng.integers(120, 400)))
        placed = []
        for _ in range(6):
            x, y = rng.integers(0, picture[0] - 10), rng.integers(0, picture[1] - 10)
            box = (int(x), int(y), int(rng.integers(x + 1, picture[0] + 1)), int(rng.integers(y + 1, picture[1] + 1)))
            placed.append(place_label((40, 10), box, placed, picture))
            left, top, right, bottom = placed[-1]
            assert left >= 0 and top >= 0 and right <= picture[0] and bottom <= picture[1]
            assert (right - left, bottom - top) == (40, 10)
    # one large box five times: its four corners and its left edge have room for all five labels
    placed = []
    for _ in range(5):
        placed.append(place_label((40, 10), (50, 50, 300, 300), placed, (400, 400)))
    for a, b in itertools.combinations(placed, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert placed[0] == (50, 40, 90, 50)  # alone: above the top left corner


def test_a_label_leaves_its_own_small_box_to_be_seen():
    """In the corner of a picture there is no room above a small box; the label goes below it."""
    for corner in ((0, 0, 12, 8), (0, 92, 12, 100), (188, 0, 200, 8), (188, 92, 200, 100), (0, 0, 12, 100)):
        left, top, right, bottom = place_label((40, 10), corner, [], (200, 100))
        width, height = min(right, corner[2]) - max(left, corner[0]), min(bottom, corner[3]) - max(top, corner[1])
        hidden = max(0, width) * max(0, height)
        assert 2 * hidden <= (corner[2] - corner[0]) * (corner[3] - corner[1])
        assert 0 <= left and right <= 200 and 0 <= top and bottom <= 100


def test_colours_differ_among_eighty_classes():
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    assert all(sum(abs(p - q) for p, q in zip(a, b)) > 90 for a, b in itertools.pairwise(colors))
