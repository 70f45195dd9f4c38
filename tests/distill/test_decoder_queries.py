"""Terms on the queries of RT-DETR's decoder: which layers teach which, what learns, and for whom they are refused."""

import copy
import dataclasses

import pytest
import torch

import models
from config import Config, TermConfig, from_tree
from distill.checks import check_terms
from distill.criterion import Criterion, TeacherFacts
from distill.losses.queries import query_agreement
from engine.training.checks import check_kept_outputs
from errors import UserError
from structures import Targets
from tests.rtdetr.tiny_rtdetr import tiny_rtdetr

pytestmark = pytest.mark.usefixtures("one_thread")
ITSELF = TermConfig("student", "last_layer", 1.0)
QUERIES = TermConfig("t", "object_queries", 1.0)
NAMES = ("a", "b", "c")
TARGETS = Targets(
    torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 0.0, 62.0, 62.0], [0.0, 32.0, 24.0, 64.0]]), torch.tensor([0, 2, 1]),
    torch.tensor([0, 1, 0]), torch.zeros(3, dtype=torch.bool),
)  # fmt: skip


def detector(seed=0, **sizes):
    """A tiny RT-DETR away from its start, at which all layers leave the boxes where they are."""
    torch.manual_seed(seed)
    made = tiny_rtdetr(3, **{"num_layers": 3, "width": 16, "num_queries": 8} | sizes).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_last_layer_teaches_the_earlier_ones_and_not_the_proposals():
    student = detector()
    criterion = Criterion((ITSELF,), student=student, teachers={}, epochs=1)
    output = student(images())
    output = dataclasses.replace(output, layer_logits=output.layer_logits + 4)  # so sure that the weights exceed 1
    logits, boxes = output.layer_logits, output.layer_boxes  # (B, 1 + L, Q, K), (B, 1 + L, Q, 4)
    expected = [
        query_agreement(s_logits=logits[:, n], t_logits=logits[:, 3], s_boxes=boxes[:, n], t_boxes=boxes[:, 3])
        for n in (1, 2)
    ]
    for targets in (TARGETS, Targets.empty()):  # it reads no labels
        found = criterion(output, {}, targets, 0.0)
        torch.testing.assert_close(found, {"last_layer_student": sum(expected) / 2})
    assert found["last_layer_student"] > 0


def test_earlier_layers_learn_from_the_last_one_which_does_not():
    student = detector()
    criterion = Criterion((ITSELF,), student=student, teachers={}, epochs=1)
    criterion(student(images()), {}, TARGETS, 0.0)["last_layer_student"].backward()
    learnt = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("decoder.class_heads.0.", "decoder.class_heads.1.", "decoder.box_heads.1.", "decoder.layers.1.",
                 "backbone.", "encoder."):  # fmt: skip
        assert any(name.startswith(part) for name in learnt), part
    alone = ("decoder.class_heads.2.", "decoder.box_heads.2.", "decoder.layers.2.", "decoder.candidate_")
    assert not any(name.startswith(alone) for name in learnt)


def test_layers_that_agree_cost_nothing():
    student = detector()
    criterion = Criterion((ITSELF,), student=student, teachers={}, epochs=1)
    output = student(images())
    equal = {name: getattr(output, name)[:, -1:].expand(-1, 4, -1, -1) for name in ("layer_logits", "layer_boxes")}
    (found,) = criterion(dataclasses.replace(output, **equal), {}, TARGETS, 0.0).values()
    assert found.abs() < 1e-6


@pytest.mark.parametrize("student", [lambda: models.build("yolov8_narrow", 3), lambda: detector(num_layers=1)])
def test_a_student_without_earlier_layers_is_refused(student):
    with pytest.raises(UserError, match=r"^terms\.0: the student has no earlier decoder layer .* an RT-DETR has$"):
        Criterion((ITSELF,), student=student(), teachers={}, epochs=1)


def test_who_may_be_the_teacher_of_which_loss():
    with pytest.raises(UserError, match=r"^terms\.0\.teacher: found 't', expected one of student$"):
        check_terms((dataclasses.replace(ITSELF, teacher="t"),), ("t",))
    with pytest.raises(UserError, match=r"^terms\.0\.teacher: found 'student', expected one of t$"):
        check_terms((TermConfig("student", "cosine", 1.0, ("p5",)),), ("t",))
    with pytest.raises(UserError, match=r"^teacher 'student': this name stands for the student itself"):
        check_terms((), ("student",))
    with pytest.raises(UserError, match=r"^terms\.0: loss 'last_layer' compares layers, not maps"):
        Criterion((dataclasses.replace(ITSELF, adapter="conv1x1"),), student=detector(), teachers={}, epochs=1)


def teach(student, teacher, targets=TARGETS, names=NAMES, seed=5):
    """The loss of the term on queries of objects."""
    facts = {"t": TeacherFacts(class_names=names)}
    criterion = Criterion(
        (QUERIES,), student=student, teachers={"t": teacher}, epochs=1, class_names=NAMES, facts=facts
    )
    assert criterion.requested_outputs("t") is None
    with torch.no_grad():
        t_output = teacher(images())
    s_output = student(images())
    torch.manual_seed(seed)  # of the noise
    (found,) = criterion(s_output, {"t": t_output}, targets, 0.0).values()
    return found


def test_both_decode_the_same_queries_and_the_last_answer_of_the_teacher_teaches_every_layer():
    student, teacher = detector(0), detector(1, num_layers=2, width=32).requires_grad_(False)
    s_output, t_output = student(images()), teacher(images())
    torch.manual_seed(5)
    noisy = student.make_queries(s_output, TARGETS, num_classes=3)
    s_boxes, s_logits = student.decode_queries(s_output, noisy)  # (B, L, T, 4), (B, L, T, K)
    t_boxes, t_logits = teacher.decode_queries(t_output, noisy)
    real = noisy.is_real[:, None, :, None].expand(-1, 3, -1, -1)
    assert not real.all()  # the second image has one object, the first two
    last = {"t_logits": t_logits[:, 1:].expand_as(s_logits), "t_boxes": t_boxes[:, 1:].expand_as(s_boxes)}
    pairs = {"s_logits": s_logits, "s_boxes": s_boxes} | last
    rows = {key: value[real.expand_as(value)].view(-1, value.shape[-1]) for key, value in pairs.items()}
    torch.testing.assert_close(teach(student, teacher), query_agreement(**rows, repeats=noisy.groups))


def test_the_student_learns_from_the_queries_down_to_its_backbone_and_the_teacher_does_not():
    student, teacher = detector(0), detector(1)
    found = teach(student, teacher)
    found.backward()
    assert found > 0 and found.dtype == torch.float32
    learnt = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("decoder.denoising_class", *(f"decoder.box_heads.{n}." for n in range(3)), "backbone.", "encoder."):
        assert any(name.startswith(part) for name in learnt), part
    assert all(p.grad is None for p in teacher.parameters())


def test_a_copy_of_a_teacher_of_one_layer_costs_nothing_and_is_not_refused():
    student = detector(0, num_layers=1)
    assert teach(student, copy.deepcopy(student)).abs() < 1e-6


def test_without_objects_there_are_no_queries():
    student = detector(0)
    found = teach(student, detector(1), Targets.empty())
    found.backward()
    assert found == 0 and all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_teacher_with_its_classes_in_another_order_teaches_the_same():
    student, teacher = detector(0), detector(1)
    order, moved = [2, 0, 1], copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in (moved.decoder.candidate_class, *moved.decoder.class_heads):
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
        moved.decoder.denoising_class.weight.copy_(moved.decoder.denoising_class.weight[order])
    torch.testing.assert_close(teach(student, moved, names=("c", "a", "b")), teach(student, teacher))
    assert not torch.isclose(teach(student, moved), teach(student, teacher))


def test_an_object_of_a_class_that_the_teacher_lacks_makes_no_query():
    student, teacher = detector(0), detector(1)
    names = ("c", "other", "b")  # no a
    others = TARGETS[TARGETS.labels != 0]
    expected = teach(student, teacher, others, names)
    torch.testing.assert_close(teach(student, teacher, TARGETS, names), expected)
    with torch.no_grad():
        teacher.decoder.denoising_class.weight[1] += 5
        student.decoder.denoising_class.weight[0] += 5
    torch.testing.assert_close(teach(student, teacher, TARGETS, names), expected)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_both_need_a_decoder_that_takes_queries(role):
    models_of = {"student": detector(0), "teacher": detector(1)} | {role: models.build("yolov8_narrow", 3).eval()}
    with pytest.raises(UserError, match=f"^terms.0: the {role} has no decoder that takes queries .* an RT-DETR has$"):
        Criterion((QUERIES,), student=models_of["student"], teachers={"t": models_of["teacher"]}, epochs=1)


def test_images_without_labels_have_no_objects_to_make_queries_of():
    both = dict(student=detector(0), teachers={"t": detector(1)}, epochs=1, unlabelled_has_boxes=False)
    with pytest.raises(UserError, match=r"^terms\.0\.on: found all, but loss 'object_queries' reads the objects"):
        Criterion((QUERIES,), **both)
    Criterion((dataclasses.replace(QUERIES, on="labelled"), ITSELF), **both)  # the other reads none


def test_kept_outputs_have_no_decoder_to_run_again():
    tree = {"name": "x", "data": {"format": "yolo", "root": "r"}, "student": {"arch": "rtdetr_r18vd"}}
    tree |= {"teachers": [], "terms": [{"teacher": "t", "loss": "object_queries", "weight": 1.0}]}
    check_kept_outputs(from_tree(Config, tree, source="test"))
    with pytest.raises(UserError, match=r"^key 'teacher_cache_gigabytes': found 1\.0 beside terms\.0, .* expected 0$"):
        check_kept_outputs(from_tree(Config, tree | {"teacher_cache_gigabytes": 1.0}, source="test"))
