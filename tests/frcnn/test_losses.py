"""The four losses against torchvision's recorded numbers and against sums in float64; gradients and empty batches."""

import numpy as np
import pytest
import torch

from frcnn.anchors import ROI_WEIGHTS, RPN_WEIGHTS, anchor_shapes, encode_boxes, place_anchors
from frcnn.losses import roi_losses, rpn_losses
from frcnn.matching import BACKGROUND, match
from tests.golden.recipe import uniform
from tests.reference import faster_rcnn as reference

NONE = torch.zeros(0, 4, dtype=torch.float64)
GRIDS = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 2)]  # of the recording; its last is rounded down


def check_gradient(leaf, golden):
    assert np.linalg.norm(leaf.grad.numpy() - golden) <= 1e-6 * np.linalg.norm(golden)


def flat(maps, width):
    """(B, n * width, h, w) per level -> (B, A, width) in the order of place_anchors."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, width) for m in maps], 1)


def test_golden_rpn(golden):
    arrays, meta = golden("loss_fasterrcnn")
    B = meta["batch"]
    shapes = [anchor_shapes((size,), tuple(meta["aspect_ratios"])).double() for size in meta["anchor_sizes"]]
    anchors = place_anchors(shapes, GRIDS, (meta["height"], meta["width"]))
    make = lambda name, scale, n: [
        (scale * torch.tensor(uniform(meta["salt"] + f"rpn.{name}{i}", (B, n, h, w)))).requires_grad_()
        for i, (h, w) in enumerate(GRIDS)
    ]
    objectness, deltas = make("obj", 1.0, 3), make("delta", 0.5, 12)
    rows = []
    for image, (z, d) in enumerate(zip(flat(objectness, 1)[..., 0], flat(deltas, 4))):
        objects = torch.tensor(arrays[f"gt_boxes{image}"])
        matched = match(anchors, objects, NONE, positive_iou=0.7, negative_iou=0.3, every_object=True)
        labels = torch.where(matched >= 0, 1, torch.where(matched == BACKGROUND, 0, -1))
        np.testing.assert_array_equal(labels.numpy(), arrays["rpn_labels"][image])
        positive = (matched >= 0).nonzero().squeeze(1)
        seen = ((matched >= 0) | (matched == BACKGROUND)).nonzero().squeeze(1)
        target = encode_boxes(objects[matched[positive]], anchors[positive], RPN_WEIGHTS)
        rows.append((z[seen], matched[seen] >= 0, d[positive], target))
    names = ("objectness_logits", "is_positive", "box_deltas", "target_deltas")
    l_objectness, l_box = rpn_losses(**{name: torch.cat(column) for name, column in zip(names, zip(*rows))})
    np.testing.assert_allclose(l_objectness.item(), arrays["rpn_loss_objectness"], rtol=1e-6)
    np.testing.assert_allclose(l_box.item(), arrays["rpn_loss_box"], rtol=1e-6)
    (l_objectness + l_box).backward()
    check_gradient(objectness[0], arrays["grad_objectness0"])


def test_golden_roi(golden):
    arrays, meta = golden("loss_fasterrcnn")
    all_labels, targets = [], []
    for image in range(meta["batch"]):
        objects, labels = torch.tensor(arrays[f"gt_boxes{image}"]), torch.tensor(arrays[f"gt_labels{image}"])
        boxes = torch.cat((torch.tensor(arrays[f"proposals{image}"]), objects))
        assert len(boxes) == arrays["roi_sampled_sizes"][image]
        matched = match(boxes, objects, NONE, positive_iou=0.5, negative_iou=0.5, every_object=False)
        all_labels.append(torch.where(matched >= 0, labels[matched], 0))  # recorded labels count the background as 0
        targets.append(encode_boxes(objects[matched[matched >= 0]], boxes[matched >= 0], ROI_WEIGHTS))
    labels = torch.cat(all_labels)
    np.testing.assert_array_equal(labels.numpy(), arrays["roi_labels"])
    K1 = meta["num_classes"]
    class_logits = torch.tensor(2 * uniform(meta["salt"] + "roi.cls", (len(labels), K1))).requires_grad_()
    box_deltas = torch.tensor(0.5 * uniform(meta["salt"] + "roi.box", (len(labels), 4 * K1))).requires_grad_()
    positive = labels.nonzero().squeeze(1)
    l_class, l_box = roi_losses(
        class_logits=class_logits,
        labels=labels,
        box_deltas=box_deltas.unflatten(1, (K1, 4))[positive, labels[positive]],
        target_deltas=torch.cat(targets),
    )
    np.testing.assert_allclose(l_class.item(), arrays["roi_loss_class"], rtol=1e-6)
    np.testing.assert_allclose(l_box.item(), arrays["roi_loss_box"], rtol=1e-6)
    (l_class + l_box).backward()
    check_gradient(class_logits, arrays["grad_roi_cls"])
    check_gradient(box_deltas, arrays["grad_roi_box"])


def inputs(N, P, K, scale):
    rng = np.random.default_rng([N, P])
    deltas, targets = rng.normal(size=(2, P, 4)) * 0.3
    is_positive = rng.permutation(np.arange(N) < P)
    labels = np.where(is_positive, rng.integers(1, K + 1, N), 0)
    return scale * rng.normal(size=N), is_positive, scale * rng.normal(size=(N, K + 1)), labels, deltas, targets


@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["usual", "saturated"])
@pytest.mark.parametrize("N, P", [(0, 0), (1, 1), (9, 0), (20, 6)])
def test_match_reference(N, P, scale):
    z, is_positive, logits, labels, deltas, targets = inputs(N, P, 5, scale)
    tensors = dict(box_deltas=torch.tensor(deltas), target_deltas=torch.tensor(targets))
    rpn = rpn_losses(objectness_logits=torch.tensor(z), is_positive=torch.tensor(is_positive), **tensors)
    roi = roi_losses(class_logits=torch.tensor(logits), labels=torch.tensor(labels), **tensors)
    count = max(N, 1)
    box = reference.smooth_l1(deltas, targets) / count
    np.testing.assert_allclose(rpn[0].item(), reference.binary_cross_entropy(z, is_positive) / count, rtol=1e-9)
    np.testing.assert_allclose(roi[0].item(), reference.cross_entropy(logits, labels) / count, rtol=1e-9)
    np.testing.assert_allclose([rpn[1].item(), roi[1].item()], [box, box], rtol=1e-9)


def test_gradients():
    z, is_positive, logits, labels, deltas, targets = inputs(7, 3, 4, 1.0)
    leaf = lambda x: torch.tensor(x, requires_grad=True)
    rpn = lambda z, d: rpn_losses(
        objectness_logits=z, is_positive=torch.tensor(is_positive), box_deltas=d, target_deltas=torch.tensor(targets)
    )
    roi = lambda z, d: roi_losses(
        class_logits=z, labels=torch.tensor(labels), box_deltas=d, target_deltas=torch.tensor(targets)
    )
    assert torch.autograd.gradcheck(rpn, (leaf(z), leaf(deltas)))
    assert torch.autograd.gradcheck(roi, (leaf(logits), leaf(deltas)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32_out(dtype):
    z, is_positive, logits, labels, deltas, targets = inputs(7, 3, 4, 1.0)
    half = lambda x: torch.tensor(x).to(dtype).requires_grad_()
    boxes = dict(box_deltas=half(deltas), target_deltas=torch.tensor(targets).float())
    terms = [
        *rpn_losses(objectness_logits=half(z), is_positive=torch.tensor(is_positive), **boxes),
        *roi_losses(class_logits=half(logits), labels=torch.tensor(labels), **boxes),
    ]
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms)


def test_nothing_sampled_still_has_a_gradient():
    """Under DistributedDataParallel every parameter must take part in every step."""
    z, d = torch.zeros(0, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    terms = rpn_losses(
        objectness_logits=z, is_positive=torch.zeros(0, dtype=torch.bool), box_deltas=d, target_deltas=torch.zeros(0, 4)
    )
    assert all(term == 0 for term in terms)
    sum(terms).backward()
    assert z.grad is not None and d.grad is not None


# ---------------------------------------------------------------- objects of several classes in part


@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["usual", "saturated"])
@pytest.mark.parametrize("N, P", [(0, 0), (1, 1), (9, 0), (20, 6)])
def test_class_scores_match_reference(N, P, scale):
    _, _, logits, labels, deltas, targets = inputs(N, P, 5, scale)
    shares = np.random.default_rng(P).dirichlet(np.ones(5), P)
    tensors = dict(box_deltas=torch.tensor(deltas), target_deltas=torch.tensor(targets))
    got, box = roi_losses(
        class_logits=torch.tensor(logits), labels=torch.tensor(labels), class_scores=torch.tensor(shares), **tensors
    )
    rows, total = iter(shares), 0.0
    for z, label in zip(logits, labels):
        wanted = [0.0, *next(rows)] if label else [1.0, 0, 0, 0, 0, 0]
        total -= sum(p * (z[k] - np.logaddexp.reduce(z)) for k, p in enumerate(wanted))
    np.testing.assert_allclose(got.item(), total / max(N, 1), rtol=1e-9)
    assert box == roi_losses(class_logits=torch.tensor(logits), labels=torch.tensor(labels), **tensors)[1]


def test_one_hot_class_scores_are_labels():
    """The same gradient, bit for bit; the value but for the order of its sum."""
    _, _, logits, labels, deltas, targets = inputs(200, 60, 5, 1.0)
    labels, shares = torch.tensor(labels), torch.eye(5, dtype=torch.float64)[labels[labels > 0] - 1]
    values, gradients = [], []
    for class_scores in (None, shares):
        leaf = torch.tensor(logits, requires_grad=True)
        value, _ = roi_losses(
            class_logits=leaf,
            labels=labels,
            box_deltas=torch.tensor(deltas),
            target_deltas=torch.tensor(targets),
            class_scores=class_scores,
        )
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, leaf)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-12) and torch.equal(*gradients)
