"""Localization distillation by hand; its checks and mutants are in test_mutants."""

import math

import pytest
import torch

from distill.losses.localization import localization_kl, paired_diou, valuable_region
from structures import Targets


def edges_of(*probabilities: float) -> torch.Tensor:
    """One location whose four edges all have these probabilities."""
    return torch.tensor(probabilities, dtype=torch.float64).log().expand(1, 4, -1)


def objects(*boxes: tuple, image: tuple[int, ...] | None = None) -> Targets:
    n = len(boxes)
    image = torch.tensor(image if image else [0] * n)
    return Targets(torch.tensor(boxes).float(), torch.zeros(n).long(), image, torch.zeros(n).bool())


def test_one_edge_of_two_bins():
    """Three edges agree; the fourth has KL((3/4, 1/4) || (1/2, 1/2)): a quarter of it, times w / max(w, 1)."""
    t = edges_of(0.5, 0.5).clone()
    t[0, 2] = torch.tensor([0.75, 0.25]).double().log()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    for weight, share in ((1.0, 1.0), (0.2, 0.2), (5.0, 1.0)):
        got = localization_kl(
            s_logits=edges_of(0.5, 0.5), t_logits=t, weight=torch.tensor([weight]).double(), temperature=1.0
        )
        assert got.item() == pytest.approx(share * kl / 4)


def test_dense_with_a_mask_is_the_rows_it_marks():
    s, t, mask = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 16), torch.rand(2, 9) < 0.4
    dense = localization_kl(s_logits=s, t_logits=t, weight=mask)
    torch.testing.assert_close(dense, localization_kl(s_logits=s[mask], t_logits=t[mask], weight=mask[mask]))


def test_bins_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ"):
        localization_kl(s_logits=torch.zeros(3, 4, 16), t_logits=torch.zeros(3, 4, 17), weight=torch.ones(3))


def test_distance_iou_of_two_squares():
    """Side 2, one to the right by 2: no overlap, centers 2 apart, hull 4 x 2."""
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([2.0, 0, 4, 2])
    assert paired_diou(a, b).item() == pytest.approx(-4 / 20)
    assert paired_diou(a, a).item() == pytest.approx(1)


def test_the_shell_around_one_object():
    """A positive at DIoU 1, so the threshold is 1/4: a fair overlap is valuable, a poor one is not."""
    gt = (0.0, 0.0, 10.0, 10.0)
    boxes = torch.tensor([gt, (0, 0, 10, 6), (8, 8, 18, 18), gt, (50, 50, 60, 60)]).float()[None]
    gt_index = torch.tensor([[0, -1, -1, -1, -1]])
    region = valuable_region(boxes_xyxy=boxes, gt_index=gt_index, targets=objects(gt), is_ignored=gt_index > 0)
    assert region.tolist() == [[False, True, False, True, False]]  # a perfect box that was not chosen belongs to it
    ignored = torch.tensor([[False, False, False, True, False]])
    region = valuable_region(boxes_xyxy=boxes, gt_index=gt_index, targets=objects(gt), is_ignored=ignored)
    assert region.tolist() == [[False, True, False, False, False]]


def test_a_poorer_positive_lowers_the_bar():
    gt = (0.0, 0.0, 10.0, 10.0)
    boxes = torch.tensor([(0, 0, 10, 6), (5, 0, 15, 8), (0, 0, 10, 2)]).float()[None]
    overlaps = paired_diou(boxes[0], torch.tensor(gt))
    gt_index = torch.tensor([[0, 0, -1]])
    for gamma in (0.2, 0.4):
        region = valuable_region(
            boxes_xyxy=boxes, gt_index=gt_index, targets=objects(gt), is_ignored=gt_index > 0, gamma=gamma
        )
        assert region[0, 2].item() == (overlaps[2] >= gamma * overlaps[:2].mean()).item()


def test_objects_of_another_image_and_without_positives_have_no_shell():
    gt = (0.0, 0.0, 10.0, 10.0)
    boxes = torch.tensor(gt).expand(2, 3, 4)
    gt_index = torch.tensor([[-1, -1, -1], [1, -1, -1]])
    region = valuable_region(
        boxes_xyxy=boxes, gt_index=gt_index, targets=objects(gt, gt, image=(0, 1)), is_ignored=gt_index > 1
    )
    assert region.tolist() == [[False, False, False], [False, True, True]]


def test_the_region_of_half_precision_boxes_is_that_of_float32():
    boxes = (torch.rand(1, 200, 4) * 20).cumsum(-1).bfloat16()
    gt_index = torch.full((1, 200), -1)
    gt_index[0, :5] = 0
    given = dict(gt_index=gt_index, targets=objects((5.0, 10.0, 30.0, 50.0)), is_ignored=gt_index > 0)
    assert torch.equal(valuable_region(boxes_xyxy=boxes, **given), valuable_region(boxes_xyxy=boxes.float(), **given))
    with pytest.raises(ValueError, match="must be"):
        valuable_region(boxes_xyxy=boxes[:, :5], **given)
