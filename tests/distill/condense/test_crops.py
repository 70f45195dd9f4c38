"""Mosaics of crops: each window holds its object, labels follow the pixels, crops are packed row by row."""

import numpy as np
import pytest
import torch

from distill.condense import crops

CONTENT = torch.tensor([0.0, 10.0, 60.0, 50.0])  # of an image of 60 x 60, letterboxed


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def flat(value, height, width):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def test_classes_come_in_turn():
    labels = torch.tensor([0] * 20 + [1] * 3 + [5])
    orders = {tuple(crops.in_turn(labels, generator=seeded(s)).tolist()) for s in range(5)}
    assert len(orders) == 5
    for order in orders:
        assert sorted(order) == list(range(24))
        kinds = labels[list(order)].tolist()
        assert sorted(kinds[:3]) == [0, 1, 5] and sorted(kinds[3:5]) == sorted(kinds[5:7]) == [0, 1]
        assert kinds[7:] == [0] * 17
    assert crops.in_turn(torch.zeros(0, dtype=torch.int64), generator=seeded()).tolist() == []


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
    found = crops.crop_window(torch.tensor(box), CONTENT, 20)
    assert found[2] - found[0] == found[3] - found[1]
    np.testing.assert_allclose(found, window, atol=1)
    assert found[0] >= 0 and found[1] >= 10 and found[2] <= 60 and found[3] <= 50


def test_a_crop_of_the_cells_size_is_the_pixels_themselves_and_clips_labels():
    picture, boxes = noise(60, 60), torch.tensor([[22.0, 24, 30, 31], [35, 35, 55, 45], [39, 0, 80, 60], [0, 0, 5, 5]])
    tile, kept, labels = crops.crop(picture, boxes, torch.tensor([4, 5, 6, 7]), (20, 20, 40, 40), 20)
    assert torch.equal(tile, picture[:, 20:40, 20:40])
    assert kept.tolist() == [[2, 4, 10, 11], [15, 15, 20, 20]] and labels.tolist() == [4, 5]  # the third: 1 px wide
    tile, kept, labels = crops.crop(picture, boxes, torch.tensor([4, 5, 6, 7]), (20, 20, 60, 60), 20)
    assert tile.shape == (3, 20, 20) and kept[0].tolist() == [1, 2, 5, 5.5] and labels.tolist() == [4, 5, 6]
    flat_tile, _, _ = crops.crop(flat(77, 60, 60), boxes[:0], torch.tensor([])[:0], (20, 20, 60, 60), 20)
    assert (flat_tile == 77).all()


def test_crops_are_packed_row_by_row():
    tiles = [(flat(i, 10, 10), torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([i])) for i in range(4)]
    tiles[2] = (tiles[2][0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    picture, boxes, labels = crops.pack_crops(tiles, 2)
    assert [int(picture[0, y, x]) for y in (0, 10) for x in (0, 10)] == [0, 1, 2, 3] and picture.shape == (3, 20, 20)
    assert boxes.tolist() == [[1, 2, 3, 4], [11, 2, 13, 4], [11, 12, 13, 14]] and labels.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="4 crops, expected 3 x 3"):
        crops.pack_crops(tiles, 3)
