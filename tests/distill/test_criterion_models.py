"""The criterion between real heads: terms that ask the models themselves, and teachers that see something else."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from config import GradientShare, TermConfig
from distill.criterion import Criterion, TeacherFacts
from distill.losses.crosskd import crosskd_classes
from distill.losses.logits import softmax_kl
from distill.losses.masked import masked_mse
from distill.teacher_weights import confidence_weights, teacher_cross_entropy
from errors import UserError
from structures import Detections, Targets
from teachers.output_cache import join_output, parts_of, parts_to_keep, split_output
from tests.reference.logit_distillation import sigmoid
from yolo.yolov8 import AnchorFreeDetector

SIZE = 64
TARGETS = Targets(
    torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 0.0, 62.0, 62.0], [0.0, 32.0, 24.0, 64.0], [8.0, 2.0, 30.0, 18.0]]),
    torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 0, 0]), torch.zeros(4, dtype=torch.bool),
)  # fmt: skip


def model(arch: str, seed: int, frozen: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    made = models.build(arch, 3)
    for parameter in made.parameters():  # away from the prior, so that predictions differ between locations
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval().requires_grad_(not frozen)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def yolos() -> dict[str, nn.Module]:
    return {
        "student": model("yolov8n", 1, frozen=False), "v8": model("yolov8n", 2), "wide": model("yolov8s", 3),
        "v5": model("yolov5n", 4), "v5 student": model("yolov5n", 5, frozen=False),
        "v7": model("yolov7_tiny", 6), "v7 student": model("yolov7_tiny", 7, frozen=False),
    }  # fmt: skip


def build(student, teacher, loss, maps=(), **changes) -> Criterion:
    facts = changes.pop("facts", {})
    weighting = changes.pop("teacher_weighting", "fixed")
    teachers = teacher if isinstance(teacher, dict) else {"t": teacher}
    terms = [TermConfig(name, loss, 1.0, maps, **changes) for name in teachers]
    return Criterion(
        tuple(terms), student=student, teachers=teachers, epochs=1, image_size=SIZE, class_names=("a", "b", "c"),
        facts=facts, teacher_weighting=weighting,
    )  # fmt: skip


def value(criterion, student, teacher, pictures, targets=TARGETS) -> Tensor:
    with torch.no_grad():
        t = teacher(pictures)
    return criterion(student(pictures), {"t": t}, targets, 0.0)


CASES = {  # student, teacher, loss, maps, changes
    "crosskd classes": ("student", "wide", "crosskd_classes", ("cls3_1", "cls4_2"), dict(adapter="conv1x1")),
    "crosskd edges": ("student", "v8", "crosskd_edges", ("box3_1", "box5_2"), {}),
    "positives as mask": ("student", "v8", "masked_mse", ("p3", "p4"), dict(parameters={"mask": "positives"})),
    "main region": ("student", "v8", "localization", ("box_logits",), dict(parameters={"region": "main"})),
    "valuable region": ("student", "v8", "localization", ("box_logits",), dict(parameters={"region": "valuable"})),
    "box classes": ("student", "v5", "box_classes", (), {}),
    "box classes, anchors": ("v5 student", "v8", "box_classes", (), {}),
    "box classes, assigned": ("student", "v5", "box_classes", (), dict(parameters={"at": "assigned"})),
    "box classes, found": (
        "student", "v8", "box_classes", (), dict(parameters={"boxes": "teacher", "score_threshold": 0.0})),
    "objectness": ("v5 student", "v5", "objectness_scaled", (), {}),
    "objectness of v7": ("v7 student", "v7", "objectness_scaled", (), {}),
    "objectness, v7 to v5": ("v5 student", "v7", "objectness_scaled", (), {}),
    "soft classes, v5 to v7": ("v7 student", "v5", "soft_class", ("class_logits",), {}),
    "own anchors of v7": (
        "v7 student", "v7", "masked_mse", ("p3", "p5"), dict(parameters={"mask": "anchors"}, adapter="conv1x1")),
    "positives of v7": (
        "v7 student", "v8", "masked_mse", ("p3",), dict(parameters={"mask": "positives"}, adapter="conv1x1")),
    "box classes, v7 assigned": ("v7 student", "v8", "box_classes", (), dict(parameters={"at": "assigned"})),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_terms_that_ask_the_models_act(case, yolos, pictures):
    student, teacher, loss, maps, changes = CASES[case]
    student, teacher = copy.deepcopy(yolos[student]), yolos[teacher]
    criterion = build(student, teacher, loss, maps, **changes)
    (found,) = value(criterion, student, teacher, pictures).values()
    found.backward()
    assert found > 0 and found.isfinite() and found.dtype == torch.float32
    assert sum(p.grad.abs().sum() for p in student.backbone.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in teacher.parameters())
    (empty,) = value(criterion, student, teacher, pictures, Targets.empty()).values()
    assert empty.isfinite()
    assert not any(key.startswith(("models", "student")) for key in criterion.state_dict())


def test_a_teacher_whose_output_is_missing_is_no_teacher(yolos, pictures):
    """The student's own output never stands in for it."""
    criterion = build(yolos["student"], yolos["v8"], "soft_class", ("class_logits",))
    with pytest.raises(KeyError, match="'t'"):
        criterion(yolos["student"](pictures), {}, TARGETS, 0.0)


@pytest.mark.parametrize(("student", "name"), [("student", "dfl"), ("v5 student", "obj")])
def test_no_term_takes_the_name_of_a_loss_of_the_student(student, name, yolos):
    with pytest.raises(UserError, match=rf"terms\.0\.name: found '{name}', expected another than box, "):
        build(yolos[student], yolos["v8"], "box_classes", name=name)


def test_the_valuable_region_leaves_out_ignored_boxes(yolos, pictures, monkeypatch):
    """An ignored box over both images takes the region around the positives, and leaves the positives."""
    student, teacher = yolos["student"], yolos["v8"]
    build_one = lambda region: build(student, teacher, "localization", ("box_logits",), parameters={"region": region})
    everywhere = torch.tensor([[-1.0, -1.0, SIZE + 1.0, SIZE + 1.0]] * 2)
    ignored = Targets(everywhere, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([True, True]))
    fields = ("boxes_xyxy", "labels", "image", "ignore")
    covered = Targets(*(torch.cat([getattr(t, name) for t in (TARGETS, ignored)]) for name in fields))
    found = {
        (region, name): value(build_one(region), student, teacher, pictures, targets)["localization_t"].item()
        for region in ("main", "valuable")
        for name, targets in (("plain", TARGETS), ("covered", covered))
    }
    assert found["valuable", "plain"] != pytest.approx(found["main", "plain"], rel=1e-3)
    assert found["valuable", "covered"] == pytest.approx(found["main", "covered"], rel=1e-6)
    assert found["main", "covered"] == pytest.approx(found["main", "plain"], rel=1e-6)
    monkeypatch.delattr(AnchorFreeDetector, "in_ignored_boxes")
    with pytest.raises(UserError, match="region valuable needs a student with"):
        build_one("valuable")


@pytest.mark.parametrize("case", CASES)
def test_a_teacher_that_leaves_out_what_no_term_reads_teaches_the_same(case, yolos, pictures):
    student, teacher, loss, maps, changes = CASES[case]
    student, teacher = yolos[student], copy.deepcopy(yolos[teacher])
    torch.manual_seed(0)
    criterion = build(student, teacher, loss, maps, **changes)
    (whole,) = value(criterion, student, teacher, pictures).values()
    teacher.requested_outputs = criterion.requested_outputs("t")
    (part,) = value(criterion, student, teacher, pictures).values()
    assert torch.equal(part, whole)


def test_maps_alone_leave_out_the_head_of_the_teacher(yolos, pictures):
    criterion = build(yolos["student"], yolos["wide"], "cwd", ("p3", "p4"), adapter="conv1x1")
    assert criterion.requested_outputs("t") == {"p3", "p4"}
    teacher = copy.deepcopy(yolos["wide"])
    teacher.requested_outputs = criterion.requested_outputs("t")
    assert teacher(pictures).class_logits is None


def test_crosskd_is_its_function_through_the_teachers_layers(yolos, pictures):
    student, teacher = yolos["student"], yolos["v8"]
    (found,) = value(build(student, teacher, "crosskd_classes", ("cls3_2",)), student, teacher, pictures).values()
    s, t = student(pictures), teacher(pictures)
    expected = crosskd_classes(
        s_map=s.features["cls3_2"], t_map=t.features["cls3_2"], t_tail=teacher.head.cls[0][2:],
        normaliser=t.class_logits.sigmoid().amax(-1).sum(),
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_positives_are_those_of_the_students_assigner(yolos, pictures):
    student, teacher = yolos["student"], yolos["v8"]
    criterion = build(student, teacher, "masked_mse", ("p4",), parameters={"mask": "positives"})
    (found,) = value(criterion, student, teacher, pictures).values()
    s, t = student(pictures), teacher(pictures)
    level = (student.positives(s, TARGETS) >= 0)[:, 64:80].reshape(2, 1, 4, 4).float()
    expected = masked_mse(s_map=s.features["p4"], t_map=t.features["p4"], mask=level)
    assert 0 < level.sum() < 32
    torch.testing.assert_close(found, expected)


def test_box_classes_are_zero_for_the_teacher_itself(yolos, pictures):
    teacher = yolos["v8"]
    (found,) = value(build(teacher, teacher, "box_classes"), teacher, teacher, pictures).values()
    assert found == 0


def test_a_teacher_that_sees_larger_pictures_is_asked_about_the_same_boxes(yolos, pictures):
    """Nearest-neighbour doubling of the pictures doubles every box; the teacher is asked in its own pixels."""
    student, teacher = yolos["student"], yolos["v8"]
    criterion = build(student, teacher, "box_classes", facts={"t": TeacherFacts(image_size=2 * SIZE)})
    with torch.no_grad():
        t = teacher(pictures.repeat_interleave(2, 2).repeat_interleave(2, 3))
    found = criterion(student(pictures), {"t": t}, TARGETS, 0.0)["box_classes_t"]
    per_image = [TARGETS.boxes_xyxy[TARGETS.image == b] for b in (0, 1)]
    s_odds = student.class_logits_at(student(pictures), per_image).detach().double().numpy()
    t_odds = teacher.class_logits_at(t, [2 * boxes for boxes in per_image]).double().numpy()
    p, q = sigmoid(t_odds), sigmoid(s_odds)
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1).mean()
    assert found.item() == pytest.approx(expected, rel=1e-4)


@dataclasses.dataclass
class TwoStageOutput:
    features: dict[str, Tensor]
    proposals: list[Tensor]
    image_logits: Tensor
    image_size: tuple[int, int]


class TwoStage(nn.Module):
    """A softmax head over the mean of the map in a box, background first; and logits of whole images."""

    class_activation = "softmax"

    def __init__(self, seed: int, num_classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.classify = nn.Linear(6, 1 + num_classes)
        self.whole = nn.Linear(6, num_classes)
        nn.init.normal_(self.classify.weight, std=3.0)

    def forward(self, images: Tensor) -> TwoStageOutput:
        p3 = self.stem(images)
        proposals = [torch.tensor([[0.0, 0.0, 32.0, 32.0], [16.0, 8.0, 60.0, 40.0]])] * len(images)
        return TwoStageOutput({"p3": p3}, proposals, self.whole(p3.mean((2, 3))), tuple(images.shape[2:]))

    def class_logits_at(self, output: TwoStageOutput, boxes_per_image: list[Tensor]) -> Tensor:
        rows = []
        for image, boxes in zip(output.features["p3"], boxes_per_image):
            cells = (boxes / 8).round().long().tolist()
            rows += [image[:, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].mean((1, 2)) for x1, y1, x2, y2 in cells]
        return self.classify(torch.stack(rows) if rows else output.features["p3"].new_zeros(0, 6))

    def detect(self, output, **thresholds) -> list[Detections]:
        return [Detections(boxes, torch.ones(len(boxes)), torch.zeros(len(boxes)).long()) for boxes in output.proposals]


@pytest.mark.parametrize("boxes", ["targets", "teacher", "proposals"])
@pytest.mark.parametrize("loss", ["softmax_kl", "decoupled_kl", "prediction_correlation", "box_classes"])
def test_softmax_heads(loss, boxes, pictures):
    student, teacher = TwoStage(1), TwoStage(2).requires_grad_(False)
    criterion = build(student, teacher, loss, parameters={"boxes": boxes})
    (found,) = value(criterion, student, teacher, pictures).values()
    found.backward()
    assert found > 0 and student.stem.weight.grad.abs().sum() > 0
    (same,) = value(build(teacher, teacher, loss, parameters={"boxes": boxes}), teacher, teacher, pictures).values()
    assert same.abs() < 1e-6


def test_softmax_kl_is_asked_about_the_objects(pictures):
    student, teacher = TwoStage(1), TwoStage(2)
    (found,) = value(build(student, teacher, "softmax_kl"), student, teacher, pictures).values()
    per_image = [TARGETS.boxes_xyxy[TARGETS.image == b] for b in (0, 1)]
    s, t = (m.class_logits_at(m(pictures), per_image) for m in (student, teacher))
    torch.testing.assert_close(found, softmax_kl(s_logits=s, t_logits=t))


def test_a_two_stage_teacher_and_a_dense_student_meet_at_boxes(yolos, pictures):
    student, teacher = yolos["student"], TwoStage(2).requires_grad_(False)
    (found,) = value(build(student, teacher, "box_classes"), student, teacher, pictures).values()
    assert found > 0


def test_a_student_that_is_not_dense_has_no_assigned_boxes(yolos):
    with pytest.raises(UserError, match=r"terms\.0: at: found assigned, but the student assigns objects to no"):
        build(TwoStage(1), yolos["v8"], "box_classes", parameters={"at": "assigned"})


def test_an_image_head_learns_from_logits_of_whole_images(pictures):
    student, teacher = TwoStage(1), TwoStage(2).requires_grad_(False)
    facts = {"t": TeacherFacts(("c", "z", "a"))}  # two classes in common
    criterion = build(student, teacher, "image_kl", ("p3",), facts=facts, parameters={"temperature": 2.0})
    (found,) = value(criterion, student, teacher, pictures).values()
    found.backward()
    head = dict(criterion.named_parameters())
    assert {tuple(p.shape) for p in head.values()} == {(2, 6), (2,)} and all(p.grad.any() for p in head.values())
    s = student(pictures).features["p3"].mean((2, 3)) @ head["losses.image_kl_t.0.head.classify.weight"].T
    s = s + head["losses.image_kl_t.0.head.classify.bias"]
    t = teacher(pictures).image_logits[:, [2, 0]]
    torch.testing.assert_close(found, softmax_kl(s_logits=s, t_logits=t, temperature=2.0))


@pytest.mark.parametrize("names", [("a",), ("c", "x", "y")], ids=["one class", "one shared class"])
def test_an_image_head_of_one_class_is_refused(names):
    """A softmax over one class is 1 whatever the logits."""
    student, teacher = TwoStage(1), TwoStage(2, num_classes=len(names)).requires_grad_(False)
    classes = ("a",) if len(names) == 1 else ("a", "b", "c")
    with pytest.raises(UserError, match=r"terms\.0: loss 'image_kl' is 0 whatever student and teacher predict"):
        Criterion(
            (TermConfig("t", "image_kl", 1.0, ("p3",)),), student=student, teachers={"t": teacher}, epochs=1,
            image_size=SIZE, class_names=classes, facts={"t": TeacherFacts(names)},
        )  # fmt: skip


REFUSED = {
    "softmax of sigmoid heads": ("student", "v8", "softmax_kl", {}, "the student has a sigmoid head"),
    "proposals of a dense teacher": (
        "student", "v8", "box_classes", dict(parameters={"boxes": "proposals"}), "only a two-stage teacher does"),
    "boxes by name": ("student", "v8", "box_classes", dict(maps=("p3",)), "expected no names of maps"),
    "unknown boxes": ("student", "v8", "box_classes", dict(parameters={"boxes": "all"}), "boxes: found 'all'"),
    "no anchors": ("student", "v8", "objectness_scaled", {}, "must have objectness and anchors"),
    "no branch": ("student", "v8", "crosskd_classes", dict(maps=("p3",)), "the teacher's branches"),
    "no adapter": ("student", "wide", "crosskd_classes", dict(maps=("cls3_1",)), "widths differ"),
    "logits of edges as maps": ("student", "v8", "fgd", dict(maps=("box_logits",)), "are not maps (B, C, H, W)"),
    "the teacher's logits of edges": (
        "student", "v8", "mse", dict(maps=("p3",), teacher_maps=("box_logits",), adapter="conv1x1"), "are not maps"),
    "no image logits": ("student", "v8", "image_kl", dict(maps=("p5",)), "'image_logits' is not among"),
    "region": (
        "student", "v8", "localization", dict(maps=("box_logits",), parameters={"region": "all"}), "found 'all'"),
    "tensor as parameter": ("student", "v8", "box_classes", dict(parameters={"weight": 2.0}), "found 'weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, yolos):
    student, teacher, loss, changes, message = REFUSED[case]
    before = {k: v.clone() for k, v in yolos[student].state_dict().items()}
    with pytest.raises(UserError) as caught:
        build(yolos[student], yolos[teacher], loss, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in yolos[student].state_dict().items())


def test_a_teacher_that_detects_nothing_has_no_boxes_of_its_own(yolos):
    teacher = models.build_teacher("dinov2_vits14")
    with pytest.raises(UserError, match=r"terms\.0: boxes: found teacher, but this teacher detects nothing"):
        changes = dict(parameters={"boxes": "teacher"}, facts={"t": TeacherFacts(image_size=56)})
        build(yolos["student"], teacher, "box_classes", **changes)


def test_confidence_weights():
    """Against the published form in float64; equal doubts weigh 1, and the mean is always 1."""
    doubt = np.array([0.2, 1.5, 0.7])
    published = (1 - np.exp(doubt) / np.exp(doubt).sum()) / 2
    torch.testing.assert_close(confidence_weights(torch.tensor(doubt), torch.ones(3)), torch.tensor(3 * published))
    torch.testing.assert_close(confidence_weights(torch.full((4,), 9.0), torch.ones(4)), torch.ones(4))
    assert confidence_weights(torch.tensor([0.1, 0.2]) + 3, torch.ones(2)).mean() == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 2"):
        confidence_weights(torch.zeros(1), torch.ones(1))


def test_a_teacher_without_an_object_of_its_classes_weighs_1():
    """It is not the best one because nothing contradicts it; the others are compared as if it were not there."""
    doubt = torch.tensor([0.0, 0.2, 1.5])
    expected = torch.cat((torch.ones(1), confidence_weights(doubt[1:], torch.ones(2))))
    torch.testing.assert_close(confidence_weights(doubt, torch.tensor([0.0, 4.0, 1.0])), expected)
    for objects in ((0.0, 0.0, 2.0), (0.0, 0.0, 0.0)):
        assert confidence_weights(doubt, torch.tensor(objects)).tolist() == [1, 1, 1]


def test_classes_that_a_batch_lacks_do_not_favour_a_teacher(yolos, pictures):
    student, teachers = yolos["student"], {"a": yolos["v8"], "b": yolos["wide"]}
    facts = {"a": TeacherFacts(("a", "x", "y"))}
    plain, trusted = (
        build(student, teachers, "box_classes", facts=facts, teacher_weighting=how) for how in ("fixed", "confidence")
    )
    objects = TARGETS[TARGETS.labels != 0]  # of the classes b and c
    with torch.no_grad():
        s, t = student(pictures), {name: teacher(pictures) for name, teacher in teachers.items()}
        before, after = (criterion(s, t, objects, 0.0) for criterion in (plain, trusted))
    assert len(objects) and before["box_classes_a"] > 0
    assert after == before


def test_a_teacher_that_knows_the_labels_counts_more(yolos, pictures):
    student, teachers = yolos["student"], {"a": yolos["v8"], "b": yolos["wide"]}
    plain = build(student, teachers, "box_classes")
    trusted = build(student, teachers, "box_classes", teacher_weighting="confidence")
    with torch.no_grad():
        t = {name: teacher(pictures) for name, teacher in teachers.items()}
        s = student(pictures)
        doubts = []
        for name, teacher in teachers.items():
            odds = teacher.class_logits_at(t[name], [TARGETS.boxes_xyxy[TARGETS.image == b] for b in (0, 1)]).numpy()
            labels = torch.cat([TARGETS.labels[TARGETS.image == b] for b in (0, 1)]).numpy()
            doubts.append(-np.log(sigmoid(odds.astype(np.float64)))[np.arange(4), labels].mean())
            found, num_objects = teacher_cross_entropy(teacher, t[name], TARGETS, (SIZE, SIZE))
            assert found.item() == pytest.approx(doubts[-1], rel=1e-5) and num_objects == 4
        weights = confidence_weights(torch.tensor(doubts), torch.ones(2)).float()
        before, after = plain(s, t, TARGETS, 0.0), trusted(s, t, TARGETS, 0.0)
        first = torch.tensor([True, False])  # the second image has pseudo boxes, which a teacher itself has made
        labelled = trusted(s, t, TARGETS, 0.0, is_labelled=first)
        of_labels = TARGETS[TARGETS.image == 0]
        trusts = [teacher_cross_entropy(m, t[name], of_labels, (SIZE, SIZE)) for name, m in teachers.items()]
        weights_of_labels = confidence_weights(*map(torch.stack, zip(*trusts)))
    for weight, name in zip(weights, before):
        torch.testing.assert_close(after[name], weight * before[name])
    for weight, name in zip(weights_of_labels, before):
        torch.testing.assert_close(labelled[name], weight * before[name], rtol=1e-5, atol=0)
    assert (weights - weights_of_labels).abs().max() > 1e-3
    assert trusted.requested_outputs("a") is None
    with pytest.raises(UserError, match="compares teachers, found 1"):
        build(student, yolos["v8"], "cwd", ("p3",), teacher_weighting="confidence")


@pytest.mark.parametrize("arch", ["yolov8n", "fasterrcnn_mobilenet_v3_small"])
def test_a_measured_weight_gives_the_gradient_its_share(arch, pictures, yolos):
    """Of real models: for two maps of the backbone, for classes of boxes, and for a term at half of its schedule."""
    student = model(arch, 1, frozen=False)
    terms = (
        TermConfig("t", "pkd", GradientShare(0.3), ("c4", "c5"), ("p4", "p5"), adapter="conv1x1"),
        TermConfig("t", "box_classes", GradientShare(0.05)),
        TermConfig("t", "cwd", GradientShare(0.2), ("p5",), adapter="conv1x1", warmup_epochs=1.0),
    )
    criterion = Criterion(
        terms, student=student, teachers={"t": yolos["v8"]}, epochs=2, image_size=SIZE, class_names=("a", "b", "c")
    )
    with torch.no_grad():
        t_output = yolos["v8"](pictures)
    torch.manual_seed(0)
    s_output = student(pictures)
    detection = student.losses(s_output, TARGETS)
    losses = criterion(s_output, {"t": t_output}, TARGETS, 0.5, detection=detection)
    pyramid = {"yolov8n": ("p3", "p4", "p5")}.get(arch, ("p5_first", "p5", "p6"))

    def norm(loss: Tensor, names: tuple[str, ...]) -> float:
        maps = [s_output.features[name] for name in names]
        gradients = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None]).norm().item()

    on = (("c4", "c5"), pyramid, pyramid)
    ratios = [norm(loss, names) / norm(sum(detection.values()), names) for loss, names in zip(losses.values(), on)]
    assert ratios == pytest.approx([0.3, 0.05, 0.5 * 0.2], rel=1e-4)
    assert criterion.shares.measured[:, 0].tolist() == [1, 1, 1]


SIMPLE = [
    *((loss, ("p4",)) for loss in ("mse", "attention", "fgd", "masked_mse", "score_weighted_l2")),
    *((loss, ("class_logits",)) for loss in ("soft_class", "quality_focal")),
    *((loss, ()) for loss in ("box_classes", "objectness_scaled")),
]


@pytest.mark.parametrize(("loss", "maps"), SIMPLE)
def test_the_parts_of_a_teachers_output_that_are_kept_are_enough(loss, maps, yolos, pictures):
    """YOLOv5's objectness is part of its scores: it is kept wherever a loss reads them."""
    student, teacher = yolos["v5 student"], copy.deepcopy(yolos["v5"])
    criterion = build(student, teacher, loss, maps)
    (expected,) = value(criterion, student, teacher, pictures).values()
    teacher.requested_outputs = criterion.requested_outputs("t")
    with torch.no_grad():
        output = teacher(pictures)
    parts = parts_to_keep(output, teacher.requested_outputs)
    rows = [{k: v for part in parts for k, v in parts_of(row)[part].items()} for row in split_output(output)]
    (found,) = criterion(student(pictures), {"t": join_output(type(output), rows)}, TARGETS, 0.0).values()
    torch.testing.assert_close(found, expected)
