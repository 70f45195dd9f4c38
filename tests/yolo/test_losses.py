"""The YOLO losses against loops in float64, their own identities, and awkward inputs."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from structures import Targets
from tests.reference import yolo_losses as reference
from yolo import losses
from yolo.assigners import anchor_ratio_matches, make_anchors, make_points

GRIDS, STRIDES = [(8, 8), (4, 4), (2, 2)], [8, 16, 32]  # 64 x 64 pixels
A8, A5, K = 84, 252, 4
POINTS, STEPS = make_points(GRIDS, STRIDES, dtype=torch.float64)
ANCHORS = torch.tensor([[[5, 6], [8, 14], [15, 11]], [[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]]])
ANCHORS = ANCHORS.double()


def targets_of(boxes, labels, image, ignore=None):
    ignore = np.zeros(len(boxes), dtype=bool) if ignore is None else ignore
    return Targets(*(torch.as_tensor(np.asarray(x)) for x in (np.reshape(boxes, (-1, 4)), labels, image, ignore)))


def scene(seed, B=3, count=12, ignored=0.0, dtype=torch.float64):
    rng = np.random.default_rng([seed, count])
    arrays = reference.random_objects(rng, B, count, 64, K, ignored)
    make = lambda *shape: torch.tensor(2 * rng.normal(size=shape), dtype=dtype).requires_grad_()
    return targets_of(*arrays), make


def v8(box_logits, class_logits, targets, **options):
    points, steps = POINTS.to(box_logits), STEPS.to(box_logits)
    return losses.yolov8_losses(
        box_logits=box_logits, class_logits=class_logits, points=points, strides=steps, targets=targets, **options
    )


def v5(box_logits, objectness_logits, class_logits, targets, matches=None, **options):
    return losses.yolov5_losses(
        box_logits=box_logits, objectness_logits=objectness_logits, class_logits=class_logits,
        grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets,
        matches=by_shape(targets) if matches is None else matches, **options,
    )  # fmt: skip


def by_shape(targets):
    return anchor_ratio_matches(grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets)


def v7(box_logits, objectness_logits, class_logits, targets, **options):
    matches = losses.yolov7_matches(
        box_logits=box_logits, objectness_logits=objectness_logits, class_logits=class_logits,
        grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets,
    )  # fmt: skip
    return v5(box_logits, objectness_logits, class_logits, targets, matches=matches, **options)


def v8_logits(make, B=3):
    return make(B, A8, 4, 16), make(B, A8, K)


def v5_logits(make, B=3):
    return make(B, A5, 4), make(B, A5), make(B, A5, K)


HEADS = {"v8": (v8, v8_logits), "v5": (v5, v5_logits), "v7": (v7, v5_logits)}
every_head = pytest.mark.parametrize("head", ["v8", "v5", "v7"])


def values(terms):
    return {name: term.item() for name, term in terms.items()}


# ------------------------------------------------------------------------------------------------ loops


@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_yolov8_matches_reference(count, ignored):
    targets, make = scene(0, count=count, ignored=ignored)
    box_logits, class_logits = v8_logits(make)
    expected, owners, _ = reference.yolov8(
        box_logits.detach().numpy(), class_logits.detach().numpy(), POINTS.numpy(), STEPS[:, 0].numpy(),
        *(x.numpy() for x in (targets.boxes_xyxy, targets.labels, targets.image, targets.ignore)),
    )  # fmt: skip
    got = values(v8(box_logits, class_logits, targets))
    assert got == pytest.approx(expected, rel=1e-9)
    assignment = losses.yolov8_assignment(
        box_logits=box_logits, class_logits=class_logits, points=POINTS, strides=STEPS, targets=targets
    )
    assert np.array_equal(assignment.gt_index.numpy(), owners)
    assert values(v8(box_logits, class_logits, targets, assignment=assignment)) == got


@pytest.mark.parametrize("head", ["v5", "v7"])
@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_anchor_heads_match_reference(count, ignored, head):
    targets, make = scene(1, count=count, ignored=ignored)
    logits = v5_logits(make)
    expected, matches = {"v5": reference.yolov5, "v7": reference.yolov7}[head](
        *(x.detach().numpy() for x in logits), GRIDS, STRIDES, ANCHORS.numpy(),
        *(x.numpy() for x in (targets.boxes_xyxy, targets.labels, targets.image, targets.ignore)),
    )  # fmt: skip
    assert values(HEADS[head][0](*logits, targets)) == pytest.approx(expected, rel=1e-9)
    grid = dict(grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets)
    names = ("box_logits", "objectness_logits", "class_logits")
    chosen = losses.yolov7_matches(**dict(zip(names, logits)), **grid) if head == "v7" else by_shape(targets)
    assignment = losses.yolov5_assignment(box_logits=logits[0], class_logits=logits[2], **grid, matches=chosen)
    last = {(b, location): n for n, b, location in matches}  # the last match of a location stays
    assert {(b, a): n for (b, a), n in np.ndenumerate(assignment.gt_index.numpy()) if n >= 0} == last


@pytest.mark.parametrize("count", [0, 1, 30])
@every_head
def test_class_scores_match_reference(head, count):
    targets, make = scene(2, count=count, ignored=0.2)
    targets = replace(targets, class_scores=(3 * make(len(targets), K)).softmax(1).detach())
    loss, logits_of = HEADS[head]
    logits = logits_of(make)
    arrays = [x.detach().numpy() for x in logits]
    columns = [getattr(targets, f.name).numpy() for f in fields(targets)]
    if head == "v8":
        expected = reference.yolov8(*arrays, POINTS.numpy(), STEPS[:, 0].numpy(), *columns)[0]
    else:
        compute = {"v5": reference.yolov5, "v7": reference.yolov7}[head]
        expected = compute(*arrays, GRIDS, STRIDES, ANCHORS.numpy(), *columns)[0]
    assert values(loss(*logits, targets)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_head
def test_one_hot_class_scores_are_labels_bit_for_bit(head, dtype):
    targets, make = scene(3, ignored=0.2, dtype=dtype)
    loss, logits_of = HEADS[head]
    logits = logits_of(make)
    found = []
    for scores in (None, torch.eye(K)[targets.labels]):
        terms = loss(*logits, replace(targets, class_scores=scores))
        found.append((values(terms), torch.autograd.grad(sum(terms.values()), logits)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


@every_head
def test_class_scores_are_taught_through_cls_alone_which_is_affine_in_them(head):
    targets, make = scene(4, ignored=0.2)
    loss, logits_of = HEADS[head]
    logits = [x.detach() for x in logits_of(make)]
    scores = [make(len(targets), K).softmax(1).detach().requires_grad_() for _ in range(2)]
    ends, slopes = [], []
    for shares in scores:
        terms = loss(*logits, replace(targets, class_scores=shares))
        assert not any(terms[name].requires_grad for name in terms if name != "cls")
        slopes += torch.autograd.grad(terms["cls"], shares)
        ends.append(terms["cls"].item())
    assert torch.equal(*slopes) and slopes[0].any() and not slopes[0][targets.ignore].any()
    assert ends[1] - ends[0] == pytest.approx(((scores[1] - scores[0]) * slopes[0]).sum().item(), rel=1e-9)


# ------------------------------------------------------------------------------------------------ identities


def test_perfect_v8_predictions():
    """Boxes that decode to the object: no CIoU loss; the class target of every positive with the same score is 1."""
    box = torch.tensor([8.0, 8.0, 56.0, 56.0]).double()
    d = torch.cat((POINTS - box[:2] / STEPS, box[2:] / STEPS - POINTS), dim=-1)  # (A, 4)
    bins = torch.arange(16).double()
    logits = (1 - (d.clamp(0, 14.99)[..., None] - bins).abs()).clamp(min=1e-30).log()[None]  # the two nearest bins
    targets = targets_of([box.numpy()], [2], [0])
    class_logits = torch.full((1, A8, K), -40.0).double()
    class_logits[..., 2] = 40
    got = losses.yolov8_assignment(
        box_logits=logits, class_logits=class_logits, points=POINTS, strides=STEPS, targets=targets
    )
    assert got.is_positive.sum() == 10 and got.target_scores[got.is_positive][:, 2].min() > 1 - 1e-5
    class_logits[..., 2] = torch.where(got.is_positive, 40.0, -40.0)
    terms = v8(logits, class_logits, targets, assignment=got)
    assert terms["box"] < 1e-5 and terms["cls"] < 1e-3
    entropy = -(got.is_positive[0, :, None] * _two_bin_entropy(d)).sum() / 4 / 10
    assert terms["dfl"].item() == pytest.approx(-1.5 * entropy.item(), rel=1e-4)


def _two_bin_entropy(d):
    share = d - d.floor()
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


@every_head
def test_order_of_images_and_objects_does_not_matter(head):
    compute, logits_of = HEADS[head]
    targets, make = scene(5, count=20, ignored=0.2)
    if head != "v8":  # no two objects meet in a location, where the order of rows would count
        corners = np.array([[4, 3, 14, 17], [44, 41, 60, 62], [2, 5, 18, 13], [43, 47, 61, 58], [3, 40, 20, 60]], float)
        targets = targets_of(corners, [0, 1, 2, 3, 0], [0, 0, 2, 2, 1], np.array([0, 0, 0, 0, 1], bool))
    logits = logits_of(make)
    expected = values(compute(*logits, targets))
    order = torch.tensor([2, 0, 1])
    row_of = order.argsort()
    moved = Targets(targets.boxes_xyxy, targets.labels, row_of[targets.image], targets.ignore)
    assert values(compute(*(x[order] for x in logits), moved)) == pytest.approx(expected, rel=1e-12)
    shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    assert values(compute(*logits, shuffled)) == pytest.approx(expected, rel=1e-12)


@every_head
def test_size_does_not_depend_on_the_batch(head):
    compute, logits_of = HEADS[head]
    targets, make = scene(6, count=20)
    logits = logits_of(make)
    boxes, labels, image, ignore = (
        torch.cat((x, x)) for x in (targets.boxes_xyxy, targets.labels, targets.image, targets.ignore)
    )
    image[len(targets) :] += 3
    twice = compute(*(x.repeat(2, *[1] * (x.dim() - 1)) for x in logits), Targets(boxes, labels, image, ignore))
    expected = values(compute(*logits, targets))
    assert values(twice) == pytest.approx(expected, rel=1e-9)


@every_head
def test_gains_multiply(head):
    compute, logits_of = HEADS[head]
    targets, make = scene(7)
    logits = logits_of(make)
    names = ("box", "cls", "dfl") if head == "v8" else ("box", "obj", "cls")
    ones = values(compute(*logits, targets, **{f"{name}_gain": 1.0 for name in names}))
    defaults = values(compute(*logits, targets))
    assert tuple(ones) == names
    gains = (7.5, 0.5, 1.5) if head == "v8" else (0.05, 1.0, 0.5)
    assert [defaults[name] / ones[name] for name in names] == pytest.approx(gains)


def test_targets_carry_no_gradient():
    targets, make = scene(8)
    box_logits, class_logits = v8_logits(make)
    v8(box_logits, class_logits, targets)["cls"].backward()
    assert box_logits.grad is None or (box_logits.grad == 0).all()  # the class target depends on the box, detached
    box_logits, objectness_logits, class_logits = v5_logits(make)
    v5(box_logits, objectness_logits, class_logits, targets)["obj"].backward()
    assert box_logits.grad is None and class_logits.grad is None  # the objectness target is a detached overlap


def test_objectness_of_no_images_is_0_and_not_the_mean_of_nothing():
    logits = torch.zeros(0, 3, requires_grad=True)
    found = losses.objectness_loss(logits, torch.zeros(0, 3), [2, 1], (4.0, 1.0))
    found.backward()
    assert found == 0 and logits.grad.shape == (0, 3)


def test_v5_objectness_target_is_at_least_zero():
    """Predictions far from the object have CIoU < 0; their target is 0, that of a perfect one is 1."""
    targets = targets_of([[16.0, 16.0, 32.0, 46.0]], [0], [0])
    box_logits, objectness = torch.zeros(1, A5, 4).double(), torch.zeros(1, A5).double().requires_grad_()
    matches = by_shape(targets)
    box_logits[0, matches.location[::2]] = torch.tensor([-40.0, 40.0, -9.0, 1.5]).double()  # small and aside
    ciou = losses.matched_ciou(matches, box_logits, grid_sizes=GRIDS, strides=STRIDES, anchors=ANCHORS, targets=targets)
    assert (ciou < 0).any() and (ciou > 0.3).any()
    v5(box_logits, objectness, torch.zeros(1, A5, K).double(), targets, balance=(1.0, 1.0, 1.0))["obj"].backward()
    counts = torch.tensor([192.0, 48.0, 12.0]).double()[matches.level]
    got = 0.5 - objectness.grad[0, matches.location] * counts  # d BCE / dz = sigmoid(0) - o
    torch.testing.assert_close(got, ciou.clamp(min=0))


@every_head
def test_ignored_locations_get_no_gradient(head):
    compute, logits_of = HEADS[head]
    _, make = scene(9)
    targets = targets_of([[0.0, 0.0, 33.0, 33.0]], [0], [1], [True])
    logits = logits_of(make)
    sum(compute(*logits, targets).values()).backward()
    points, steps = (POINTS, STEPS) if head == "v8" else make_anchors(GRIDS, STRIDES, ANCHORS)[:2]
    is_inside = ((points * steps) < 33).all(-1)
    gradient = logits[1].grad.reshape(3, len(points), -1).abs().sum(-1)
    assert (gradient[1][is_inside] == 0).all() and (gradient[1][~is_inside] > 0).all() and (gradient[::2] > 0).all()


# ------------------------------------------------------------------------------------------------ awkward inputs

AWKWARD = {
    "none": [],
    "one pixel": [[15.6, 15.6, 16.6, 16.6]],
    "tenth of a pixel": [[15.6, 15.6, 15.7, 15.7]],
    "no area": [[20, 20, 20, 20], [20, 10, 20, 50], [10, 20, 50, 20]],
    "inside out": [[50, 50, 10, 10]],
    "outside": [[-90, -90, -10, -10], [60, 60, 300, 300], [1e6, 1e6, 2e6, 2e6]],
    "larger than the image": [[-100, -100, 200, 200]],
    "hair": [[0, 31.9, 64, 32.1]],
    "duplicates": [[10, 10, 40, 40]] * 8,
    "hundreds": [[x, y, x + 9, y + 9] for x in range(0, 54, 4) for y in range(0, 54, 4)],
}


@every_head
@pytest.mark.parametrize("scale", [1.0, 0.0, 300.0], ids=["usual", "zero", "saturated"])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_boxes_are_finite_with_finite_gradients(head, name, scale):
    compute, logits_of = HEADS[head]
    boxes = np.array(AWKWARD[name], dtype=np.float32).reshape(-1, 4)
    targets = targets_of(boxes, np.arange(len(boxes)) % K, np.zeros(len(boxes), dtype=np.int64))  # image 1 has none
    _, make = scene(10, dtype=torch.float32)
    leaves = [(scale * x.detach()).requires_grad_() for x in logits_of(make, B=2)]
    terms = compute(*leaves, targets)
    sum(terms.values()).backward()
    assert all(term.isfinite() and term >= 0 and term.dtype == torch.float32 for term in terms.values())
    assert all(x.grad.isfinite().all() for x in leaves)
    if name in ("none", "no area", "inside out"):
        assert terms["box"] == 0 and (leaves[0].grad == 0).all()


@every_head
def test_collapsed_predictions_have_finite_gradients(head):
    """Predicted boxes of no width or height (all mass in bin 0; sigmoid at 0): atan(w / h) and 1 / union survive."""
    compute, logits_of = HEADS[head]
    targets = targets_of([[8.0, 8.0, 40.0, 56.0]], [0], [0])
    _, make = scene(11, dtype=torch.float32)
    leaves = [torch.zeros_like(x) for x in logits_of(make, B=1)]
    if head == "v8":
        leaves[0][..., 0] = 200.0
    else:
        leaves[0][..., 2:] = -200.0
    leaves = [x.requires_grad_() for x in leaves]
    if head == "v8":  # a box of no size overlaps nothing and so is no positive; hand the positives over
        is_positive = torch.ones(1, A8, dtype=torch.bool)
        scores = torch.zeros(1, A8, K)
        scores[..., 0] = 1
        given = losses.Assignment(is_positive, torch.zeros(1, A8, dtype=torch.int64), scores, ~is_positive)
        terms = compute(*leaves, targets, assignment=given)
    else:
        terms = compute(*leaves, targets)
    sum(terms.values()).backward()
    assert terms["box"] > 0 and all(term.isfinite() for term in terms.values())
    assert all(x.grad.isfinite().all() for x in leaves)


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(head, dtype):
    compute, logits_of = HEADS[head]
    targets, make = scene(12, dtype=torch.float32)
    leaves = [x.detach().to(dtype).requires_grad_() for x in logits_of(make)]
    with torch.autocast("cpu", dtype=dtype):
        terms = compute(*leaves, targets)
    expected = compute(*(x.detach().float() for x in leaves), targets)
    sum(terms.values()).backward()
    assert values(terms) == values(expected)  # bit for bit
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in leaves)


@every_head
def test_predictions_that_are_not_numbers_reach_the_loss(head):
    """A loss that leaves out what it cannot compare would train on beside a broken network."""
    compute, logits_of = HEADS[head]
    targets, make = scene(15, count=20)
    for broken, name in ((0, "box"), (-1, "cls")):
        logits = [x.detach() for x in logits_of(make)]
        logits[broken].fill_(math.nan)
        assert compute(*logits, targets)[name].isnan()


@every_head
def test_same_bytes_every_time(head):
    compute, logits_of = HEADS[head]
    targets, make = scene(13, count=60, dtype=torch.float32)
    targets = Targets(torch.cat((targets.boxes_xyxy, targets.boxes_xyxy)), *(
        torch.cat((x, x)) for x in (targets.labels, targets.image, targets.ignore)
    ))  # fmt: skip
    logits = [torch.zeros_like(x) for x in logits_of(make)]  # as at the start of training: ties everywhere
    first = values(compute(*logits, targets))
    assert all(values(compute(*logits, targets)) == first for _ in range(3))
    assert all(math.isfinite(x) for x in first.values())


@every_head
def test_one_class(head):
    targets, make = scene(14)
    targets = Targets(targets.boxes_xyxy, 0 * targets.labels, targets.image, targets.ignore)
    logits = [make(3, A8, 4, 16), make(3, A8, 1)] if head == "v8" else [make(3, A5, 4), make(3, A5), make(3, A5, 1)]
    assert all(term > 0 for term in HEADS[head][0](*logits, targets).values())
