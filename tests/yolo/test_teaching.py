"""What the dense detectors give to distillation: maps within the head and what follows them, positives, box classes."""

import numpy as np
import pytest
import torch

from distill.losses.box_classes import assigned_logits
from distill.losses.crosskd import cross_logits
from distill.losses.masks import positive_masks
from layers.fusion import fuse
from models import build
from structures import Targets
from tests.reference import yolo_losses as reference
from yolo.assigners import make_points
from yolo.taps import BRANCH_MAPS
from yolo.yolov5 import AnchorOutput
from yolo.yolov8 import LEVEL_STRIDES, AnchorFreeOutput, level_sizes

ARCHITECTURES = ["yolov8n", "yolov5n", "yolov5nu", "yolov7_tiny"]
WITH_ANCHORS = ("yolov5n", "yolov7_tiny")
all_architectures = pytest.mark.parametrize("arch", ARCHITECTURES)
K = 4


@pytest.fixture(scope="module")
def detectors():
    """By name, in eval mode, with activations of a size that a fresh BatchNorm alone would not give."""
    torch.manual_seed(0)
    built = {arch: build(arch, K) for arch in ARCHITECTURES}
    with torch.no_grad():
        for detector in built.values():
            detector(4 * torch.rand(2, 3, 64, 64))  # moves the running statistics
    return {arch: detector.eval() for arch, detector in built.items()}


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------- maps within the head


def level_logits(output, name):
    """The logits of the map's branch and level as (B, C, H, W), cut out of the whole head's."""
    kind, row, _ = BRANCH_MAPS[name]
    sizes = level_sizes(output.image_size)
    start = sum(h * w for h, w in sizes[:row])
    logits = output.class_logits if kind == "cls" else output.box_logits.flatten(2)
    h, w = sizes[row]
    return logits[:, start : start + h * w].transpose(1, 2).unflatten(2, (h, w))


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5nu"])
def test_maps_within_the_head_are_those_of_its_layers(detectors, images, arch):
    detector = detectors[arch]
    with torch.no_grad():
        output = detector(images)
        for kind, branches in (("box", detector.head.box), ("cls", detector.head.cls)):
            for level, branch in zip((3, 4, 5), branches):
                first = branch[0](output.features[f"p{level}"])
                assert torch.equal(output.features[f"{kind}{level}_1"], first)
                assert torch.equal(output.features[f"{kind}{level}_2"], branch[1](first))


@pytest.mark.parametrize("name", BRANCH_MAPS)
def test_a_tail_makes_of_its_map_what_the_head_makes(detectors, images, name):
    detector = detectors["yolov8n"]
    with torch.no_grad():
        output = detector(images)
        got = detector.tail(name)(output.features[name])
    torch.testing.assert_close(got, level_logits(output, name), rtol=1e-5, atol=1e-6)


def test_a_tail_is_the_detectors_own_and_in_its_mode(detectors):
    detector = detectors["yolov8n"]
    tail = detector.tail("cls4_1")
    assert not tail.training
    assert {id(p) for p in tail.parameters()} == {id(p) for p in detector.head.cls[1][1:].parameters()}
    assert build("yolov8n", 2).tail("cls4_1").training


@pytest.mark.parametrize("arch", ["yolov8n", "yolov5nu"])
@pytest.mark.parametrize("name", ["cls3_1", "box5_2"])
def test_tails_of_a_fused_frozen_teacher(detectors, images, arch, name):
    """As teachers run: fused, frozen, under inference mode. CrossKD takes such a tail; the student gets gradient."""
    teacher = fuse(detectors[arch]).requires_grad_(False)
    with torch.inference_mode():
        output = teacher(images)
    with torch.no_grad():
        expected = detectors[arch](images)
    t_map, tail = output.features[name], teacher.tail(name)
    torch.testing.assert_close(tail(t_map.clone()), level_logits(expected, name), rtol=1e-4, atol=1e-4)
    s_map = torch.rand(t_map.shape).requires_grad_()
    cross_logits(s_map=s_map, t_map=t_map.clone(), t_tail=tail).sum().backward()
    assert s_map.grad.isfinite().all() and s_map.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_live_tail_is_refused_as_a_teachers(detectors):
    """What cross_logits asks of a tail is seen through it: parameters that learn, BatchNorm that trains."""
    a_map = torch.rand(2, 64, 4, 4)
    with pytest.raises(ValueError, match="frozen"):
        cross_logits(s_map=a_map, t_map=a_map, t_tail=detectors["yolov8n"].tail("box3_1"))
    with pytest.raises(ValueError, match="eval"):
        training = build("yolov8n", 2).requires_grad_(False)
        cross_logits(s_map=a_map, t_map=a_map, t_tail=training.tail("box3_1"))


def test_other_names_have_no_tail(detectors):
    for name in ("p3", "cls3_3", "cls3_0", "cls2_1", ""):
        with pytest.raises(KeyError, match=r"box3_1, .*cls5_2"):
            detectors["yolov8n"].tail(name)
    with pytest.raises(KeyError, match="none"):
        detectors["yolov5n"].tail("cls3_1")


# -------------------------------------------------------------------------------------------------------- positives


def planted_output(arch, dtype=torch.float32, seed=0, size=(64, 64)):
    """Random logits of the right shapes for two images, without running a network."""
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in level_sizes(size))
    random = lambda *shape: 2 * torch.randn(2, *shape, generator=generator, dtype=dtype)
    if arch in WITH_ANCHORS:
        return AnchorOutput({}, random(3 * cells, 4), random(3 * cells), random(3 * cells, K), size)
    return AnchorFreeOutput({}, random(cells, 4, 16), random(cells, K), size)


def random_scene(seed, count=8, ignored=0.3):
    """The objects of two images as arrays for the reference, and as Targets."""
    arrays = reference.random_objects(np.random.default_rng(seed), 2, count, 64, K, ignored)
    return arrays, Targets(*(torch.as_tensor(x) for x in arrays))


def as_arrays(*tensors):
    return [x.detach().double().numpy() for x in tensors]


@pytest.mark.parametrize("seed", range(4))
def test_yolov8_positives_are_those_of_the_reference(detectors, seed):
    arrays, targets = random_scene(seed)
    output = planted_output("yolov8n", torch.float64, seed)
    points, strides = make_points(level_sizes((64, 64)), LEVEL_STRIDES, dtype=torch.float64)
    box, cls = as_arrays(output.box_logits, output.class_logits)
    _, owners, _ = reference.yolov8(box, cls, points.numpy(), strides[:, 0].numpy(), *arrays)
    got = detectors["yolov8n"].positives(output, targets)
    assert got.dtype == torch.int64 and (got >= 0).any() and np.array_equal(got.numpy(), owners)


@pytest.mark.parametrize("seed", range(4))
def test_yolov5_positives_are_matches_of_the_reference(detectors, seed):
    """Positive are exactly the matched locations; of several objects there, the last of the reference's list."""
    arrays, targets = random_scene(seed, count=20)
    output, detector = planted_output("yolov5n", torch.float64, seed), detectors["yolov5n"]
    logits = as_arrays(output.box_logits, output.objectness_logits, output.class_logits)
    anchors = detector.anchors_pixels().double().numpy()
    _, matches = reference.yolov5(*logits, level_sizes((64, 64)), LEVEL_STRIDES, anchors, *arrays)
    expected = np.full(output.objectness_logits.shape, -1)
    for row, image, location in matches:
        expected[image, location] = row
    got = detector.positives(output, targets)
    assert got.dtype == torch.int64 and len(matches) > (expected >= 0).sum() > 0  # some location is shared
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_yolov7_positives_are_choices_of_the_reference(detectors, seed):
    arrays, targets = random_scene(seed, count=20)
    output, detector = planted_output("yolov7_tiny", torch.float64, seed), detectors["yolov7_tiny"]
    logits = as_arrays(output.box_logits, output.objectness_logits, output.class_logits)
    anchors = detector.anchors_pixels().double().numpy()
    expected = np.full(output.objectness_logits.shape, -1)
    for row, image, location, *_ in reference.yolov7_matches(
        *logits, level_sizes((64, 64)), LEVEL_STRIDES, anchors, *arrays
    ):
        expected[image, location] = row
    got = detector.positives(output, targets)
    assert got.dtype == torch.int64 and (got >= 0).any() and np.array_equal(got.numpy(), expected)


@all_architectures
def test_positives_are_the_locations_whose_boxes_the_losses_teach(detectors, arch):
    """A location's box logits have a gradient exactly where it is positive: the training loss itself says so."""
    _, targets = random_scene(5)
    output, detector = planted_output(arch, torch.float64, 5), detectors[arch]
    output.box_logits.requires_grad_()
    positives = detector.positives(output, targets)
    assert not positives.requires_grad
    terms = detector.losses(output, targets)
    (terms["box"] + terms.get("dfl", 0)).backward()
    is_taught = output.box_logits.grad.flatten(2).abs().sum(-1) > 0
    assert torch.equal(is_taught, positives >= 0)
    assert (targets.image[positives] == torch.arange(2)[:, None])[positives >= 0].all()
    assert not targets.ignore[positives[positives >= 0]].any()


@all_architectures
def test_no_objects_no_positives(detectors, arch):
    output = planted_output(arch)
    got = detectors[arch].positives(output, Targets.empty())
    assert got.shape == output.class_logits.shape[:2] and (got == -1).all()


@all_architectures
def test_positives_fit_masks_and_assigned_logits(detectors, arch):
    """An object in the upper left quarter of the second image marks pixels there, on the grids of the head."""
    box = torch.tensor([[2.0, 3.0, 29.0, 30.0]])
    one, output = torch.ones(1, dtype=torch.int64), planted_output(arch)
    targets = Targets(box, 2 * one, one, torch.zeros(1, dtype=torch.bool))
    positives = detectors[arch].positives(output, targets)
    anchors = 3 if arch in WITH_ANCHORS else 1
    masks = positive_masks(positives >= 0, grid_sizes=level_sizes((64, 64)), anchors_per_pixel=anchors)
    assert [tuple(mask.shape) for mask in masks] == [(2, 1, 8, 8), (2, 1, 4, 4), (2, 1, 2, 2)]
    assert any(mask[1].any() for mask in masks)
    for mask in masks:
        half = mask.shape[-1] // 2
        assert not mask[0].any() and not mask[1, 0, half:].any() and not mask[1, 0, :, half:].any()
    logits, row = assigned_logits(detectors[arch].location_logits(output), positives)
    assert len(logits) == (positives >= 0).sum() and (row == 0).all()


# ---------------------------------------------------------------------------------------------------------- box classes


@all_architectures
def test_class_odds_per_location_are_the_log_odds_of_its_scores(detectors, arch):
    detector, output = detectors[arch], planted_output(arch)
    assert detector.class_activation == "sigmoid"
    torch.testing.assert_close(detector.location_logits(output).sigmoid(), detector.decode(output)[1])


# -------------------------------------------------------------------------------------------------- requested outputs

HEAD_FIELDS = {
    "yolov8n": ["box_logits", "class_logits"],
    "yolov5n": ["box_logits", "objectness_logits", "class_logits"],
}
HEAD_FIELDS["yolov5nu"], HEAD_FIELDS["yolov7_tiny"] = HEAD_FIELDS["yolov8n"], HEAD_FIELDS["yolov5n"]
REQUESTED = [  # names, whether the neck runs, whether the head runs
    ({"c3", "c5"}, False, False),
    ({"p4"}, True, False),
    ({"c3", "p5"}, True, False),
    ({"class_logits"}, True, True),
    ({"c4", "box_logits"}, True, True),
    (set(), False, False),
]


@all_architectures
@pytest.mark.parametrize(
    "requested, runs_neck, runs_head", REQUESTED, ids=["+".join(sorted(w)) or "-" for w, *_ in REQUESTED]
)
def test_parts_that_nobody_reads_do_not_run(detectors, images, arch, requested, runs_neck, runs_head):
    detector, ran = detectors[arch], []
    hooks = [
        getattr(detector, part).register_forward_hook(lambda *_, p=part: ran.append(p)) for part in ("neck", "head")
    ]
    with torch.no_grad():
        expected = detector(images)
        ran.clear()
        detector.requested_outputs = frozenset(requested)
        try:
            got = detector(images)
        finally:
            detector.requested_outputs = None
            [hook.remove() for hook in hooks]
    assert ("neck" in ran, "head" in ran) == (runs_neck, runs_head)
    assert not BRANCH_MAPS.keys() & got.features.keys() and got.image_size == expected.image_size
    assert requested <= got.features.keys() | set(HEAD_FIELDS[arch])
    assert all(torch.equal(value, expected.features[name]) for name, value in got.features.items())
    for field in HEAD_FIELDS[arch]:
        value = getattr(got, field)
        assert torch.equal(value, getattr(expected, field)) if runs_head else value is None


def test_of_the_maps_within_the_head_only_the_requested_are_kept(detectors, images):
    teacher = fuse(detectors["yolov8n"])
    with torch.no_grad():
        expected = teacher(images)
        teacher.requested_outputs = frozenset({"p3", "cls4_1", "box3_2"})
        got = teacher(images)
    assert BRANCH_MAPS.keys() & got.features.keys() == {"cls4_1", "box3_2"}
    assert all(torch.equal(value, expected.features[name]) for name, value in got.features.items())
    assert fuse(teacher).requested_outputs == teacher.requested_outputs  # a copy is asked for the same


@pytest.mark.slow  # tracing takes seconds
@pytest.mark.parametrize("arch, requested", [("yolov8n", None), ("yolov8n", {"p3", "cls3_1"}), ("yolov5n", {"p3"})])
def test_one_graph_whatever_is_requested(detectors, images, arch, requested):
    """torch.compile traces forward without a break, and maps and logits come out as they are."""
    detector = fuse(detectors[arch])
    detector.requested_outputs = None if requested is None else frozenset(requested)
    with torch.no_grad():
        expected = detector(images)
        got = torch.compile(detector, backend="eager", fullgraph=True)(images)
    assert got.features.keys() == expected.features.keys()
    assert all(torch.equal(value, expected.features[name]) for name, value in got.features.items())
    assert (got.class_logits is None) == (expected.class_logits is None) == (requested == {"p3"})
