"""What a term is given: scores with objectness, levels by name, labels of proposals, the detector's own anchors."""

import copy
import types

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from config import TermConfig
from distill.criterion import Criterion, TeacherFacts
from distill.given_boxes import assigned_labels
from distill.losses.masked import masked_mse
from distill.losses.masks import anchor_mask
from distill.term_inputs import TermInputs
from errors import UserError
from frcnn.matching import match
from structures import Targets
from tests.reference.logit_distillation import sigmoid

SIZE = 64
IMAGES = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
TARGETS = Targets(
    torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 0.0, 62.0, 62.0], [8.0, 2.0, 30.0, 18.0]]),
    torch.tensor([0, 2, 1]), torch.tensor([0, 1, 0]), torch.zeros(3, dtype=torch.bool),
)  # fmt: skip


def build(student, teacher, loss: str, maps=(), **changes) -> Criterion:
    facts = {"t": changes.pop("facts", TeacherFacts())}
    return Criterion(
        (TermConfig("t", loss, 1.0, maps, **changes),), student=student, teachers={"t": teacher}, epochs=1,
        image_size=SIZE, class_names=("a", "b", "c"), facts=facts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def yolov5s() -> tuple[torch.nn.Module, torch.nn.Module]:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(models.build("yolov5n", 3).eval())
        for parameter in made[-1].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made[0], made[1].requires_grad_(False)


def class_terms(s_output, t_output, columns: list[int] | None = None) -> dict[str, float]:
    """soft_class and quality_focal of YOLOv5 in float64: sums over locations of score-weighted losses."""
    s, t, objectness = (
        x.detach().double().numpy() for x in (s_output.class_logits, t_output.class_logits, t_output.objectness_logits)
    )
    s, t = (s, t) if columns is None else (s[..., columns], t[..., columns])
    p, q = sigmoid(t), sigmoid(s)
    score = sigmoid(objectness) * p.max(-1)
    entropy = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    kl = entropy + p * np.log(p) + (1 - p) * np.log(1 - p)
    total = max(score.sum(), 1)
    return {
        "soft_class": (score * kl.sum(-1)).sum() / total,
        "quality_focal": (score * (abs(p - q) * entropy).sum(-1)).sum() / total,
    }


@pytest.mark.parametrize("some_classes", [False, True])
@pytest.mark.parametrize("loss", ["soft_class", "quality_focal"])
def test_scores_of_a_head_with_objectness_are_objectness_times_class(yolov5s, loss, some_classes):
    """Weight and normaliser; a teacher that is sure of a class where it sees no object teaches nothing there."""
    student, teacher = yolov5s
    facts = TeacherFacts(("a", "b", "other")) if some_classes else TeacherFacts()
    criterion = build(student, teacher, loss, ("class_logits",), facts=facts)
    s, t = student(IMAGES), teacher(IMAGES)
    t.objectness_logits[:] = -8.0  # but for one location in ten
    t.objectness_logits[:, ::10] = 3.0
    t.class_logits[:, 1::10] = 6.0
    found = criterion(s, {"t": t}, TARGETS, 0.0)[f"{loss}_t"]
    expected = class_terms(s, t, [0, 1] if some_classes else None)[loss]
    assert found.item() == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(found, s.class_logits)
    strength = gradient.abs().sum((0, 2))
    assert strength[::10].sum() > 0.8 * strength.sum()


GRIDS = {"p3": (8, 8), "p4": (4, 4), "p5": (2, 2)}  # the teacher's, of images twice as large as the student's
SCORES = {"p3": 0.5, "p4": 0.25, "p5": 0.125}
STRIDES = {"c3": 8, "p3": 8, "p4": 16, "p5": 32, "tokens": 14}


def inputs_of(name: str, factor: int) -> TermInputs:
    """A teacher whose score is one number on each level; the student's grids are `factor` times as fine as its own."""
    features = {level: torch.zeros(1, 6, *grid) for level, grid in GRIDS.items()} | {"c3": torch.zeros(1, 6, 8, 8)}
    features["tokens"] = torch.zeros(1, 6, 5, 5)
    logits = torch.cat([torch.full((1, h * w, 2), SCORES[p]).logit() for p, (h, w) in GRIDS.items()], 1)
    output = types.SimpleNamespace(features=features, class_logits=logits, image_size=(64, 64))
    h, w = features[name].shape[2:]
    s_map = torch.zeros(1, 6, h // factor, w // factor)
    teacher = types.SimpleNamespace(strides=STRIDES)
    return TermInputs(TARGETS, output, output, teacher=teacher, t_name=name, s_map=s_map, t_map=s_map)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize(("name", "level"), [("p3", "p3"), ("c3", "p3"), ("p4", "p4"), ("p5", "p5")])
def test_levels_go_by_name_and_scores_are_summed_on_the_students_grids(name, level, factor):
    """Not by equal grids: at twice the size the student's p3 has the grid of the teacher's p4."""
    inputs = inputs_of(name, factor)
    h, w = GRIDS[level]
    torch.testing.assert_close(inputs.teacher_score_map(), torch.full((1, h // factor, w // factor), SCORES[level]))
    expected = sum(SCORES[p] * (a // factor) * (b // factor) for p, (a, b) in GRIDS.items())
    assert inputs.teacher_score_sum().item() == pytest.approx(expected)


def test_a_map_beside_no_level_is_named():
    with pytest.raises(ValueError, match="map 'tokens': the head has no level of its stride, only p3, p4, p5"):
        inputs_of("tokens", 1).teacher_score_map()


def test_a_teacher_of_larger_images_weighs_by_its_own_level():
    torch.manual_seed(3)
    student, teacher = models.build("yolov8n", 3).eval(), models.build("yolov8n", 3).eval().requires_grad_(False)
    criterion = build(student, teacher, "score_weighted_l2", ("p3", "p4", "p5"), facts=TeacherFacts((), 2 * SIZE))
    s, t = student(IMAGES), teacher(IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3))
    value = lambda: criterion(s, {"t": t}, TARGETS, 0.0)["score_weighted_l2_t"].item()
    before = value()
    t.class_logits[:, :100] = 3.0  # of its p3: 16 x 16 locations
    assert value() != pytest.approx(before, rel=1e-3)


def test_proposals_are_labelled_as_the_second_stage_learns_them():
    """Against frcnn.matching.match, image by image: the best object's label from IoU 0.5 on, else background."""
    draw = torch.Generator().manual_seed(4)
    corner, side = 60 * torch.rand(9, 2, generator=draw), 8 + 40 * torch.rand(9, 2, generator=draw)
    objects = Targets(
        torch.cat((corner, corner + side), 1), torch.arange(9), torch.arange(9) % 3, torch.arange(9) % 4 == 3
    )
    near = objects.boxes_xyxy[torch.randint(9, (80,), generator=draw)] + 5 * torch.randn(80, 4, generator=draw)
    boxes = torch.cat((near, objects.boxes_xyxy, torch.tensor([[80.0, 80.0, 95.0, 95.0]])))
    image = torch.randint(3, (90,), generator=draw)
    found = assigned_labels(boxes, image, objects)
    for b in range(3):
        learnt = objects[(objects.image == b) & ~objects.ignore]
        ignored = objects[(objects.image == b) & objects.ignore].boxes_xyxy
        rule = dict(positive_iou=0.5, negative_iou=0.5, every_object=False)
        matched = match(boxes[image == b], learnt.boxes_xyxy, ignored, **rule)
        expected = torch.where(matched >= 0, learnt.labels[matched.clamp(min=0)], -1)
        assert torch.equal(found.labels[image == b], expected)
        assert torch.equal(found.ignore[image == b], matched == -2)
    assert (found.labels >= 0).sum() > 5 and found.ignore.any()
    assert torch.equal(assigned_labels(boxes, image, Targets.empty()).labels, torch.full((90,), -1))


def pair_inputs(student, teacher, name: str, t_size: int = SIZE) -> TermInputs:
    outputs = [types.SimpleNamespace(image_size=(size, size)) for size in (SIZE, t_size)]
    return TermInputs(TARGETS, *outputs, student, teacher, name, name, s_map=torch.zeros(2, 6, 8, 8))


def widths_and_heights(anchors: Tensor) -> list[list[float]]:
    return sorted(anchors.round().tolist())


def test_fgfi_takes_the_anchors_of_the_detector(yolov5s):
    """YOLOv5's p3 begins at 10 x 13 px, Faster R-CNN's at 64 px of area: four times as large."""
    yolov5, _ = yolov5s
    yolov8, rcnn = models.build("yolov8n", 3), models.build("fasterrcnn_resnet18", 3)
    none, ratios = None, (0.5, 1.0, 2.0)
    anchors_of = lambda s, t, name, size=SIZE, sizes=none: widths_and_heights(
        pair_inputs(s, t, name, size).anchors(sizes, ratios)
    )
    ours = widths_and_heights(yolov5.anchors_pixels()[0])
    assert ours == [[10, 13], [16, 30], [33, 23]] and anchors_of(yolov5, rcnn, "p3") == ours
    assert anchors_of(rcnn, yolov5, "p3") == [[46, 90], [64, 64], [90, 46]] == anchors_of(rcnn, yolov5, "c3")
    assert anchors_of(yolov8, yolov5, "p3") == ours  # those of the teacher, in pixels of the student's images:
    assert anchors_of(yolov8, yolov5, "p3", 2 * SIZE) == widths_and_heights(yolov5.anchors_pixels()[0] / 2)
    sides = [round((w * h) ** 0.5) for w, h in pair_inputs(yolov8, yolov8, "p3").anchors(none, ratios).tolist()]
    assert sorted(sides) == [16, 16, 16, 32, 32, 32]
    with pytest.raises(ValueError, match=r"anchor_ratios: the head has anchors of its own, expected anchor_sizes"):
        pair_inputs(yolov8, yolov5, "p3").anchors(none, (1.0,))
    assert len(pair_inputs(yolov8, yolov5, "p3").anchors((8.0,), (1.0,))) == 1
    assert anchors_of(yolov5, yolov5, "p3", SIZE, (8.0,)) == [[45, 91], [64, 64], [91, 45]]


@pytest.mark.parametrize("loss", ["soft_class", "quality_focal", "objectness_scaled"])
def test_locations_of_other_anchors_are_not_compared(yolov5s, loss):
    """Equal weights, one anchor of another width: its logits speak of other boxes, though their shapes are equal."""
    student, _ = yolov5s
    teacher = copy.deepcopy(student).requires_grad_(False)
    maps = () if loss == "objectness_scaled" else ("class_logits",)
    build(student, teacher, loss, maps)
    teacher.head.anchors[1, 2, 0] *= 1.5
    with pytest.raises(
        UserError, match=r"^terms\.0: the anchors of student and teacher differ: their locations predict"
    ):
        build(student, teacher, loss, maps)


def test_masked_imitation_of_yolov5_marks_by_its_anchors(yolov5s):
    student, teacher = yolov5s
    criterion = build(student, teacher, "masked_mse", ("p4",), parameters={"mask": "anchors"})
    s, t = student(IMAGES), teacher(IMAGES)
    mask = anchor_mask(
        TARGETS, batch_size=2, grid_size=(4, 4), image_size=(SIZE, SIZE), anchor_sizes=student.anchors_pixels()[1]
    )
    expected = masked_mse(s_map=s.features["p4"], t_map=t.features["p4"], mask=mask)
    torch.testing.assert_close(criterion(s, {"t": t}, TARGETS, 0.0)["masked_mse_t"], expected)


def test_a_pyramid_without_the_stride_is_refused():
    rcnn = models.build("fasterrcnn_mobilenet_v3_small", 3)
    with pytest.raises(ValueError, match="mask anchors: 'c4' has the stride of no level with anchors"):
        pair_inputs(rcnn, rcnn, "c4").anchors(None, (1.0,))


def test_every_batch_of_a_step_has_masks_of_its_own_and_a_step_repeats(yolov5s):
    """One seed for a step, two batches in it: the losses of one batch given twice differ, and a step again is equal."""
    student, teacher = yolov5s
    criterion = build(student, teacher, "mgd", ("p3",))
    s, t = student(IMAGES), {"t": teacher(IMAGES)}
    steps = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        steps.append([criterion(s, t, TARGETS, 0.0)["mgd_t"].item() for _ in range(2)])
    assert steps[0] == steps[1] and len({*steps[0], *steps[2]}) == 4


ALWAYS_ZERO = {
    "one pixel": ("cwd", ("p5",), {}, 32),
    "one pixel has one similarity": ("location_similarity", ("p5",), {}, 32),
    "attention of one pixel": ("attention", ("p5",), {}, 32),
    "objects of one pixel": ("instance_distance", ("p5",), {}, 32),
    "no part of a loss": ("decoupled_mse", ("p4",), {"foreground_weight": 0.0, "background_weight": 0.0}, 64),
}


@pytest.mark.parametrize("case", ALWAYS_ZERO)
def test_a_term_that_is_always_zero_is_refused(case, yolov5s):
    loss, maps, parameters, size = ALWAYS_ZERO[case]
    student, teacher = yolov5s
    before = torch.random.get_rng_state()
    with pytest.raises(UserError, match=rf"terms\.0: loss '{loss}' is 0 whatever student and teacher predict"):
        Criterion(
            (TermConfig("t", loss, 1.0, maps, parameters=parameters),), student=student, teachers={"t": teacher},
            epochs=1, image_size=size,
        )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)


ACTS = {  # for a batch, though not for every image, or not in noise
    "positives of a coarse level": ("masked_mse", ("p5",), {"mask": "positives"}, 64),
    "detections in noise": ("box_classes", (), {"boxes": "teacher", "score_threshold": 0.9}, 64),
    "one pixel in two images": ("pkd", ("p5",), {}, 32),
    "three objects": ("instance_distance", ("p3",), {}, 64),
}


@pytest.mark.parametrize("case", ACTS)
def test_a_term_that_acts_at_times_is_accepted_also_between_equal_models(case, yolov5s):
    loss, maps, parameters, size = ACTS[case]
    _, teacher = yolov5s
    Criterion(
        (TermConfig("t", loss, 1.0, maps, parameters=parameters),), student=teacher, teachers={"t": teacher},
        epochs=1, image_size=size,
    )  # fmt: skip
