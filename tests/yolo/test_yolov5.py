"""YOLOv5 (anchors) and YOLOv5u (anchor-free) against the recorded outputs of the released implementations."""

import math

import numpy as np
import pytest
import torch

import checkpoint
from boxes import xyxy_to_cxcywh
from errors import UserError
from models import build
from structures import DenseDetector, Targets
from tests.reference.dense_reading import read_reference
from tests.reference.golden_models import check_anchor_free_golden, check_anchor_golden, public_state, undrawn
from weights import load_public, rename, row_pattern
from yolo.assigners import anchor_ratio_matches
from yolo.losses import yolov5_losses
from yolo.taps import joint_logits
from yolo.yolov5 import ANCHORS_PIXELS, AnchorOutput
from yolo.yolov8 import level_sizes

SIZES = ["n", "s", "m", pytest.param("l", marks=pytest.mark.slow), pytest.param("x", marks=pytest.mark.slow)]
ANCHORS_CELLS = np.array(ANCHORS_PIXELS) / np.array([8, 16, 32])[:, None, None]


@pytest.mark.parametrize("size", SIZES)
def test_anchor_variant_reproduces_the_released_model(golden, size):
    arrays, meta = golden(f"yolov5{size}")
    with undrawn():
        model = build(f"yolov5{size}", meta["nc"])
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    state = public_state(meta, {"model.24.anchors": ANCHORS_CELLS})
    assert set(rename(state, model.public_names)) == set(model.state_dict()) and len(state) == len(model.state_dict())
    load_public(model, state)
    check_anchor_golden(model, arrays, meta, maps=("p3", "p4", "p5"))


@pytest.mark.parametrize("size", SIZES)
def test_u_variant_reproduces_the_released_model(golden, size):
    arrays, meta = golden(f"yolov5{size}u")
    check_anchor_free_golden(f"yolov5{size}u", arrays, meta, "model.24.dfl.conv.weight")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("yolov5n", 3)


def test_is_a_dense_detector(model):
    assert isinstance(model, DenseDetector) and isinstance(build("yolov5nu", 1), DenseDetector)
    assert {"backbone.stage2.main.conv.weight", "neck.lateral5.bn.bias", "head.predict.0.bias", "head.anchors"} <= set(
        model.state_dict()
    )


def test_variants_do_not_load_into_one_another(golden):
    _, meta = golden("yolov5nu")
    state = public_state(meta, {"model.24.dfl.conv.weight": np.arange(16.0)})
    with pytest.raises(UserError):
        load_public(build("yolov5n", 80), state)


def old_file(tmp_path, model, *, half: bool, cells=(3, 3, 2), pixels=(3, 1, 3, 1, 1, 2), wrong: float = 1.0):
    """The weights of a YOLOv5 as release 6.0 and before wrote them, the anchors once in cells and once in pixels."""
    rows = {new: old for old, new in model.public_names}
    state = {}
    for name, value in model.state_dict().items():
        new = next(new for new in sorted(rows, key=len, reverse=True) if row_pattern(new).match(name))
        match = row_pattern(new).match(name)
        state[rows[new].format(*match.groups()) + name[match.end() :]] = value
    anchors = state.pop("model.24.anchors")
    if cells:
        state["model.24.anchors"] = anchors.reshape(cells)
    if pixels:
        in_pixels = anchors * torch.tensor([8.0, 16.0, 32.0])[:, None, None]
        state["model.24.anchor_grid"] = wrong * in_pixels.reshape(pixels)
    state = {name: t.half() if half and t.is_floating_point() else t for name, t in state.items()}
    torch.save({"epoch": -1, "model": state, "names": ["a", "b", "c"]}, tmp_path / "old.pt")
    return tmp_path / "old.pt"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("cells", "pixels"),
    [((3, 3, 2), (3, 1, 3, 1, 1, 2)), (None, (3, 1, 3, 1, 1, 2)), ((3, 6), (3, 3, 2)), ((3, 1, 3, 1, 1, 2), None)],
    ids=["both", "pixels", "other-shapes", "cells"],
)
def test_files_of_release_6_0_have_the_anchors_twice(tmp_path, model, half, cells, pixels):
    with torch.no_grad():
        scale = torch.linspace(0.5, 1.5, 18).view(3, 3, 2)
        model.head.anchors.mul_(scale)  # anchors of its own, as autoanchor finds them
        path = old_file(tmp_path, model, half=half, cells=cells, pixels=pixels)
        expected = model.head.anchors.clone()
        model.head.anchors.div_(scale)
    loaded, info = checkpoint.load_model(path, "yolov5n")
    torch.testing.assert_close(loaded.head.anchors, expected, rtol=1e-3 if half else 1e-6, atol=0)
    assert loaded.head.anchors.dtype == torch.float32 and info.names == ("a", "b", "c")


def test_anchors_that_contradict_one_another_are_refused(tmp_path, model):
    with pytest.raises(UserError, match=r"old\.pt: .*'model.24.anchors' in cells and 'model.24.anchor_grid' in pixels"):
        checkpoint.load_model(old_file(tmp_path, model, half=False, wrong=1.02), "yolov5n")
    state = torch.load(old_file(tmp_path, model, half=False), weights_only=True)
    state["model"]["model.24.anchor_grid"] = torch.ones(3, 4, 2)  # a fourth anchor
    torch.save(state, tmp_path / "four.pt")
    with pytest.raises(UserError, match=r"four\.pt: is not yolov5n: 'model.24.anchor_grid' is \(3, 4, 2\)"):
        checkpoint.load_model(tmp_path / "four.pt", "yolov5n")


def test_anchors_of_a_checkpoint_are_used(golden):
    """A checkpoint trained with its own anchors brings them: decode follows, and so do the pixels the losses see."""
    _, meta = golden("yolov5n")
    model = build("yolov5n", 80)
    load_public(model, public_state(meta, {"model.24.anchors": 2 * ANCHORS_CELLS}))
    assert torch.allclose(model.anchors_pixels(), 2 * torch.tensor(ANCHORS_PIXELS, dtype=torch.float32))
    output = planted_output((32, 32), 80)
    twice, once = (xyxy_to_cxcywh(m.decode(output)[0]) for m in (model, build("yolov5n", 80)))
    torch.testing.assert_close(twice[..., 2:], 2 * once[..., 2:])
    torch.testing.assert_close(twice[..., :2], once[..., :2], rtol=1e-5, atol=1e-4)


def planted_output(image_size, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = sum(3 * h * w for h, w in level_sizes(image_size))
    box, objectness, classes = (
        2 * torch.randn(2, A, *tail, generator=generator) for tail in ((4,), (), (num_classes,))
    )
    return AnchorOutput({}, box, objectness, classes, image_size)


def test_decode_matches_float64_reference(model):
    output = planted_output((64, 96), 3)
    boxes_xyxy, scores = model.decode(output)
    sigmoid = lambda z: 1 / (1 + np.exp(-z.double().numpy()))
    t = sigmoid(output.box_logits)
    n = 0
    for level, (stride, (h, w)) in enumerate(zip((8, 16, 32), [(8, 12), (4, 6), (2, 3)])):
        for anchor in ANCHORS_PIXELS[level]:
            for y in range(h):
                for x in range(w):
                    center = (2 * t[:, n, :2] - 0.5 + [x, y]) * stride
                    size = (2 * t[:, n, 2:]) ** 2 * np.array(anchor)
                    expected = np.concatenate([center - size / 2, center + size / 2], axis=-1)
                    np.testing.assert_allclose(boxes_xyxy[:, n].numpy(), expected, rtol=1e-4, atol=1e-3)
                    n += 1
    assert n == boxes_xyxy.shape[1]
    expected = sigmoid(output.objectness_logits)[..., None] * sigmoid(output.class_logits)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 20])
def test_prior_of_objectness_and_classes(num_classes):
    """Per anchor, a level's objectness odds add up to 8 objects at 640 px; a class has odds 0.6 / (K - 0.99999)."""
    model = build("yolov5n", num_classes)
    for conv, stride in zip(model.head.predict, (8, 16, 32)):
        odds = conv.bias.detach().exp().view(3, 5 + num_classes)
        assert torch.allclose(odds[:, 4] * (640 / stride) ** 2, torch.tensor(8.0), rtol=1e-4)
        assert torch.allclose(odds[:, 5:], torch.tensor(0.6 / (num_classes - 0.99999)), rtol=1e-3)


def test_joint_logits_are_the_logits_of_the_score():
    o, c = torch.meshgrid(torch.linspace(-12, 12, 25), torch.linspace(-12, 12, 25), indexing="ij")
    o, c = o[..., None].double(), c[..., None].double()
    p = 1 / (1 + np.exp(-o.numpy())) / (1 + np.exp(-c.numpy()))
    np.testing.assert_allclose(joint_logits(o, c).numpy(), np.log(p / (1 - p)), rtol=1e-6, atol=1e-6)
    far = torch.tensor([[200.0, 200.0], [-200.0, 200.0], [-200.0, -200.0]], requires_grad=True)
    got = joint_logits(far[:, :1], far[:, 1:])
    torch.testing.assert_close(got[:, 0], torch.tensor([200 - math.log(2), -200.0, -400.0]))
    got.sum().backward()
    assert far.grad.isfinite().all()
    assert torch.autograd.gradcheck(joint_logits, (o[:3, :3].requires_grad_(), c[:3, :3].requires_grad_()))


def test_class_logits_at_reads_the_joint_logits(model):
    output = planted_output((64, 96), 3)
    output.class_logits.requires_grad_()
    output.objectness_logits.requires_grad_()
    boxes_xyxy, scores = model.decode(output)
    boxes = [boxes_xyxy[0, [5, 300]].detach(), torch.zeros(0, 4)]
    got = model.class_logits_at(output, boxes)
    points, strides, _ = model._locations(output)
    p = scores[0].detach().double().numpy()
    expected = read_reference(
        np.log(p / (1 - p)), boxes_xyxy[0].detach().double().numpy(), (points * strides).numpy(), boxes[0].numpy(), 10
    )
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert output.class_logits.grad[0].abs().sum() > 0 and output.objectness_logits.grad[0].abs().sum() > 0
    assert (output.class_logits.grad[1] == 0).all()
    assert model.class_logits_at(output, [torch.zeros(0, 4)] * 2).shape == (0, 3)


def test_gains_follow_the_task(model):
    """The released recipe: the objectness gain grows with the image's area, the class gain with K."""
    output = planted_output((64, 96), 3)
    target = Targets(
        torch.tensor([[4.0, 6.0, 25.0, 28.0]]), torch.tensor([0]), torch.tensor([1]), torch.tensor([False])
    )
    terms = model.losses(output, target)
    anchors = torch.tensor(ANCHORS_PIXELS, dtype=torch.float32)
    grid = dict(grid_sizes=[(8, 12), (4, 6), (2, 3)], strides=[8, 16, 32], anchors=anchors, targets=target)
    plain = yolov5_losses(
        box_logits=output.box_logits, objectness_logits=output.objectness_logits, class_logits=output.class_logits,
        **grid, matches=anchor_ratio_matches(**grid), box_gain=1.0, obj_gain=1.0, cls_gain=1.0,
    )  # fmt: skip
    assert terms["box"].item() == pytest.approx(0.05 * plain["box"].item(), rel=1e-5) and plain["box"] > 0
    assert terms["obj"].item() == pytest.approx(plain["obj"].item() * 64 * 96 / 640**2, rel=1e-5)
    assert terms["cls"].item() == pytest.approx(0.5 * plain["cls"].item() * 3 / 80, rel=1e-5)
