"""The boxes that both models of a term classify, and their class logits for them; the losses are in box_classes.

`given_boxes` chooses the boxes: labelled objects, the teacher's detections, or its proposals. `classify_boxes`
asks both models for their class logits.
"""

from typing import Literal

import torch
from torch import Tensor

from boxes import box_area, box_iou, paired_intersection
from distill.losses.box_classes import assigned_logits, boxes_by_image, teacher_scale
from distill.outputs import any_map
from distill.term_inputs import TermInputs
from layers.precision import in_precision_of
from structures import Targets

Boxes = Literal["targets", "teacher", "proposals"]
At = Literal["boxes", "assigned"]


def given_boxes(inputs: TermInputs, boxes: Boxes, score_threshold: float, max_boxes: int) -> Targets:
    """The boxes that both models classify, in pixels of the student's images, with the student's labels.

    targets: the learnt objects of the batch.
    teacher: the teacher's detections that score at least score_threshold, at most max_boxes per image. A class that the
        student lacks becomes label -1.
    proposals: the first max_boxes proposals of a two-stage teacher, labelled by assigned_labels.
    """
    if boxes not in ("targets", "teacher", "proposals"):
        raise ValueError(f"boxes: found {boxes!r}, expected targets, teacher or proposals")
    if boxes == "targets":
        return inputs.targets.learnt()
    if boxes == "proposals":
        if getattr(inputs.t_output, "proposals", None) is None:
            raise ValueError("boxes: found proposals, but this teacher has none: only a two-stage teacher does")
        boxes_xyxy, image = in_student_pixels(inputs, [rows[:max_boxes] for rows in inputs.t_output.proposals])
        return assigned_labels(boxes_xyxy, image, inputs.targets)
    if not hasattr(inputs.teacher, "detect"):
        raise ValueError("boxes: found teacher, but this teacher detects nothing: only a detector does")
    detections = inputs.teacher.detect(
        inputs.t_output, score_threshold=score_threshold, iou_threshold=0.6, max_detections=max_boxes
    )
    boxes_xyxy, image = in_student_pixels(inputs, [d.boxes_xyxy for d in detections])
    labels = torch.cat([d.labels for d in detections])
    labels = labels if inputs.classes is None else to_student_labels(labels, *inputs.classes)
    return Targets(boxes_xyxy, labels, image, torch.zeros_like(labels, dtype=torch.bool))


def in_student_pixels(inputs: TermInputs, boxes_per_image: list[Tensor]) -> tuple[Tensor, Tensor]:
    """B tensors (N_b, 4) in pixels of the teacher's images -> (N, 4) in the student's, and their images (N,)."""
    device = boxes_per_image[0].device
    counts = torch.tensor([len(rows) for rows in boxes_per_image], device=device)
    image = torch.arange(len(counts), device=device).repeat_interleave(counts)
    boxes_xyxy = torch.cat(boxes_per_image).float()
    return boxes_xyxy / teacher_scale(inputs.image_size, inputs.t_output.image_size, like=boxes_xyxy), image


@torch.no_grad()
def assigned_labels(boxes_xyxy: Tensor, image: Tensor, targets: Targets) -> Targets:
    """Label N boxes (N, 4) of images (N,) as the second stage of Faster R-CNN labels proposals (arXiv:1506.01497).

    A box takes the label of the object with the highest IoU in its image (the first of equals) if that IoU is at least
    0.5; otherwise it is background, -1. A background box is marked `ignore` if half of it or more lies in an ignored
    object.
    """
    is_same = image[:, None] == targets.image  # (N, G)
    iou = box_iou(boxes_xyxy, targets.boxes_xyxy.to(boxes_xyxy)) * (is_same & targets.is_learnt)
    best, row = torch.cat((iou, iou.new_zeros(len(iou), 1)), 1).max(1)  # the last column: no object
    labels = torch.cat((targets.labels, targets.labels.new_full((1,), -1)))[row]
    labels = torch.where(best >= 0.5, labels, -1)
    covered = paired_intersection(boxes_xyxy[:, None], targets.boxes_xyxy.to(boxes_xyxy)) * (is_same & targets.ignore)
    is_covered = ((covered >= 0.5 * box_area(boxes_xyxy)[:, None]) & (covered > 0)).any(1)
    return Targets(boxes_xyxy, labels, image, is_covered & (labels < 0))


def classify_boxes(inputs: TermInputs, chosen: Targets, at: At = "boxes") -> dict[str, Tensor]:
    """s_logits (N, ...) and t_logits (N, ...): both models' class logits for N boxes, by class_logits_at.

    at: boxes, the chosen ones; assigned, the objects of the batch, with a row for each location that the assigner of a
        dense student gives an object: the student's logits there, and the teacher's of the object's box.
    """
    if at not in ("boxes", "assigned"):
        raise ValueError(f"at: found {at!r}, expected boxes or assigned")
    student, teacher = inputs.student, inputs.teacher
    for role, model in (("student", student), ("teacher", teacher)):
        if not hasattr(model, "class_logits_at"):
            raise ValueError(f"the {role} cannot classify given boxes: it has no class_logits_at")
    if at == "assigned" and not hasattr(student, "location_logits"):
        raise ValueError("at: found assigned, but the student assigns objects to no locations: it is not dense")
    boxes = inputs.targets if at == "assigned" else chosen
    per_image, place = boxes_by_image(boxes.boxes_xyxy, boxes.image, len(any_map(inputs.s_output)))
    scale = teacher_scale(inputs.image_size, inputs.t_output.image_size, like=boxes.boxes_xyxy)
    with torch.no_grad(), in_precision_of(any_map(inputs.t_output)):
        t_logits = teacher.class_logits_at(inputs.t_output, [own * scale for own in per_image])[place]
    if at == "boxes":
        with in_precision_of(any_map(inputs.s_output)):
            return {"s_logits": student.class_logits_at(inputs.s_output, per_image)[place], "t_logits": t_logits}
    s_logits, gt_index = assigned_logits(student.location_logits(inputs.s_output), inputs.positives())
    return {"s_logits": s_logits, "t_logits": t_logits[gt_index]}


def softmax_logits(
    inputs: TermInputs, boxes: Boxes, score_threshold: float, max_boxes: int
) -> tuple[dict[str, Tensor], Targets]:
    """classify_boxes of two softmax heads for given_boxes, and the boxes.

    ValueError where one of the heads is not a softmax, or the columns are not the same classes.
    """
    for role, model in (("student", inputs.student), ("teacher", inputs.teacher)):
        activation = getattr(model, "class_activation", "no")
        if activation != "softmax":
            raise ValueError(f"the {role} has a {activation} head, this loss is for softmax heads; see box_classes")
    if inputs.classes is not None:
        raise ValueError("softmax heads of different class lists cannot be compared; see box_classes")
    chosen = given_boxes(inputs, boxes, score_threshold, max_boxes)
    return classify_boxes(inputs, chosen), chosen


def to_student_labels(t_labels: Tensor, s_columns: Tensor, t_columns: Tensor) -> Tensor:
    """The teacher's labels (N,) as the student's; -1 for a class that the student lacks."""
    size = max([-1, *t_labels.tolist(), *t_columns.tolist()]) + 1
    table = torch.full((size,), -1, dtype=torch.int64, device=t_labels.device)
    table[t_columns.to(t_labels.device)] = s_columns.to(t_labels.device)
    return table[t_labels]
