"""YOLOv8 against the recorded outputs of the released implementation, and the contract of an anchor-free detector."""

import numpy as np
import pytest
import torch

from models import build
from structures import DenseDetector, Targets
from tests.reference.dense_reading import read_reference
from tests.reference.golden_models import check_anchor_free_golden
from yolo.taps import logits_at_boxes
from yolo.yolov8 import AnchorFreeOutput, level_sizes

SIZES = ["n", "s", "m", pytest.param("l", marks=pytest.mark.slow), pytest.param("x", marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
def test_reproduces_the_released_model(golden, size):
    arrays, meta = golden(f"yolov8{size}")
    check_anchor_free_golden(f"yolov8{size}", arrays, meta, "model.22.dfl.conv.weight")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("yolov8n", 3)


def test_is_a_dense_detector_with_readable_names(model):
    assert isinstance(model, DenseDetector)
    names = set(model.state_dict())
    assert {
        "backbone.stem.conv.weight",
        "backbone.stage2.blocks.0.conv1.bn.running_mean",
        "neck.top_down4.split.conv.weight",
        "head.box.0.2.bias",
        "head.cls.2.2.weight",
    } <= names
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.03}


@pytest.mark.parametrize("arch", ["yolov8n", "yolov8m", "yolov5n", "yolov5nu"])
def test_features_are_as_announced(arch):
    model = build(arch, 2).eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, 64, 128))
    assert list(output.features) == list(model.strides) == list(model.channels)
    assert list(output.features)[:6] == ["c3", "c4", "c5", "p3", "p4", "p5"]
    assert len(output.features) == (6 if arch == "yolov5n" else 18)
    for name, value in output.features.items():
        stride = model.strides[name]
        assert value.shape == (1, model.channels[name], 64 // stride, 128 // stride)


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n", "yolov5nu"])
@pytest.mark.parametrize("num_classes", [1, 7])
def test_smallest_picture_trains_and_detects(arch, num_classes):
    """Batch 2 of 32x32 pixels: a map of one cell. (One picture of it has no variance for BatchNorm to learn from.)"""
    torch.manual_seed(0)
    model = build(arch, num_classes)
    output = model(torch.rand(2, 3, 32, 32))
    for targets in [Targets.empty(), one_target()]:
        terms = model.losses(output, targets)
        assert all(value.isfinite() and value.dtype == torch.float32 for value in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        output = model(torch.rand(1, 3, 32, 32))
    boxes_xyxy, scores = model.decode(output)
    A = (16 + 4 + 1) * (3 if arch == "yolov5n" else 1)
    assert boxes_xyxy.shape == (1, A, 4) and scores.shape == (1, A, num_classes)
    (found,) = model.detect(output, score_threshold=0.0, iou_threshold=0.7, max_detections=5)
    assert 1 <= len(found) <= 5 and (found.labels < num_classes).all() and found.scores.diff().le(0).all()


def one_target():
    return Targets(torch.tensor([[4.0, 6.0, 25.0, 28.0]]), torch.tensor([0]), torch.tensor([1]), torch.tensor([False]))


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n", "yolov5nu"])
def test_losses_and_decode_are_float32_under_autocast(arch):
    torch.manual_seed(0)
    model = build(arch, 3).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
        inside = [*model.losses(output, one_target()).values(), *model.decode(output)]
    outside = [*model.losses(output, one_target()).values(), *model.decode(output)]
    assert output.class_logits.dtype == torch.bfloat16
    for a, b in zip(inside, outside):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n", "yolov5nu"])
def test_channels_last_maps_stay_channels_last(arch):
    model = build(arch, 3).eval().to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        output, expected = model(images), model.to(memory_format=torch.contiguous_format)(images.contiguous())
    for name, value in output.features.items():
        assert value.is_contiguous(memory_format=torch.channels_last), name
    torch.testing.assert_close(output.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 33, 64), (1, 3, 64, 48), (1, 3, 0, 32), (3, 32, 32), (1, 1, 32, 32)])
@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n"])
def test_refuses_other_sizes(arch, shape):
    with pytest.raises(ValueError, match=r"expected (multiples of 32|\(B, 3, H, W\))"):
        build(arch, 2)(torch.zeros(shape))


@pytest.mark.parametrize("arch", ["yolov8n", "yolov8s", "yolov5su"])
@pytest.mark.parametrize("num_classes", [1, 20])
def test_prior_expects_five_objects(arch, num_classes):
    """At 640 px, the biases of one level put probability mass 5 on it, over all cells and classes (small p)."""
    model = build(arch, num_classes)
    for box, cls, stride in zip(model.head.box, model.head.cls, (8, 16, 32)):
        odds = cls[-1].bias.exp()  # p / (1 - p)
        assert odds.sum().item() * (640 / stride) ** 2 == pytest.approx(5, rel=1e-4)
        assert (box[-1].bias == 1).all()


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5n", "yolov5nu"])
def test_one_seed_one_model_and_forward_draws_nothing(arch):
    torch.manual_seed(5)
    first = build(arch, 2)
    torch.manual_seed(5)
    second = build(arch, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    state = torch.get_rng_state()
    output = first(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    sum(first.losses(output, one_target()).values()).backward()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "arch, num_classes, count",
    [("yolov5nu", 1, 2508659), ("yolov5nu", 90, 2746286), ("yolov5nu", 365, 2924051), ("yolov8x", 3, 68155497)],
)
def test_head_widths_follow_the_number_of_classes(arch, num_classes, count):
    """Parameter counts of the released implementation (Ultralytics 8.4.190) built for other class counts."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(arch, num_classes).parameters()) + 16 == count


def test_the_width_of_the_class_branches_may_be_given():
    with torch.device("meta"):
        wide, plain = build("yolov8n", 3, class_width=80), build("yolov8n", 3)
    assert wide.channels["cls3_1"] == wide.channels["cls5_2"] == 80 and plain.channels["cls3_1"] == 64
    released = build("yolov8n", 80).state_dict()
    differing = {name for name, value in wide.state_dict().items() if value.shape != released[name].shape}
    assert differing == {f"head.cls.{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")}


# ------------------------------------------------------------------------------------------ decode, class_logits_at


def planted_output(image_size, num_classes, seed=0):
    """Random logits of the right shapes, without running a network."""
    generator = torch.Generator().manual_seed(seed)
    A = sum(h * w for h, w in level_sizes(image_size))
    box_logits = 3 * torch.randn(2, A, 4, 16, generator=generator)
    class_logits = torch.randn(2, A, num_classes, generator=generator)
    return AnchorFreeOutput({}, box_logits, class_logits, image_size)


def test_decode_matches_float64_reference(model):
    output = planted_output((64, 96), 3)
    boxes_xyxy, scores = model.decode(output)
    z = output.box_logits.double().numpy()
    n = 0
    for stride, (h, w) in zip((8, 16, 32), [(8, 12), (4, 6), (2, 3)]):
        for y in range(h):
            for x in range(w):
                p = np.exp(z[:, n] - z[:, n].max(-1, keepdims=True))
                left, top, right, bottom = ((p / p.sum(-1, keepdims=True)) @ np.arange(16)).T * stride  # (B,) each
                cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                expected = np.stack([cx - left, cy - top, cx + right, cy + bottom], axis=-1)
                np.testing.assert_allclose(boxes_xyxy[:, n].numpy(), expected, atol=1e-4)
                n += 1
    assert n == boxes_xyxy.shape[1]
    np.testing.assert_allclose(scores.numpy(), 1 / (1 + np.exp(-output.class_logits.double().numpy())), rtol=1e-5)


def test_logits_at_boxes_match_float64_reference():
    rng = np.random.default_rng(3)
    points = rng.uniform(0, 100, (200, 2))
    decoded = np.concatenate([points - rng.uniform(1, 30, (200, 2)), points + rng.uniform(1, 30, (200, 2))], axis=1)
    corner = rng.uniform(0, 70, (12, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (12, 2))], axis=1)
    boxes[0] = [50, 50, 50.001, 50.001]  # holds no point
    boxes[1] = [300, 300, 320, 330]  # outside
    z = rng.normal(size=(200, 5))
    as_tensors = [torch.tensor(a) for a in (z, decoded, points, boxes)]
    got = logits_at_boxes(
        as_tensors[0][None],
        decoded_xyxy=as_tensors[1][None],
        centers=as_tensors[2],
        boxes_per_image=[as_tensors[3]],
        locations=4,
    )
    np.testing.assert_allclose(got.numpy(), read_reference(z, decoded, points, boxes, 4), rtol=1e-6)


def test_class_logits_at_goes_image_by_image_and_is_differentiable(model):
    output = planted_output((64, 96), 3)
    logits = output.class_logits.requires_grad_()
    boxes_xyxy = model.decode(output)[0].detach()
    boxes = [torch.zeros(0, 4), boxes_xyxy[1, [20, 60, 99]]]
    got = model.class_logits_at(output, boxes)
    assert got.shape == (3, 3)
    got.sum().backward()
    assert (logits.grad[0] == 0).all() and logits.grad[1].sum().item() == pytest.approx(9, rel=1e-5)  # a mean: sum 1
    nothing = model.class_logits_at(output, [torch.zeros(0, 4)] * 2)
    assert nothing.shape == (0, 3)
    with pytest.raises(ValueError):
        model.class_logits_at(output, boxes[:1])


def test_a_confident_location_is_read_back(model):
    """One location that predicts a box exactly, among locations that predict elsewhere, decides alone."""
    output = planted_output((64, 64), 3)
    points, strides = model._locations(output)
    z = torch.full((2, len(points), 4, 16), -50.0)
    z[..., 15] = 50.0  # all predict 30 cells wide boxes ...
    z[0, 40, :, 15], z[0, 40, :, 2] = -50.0, 50.0  # ... but one: 2 cells to each side
    output = AnchorFreeOutput({}, z, output.class_logits, (64, 64))
    center = points[40] * strides[40]
    box = torch.cat((center - 16, center + 16))[None]
    assert torch.allclose(model.decode(output)[0][0, 40], box[0])
    got = logits_at_boxes(
        output.class_logits[:1], decoded_xyxy=model.decode(output)[0][:1], centers=points * strides,
        boxes_per_image=[box], locations=1,
    )  # fmt: skip
    assert torch.equal(got[0], output.class_logits[0, 40])
