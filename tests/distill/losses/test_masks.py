"""Masks drawn as pictures; the comparison with loops over pixels, and the mutants, are in test_mutants."""

import torch

from distill.losses.masks import anchor_mask, box_density, box_mask, make_anchor_sizes, positive_masks
from structures import Targets

WHERE = dict(batch_size=1, grid_size=(5, 6), image_size=(40, 48))  # stride 8


def objects(*boxes, ignore=()) -> Targets:
    count = len(boxes)
    rows = torch.zeros(count, dtype=torch.int64)
    return Targets(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        rows,
        rows,
        torch.tensor([i in ignore for i in range(count)], dtype=torch.bool),
    )


def picture(mask) -> list[str]:
    return ["".join(".#"[int(v > 0)] for v in line) for line in mask[0, 0]]


def test_boxes_become_rectangles_of_pixels():
    """From the first center inside to the last; an object smaller than a pixel is kept; an ignored one is not."""
    targets = objects([8, 8, 24, 33], [41, 1, 43, 3], [30, 20, 48, 40], ignore={2})
    assert picture(box_mask(targets, **WHERE)) == [
        ".....#",
        ".##...",
        ".##...",
        ".##...",
        "......",
    ]  # fmt: skip


def test_a_box_line_without_centers_takes_one_row():
    assert picture(box_mask(objects([0, 13, 48, 15]), **WHERE)) == ["......", "######", "......", "......", "......"]


def test_the_smaller_of_two_overlapping_objects_counts():
    density = box_density(objects([0, 0, 48, 40], [8, 8, 16, 16]), **WHERE)
    assert density[0, 0, 1, 1] == 1 and density[0, 0, 0, 0] == torch.tensor(1 / 30)


def test_anchor_mask_adapts_to_the_size_of_each_object():
    """An object far smaller than all anchors, which no fixed IoU threshold would keep, marks pixels around it too."""
    sizes = make_anchor_sizes([32.0], [1.0])
    small = anchor_mask(objects([20, 12, 28, 20]), **WHERE, anchor_sizes=sizes)
    assert small.any() and small[0, 0, 1, 2]
    large = anchor_mask(objects([8, 8, 40, 40]), **WHERE, anchor_sizes=sizes)
    assert picture(large) == ["......", "..##..", ".####.", ".####.", "..##.."]


def test_a_smaller_psi_marks_more():
    targets, sizes = objects([3, 3, 30, 21], [30, 10, 46, 38]), make_anchor_sizes([16.0, 32.0], [0.5, 1.0, 2.0])
    areas = [int(anchor_mask(targets, **WHERE, anchor_sizes=sizes, psi=psi).sum()) for psi in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[2] > 0 == areas[-1]


def test_anchor_sizes_keep_their_area():
    sizes = make_anchor_sizes([8.0, 16.0], [0.5, 1.0, 2.0])
    torch.testing.assert_close(sizes.prod(1), torch.tensor([64.0] * 3 + [256.0] * 3))
    torch.testing.assert_close(sizes[:, 1] / sizes[:, 0], torch.tensor([0.5, 1, 2] * 2))


def test_no_objects_no_mask():
    empty = Targets.empty()
    assert not box_mask(empty, **WHERE).any() and not box_density(empty, **WHERE).any()
    assert not anchor_mask(empty, **WHERE, anchor_sizes=make_anchor_sizes([8.0], [1.0])).any()
    assert box_mask(empty, batch_size=0, grid_size=(2, 2), image_size=(8, 8)).shape == (0, 1, 2, 2)
    assert [
        m.any().item() for m in positive_masks(torch.zeros(1, 5, dtype=torch.bool), grid_sizes=[(2, 2), (1, 1)])
    ] == [False, False]
