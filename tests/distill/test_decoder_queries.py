"""Terms on the queries of RT-DETR's decoder: which layers teach which, what learns, and for whom they are refused."""

import dataclasses

import pytest
import torch

import models
from config import TermConfig
from distill.checks import check_terms
from distill.criterion import Criterion
from distill.losses.queries import query_agreement
from errors import UserError
from structures import Targets
from tests.rtdetr.tiny_rtdetr import tiny_rtdetr

pytestmark = pytest.mark.usefixtures("one_thread")
ITSELF = TermConfig("student", "last_layer", 1.0)
TARGETS = Targets(
    torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 0.0, 62.0, 62.0]]), torch.tensor([0, 2]), torch.tensor([0, 1]),
    torch.zeros(2, dtype=torch.bool),
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
