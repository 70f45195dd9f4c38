"""Targets: rows are chosen and moved together, with or without class scores."""

from dataclasses import fields, replace

import pytest
import torch

from structures import Targets


def targets_of(count: int, class_scores=None) -> Targets:
    return Targets(
        torch.rand(count, 4), torch.arange(count), torch.zeros(count).long(), torch.arange(count) == 1, class_scores
    )


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True]), torch.zeros(0).long()])
@pytest.mark.parametrize("has_scores", [True, False])
def test_every_column_goes_along(rows, has_scores):
    targets = targets_of(3, torch.rand(3, 5) if has_scores else None)
    for changed, expected in ((targets[rows], lambda x: x[rows]), (targets.to("meta"), lambda x: x.to("meta"))):
        assert (changed.class_scores is not None) == has_scores
        for name in [f.name for f in fields(Targets)][: 5 if has_scores else 4]:
            column, wanted = getattr(changed, name), expected(getattr(targets, name))
            assert column.shape == wanted.shape and column.device == wanted.device
            assert column.is_meta or torch.equal(column, wanted)


def test_rows_that_differ_are_refused():
    for class_scores in (torch.rand(2, 5), torch.rand(3), torch.rand(3, 5, 1)):
        with pytest.raises(ValueError, match=r"rows differ.*class_scores"):
            targets_of(3, class_scores)
    assert targets_of(0, torch.rand(0, 5))[torch.zeros(0).long()].class_scores.shape == (0, 5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_boxes_that_are_not_finite_are_refused(wrong):
    """An object at nan would not be learnt, and one that ends at infinity would make every loss nan."""
    boxes_xyxy = torch.arange(12.0).view(3, 4)
    boxes_xyxy[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"boxes_xyxy: row 1 is \[4.0, 5.0, {wrong}, 7.0\], expected finite numbers"):
        replace(targets_of(3), boxes_xyxy=boxes_xyxy)
    assert len(replace(targets_of(3), boxes_xyxy=boxes_xyxy.to("meta"))) == 3  # where the host would wait


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ignore", torch.int64), ("ignore", torch.uint8), ("image", torch.uint8), ("labels", torch.float32)],
)
def test_indices_and_masks_of_another_kind_are_refused(name, kind):
    """~ignore of whole numbers is -1 and -2, which are rows from the end."""
    targets = targets_of(3, None)
    with pytest.raises(ValueError, match="chosen: found int64, expected bool"):
        targets.of_images(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"{name}: found {str(kind).removeprefix('torch.')}, expected"):
        replace(targets, **{name: getattr(targets, name).to(kind)})
