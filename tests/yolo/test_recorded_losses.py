"""The YOLO losses against the recorded losses and gradients of the released implementations."""

import numpy as np
import torch

from tests.golden.recipe import uniform
from tests.yolo.test_losses import STRIDES, targets_of
from yolo import losses
from yolo.assigners import anchor_ratio_matches, make_points


def golden_targets(arrays, meta):
    rows, (W, H) = arrays["targets"], (meta["width"], meta["height"])
    (cx, cy), (w, h) = (rows[:, 2:4] * [W, H]).T, (rows[:, 4:] * [W, H]).T
    boxes = np.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), axis=1)
    return targets_of(boxes, rows[:, 1].astype(np.int64), rows[:, 0].astype(np.int64))


def test_golden_yolov8(golden):
    arrays, meta = golden("loss_yolov8")
    B, H, W = meta["batch"], meta["height"], meta["width"]
    points, strides = make_points([(H // s, W // s) for s in STRIDES], STRIDES, dtype=torch.float64)
    raw_boxes = torch.tensor(3 * uniform(meta["salt"] + "v8.boxes", (B, 64, len(points)))).requires_grad_()
    raw_scores = torch.tensor(
        2 * uniform(meta["salt"] + "v8.scores", (B, meta["nc"], len(points))) - 2
    ).requires_grad_()
    terms = losses.yolov8_losses(
        box_logits=raw_boxes.unflatten(1, (4, 16)).permute(0, 3, 1, 2), class_logits=raw_scores.transpose(1, 2),
        points=points, strides=strides, targets=golden_targets(arrays, meta),
    )  # fmt: skip
    got = B * torch.stack([terms["box"], terms["cls"], terms["dfl"]])  # the file's are multiplied by the batch size
    np.testing.assert_allclose(got.detach().numpy(), arrays["loss"], rtol=1e-6)
    got.sum().backward()
    for leaf, name in ((raw_boxes, "grad_boxes"), (raw_scores, "grad_scores")):  # recorded in float32
        assert np.linalg.norm(leaf.grad.numpy() - arrays[name]) <= 1e-6 * np.linalg.norm(arrays[name])


def golden_anchor_logits(meta, version):
    """Per level the raw outputs (B, 3, H, W, 5 + K), and the inputs of the losses: logits, grids, strides, anchors."""
    B, H, W = meta["batch"], meta["height"], meta["width"]
    grids = [(H // s, W // s) for s in STRIDES]
    raw = [
        torch.tensor(2 * uniform(meta["salt"] + f"{version}.raw{i}", (B, 3, h, w, 5 + meta["nc"]))).requires_grad_()
        for i, (h, w) in enumerate(grids)
    ]
    flat = torch.cat([x.flatten(1, 3) for x in raw], dim=1)  # (B, A, 5 + K)
    logits = dict(box_logits=flat[..., :4], objectness_logits=flat[..., 4], class_logits=flat[..., 5:])
    return raw, logits | dict(grid_sizes=grids, strides=STRIDES, anchors=torch.tensor(meta["anchors"]).double())


def check_golden_anchor_terms(terms, raw, arrays, B):
    got = [terms[name].item() for name in ("box", "obj", "cls")]
    np.testing.assert_allclose(got, arrays["items"][:3], rtol=1e-6)
    total = B * sum(terms.values())
    np.testing.assert_allclose(total.item(), arrays["loss"].item(), rtol=1e-6)
    total.backward()
    for i, leaf in enumerate(raw):
        assert np.linalg.norm(leaf.grad.numpy() - arrays[f"grad{i}"]) <= 1e-6 * np.linalg.norm(arrays[f"grad{i}"])


def test_golden_yolov5(golden):
    arrays, meta = golden("loss_yolov5")
    raw, inputs = golden_anchor_logits(meta, "v5")
    targets = golden_targets(arrays, meta)
    grid = {key: inputs[key] for key in ("grid_sizes", "strides", "anchors")}
    terms = losses.yolov5_losses(**inputs, targets=targets, matches=anchor_ratio_matches(**grid, targets=targets))
    check_golden_anchor_terms(terms, raw, arrays, meta["batch"])


def test_golden_yolov7(golden):
    """A location that fits several objects is recorded as often as it is learnt: some twice or three times."""
    arrays, meta = golden("loss_yolov7")
    raw, inputs = golden_anchor_logits(meta, "v7")
    targets = golden_targets(arrays, meta)
    matches = losses.yolov7_matches(**inputs, targets=targets)
    expected, start = [], 0
    for level, (h, w) in enumerate(inputs["grid_sizes"]):
        for image, anchor, y, x, row in arrays[f"matches_{level}"].tolist():
            expected.append((level, image, start + (anchor * h + y) * w + x, row))
        start += 3 * h * w
    assert len(expected) > len(set(expected))
    columns = (matches.level, matches.image, matches.location, matches.gt_index)
    assert sorted(zip(*(x.tolist() for x in columns))) == sorted(expected)
    terms = losses.yolov5_losses(**inputs, targets=targets, matches=matches)
    check_golden_anchor_terms(terms, raw, arrays, meta["batch"])
