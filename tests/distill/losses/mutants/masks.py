"""Masks: their checks against loops over pixels, and wrong variants of each."""

import numpy as np
import torch

from distill.losses.masks import anchor_mask, box_density, box_mask, level_maps, positive_masks, score_maps
from structures import Targets
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.reference import feature_distillation as reference

GRID, IMAGE_SIZE = (5, 7), (40, 56)  # stride 8
ANCHORS = np.array([[8.0, 8.0], [12.0, 24.0], [40.0, 20.0]])


def objects(seed: int = 0, count: int = 12) -> dict[str, np.ndarray]:
    """Boxes of every kind on multiples of 1/4, so that float32 is exact: tiny, large, across the border, ignored."""
    rng = np.random.default_rng(seed)
    center, size = rng.uniform(-4, 60, (count, 2)), rng.choice([1, 3, 10, 30, 70], (count, 2))
    boxes = np.round(np.concatenate([center - size / 2, center + size / 2], 1) * 4) / 4
    special = [[12, 12, 20, 20], [5, 5, 5, 9], [10, 10, 4, 4], [-30, 3, -10, 20], [0, 0, 56, 40], [56, 40, 60, 50]]
    boxes = np.concatenate([boxes, special])
    image = rng.integers(0, 4, len(boxes))  # image 4 of 5 stays empty
    return dict(boxes=boxes, image=image, ignore=rng.random(len(boxes)) < 0.3)


def as_targets(boxes, image, ignore) -> Targets:
    return Targets(
        torch.tensor(boxes, dtype=torch.float32),
        torch.zeros(len(boxes)).long(),
        torch.tensor(image),
        torch.tensor(ignore),
    )


def matches(reference_mask, dtype, **others):
    """The mask equals the loops', for many objects, for none, for all of them ignored, and for one pixel."""

    def check_mask(mask) -> None:
        none, ignored = objects(count=0), objects(1)
        cases = [(objects(s), GRID) for s in range(4)] + [(objects(4), (1, 1)), (objects(5), (80, 56))]
        cases += [({k: v[:0] for k, v in none.items()}, GRID), (ignored | {"ignore": ignored["ignore"] | True}, GRID)]
        for rows, grid_size in cases:
            where = dict(batch_size=5, grid_size=grid_size, image_size=IMAGE_SIZE)
            got = mask(as_targets(**rows), **where, **{k: torch.as_tensor(v) for k, v in others.items()})
            assert got.shape == (5, 1, *grid_size) and got.dtype == dtype and not got.requires_grad
            expected = reference_mask(**rows, **where, **others)
            np.testing.assert_allclose(got.double().numpy(), expected.astype(float), rtol=1e-6)
            assert not got[4].any()

    return check_mask


def check_small_object_is_kept(mask) -> None:
    box = Targets(torch.tensor([[9.0, 1.0, 10.0, 2.0]]), torch.tensor([0]), torch.tensor([0]), torch.tensor([False]))
    got = mask(box, batch_size=1, grid_size=GRID, image_size=IMAGE_SIZE)
    assert got.sum() == 1 and got[0, 0, 0, 1] == 1


def check_density_sums_to_objects(mask) -> None:
    """Disjoint objects weigh 1 each."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [16, 0, 56, 8], [0, 16, 30, 40]])
    apart = Targets(boxes, torch.zeros(3).long(), torch.zeros(3).long(), torch.zeros(3).bool())
    got = mask(apart, batch_size=1, grid_size=GRID, image_size=IMAGE_SIZE)
    torch.testing.assert_close(got.sum(), torch.tensor(3.0))


def check_threshold_is_strict(mask) -> None:
    rows = objects(2)
    where = dict(batch_size=5, grid_size=GRID, image_size=IMAGE_SIZE, anchor_sizes=torch.tensor(ANCHORS))
    assert not mask(as_targets(**rows), **where, psi=1.0).any()
    half, tenth = (mask(as_targets(**rows), **where, psi=psi) for psi in (0.5, 0.1))
    assert (half <= tenth).all() and half.sum() < tenth.sum()


SCORES = "location_scores"  # the function on which score_maps rests
GRIDS = [(2, 3), (1, 2)]


def check_levels(split) -> None:
    """Location (anchor * H + y) * W + x of its level, for a head of 3 anchors per pixel and of 1."""
    for n in (1, 3):
        values = torch.arange(2 * n * 8).view(2, n * 8)
        first, second = split(values, GRIDS, n)
        assert first.shape == (2, n, 2, 3) and second.shape == (2, n, 1, 2)
        for b, a, y, x in np.ndindex(2, n, 2, 3):
            assert first[b, a, y, x] == values[b, (a * 2 + y) * 3 + x]
        for b, a, x in np.ndindex(2, n, 2):
            assert second[b, a, 0, x] == values[b, n * 6 + a * 2 + x]
    for wrong in (torch.zeros(2, 9), torch.zeros(2, 8, 1)):
        try:
            split(wrong, GRIDS, 1)
        except ValueError:
            continue
        raise AssertionError("took the wrong number of locations")


def check_positives(split) -> None:
    is_positive = torch.zeros(2, 24, dtype=torch.bool)
    is_positive[0, 6 + 4] = is_positive[1, 18 + 2 + 1] = (
        True  # anchor 1, y = 1, x = 1 of level 0; anchor 1, x = 1 of level 1
    )
    first, second = split(is_positive, grid_sizes=GRIDS, anchors_per_pixel=3)
    assert first.shape == (2, 1, 2, 3) and second.shape == (2, 1, 1, 2) and first.dtype == torch.bool
    assert first.nonzero().tolist() == [[0, 0, 1, 1]] and second.nonzero().tolist() == [[1, 0, 0, 1]]


def check_scores(split) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2, 24, 4))
    given = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    got = split(given, grid_sizes=GRIDS, anchors_per_pixel=3)
    best = 1 / (1 + np.exp(-logits.max(-1)))
    assert [m.shape for m in got] == [(2, 2, 3), (2, 1, 2)] and not got[0].requires_grad
    np.testing.assert_allclose(got[0].numpy(), best[:, :18].reshape(2, 3, 2, 3).max(1), rtol=1e-6)
    np.testing.assert_allclose(got[1].numpy(), best[:, 18:].reshape(2, 3, 1, 2).max(1), rtol=1e-6)
    assert split(given.bfloat16(), grid_sizes=GRIDS, anchors_per_pixel=3)[0].dtype == torch.float32
    objectness = rng.normal(size=(2, 24))
    scaled = split(given, grid_sizes=GRIDS, anchors_per_pixel=3, t_objectness_logits=torch.tensor(objectness))
    expected = best / (1 + np.exp(-objectness))
    np.testing.assert_allclose(scaled[0].numpy(), expected[:, :18].reshape(2, 3, 2, 3).max(1), rtol=1e-6)
    none = split(torch.zeros(2, 8, 0), grid_sizes=GRIDS)
    assert none[0].shape == (2, 2, 3) and not none[0].any()


RASTER = {
    "ignored objects learnt": Edit("targets.is_learnt & ", "", within="raster_boxes"),
    "small objects lost": Edit("inside | (holds_middle & ~inside.any(1, keepdim=True))", "inside", within="covered_1d"),
    "one pixel too many, between two centers": Edit(
        "holds_middle & ~inside.any(1, keepdim=True)", "holds_middle", "covered_1d"
    ),
    "corners of pixels": Edit(
        "torch.arange(w, device=device) + 0.5", "torch.arange(w, device=device) + 0.0", "pixel_centers"
    ),
    "closed above": Edit("(centers < high[:, None])", "(centers <= high[:, None])", within="covered_1d"),
    "height for width": Edit("width / max(w, 1)", "height / max(h, 1)", within="pixel_centers"),
    "all in the first image": Edit("image[:, None].expand", "(0 * image)[:, None].expand", within="max_over_objects"),
    "outside objects marked": Edit(
        "targets.is_learnt & (box_area(boxes) > 0)", "targets.is_learnt", within="raster_boxes"
    ),
}

CASES = [
    LossCase(
        "box_mask",
        box_mask,
        checks=(matches(reference.box_mask, torch.bool), check_small_object_is_kept),
        mutants=RASTER | {"density": Edit("batch_size) > 0", "batch_size)")},
    ),
    LossCase(
        "box_density",
        box_density,
        checks=(
            matches(reference.box_density, torch.float32),
            check_small_object_is_kept,
            check_density_sums_to_objects,
        ),
        mutants=RASTER
        | {
            "all objects alike": Edit("inside / area", "inside / 1"),
            "largest, not smallest, on overlap": Edit(
                '"amax")', '"amin", include_self=False)', within="max_over_objects"
            ),
            "sum on overlap": Edit('"amax")', '"sum")', within="max_over_objects"),
            "square root of the area": Edit("inside / area", "inside / area.sqrt()"),
        },
    ),
    LossCase(
        "anchor_mask",
        anchor_mask,
        checks=(
            matches(reference.anchor_mask, torch.bool, anchor_sizes=ANCHORS),
            matches(reference.anchor_mask, torch.bool, anchor_sizes=ANCHORS[:1], psi=0.2),
            check_threshold_is_strict,
        ),
        mutants={
            "threshold psi, not psi of the best": Edit(
                "psi * best.amax((1, 2), keepdim=True) if best.numel() else best", "psi"
            ),
            "best over all objects": Edit("best.amax((1, 2), keepdim=True)", "best.max()"),
            "not strict": Edit("best > threshold", "best >= threshold"),
            "intersection, not IoU": Edit("intersection / union", "intersection"),
            "union without the intersection": Edit(" - intersection\n", "\n"),
            "first anchor only": Edit("in anchor_sizes.tolist()", "in anchor_sizes[:1].tolist()"),
            "height and width of the anchor swapped": Edit("for width, height in", "for height, width in"),
            "ignored objects learnt": Edit("targets.is_learnt[", "(box_area(boxes) > 0)["),
            "corners of pixels": Edit(
                "torch.arange(h, device=device) + 0.5", "torch.arange(h, device=device) + 0.0", "pixel_centers"
            ),
            "overlap below zero": Edit(".clamp(min=0)", "", within="overlap_1d"),
            "half an anchor": Edit("centers + size / 2", "centers", within="overlap_1d"),
            "all in the first image": Edit("image[:, None].expand", "(0 * image)[:, None].expand", "max_over_objects"),
        },
    ),
    LossCase(
        "level_maps",
        level_maps,
        checks=(check_levels,),
        mutants={
            "pixel slowest": Edit("(anchors_per_pixel, h, w))", "(h, w, anchors_per_pixel)).permute(0, 3, 1, 2)"),
            "width first": Edit("(anchors_per_pixel, h, w))", "(anchors_per_pixel, w, h)).transpose(2, 3)"),
            "levels reversed": Edit("values.split(counts, dim=1)", "values.flip(1).split(counts, dim=1)"),
            "any number of dimensions": Edit("values.dim() != 2 or ", ""),
        },
    ),
    LossCase(
        "positive_masks",
        positive_masks,
        checks=(check_positives,),
        mutants={
            "all anchors": Edit(".any(1, keepdim=True)", ".all(1, keepdim=True)"),
            "first anchor": Edit("level.any(1, keepdim=True)", "level[:, :1]"),
            "per anchor": Edit("level.any(1, keepdim=True)", "level"),
            "one anchor assumed": Edit(", anchors_per_pixel)]", ", anchors_per_pixel)][::-1]"),
        },
    ),
    LossCase(
        "score_maps",
        score_maps,
        checks=(check_scores,),
        mutants={
            "mean class": Edit(".amax(-1)", ".mean(-1)", SCORES),
            "logits": Edit("best.sigmoid()", "best", SCORES),
            "softmax": Edit(
                "t_class_logits.float().amax(-1)", "t_class_logits.float().log_softmax(-1).amax(-1)", SCORES
            ),
            "mean anchor": Edit("level.amax(1)", "level.mean(1)"),
            "first anchor": Edit("level.amax(1)", "level[:, 0]"),
            "half precision": Edit("t_class_logits.float()", "t_class_logits", SCORES),
            "objectness forgotten": Edit("scores * t_objectness_logits.float().sigmoid()", "scores", SCORES),
            "objectness alone": Edit("scores * t_objectness_logits", "t_objectness_logits", SCORES),
            "objectness not given": Edit("(t_class_logits, t_objectness_logits)", "(t_class_logits)"),
        },
    ),
]
