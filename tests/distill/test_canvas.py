"""Pictures put together from real objects: pixels and boxes land where they should, and what is not seen goes."""

import numpy as np
import pytest
import torch

from distill import canvas
from distill.canvas import CanvasSettings, Cutout, Placement
from structures import Detections

CONTENT = torch.tensor([0.0, 10.0, 60.0, 50.0])  # of a picture of 60 x 60, letterboxed


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def flat(value, height, width):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def cutout(value, side, label=0, inset=0):
    box = torch.tensor([inset, inset, side - inset, side - inset], dtype=torch.float32)
    return Cutout(flat(value, side, side), box, label)


def nothing():
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def detections(boxes, labels):
    return Detections(torch.tensor(boxes).view(-1, 4), torch.ones(len(labels)), torch.tensor(labels))


# ---------------------------------------------------------------- cutouts


def test_context_shrinks_from_the_smallest_object_to_the_largest():
    margins = canvas.context_margins(torch.tensor([100.0, 10.0, 55.0]), 4.0)
    torch.testing.assert_close(margins, torch.tensor([0.0, 4.0, 2.0]))
    torch.testing.assert_close(canvas.context_margins(torch.tensor([7.0, 7.0]), 4.0), torch.tensor([4.0, 4.0]))
    assert canvas.context_margins(torch.zeros(0), 4.0).shape == (0,)


@pytest.mark.parametrize(
    ("box", "margin", "rectangle"),
    [
        ([20.2, 22.7, 30.0, 35.1], 0.0, (20, 22, 30, 36)),
        ([20.2, 22.7, 30.0, 35.1], 2.5, (17, 20, 33, 38)),
        ([0.0, 10.0, 5.0, 15.0], 3.0, (0, 10, 8, 18)),  # stays within the content, off the padding
        ([50.0, 40.0, 60.0, 50.0], 3.0, (47, 37, 60, 50)),
    ],
)
def test_a_cutout_is_the_pixels_around_its_box(box, margin, rectangle):
    picture, (x1, y1, x2, y2) = noise(60, 60), rectangle
    found = canvas.cut_out(picture, torch.tensor(box), 3, margin=margin, content_xyxy=CONTENT)
    assert torch.equal(found.pixels, picture[:, y1:y2, x1:x2]) and found.label == 3
    torch.testing.assert_close(found.box_xyxy, torch.tensor(box) - torch.tensor([x1, y1, x1, y1]))


def test_classes_come_in_turn():
    labels = torch.tensor([0] * 20 + [1] * 3 + [5])
    orders = {tuple(canvas.in_turn(labels, generator=seeded(s)).tolist()) for s in range(5)}
    assert len(orders) == 5
    for order in orders:
        assert sorted(order) == list(range(24))
        kinds = labels[list(order)].tolist()
        assert sorted(kinds[:3]) == [0, 1, 5] and sorted(kinds[3:5]) == sorted(kinds[5:7]) == [0, 1]
        assert kinds[7:] == [0] * 17
    assert canvas.in_turn(torch.zeros(0, dtype=torch.int64), generator=seeded()).tolist() == []


def test_a_background_keeps_colours_and_loses_objects_and_padding():
    picture = flat(114, 60, 60)
    picture[:, 10:50] = 200
    picture[:, 30:33, 30:33] = 0
    background = canvas.smooth_background(picture, CONTENT)
    assert background.shape == (3, 60, 60) and background.dtype == torch.uint8
    assert background.min() >= 175 and background.float().mean() == pytest.approx(199, abs=1.5)


# ---------------------------------------------------------------- the canvas


def test_places_are_free_enough_inside_and_as_many_draws_as_cutouts():
    cutouts = [cutout(value, 15) for value in range(40)]
    placed = canvas.place(cutouts, [], size=60, generator=seeded(), attempts=40, max_overlap=0.3)
    assert 10 < len(placed) < 40
    is_taken = np.zeros((60, 60), bool)
    for p in placed:
        assert 0 <= p.left <= 45 and 0 <= p.top <= 45
        area = is_taken[p.top : p.top + 15, p.left : p.left + 15]
        assert area.mean() <= 0.3
        area[:] = True
    assert np.array_equal(canvas.covered(placed, 60).numpy(), is_taken)
    again = canvas.place(cutouts, [], size=60, generator=seeded(), attempts=40, max_overlap=0.3)
    assert [(p.left, p.top) for p in again] == [(p.left, p.top) for p in placed]
    assert len(canvas.place(cutouts, [], size=60, generator=seeded(), attempts=40, max_overlap=1.0)) == 40
    assert not canvas.place([cutout(1, 61)], [], size=60, generator=seeded(), attempts=5, max_overlap=1.0)
    corners = {
        (p.left, p.top)
        for seed in range(60)
        for p in canvas.place([cutout(1, 59)], [], size=60, generator=seeded(seed), attempts=1, max_overlap=0)
    }
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}  # every place can be drawn, the last ones too


def test_what_is_pasted_later_lies_above():
    placed = [Placement(cutout(10, 20, 0, inset=2), 5, 8), Placement(cutout(20, 10, 1), 15, 8)]
    picture, boxes, labels = canvas.render(flat(0, 40, 40), placed)
    expected = np.zeros((40, 40), np.uint8)
    expected[8:28, 5:25] = 10
    expected[8:18, 15:25] = 20
    assert all(np.array_equal(channel, expected) for channel in picture.numpy())
    assert boxes.tolist() == [[7, 10, 23, 26], [15, 8, 25, 18]] and labels.tolist() == [0, 1]
    picture, boxes, labels = canvas.render(flat(7, 9, 9), [])
    assert torch.equal(picture, flat(7, 9, 9)) and boxes.shape == (0, 4) and labels.shape == (0,)


def test_seen_by_overlap_and_where_it_is_asked_by_class():
    boxes, labels = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 4, 4.0]]), torch.tensor([0, 1, 0])
    found = detections([[0.0, 0, 10, 4], [20, 20, 30, 30]], [0, 0])  # IoU 0.4, 1; with the third 0.4
    ask = lambda **kw: canvas.is_seen(boxes, labels, found, **{"min_iou": 0.25, "class_agnostic": True} | kw).tolist()
    assert ask() == [True, True, True]
    assert ask(class_agnostic=False) == [True, False, True]
    assert ask(min_iou=0.41) == [False, True, False]
    assert canvas.is_seen(boxes, labels, nothing(), min_iou=0.25, class_agnostic=True).tolist() == [False] * 3


def test_unseen_objects_go_until_too_little_would_be_covered():
    placed = [Placement(cutout(i, 10), 10 * i, 0) for i in range(4)]  # each 1 / 16 of 40 x 40
    drop = lambda seen, area: [
        p.left // 10 for p in canvas.drop_unseen(placed, torch.tensor(seen), min_area=area, size=40)
    ]
    assert drop([True, False, True, False], 0.0) == [0, 2]
    assert drop([False] * 4, 0.15) == [1, 2, 3]  # 3 / 16 stay covered: 2 / 16 would be too little
    assert drop([False, True, False, False], 1.0) == [0, 1, 2, 3]
    both = [Placement(cutout(1, 10), 0, 0), Placement(cutout(2, 10), 0, 0)]  # one hides the other
    assert canvas.drop_unseen(both, torch.tensor([False, False]), min_area=0.05, size=40) == both[1:]


def test_a_composed_canvas_holds_what_the_observer_sees_and_nothing_of_the_rest():
    background = noise(60, 60)
    cutouts = [cutout(255 if i % 2 else 254, 12, label=i % 2) for i in range(30)]

    def sees_the_second_class(picture):
        """Boxes of 12 x 12 of value 255: wherever its top left corner is."""
        is_bright = (picture[0] == 255).float()[None, None]
        full = torch.nn.functional.avg_pool2d(is_bright, 12, stride=1)[0, 0] == 1
        top, left = full.nonzero().unbind(1)
        boxes = torch.stack((left, top, left + 12, top + 12), dim=1).float()
        return Detections(boxes, torch.ones(len(boxes)), torch.ones(len(boxes), dtype=torch.int64))

    settings = CanvasSettings(max_overlap=0.0, min_area=0.0, rounds=3)
    compose = lambda observe, settings, seed=0: canvas.compose(
        background, cutouts, observe=observe, generator=seeded(seed), settings=settings
    )
    picture, boxes, labels = compose(sees_the_second_class, settings)
    assert len(boxes) > 4 and set(labels.tolist()) == {1}
    for x1, y1, x2, y2 in boxes.int().tolist():
        assert (picture[:, y1:y2, x1:x2] == 255).all()
    is_object = torch.zeros(60, 60, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.int().tolist():
        is_object[y1:y2, x1:x2] = True
    assert torch.equal(picture[:, ~is_object], background[:, ~is_object])  # dropped objects leave no trace
    assert torch.equal(compose(sees_the_second_class, settings)[0], picture)
    assert not torch.equal(compose(sees_the_second_class, settings, seed=1)[0], picture)
    everything = compose(None, CanvasSettings(max_overlap=0.0, rounds=0))
    assert set(everything[2].tolist()) == {0, 1}
    blind = compose(lambda picture: nothing(), CanvasSettings(max_overlap=0.0, min_area=0.2, rounds=2))
    assert 0.2 * 3600 < sum((b[2] - b[0]) * (b[3] - b[1]) for b in blind[1].tolist()) <= 0.2 * 3600 + 144
    empty = canvas.compose(background, [], observe=None, generator=seeded(), settings=CanvasSettings())
    assert torch.equal(empty[0], background) and empty[1].shape == (0, 4)


# ---------------------------------------------------------------- a mosaic of crops


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ([25.0, 25, 35, 35], (20, 20, 40, 40)),
        ([0.0, 10, 6, 14], (0, 10, 20, 30)),  # moved into the content
        ([55.0, 45, 60, 50], (40, 30, 60, 50)),
        ([20.0, 15, 45, 40], (18, 12, 48, 42)),  # 1.2 x 25 is more than the cell
        ([0.0, 10, 60, 50], (10, 10, 50, 50)),  # never more than the content
    ],
)
def test_a_window_holds_its_object_and_stays_in_the_picture(box, window):
    found = canvas.crop_window(torch.tensor(box), CONTENT, 20)
    assert found[2] - found[0] == found[3] - found[1]
    np.testing.assert_allclose(found, window, atol=1)
    assert found[0] >= 0 and found[1] >= 10 and found[2] <= 60 and found[3] <= 50


def test_a_crop_of_the_cells_size_is_the_pixels_themselves_and_clips_labels():
    picture, boxes = noise(60, 60), torch.tensor([[22.0, 24, 30, 31], [35, 35, 55, 45], [39, 0, 80, 60], [0, 0, 5, 5]])
    tile, kept, labels = canvas.crop(picture, boxes, torch.tensor([4, 5, 6, 7]), (20, 20, 40, 40), 20)
    assert torch.equal(tile, picture[:, 20:40, 20:40])
    assert kept.tolist() == [[2, 4, 10, 11], [15, 15, 20, 20]] and labels.tolist() == [4, 5]  # the third: 1 px wide
    tile, kept, labels = canvas.crop(picture, boxes, torch.tensor([4, 5, 6, 7]), (20, 20, 60, 60), 20)
    assert tile.shape == (3, 20, 20) and kept[0].tolist() == [1, 2, 5, 5.5] and labels.tolist() == [4, 5, 6]
    flat_tile, _, _ = canvas.crop(flat(77, 60, 60), boxes[:0], torch.tensor([])[:0], (20, 20, 60, 60), 20)
    assert (flat_tile == 77).all()


def test_crops_are_packed_row_by_row():
    tiles = [(flat(i, 10, 10), torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([i])) for i in range(4)]
    tiles[2] = (tiles[2][0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    picture, boxes, labels = canvas.pack_crops(tiles, 2)
    assert [int(picture[0, y, x]) for y in (0, 10) for x in (0, 10)] == [0, 1, 2, 3] and picture.shape == (3, 20, 20)
    assert boxes.tolist() == [[1, 2, 3, 4], [11, 2, 13, 4], [11, 12, 13, 14]] and labels.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="4 crops, expected 3 x 3"):
        canvas.pack_crops(tiles, 3)
