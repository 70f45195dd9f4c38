"""RT-DETR as a student: what a step gives, two processes, an interrupted run, and pictures learnt by heart."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import checkpoint
import models
import train
from config import TermConfig
from datasets.shapes import NAMES, draw_picture
from distill.criterion import Criterion
from metrics.coco import evaluate
from metrics.tables import DetectionTable, GroundTruth
from rtdetr import denoising
from structures import Targets, select_images
from teachers.output_cache import join_output, split_output
from tests.exporting import fill
from tests.rtdetr.tiny_rtdetr import tiny_rtdetr
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 96
KINDS = ("vfl", "l1", "giou")


def shapes(count):
    """Images (B, 3, S, S) of the embedded dataset and their objects."""
    drawn = [draw_picture(0, "train", index, SIZE) for index in range(count)]
    images = torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) / 255 for pixels, _, _ in drawn])
    boxes = torch.cat([torch.from_numpy(boxes).float() for _, boxes, _ in drawn])
    labels = torch.cat([torch.from_numpy(labels) for _, _, labels in drawn])
    image = torch.arange(count).repeat_interleave(torch.tensor([len(labels) for _, _, labels in drawn]))
    return images, Targets(boxes, labels, image, torch.zeros_like(labels, dtype=torch.bool))


def fresh(**sizes):
    torch.manual_seed(0)
    return tiny_rtdetr(len(NAMES), **sizes)


def test_a_step_reaches_every_parameter_also_without_objects():
    model, (images, targets) = fresh(), shapes(2)
    from_numpy = replace(targets, boxes_xyxy=targets.boxes_xyxy.double())
    for objects in (targets, from_numpy, Targets.empty()):
        losses = model.losses(model(images), objects)
        assert list(losses) == [*KINDS, *(f"denoising_{kind}" for kind in KINDS)]
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
        model.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert losses["vfl"] > 0 and all(value == 0 for name, value in losses.items() if name != "vfl")


def test_a_step_under_autocast_has_losses_in_float32():
    model, (images, targets) = fresh(), shapes(2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    losses = model.losses(output, targets)
    assert output.memory.dtype == torch.bfloat16
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_start_is_a_hundredth_for_every_class_and_boxes_that_stay():
    model = fresh(num_queries=20).eval()
    with torch.no_grad():
        output = model(shapes(1)[0])
    assert output.query_logits.sigmoid().median().item() == pytest.approx(0.01, abs=0.02)
    torch.testing.assert_close(output.layer_boxes, output.layer_boxes[:, :1].expand_as(output.layer_boxes))


def test_images_without_labels_are_left_out_of_the_losses():
    model, (images, targets) = fresh().eval(), shapes(3)
    chosen = torch.tensor([True, False, True])
    part = select_images(model(images), chosen)
    alone = model(images[chosen])
    torch.testing.assert_close(part.layer_logits, alone.layer_logits, rtol=1e-4, atol=1e-5)
    values = []
    for output in (part, alone):
        torch.manual_seed(1)
        values.append(torch.stack(list(model.losses(output, targets.of_images(chosen)).values())))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_a_cache_of_outputs_keeps_what_detects_and_no_more():
    model, (images, targets) = fresh().eval(), shapes(2)
    with torch.no_grad():
        output = model(images)
    again = join_output(type(output), split_output(output))
    assert torch.equal(again.boxes_xyxy, output.boxes_xyxy) and again.memory is None
    with pytest.raises(ValueError, match="the output has no decoder layers"):
        model.losses(again, targets)


@pytest.mark.parametrize("teacher", ["yolov8_narrow", "fasterrcnn_mobilenet_v3_small"])
def test_other_families_teach_it_by_boxes_and_by_its_encoder_map(teacher):
    """The classes of the labelled boxes, and the cosine of p5, as in RT-DETRv4 (arXiv:2510.25257)."""
    images, targets = shapes(2)
    images, student = images[:, :, :64, :64], fresh().eval()
    torch.manual_seed(1)
    made = models.build(teacher, len(NAMES)).eval().requires_grad_(False)
    p5 = "p5" if "p5" in made.strides else list(made.strides)[-1]
    terms = (
        TermConfig("t", "box_classes", 1.0),
        TermConfig("t", "cosine", 1.0, student_maps=("p5",), teacher_maps=(p5,), adapter="conv1x1"),
    )
    criterion = Criterion(terms, student=student, teachers={"t": made}, epochs=1)
    losses = criterion(student(images), {"t": made(images)}, targets, 0.0)
    for name, part in (("box_classes_t", "decoder.class_heads"), ("cosine_t", "encoder.bottom_up5")):
        student.zero_grad(set_to_none=True)
        losses[name].backward(retain_graph=True)
        found = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        assert losses[name] > 0 and any(n.startswith(part) for n in found), name
        assert any(n.startswith("backbone.") for n in found)


# -------------------------------------------------------------------------------------------------- two processes

UNEQUAL = ([3, 4], [5])  # images of each process; the most objects of an image, and so the groups, differ
TERMS = (TermConfig("student", "last_layer", 1.0), TermConfig("t", "object_queries", 1.0))


def still_noise(shape, num_classes):
    """One noise for every group, so that their number does not matter."""
    return dict(
        size=torch.full((*shape, 4), 0.5), sign=torch.ones(*shape, 4), flip=torch.ones(shape),
        other=torch.zeros(shape, dtype=torch.int64),
    )  # fmt: skip


def gradients_of(rows):
    """By loss, all gradients in one row, in float64, of a model in eval mode (batches share no statistics)."""
    images, targets = shapes(6)
    model = fresh(width=16)
    fill(model.state_dict())  # fresh weights give all cells nearly one score, and rounding would choose the queries
    model.double().eval()
    teacher = fresh(width=16)
    fill(teacher.state_dict())
    with torch.no_grad():  # another model, which finds other boxes and classes
        for parameter in teacher.decoder.parameters():
            parameter.mul_(0.9)
    teacher.double().eval().requires_grad_(False)
    chosen = torch.tensor([row in rows for row in range(6)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "draw_noise", still_noise)
        output = model(images[chosen].double())
        losses = model.losses(output, targets.of_images(chosen))
        criterion = Criterion(TERMS, student=model, teachers={"t": teacher}, epochs=1)
        with torch.no_grad():
            t_output = teacher(images[chosen].double())
        losses |= criterion(output, {"t": t_output}, targets.of_images(chosen), 0.0)
    found = {}
    for name, loss in losses.items():
        each = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        found[name] = torch.cat([g.flatten() for g in each if g is not None])
    return found


def of_process(rank):
    return gradients_of(UNEQUAL[rank])


def test_two_processes_learn_as_one_with_the_joined_batch(tmp_path):
    first, second = in_two_processes(of_process, tmp_path)
    joined, own = gradients_of([3, 4, 5]), gradients_of([3, 4])
    for name, expected in joined.items():
        both = (first[name] + second[name]) / 2
        assert (both - expected).abs().max() <= 1e-7 * expected.abs().max(), name
        assert (own[name] - expected).abs().max() > 1e-2 * expected.abs().max(), name  # one process is not enough


# ------------------------------------------------------------------------------------------------------ whole runs


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_with_the_same_weights(make_tiny, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "rtdetr_r18vd", tiny_rtdetr)
    rates = {"learning_rate": 1e-3, "backbone_factor": 0.1, "warmup_epochs": 0.5}
    optimizer = rates | {"name": "adamw", "momentum": 0.9, "clip_norm": 0.1}

    def config(name):
        terms = [
            {"teacher": "student", "loss": "last_layer", "weight": 1.0},
            {"teacher": "t", "loss": "object_queries", "weight": 1.0},
        ]
        teachers = [{"name": "t", "arch": "rtdetr_r18vd", "weights": "random"}]
        student = {"arch": "rtdetr_r18vd"}
        return make_tiny(name=name, student=student, optimizer=optimizer, terms=terms, teachers=teachers)

    train.run(config("whole"), quiet=True)

    def stop(row):
        raise Interrupted

    with pytest.raises(Interrupted):
        train.run(config("parts"), quiet=True, on_epoch=stop)
    train.run(config("parts"), quiet=True, resume=True)
    runs = config("whole").runs
    whole, parts = (checkpoint.load_newest(f"{runs}/{name}/weights/last.pt", print) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 6
    groups = {group["name"]: group["lr"] for group in parts["optimizer"]["param_groups"]}
    assert groups["backbone.weights"] == 0.1 * groups["weights"] > 0
    for key in ("model", "ema"):
        assert whole[key].keys() == parts[key].keys()
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert any(name.startswith("decoder.denoising_class") for name in whole["ema"])


def learn_by_heart(steps, count, learning_rate, num_queries):
    """A small RT-DETR after `steps` steps on the same images: it, the images, their objects, the loss of each step."""
    images, targets = shapes(count)
    model = fresh(num_queries=num_queries)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    totals = []
    for step in range(steps):
        for group in optimizer.param_groups:
            warmth, decay = min(1, 5 * (step + 1) / steps), 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
            group["lr"] = learning_rate * warmth * decay
        total = sum(model.losses(model(images), targets).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    return model, images, targets, totals


def map50(model, images, targets):
    with torch.no_grad():
        found = model.eval().detect(model(images), score_threshold=0.001, iou_threshold=1.0, max_detections=100)
    image = np.concatenate([np.full(len(rows), row) for row, rows in enumerate(found)])
    detections = DetectionTable(
        image, torch.cat([d.boxes_xyxy for d in found]).double().numpy(), torch.cat([d.scores for d in found]).numpy(),
        torch.cat([d.labels for d in found]).numpy(),
    )  # fmt: skip
    true = GroundTruth(
        targets.image.numpy(), targets.boxes_xyxy.double().numpy(), targets.labels.numpy(), len(images), NAMES
    )
    return evaluate(true, detections).numbers["AP50"]


def test_two_pictures_are_learnt_by_heart(monkeypatch):
    monkeypatch.setattr(denoising, "NUM_QUERIES", 10)
    model, images, targets, totals = learn_by_heart(60, count=2, learning_rate=4e-3, num_queries=20)
    # A step's denoising queries are drawn, so a last digit elsewhere gives another path: 0.58 to 0.70, 0.53 to 0.94
    assert np.median(totals[-12:]) < 0.8 * totals[0] and map50(model, images, targets) >= 0.4


@pytest.mark.slow
@pytest.mark.weekly
def test_sixteen_pictures_are_learnt_by_heart(monkeypatch):
    """With the usual number of denoising queries too, in 125 steps that take twice as long."""
    monkeypatch.setattr(denoising, "NUM_QUERIES", 20)
    model, images, targets, totals = learn_by_heart(220, count=16, learning_rate=2e-3, num_queries=60)
    assert totals[-1] < 0.5 * totals[0] and map50(model, images, targets) >= 0.9
