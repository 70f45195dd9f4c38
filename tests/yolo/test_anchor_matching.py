"""YOLOv5's matching of objects with anchors by their ratio, against loops over objects and cells, and by hand."""

import numpy as np
import pytest
import torch

from structures import Targets
from tests.reference import yolo_losses as reference
from tests.yolo.test_assigners import ANCHORS, GRIDS, STRIDES, targets_of
from yolo.assigners import anchor_ratio_matches, assignment_of_matches, last_match, make_anchors


def matches_of(targets, anchors=ANCHORS):
    return anchor_ratio_matches(grid_sizes=GRIDS, strides=STRIDES, anchors=anchors, targets=targets)


def matches_of_reference(boxes, image, ignore=None):
    found, start = [], 0
    for level, ((h, w), stride) in enumerate(zip(GRIDS, STRIDES)):
        for n, a, y, x in reference.anchor_matches(boxes, ANCHORS[level].numpy(), (h, w), stride):
            if ignore is None or not ignore[n]:
                found.append((n, int(image[n]), start + (a * h + y) * w + x, level))
        start += 3 * h * w
    return found


@pytest.mark.parametrize("seed", range(4))
def test_anchor_ratio_matches_reference(seed):
    rng = np.random.default_rng(seed)
    boxes, labels, image, ignore = reference.random_objects(rng, 3, 80, 64, 4, ignored=0.2)
    boxes[::5] = np.round(boxes[::5])  # centers on borders and at exactly half a cell
    boxes[1::9] -= 25  # some centers outside the image
    got = matches_of(targets_of(boxes, labels, image, ignore))
    pairs = list(zip(*(x.tolist() for x in (got.gt_index, got.image, got.location, got.level))))
    assert pairs == matches_of_reference(boxes, image, ignore)
    assert len(pairs) > 100 and len(set(pairs)) == len(pairs)


def test_anchor_ratio_by_hand():
    one_anchor = torch.tensor([[[8.0, 8.0]]] * 3).double()
    # center (20, 11): on stride 8 cell (2, 1), at 0.5 and 0.375 of it: no left or right neighbour, the one above
    box = [[20 - 6, 11 - 7, 20 + 6, 11 + 7]]
    got = matches_of(targets_of(box), one_anchor)
    cells = [(location % 8, location // 8) for location in got.location[got.level == 0].tolist()]
    assert cells == [(2, 1), (2, 0)]
    for side, taken in ((31.9, True), (32.1, False), (2.1, True), (1.9, False)):
        box = [[20 - side / 2, 8, 20 + side / 2, 16]]
        assert bool(len(matches_of(targets_of(box), one_anchor).gt_index)) == taken  # side / 8 and 8 / side below 4


@pytest.mark.parametrize("center", [(0, 0), (64, 64), (0, 64), (32, 64), (32, 32), (63.99, 0.01)])
def test_centers_on_borders_stay_inside_the_grid(center):
    x, y = center
    got = matches_of(targets_of([[x - 5, y - 5, x + 5, y + 5]]))
    sizes = torch.tensor([3 * h * w for h, w in GRIDS])
    start = (sizes.cumsum(0) - sizes)[got.level]
    assert len(got.gt_index) and ((got.location >= start) & (got.location < start + sizes[got.level])).all()
    assert len(set(got.location.tolist())) == len(got.gt_index)  # each cell once
    points, strides, _ = make_anchors(GRIDS, STRIDES, ANCHORS)
    distance = (points[got.location] - torch.tensor(center) / strides[got.location]).abs()
    assert (distance <= 1).all()  # the decoder reaches one cell from the center


def test_last_match_decides_a_shared_location():
    same = [[10, 10, 22, 22]] * 2
    targets = targets_of(same, labels=[1, 3])
    matches = matches_of(targets)
    A = 3 * 84
    winner = last_match(matches, 1, A)
    assert set(matches.gt_index[winner[winner >= 0]].tolist()) == {1}
    points, strides, _ = make_anchors(GRIDS, STRIDES, ANCHORS)
    scores = torch.linspace(0.1, 0.9, len(matches.gt_index)).double()
    got = assignment_of_matches(matches, scores, points=points, strides=strides, targets=targets, shape=(1, A, 4))
    assert (got.gt_index[got.is_positive] == 1).all() and (got.gt_index[~got.is_positive] == -1).all()
    assert sorted(got.is_positive[0].nonzero()[:, 0].tolist()) == sorted(set(matches.location.tolist()))
    for index, location in enumerate(matches.location.tolist()):
        if matches.gt_index[index] == 1:
            assert got.target_scores[0, location].tolist() == [0, 0, 0, scores[index].item()]


def test_no_objects_at_all():
    matches = matches_of(Targets.empty())
    assert matches.gt_index.shape == matches.image.shape == matches.location.shape == matches.level.shape == (0,)
    assert (last_match(matches, 2, 252) == -1).all()
