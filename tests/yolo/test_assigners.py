"""The assigners against loops over objects and cells, on scenes where the answer is known, and on awkward boxes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.host_waits import host_waits
from structures import Targets
from tests.golden.recipe import uniform
from tests.reference import yolo_losses as reference
from yolo import assigners
from yolo.assigners import (
    anchor_ratio_matches,
    make_anchors,
    make_points,
    plain_task_aligned_assignment,
    task_aligned_assignment,
)

GRIDS, STRIDES = [(8, 8), (4, 4), (2, 2)], [8, 16, 32]  # 64 x 64 pixels, A = 84
ANCHORS = torch.tensor([[[5, 6], [8, 14], [15, 11]], [[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]]])
ANCHORS = ANCHORS.double()  # (3, 3, 2) pixels
POINTS, STEPS = make_points(GRIDS, STRIDES, dtype=torch.float64)


def targets_of(boxes, labels=None, image=None, ignore=None):
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
    N = len(boxes)
    return Targets(
        boxes,
        torch.zeros(N, dtype=torch.int64) if labels is None else torch.as_tensor(labels),
        torch.zeros(N, dtype=torch.int64) if image is None else torch.as_tensor(image),
        torch.zeros(N, dtype=torch.bool) if ignore is None else torch.as_tensor(ignore),
    )


def assign(logits, predicted, targets, assigner=task_aligned_assignment, **options):
    return assigner(class_logits=logits, boxes_xyxy=predicted, points=POINTS, strides=STEPS, targets=targets, **options)


def cells_of_equal_merit(box, B=1, K=1):
    """Every location predicts `box` with the same score."""
    return torch.zeros(B, 84, K).double(), torch.tensor(box).double().expand(B, 84, 4).clone()


# ------------------------------------------------------------------------------------------------ the grids


def test_points_are_cell_centers_level_by_level():
    points, strides = make_points([(2, 3), (1, 2)], [8, 16])
    assert points.tolist() == reference.cell_centers([(2, 3), (1, 2)]).tolist()
    assert points[:4].tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5]]  # x first, row by row
    assert strides[:, 0].tolist() == [8] * 6 + [16] * 2
    assert make_points([(2, 3)], [8], dtype=torch.float64)[0].dtype == torch.float64


def test_anchor_order_is_level_anchor_row_column():
    grids = [(2, 3), (1, 2)]
    points, strides, sizes = make_anchors(grids, [8, 16], ANCHORS[:2])
    start = 0
    for level, (h, w) in enumerate(grids):
        for anchor in range(3):
            for y in range(h):
                for x in range(w):
                    index = start + (anchor * h + y) * w + x
                    assert points[index].tolist() == [x + 0.5, y + 0.5]
                    assert sizes[index].tolist() == ANCHORS[level, anchor].tolist()
                    assert strides[index].item() == [8, 16][level]
        start += 3 * h * w
    assert len(points) == start


# ------------------------------------------------------------------------------------------------ task-aligned


def random_predictions(rng, boxes, image, B, K):
    """Half of the locations predict near an object of their image, so that many compete; others anything."""
    predicted = np.sort(rng.uniform(-5, 70, (B, 84, 2, 2)), axis=2).reshape(B, 84, 4)
    for b in range(B):
        rows = np.flatnonzero(image == b)
        for a in range(84):
            if len(rows) and rng.random() < 0.6:
                predicted[b, a] = boxes[rng.choice(rows)] + rng.normal(scale=2, size=4)
    predicted[..., 2:] = np.maximum(predicted[..., 2:], predicted[..., :2])
    return predicted, rng.normal(-1, 2, (B, 84, K))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [0, 1, 12, 60])
def test_task_aligned_matches_reference(seed, count):
    rng = np.random.default_rng([seed, count])
    B, K = 3, 4
    boxes, labels, image, ignore = reference.random_objects(rng, B, count, 64, K, ignored=0.1)
    boxes[: count // 6] = np.clip(boxes[: count // 6], 20, 60)  # crowd some of them, duplicates and empty ones too
    boxes[::4, 2] = boxes[::4, 0] + rng.uniform(0.5, 17, len(boxes[::4]))  # sides around 8 and 16 px
    predicted, logits = random_predictions(rng, boxes, image, B, K)
    got = assign(torch.tensor(logits), torch.tensor(predicted), targets_of(boxes, labels, image, ignore))
    for b in range(B):
        rows = np.flatnonzero((image == b) & ~ignore)
        owner, score = reference.task_aligned(
            1 / (1 + np.exp(-logits[b])), predicted[b], (POINTS * STEPS).numpy(), boxes[rows], labels[rows]
        )
        expected = np.where(owner >= 0, rows[owner] if len(rows) else -1, -1)
        assert got.gt_index[b].tolist() == expected.tolist()
        dense = np.zeros((84, K))
        dense[owner >= 0, labels[expected[owner >= 0]]] = score[owner >= 0]
        np.testing.assert_allclose(got.target_scores[b].numpy(), dense, rtol=1e-9, atol=1e-12)
    assert torch.equal(got.is_positive, got.gt_index >= 0)


def awkward_scene(kind, seed, count=40, B=3, K=4):
    """Logits, predictions and targets (the last fifth ignored) of which many are equal, without area, or nan."""
    rng = np.random.default_rng([seed, count])
    boxes, labels, image, ignore = reference.random_objects(rng, B, count, 64, K, ignored=0.2)
    if kind == "equal":
        boxes[: count // 3] = boxes[:1]
    predicted, logits = random_predictions(rng, boxes, image, B, K)
    if kind == "equal":
        predicted[:, ::3], logits = [0, 0, 64, 64], np.round(logits / 3)
    if kind == "without area":
        boxes[::3, 2:] = boxes[::3, :2]
        boxes[1::3, 2] = boxes[1::3, 0] - 5
        labels[ignore] = 99  # nobody's business
    if kind == "nan":
        predicted[rng.random((B, 84)) < 0.1] = np.nan
        logits[rng.random(logits.shape) < 0.1] = np.nan
    return torch.tensor(logits), torch.tensor(predicted), targets_of(boxes, labels, image, ignore)


@pytest.mark.parametrize("kind", ["usual", "equal", "without area"])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_fast_form_equals_the_specification(kind, count):
    """Also where objects and locations are equal, ignored, turned inside out or without area."""
    for seed in range(8):
        logits, predicted, targets = awkward_scene(kind, seed, count, B=2)
        for options in ({}, {"topk": 3, "alpha": 1.0, "beta": 2.0}):
            got = assign(logits, predicted, targets, **options)
            expected = assign(logits, predicted, targets, plain_task_aligned_assignment, **options)
            for name in ("is_positive", "gt_index", "is_ignored"):
                assert torch.equal(getattr(got, name), getattr(expected, name)), name
            torch.testing.assert_close(got.target_scores, expected.target_scores, rtol=1e-12, atol=0)
            assert got.max_positives == expected.max_positives
            assert got.is_positive.any() or count < 40


def test_forms_agree_on_empty_batches():
    logits, predicted = torch.zeros(0, 84, 2), torch.zeros(0, 84, 4)
    for assigner in (task_aligned_assignment, plain_task_aligned_assignment):
        got = assign(logits, predicted, Targets.empty(), assigner)
        assert got.is_positive.shape == (0, 84) and got.target_scores.shape == (0, 84, 2)


@pytest.mark.parametrize("kind", ["usual", "equal", "without area", "nan"])
@pytest.mark.parametrize("count", [0, 1, 40, 200])
def test_all_pairs_make_the_same_assignment_as_the_candidates(kind, count, monkeypatch):
    """What a GPU lists, whose host does not ask how many candidates there are."""
    for seed in range(2):
        logits, predicted, targets = awkward_scene(kind, seed, count)
        candidates = assign(logits, predicted, targets, topk=5)
        with monkeypatch.context() as patch, host_waits(logits.device) as waits:
            patch.setattr(assigners, "is_asynchronous", lambda device: True)
            all_pairs = assign(logits, predicted, targets, topk=5)
        assert not waits
        for name in ("is_positive", "gt_index", "is_ignored"):
            assert torch.equal(getattr(all_pairs, name), getattr(candidates, name)), name
        # Not bit for bit: vector and scalar arithmetic round differently, and which is used depends on the place.
        scores = all_pairs.target_scores, candidates.target_scores
        torch.testing.assert_close(*scores, rtol=1e-12, atol=0, equal_nan=True)
        assert all_pairs.max_positives == candidates.max_positives == 5 * count
        assert kind == "nan" or candidates.is_positive.sum() <= 5 * count


def test_too_many_pairs_are_not_all_listed(monkeypatch):
    logits, predicted, targets = awkward_scene("usual", 0)
    expected = assign(logits, predicted, targets)
    monkeypatch.setattr(assigners, "is_asynchronous", lambda device: True)
    monkeypatch.setattr(assigners, "MAX_PAIRS", 40 * 84 - 1)
    with host_waits(logits.device) as waits:
        got = assign(logits, predicted, targets)
    assert waits and torch.equal(got.target_scores, expected.target_scores)


@pytest.mark.parametrize("max_positives", [None, 3, 4, 7, 100])
def test_positives_are_listed_in_order_and_filled_up(max_positives, monkeypatch):
    is_positive = torch.zeros(2, 10, dtype=torch.bool)
    is_positive[0, 3] = is_positive[1, 0] = is_positive[1, 9] = True
    given = assigners.Assignment(is_positive, is_positive.long() - 1, is_positive[..., None].double(), ~is_positive)
    given = replace(given, max_positives=max_positives)
    image, location, is_real = given.positives()
    assert list(zip(image.tolist(), location.tolist())) == [(0, 3), (1, 0), (1, 9)] and is_real.all()
    monkeypatch.setattr(assigners, "is_asynchronous", lambda device: True)
    image, location, is_real = given.positives()
    assert list(zip(image.tolist(), location.tolist()))[:3] == [(0, 3), (1, 0), (1, 9)]
    assert len(image) == min(max_positives or 3, 20) and is_real.tolist() == [i < 3 for i in range(len(image))]
    filled = (image * 10 + location)[3:]
    assert ((filled >= 0) & (filled < 20)).all() and len(set(filled.tolist())) == len(filled)


def test_golden_assignment(golden):
    arrays, meta = golden("loss_yolov8")
    H, W = meta["height"], meta["width"]
    rows = torch.tensor(arrays["targets"])
    cx, cy, w, h = (rows[:, 2:] * torch.tensor([W, H, W, H])).unbind(1)
    targets = targets_of(
        torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), 1), rows[:, 1].long(), rows[:, 0].long()
    )
    points, strides = make_points([(H // s, W // s) for s in STRIDES], STRIDES, dtype=torch.float64)
    A = len(points)
    z = torch.tensor(3 * uniform(meta["salt"] + "v8.boxes", (3, 64, A))).unflatten(1, (4, 16))
    ltrb = (z.softmax(2) * torch.arange(16.0)[:, None]).sum(2).transpose(1, 2)
    predicted = torch.cat((points - ltrb[..., :2], points + ltrb[..., 2:]), -1) * strides
    logits = torch.tensor(2 * uniform(meta["salt"] + "v8.scores", (3, meta["nc"], A)) - 2).transpose(1, 2)
    got = task_aligned_assignment(
        class_logits=logits, boxes_xyxy=predicted, points=points, strides=strides, targets=targets
    )
    assert np.array_equal(got.is_positive.numpy(), arrays["foreground"])
    first_row = torch.searchsorted(targets.image, torch.arange(3))  # the file counts objects within their image
    index = got.gt_index - first_row[:, None]
    assert torch.equal(index[got.is_positive], torch.tensor(arrays["assigned_gt"])[got.is_positive])


def test_shared_location_goes_to_the_largest_overlap_even_if_it_did_not_choose_it():
    logits, predicted = cells_of_equal_merit([0, 0, 64, 64], K=2)
    a, b, c = [0, 0, 64, 60.0], [0, 0, 64, 58.0], [0, 0, 64, 62.0]
    logits[0, :, 1] = -30  # object c's label has no score anywhere: at most an accident chooses for it
    logits[0, 40:, 1] = 0
    got = assign(logits, predicted, targets_of([a, b, c], labels=[0, 0, 1]), topk=5)
    # a and b choose locations 0..4, c chooses 40..44; c overlaps most, so it takes the shared ones as well
    assert got.gt_index[0, :5].tolist() == [2] * 5 and got.gt_index[0, 40:45].tolist() == [2] * 5
    assert got.is_positive.sum() == 10
    assert got.target_scores[0, 40:45, 1].min() > 0.9 and (got.target_scores[0, :, 0] == 0).all()


def test_equal_candidates_lower_location_first_and_equal_objects_lower_row_first():
    logits, predicted = cells_of_equal_merit([4, 4, 60, 60])
    got = assign(logits, predicted, targets_of([[4, 4, 60, 60]] * 3), topk=7)
    inside = ((POINTS * STEPS > 4) & (POINTS * STEPS < 60)).all(-1).nonzero()[:7, 0]
    assert got.is_positive[0].nonzero()[:, 0].tolist() == inside.tolist()
    assert (got.gt_index[got.is_positive] == 0).all()


def test_best_location_of_an_object_gets_its_overlap_as_target():
    """max_a of the normalised scores is max_a u_ga, and a worse location gets the share of its metric."""
    logits, predicted = cells_of_equal_merit([0, 0, 32, 32])
    predicted[0, 9] = torch.tensor([0, 0, 16, 32.0])  # overlap 1/2, and no shape like the object's
    got = assign(logits, predicted, targets_of([[0, 0, 32, 32]]), topk=100)
    scores = got.target_scores[0, :, 0]
    assert scores.max().item() == pytest.approx(1, abs=1e-6)
    ciou = reference.ciou([0, 0, 16, 32], [0, 0, 32, 32])
    assert scores[9].item() == pytest.approx(ciou**6, rel=1e-5)  # (1/2)^alpha u^beta against (1/2)^alpha 1^beta


def test_images_do_not_touch_one_another():
    rng = np.random.default_rng(4)
    boxes, labels, image, ignore = reference.random_objects(rng, 3, 40, 64, 4)
    predicted, logits = map(torch.tensor, random_predictions(rng, boxes, image, 3, 4))
    both = assign(logits, predicted, targets_of(boxes, labels, image, ignore))
    for b in range(3):
        rows = np.flatnonzero(image == b)
        alone = assign(logits[b : b + 1], predicted[b : b + 1], targets_of(boxes[rows], labels[rows]))
        torch.testing.assert_close(alone.target_scores[0], both.target_scores[b], rtol=0, atol=0)
        expected = torch.tensor(rows)[alone.gt_index[0]].where(alone.is_positive[0], -1)
        assert torch.equal(expected, both.gt_index[b])


def test_one_pixel_box_between_the_centers_is_still_learnt():
    logits, predicted = cells_of_equal_merit([15, 15, 18, 18])
    got = assign(logits, predicted, targets_of([[15.6, 15.6, 16.6, 16.6]]))
    centers = (POINTS * STEPS)[got.is_positive[0]]
    assert len(centers) == 6  # four of stride 8, one of stride 16, one of stride 32
    assert ((centers - 16.1).abs() < 8).all()
    assert got.target_scores.max() > 0


def pool_sizes(widths, heights, count=40):
    """Mean number of candidates of boxes about `count` random centers: all of them are positives, of equal merit."""
    centers = np.random.default_rng(0).uniform(16, 48, (count, 2))
    sizes = []
    for width, height in zip(widths, heights):
        half = np.array([width / 2, height / 2])
        boxes = np.concatenate((centers - half, centers + half), axis=1)
        found = 0
        for box in boxes:
            logits, predicted = cells_of_equal_merit(box)
            found += int(assign(logits, predicted, targets_of([box]), topk=84).is_positive.sum())
        sizes.append(found / count)
    return sizes


def test_larger_objects_never_have_fewer_candidates():
    sides = [1, 4, 7.9, 8, 8.1, 12, 15.9, 16, 16.1, 20, 28]
    pool = pool_sizes(sides, sides)
    assert pool == sorted(pool) and len(set(pool[:8])) == 1 and pool[0] > 4  # below 16 px all count as 16
    assert pool[-1] > pool[-2] > pool[7]
    for flat in (pool_sizes(sides, [30] * len(sides)), pool_sizes([30] * len(sides), sides)):  # each side by itself
        assert flat == sorted(flat) and len(set(flat[:8])) == 1 and flat[-1] > flat[0] > pool[0]


def test_ultralytics_assigns_the_same_where_its_claims_without_merit_are_left_out():
    """200 batches of any sizes of objects. Theirs lets objects claim locations of t = 0; such claims are left out."""
    tal = pytest.importorskip("ultralytics.utils.tal")

    class WithMerit(tal.TaskAlignedAssigner):
        def select_topk_candidates(self, metrics, topk_mask=None):
            return super().select_topk_candidates(metrics, topk_mask) * (metrics > 0)

    B, K, G = 2, 3, 9
    peer = WithMerit(topk=10, num_classes=K, alpha=0.5, beta=6.0, stride=STRIDES)
    for seed in range(200):
        rng = np.random.default_rng([7, seed])
        corner, sides = (
            rng.uniform(0, 50, (B, G, 2)),
            rng.uniform(2, 40, (B, G, 2)) ** rng.choice([0.5, 1.0], (B, G, 1)),
        )
        boxes, labels = np.concatenate((corner, corner + sides), axis=2), rng.integers(K, size=(B, G))
        flat = targets_of(boxes.reshape(-1, 4), labels.reshape(-1), np.repeat(np.arange(B), G))
        predicted, logits = map(torch.tensor, random_predictions(rng, boxes.reshape(-1, 4), flat.image.numpy(), B, K))
        got = assign(logits, predicted, flat)
        _, _, scores, is_positive, index = peer(
            logits.sigmoid(), predicted, POINTS * STEPS, torch.tensor(labels)[..., None], torch.tensor(boxes),
            torch.ones(B, G, 1, dtype=torch.bool),
        )  # fmt: skip
        assert torch.equal(got.is_positive, is_positive)
        assert torch.equal(got.gt_index[is_positive], (index + G * torch.arange(B)[:, None])[is_positive])
        torch.testing.assert_close(got.target_scores, scores, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    "box",
    [[20, 20, 20, 20], [20, 10, 20, 50], [10, 20, 50, 20], [50, 50, 10, 10], [-90, -90, -10, -10], [100, 0, 164, 64]],
    ids=["point", "upright line", "flat line", "inside out", "left of the image", "right of the image"],
)
def test_boxes_that_nothing_can_learn(box):
    logits, predicted = cells_of_equal_merit([0, 0, 64, 64])
    got = assign(logits, predicted, targets_of([box]))
    assert not got.is_positive.any() and (got.gt_index == -1).all() and (got.target_scores == 0).all()
    matches = anchor_ratio_matches(grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets_of([box]))
    assert len(matches.gt_index) == 0


def test_ignored_rows():
    logits, predicted = cells_of_equal_merit([0, 0, 64, 64])
    targets = targets_of([[0, 0, 64, 64], [0, 0, 20, 20], [0, 0, 64, 64]], [0, 0, 0], [0, 0, 1], [False, True, True])
    logits, predicted = logits.repeat(2, 1, 1), predicted.repeat(2, 1, 1)
    got = assign(logits, predicted, targets, topk=2)
    assert got.gt_index[0, :2].tolist() == [0, 0] and got.is_positive.sum() == 2  # an ignored row teaches nothing
    is_inside = ((POINTS * STEPS) < 20).all(-1)
    assert torch.equal(got.is_ignored[0], is_inside & ~got.is_positive[0])  # a positive stays a positive
    assert got.is_ignored[1].all()


def test_many_objects_and_many_classes():
    rng = np.random.default_rng(5)
    boxes, labels, image, ignore = reference.random_objects(rng, 2, 400, 64, 80)
    boxes[100:200] = boxes[:100]
    labels[100:200], image[100:200] = labels[:100], image[:100]  # duplicates
    predicted, logits = map(torch.tensor, random_predictions(rng, boxes, image, 2, 80))
    got = assign(logits.float(), predicted.float(), targets_of(boxes, labels, image, ignore))
    assert got.target_scores.isfinite().all() and got.target_scores.max() <= 1 and got.target_scores.min() >= 0
    assert torch.equal(got.target_scores.sum(-1) > 0, got.is_positive)
    assert not ((got.gt_index >= 100) & (got.gt_index < 200)).any()  # the first of two equal rows


def test_saturated_predictions():
    logits, predicted = cells_of_equal_merit([0, 0, 64, 64])
    for value in (-1e4, 1e4):
        got = assign(logits + value, predicted, targets_of([[0, 0, 64, 64]]))
        assert got.target_scores.isfinite().all()


def test_no_objects_at_all():
    logits, predicted = cells_of_equal_merit([0, 0, 64, 64], B=2, K=3)
    got = assign(logits, predicted, Targets.empty())
    assert got.target_scores.shape == (2, 84, 3) and got.target_scores.sum() == 0
    assert not got.is_positive.any() and not got.is_ignored.any() and (got.gt_index == -1).all()
