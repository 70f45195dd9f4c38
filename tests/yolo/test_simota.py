"""SimOTA against loops, on scenes where the answer is known, and against wrong variants of itself and of the losses."""

import math

import numpy as np
import pytest
import torch

from structures import Targets
from tests.conftest import ROOT
from tests.distill.losses.mutants.machinery import Edit, apply_edit
from tests.reference import yolo_losses as reference
from tests.yolo.test_losses import ANCHORS, GRIDS, STRIDES, K, scene, targets_of, v5_logits, v7, values
from yolo import losses
from yolo.assigners import AnchorMatches
from yolo.simota import class_cost, simota_matches

COUNTS = (0, 1, 12, 30)


def candidates_of(rows, locations):
    """Candidates of one image, all of level 0."""
    rows, locations = torch.tensor(rows, dtype=torch.int64), torch.tensor(locations, dtype=torch.int64)
    return AnchorMatches(rows, torch.zeros_like(rows), locations, torch.zeros_like(rows))


def choose(boxes, rows, locations, predicted, logits=None, labels=None, assign=simota_matches, **options):
    """(row, location) of what one image learns, by boxes and class logits (C, K); the objectness is certain."""
    predicted = torch.tensor(predicted, dtype=torch.float64).reshape(-1, 4)
    logits = torch.zeros(len(predicted), 2) if logits is None else torch.tensor(logits)
    matches = assign(
        candidates_of(rows, locations), boxes_xyxy=predicted, objectness_logits=torch.full((len(predicted),), 9.0),
        class_logits=logits, targets=targets_of(boxes, labels or [0] * len(boxes), [0] * len(boxes)), **options,
    )  # fmt: skip
    return list(zip(matches.gt_index.tolist(), matches.location.tolist()))


# ------------------------------------------------------------------------------------------------ checks of an assigner


def matches_the_reference(assign):
    """Crowded scenes: shared locations, objects without a match of their own, ignored and empty boxes."""
    for seed, count in enumerate(COUNTS):
        targets, make = scene(40 + seed, count=count, ignored=0.2)
        boxes = targets.boxes_xyxy.clone()
        boxes[1::7, 2] = boxes[1::7, 0] + 0.5  # fits no anchor
        boxes[2::7, 2:] = boxes[2::7, :2]  # no area
        targets = Targets(boxes, targets.labels, targets.image, targets.ignore)
        logits = v5_logits(make)
        columns = (targets.boxes_xyxy, targets.labels, targets.image, targets.ignore)
        expected = reference.yolov7_matches(
            *(x.detach().numpy() for x in logits), GRIDS, STRIDES, ANCHORS.numpy(), *(x.numpy() for x in columns)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "simota_matches", assign)
            names = ("box_logits", "objectness_logits", "class_logits")
            got = losses.yolov7_matches(
                **dict(zip(names, logits)), grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets
            )
        assert [*zip(got.gt_index.tolist(), got.image.tolist(), got.location.tolist(), got.level.tolist())] == [
            match[:4] for match in expected
        ]


def counts_by_overlap(assign):
    """Exact predictions have IoU 1: an object takes as many as there are, up to `topk`; poor ones give it one."""
    box, far = [8.0, 8, 24, 24], [40.0, 40, 60, 60]
    for exact in (1, 3, 12):
        predicted = [box] * exact + [far] * 3
        got = choose([box], [0] * (exact + 3), range(exact + 3), predicted, assign=assign)
        # IoU is 1 minus 4e-10 (the eps of the union), so the sum of n of them is rounded down to n - 1
        assert got == [(0, location) for location in range(max(1, min(exact, 10) - 1))]


def shared_goes_to_the_cheapest(assign):
    """One location, chosen by two objects as two candidates: both go to the object it overlaps more."""
    small, large = [8.0, 8, 24, 24], [8.0, 8, 30, 30]
    got = choose([small, large], [0, 1], [5, 5], [large, large], assign=assign)
    assert got == [(1, 5), (1, 5)]


def copies_are_no_competition(assign):
    """An object that takes both copies of a location keeps it, though another, content elsewhere, has a lower cost."""
    a, b = [8.0, 8, 24, 24], [8.0, 8, 24, 14]
    at5, at8, at9 = [8.0, 8, 24, 23], [8.0, 20, 24, 24], b
    class_of_b = [[-6.0, 6.0]] * 4
    got = choose([a, b], [0, 1, 0, 1], [5, 5, 8, 9], [at5, at5, at8, at9], class_of_b, [0, 1], assign=assign)
    assert got == [(0, 5), (0, 5), (1, 9)]


def ties_prefer_own_then_lower(assign):
    """Equal costs: an object learns its own candidate, not the lower one of another object."""
    a, b = [8.0, 8, 24, 24], [8.0, 8, 24, 24]
    predicted = [[8.0, 8, 24, 16]] * 3
    assert choose([a, b], [1, 0, 0], [4, 5, 6], predicted, assign=assign) == [(1, 4), (0, 5)]


def classes_count(assign):
    """Of two locations with equal boxes an object takes the one that has its class."""
    box, predicted = [8.0, 8, 24, 24], [[8.0, 8, 24, 16]] * 2
    for label in (0, 1):
        got = choose([box], [0, 0], [4, 5], predicted, [[3.0, -3], [-3, 3]], [label], assign=assign)
        assert got == [(0, 4 + label)]


def nan_is_chosen(assign):
    box = [8.0, 8, 24, 24]
    assert (0, 7) in choose([box], [0, 0], [6, 7], [[8.0, 8, 24, 22], [math.nan] * 4], assign=assign)


CHECKS = (
    classes_count, counts_by_overlap, shared_goes_to_the_cheapest, copies_are_no_competition,
    ties_prefer_own_then_lower, nan_is_chosen, matches_the_reference,
)  # fmt: skip
MUTANTS = {
    "floor becomes ceiling": Edit(".floor()", ".ceil()"),
    "objects without overlap learn nothing": Edit(".clamp(min=1).floor()", ".floor()"),
    "one location each": Edit(".sum(1, keepdim=True).nan_to_num()", ".amax(1, keepdim=True).nan_to_num()"),
    "counts all overlaps": Edit("min(topk, len(c))", "len(c)"),
    "overlap does not cost": Edit("cost - iou_weight", "cost - 0 * iou_weight"),
    "overlap costs once": Edit("iou_weight * overlap", "overlap"),
    "overlap is cheap": Edit("cost - iou_weight", "cost + iou_weight"),
    "classes do not cost": Edit("cost = class_cost(", "cost = 0 * class_cost("),
    "objectness does not cost": Edit(" + F.logsigmoid(objectness_logits)[:, None]", " * 2", within="class_cost"),
    "product, not its root": Edit("[:, None]) / 2", "[:, None])", within="class_cost"),
    "its own class alone": Edit(" - log_not_q.sum(1)", "", within="class_cost"),
    "other classes are rewarded": Edit(" - log_not_q.sum(1)", " + log_not_q.sum(1)", within="class_cost"),
    "dearest first": Edit(".argsort(dim=1, stable=True))\n", ".argsort(dim=1, stable=True, descending=True))\n"),
    "order for rank": Edit("by_cost.argsort(dim=1) < count", "by_cost < count"),
    "others before its own": Edit("candidates.gt_index[c] != rows", "candidates.gt_index[c] == rows"),
    "shared goes to the dearest": Edit("cost.argmin(0)", "cost.argmax(0)"),
    "shared goes to the first": Edit("torch.where(is_shared, cost.argmin(0), chooses.int().argmax(0))",
                                     "chooses.int().argmax(0)"),
    "all go to the cheapest": Edit("torch.where(is_shared, cost.argmin(0), chooses.int().argmax(0))",
                                   "cost.argmin(0)"),
    "shared within a candidate alone": Edit("is_shared = ((claims > 0).sum(0) > 1)[place]",
                                            "is_shared = chooses.sum(0) > 1"),
    "copies share with themselves": Edit("(claims > 0).sum(0) > 1", "claims.sum(0) > 1"),
    "its matches alone": Edit("owner = torch.where(", "chooses &= candidates.gt_index[c] == rows[:, None]\n"
                              "        owner = torch.where("),
    "ignored objects choose": Edit("targets.is_learnt & ", ""),
    "objects of other images": Edit("(targets.is_learnt & (targets.image == image))", "targets.is_learnt"),
    "nan is dear": Edit("nan=-torch.inf", "nan=torch.inf"),
}  # fmt: skip


def test_the_document_counts_the_wrong_variants():
    count = len(MUTANTS) + len(LOSS_MUTANTS)
    assert f"| {count} of {count} |" in (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_holds(check):
    check(simota_matches)


@pytest.mark.parametrize("wrong", MUTANTS)
def test_wrong_assignment_is_noticed(wrong):
    mutant = apply_edit(simota_matches, MUTANTS[wrong])
    with pytest.raises(AssertionError):
        for check in CHECKS:
            check(mutant)


# ------------------------------------------------------------------------------------------------ losses of its matches

LOSS_MUTANTS = {
    "overlap instead of its loss": Edit("(weight * (1 - ciou))", "(weight * ciou)"),
    "all levels together": Edit("[matches.level]  # 1 / |M_l| (M,)", ".sum()"),
    "sum of classes": Edit(".mean(-1)).sum()", ".sum(-1)).sum()"),
    "negative overlap as target": Edit("ciou.detach().clamp(min=0)", "ciou.detach()"),
    "target of one": Edit("ciou.detach().clamp(min=0)", "torch.ones_like(ciou)"),
    "levels alike": Edit("sizes, balance)", "sizes, (1.0, 1.0, 1.0))"),
    "ignored regions are background": Edit("] = -1", "] = 0"),
    "matches by shape": Edit(
        "ciou = matched_ciou(",
        "matches = anchor_ratio_matches(grid_sizes=grid_sizes, strides=strides, anchors=anchors, targets=targets)\n"
        "    ciou = matched_ciou(",
    ),
}


def matches_the_loss_of_the_reference(compute):
    for seed, count in enumerate(COUNTS):
        targets, make = scene(50 + seed, count=count, ignored=0.2)
        logits = v5_logits(make)
        columns = (targets.boxes_xyxy, targets.labels, targets.image, targets.ignore)
        arrays = [x.detach().numpy() for x in logits]
        expected, _ = reference.yolov7(*arrays, GRIDS, STRIDES, ANCHORS.numpy(), *(x.numpy() for x in columns))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "yolov5_losses", compute)
            got = v7(*logits, targets)
        assert values(got) == pytest.approx(expected, rel=1e-9)
        assert not torch.autograd.grad(got["obj"], logits[0], allow_unused=True)[0]  # the target is detached


def test_losses_hold():
    matches_the_loss_of_the_reference(losses.yolov5_losses)


@pytest.mark.parametrize("wrong", LOSS_MUTANTS)
def test_wrong_loss_is_noticed(wrong):
    with pytest.raises(AssertionError):
        matches_the_loss_of_the_reference(apply_edit(losses.yolov5_losses, LOSS_MUTANTS[wrong]))


# ------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["usual", "saturated"])
def test_the_cost_of_classes_is_a_cross_entropy(scale):
    rng = np.random.default_rng(0)
    objectness, classes = scale * rng.normal(size=6), scale * rng.normal(size=(6, K))
    labels = np.array([2, 0, 3])
    got = class_cost(torch.tensor(objectness), torch.tensor(classes), torch.tensor(labels))
    assert got.isfinite().all()
    if scale == 1:
        q = np.sqrt(1 / (1 + np.exp(-classes)) / (1 + np.exp(-objectness[:, None])))
        for g, label in enumerate(labels):
            one_hot = np.arange(K) == label
            expected = -np.where(one_hot, np.log(q), np.log(1 - q)).sum(1)
            np.testing.assert_allclose(got[g].numpy(), expected, rtol=1e-12)


def test_a_location_learns_one_object():
    for seed in range(6):
        targets, make = scene(60 + seed, count=40)
        logits = [x.detach() for x in v5_logits(make)]
        names = ("box_logits", "objectness_logits", "class_logits")
        matches = losses.yolov7_matches(
            **dict(zip(names, logits)), grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets
        )
        owners = {}
        for row, image, location in zip(matches.gt_index.tolist(), matches.image.tolist(), matches.location.tolist()):
            assert owners.setdefault((image, location), row) == row
        assert len(matches.gt_index) > len(owners)  # some are learnt several times


def test_half_precision_chooses_as_float32():
    targets, make = scene(70, count=20, dtype=torch.float32)
    logits = [x.detach().to(torch.bfloat16) for x in v5_logits(make)]
    names = ("box_logits", "objectness_logits", "class_logits")
    grid = dict(grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets)
    half = losses.yolov7_matches(**dict(zip(names, logits)), **grid)
    full = losses.yolov7_matches(**dict(zip(names, (x.float() for x in logits))), **grid)
    assert all(
        torch.equal(getattr(half, name), getattr(full, name)) for name in ("gt_index", "image", "location", "level")
    )
