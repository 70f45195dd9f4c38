"""How a loss gets the student's and the teacher's tensors out of what the two models said.

map       two maps of `output.features`; the student's through its adapter, the teacher's at the student's grid
logits    two outputs of equal locations; class logits of the classes that both know
boxes     what both believe about the same boxes: `class_logits_at`
image     the student's map, and what the teacher says of the whole image
outputs   all raw outputs of two YOLOv5 heads
"""

import contextlib
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.adapters import resize_like
from distill.beliefs import assigned_logits, boxes_by_image
from distill.masks import objects
from distill.scene import Scene, student_positives
from structures import Targets

OUTPUTS = ("box_logits", "objectness_logits", "class_logits")
HALF = (torch.bfloat16, torch.float16)


def named_map(output: Any, name: str) -> Tensor:
    """The tensor called `name` in a model's output: of its `features`, else its own attribute."""
    if name in output.features:
        return output.features[name]
    value = getattr(output, name, None)
    if not isinstance(value, Tensor):
        tensors = [f.name for f in dataclasses.fields(output) if isinstance(getattr(output, f.name), Tensor)]
        raise KeyError(f"{name!r} is not among {', '.join([*output.features, *tensors])}")
    return value


def in_precision_of(value: Tensor) -> contextlib.AbstractContextManager:
    """Autocast to the precision a tensor came in; layers applied to it then run as the model's own did."""
    is_half = value.dtype in HALF
    return torch.autocast(value.device.type, dtype=value.dtype if is_half else None, enabled=is_half)


def read_maps(scene: Scene, adapter: nn.Module) -> dict[str, Tensor]:
    """s_map (B, C_t, H, W) after the adapter, and t_map (B, C_t, H, W), both at the student's grid."""
    s, t = named_map(scene.s_output, scene.s_name), named_map(scene.t_output, scene.t_name).detach()
    with in_precision_of(s):
        s = adapter(s)
    return {"s_map": s, "t_map": resize_like(t, s)}


def read_logits(scene: Scene, adapter: nn.Module) -> dict[str, Tensor]:
    """s_logits and t_logits (B, A, ...) of equal locations; of class logits the columns that both know."""
    s, t = named_map(scene.s_output, scene.s_name), named_map(scene.t_output, scene.t_name).detach()
    if scene.classes is not None and scene.s_name == "class_logits":
        s, t = s[..., scene.classes[0].to(s.device)], t[..., scene.classes[1].to(t.device)]
    return {"s_logits": s, "t_logits": t}


def read_image(scene: Scene, adapter: nn.Module) -> dict[str, Tensor]:
    """s_map (B, C, H, W), and t_logits (B, J) of the whole images for the classes that both know."""
    s, t = named_map(scene.s_output, scene.s_name), named_map(scene.t_output, scene.t_name).detach()
    return {"s_map": s, "t_logits": t if scene.classes is None else t[:, scene.classes[1].to(t.device)]}


def read_outputs(scene: Scene, adapter: nn.Module) -> dict[str, Tensor]:
    """s_ and t_ box, objectness and class logits of two heads with the same anchors, else ValueError."""
    models = (scene.student, scene.teacher)
    if not all(hasattr(model, "anchors_pixels") for model in models):
        raise ValueError("both models must have objectness and anchors (YOLOv5)")
    if not torch.equal(*(model.anchors_pixels().cpu() for model in models)):
        raise ValueError("the anchors of student and teacher differ: their locations predict different boxes")
    if scene.classes is not None:
        raise ValueError("whole outputs can be compared where the class lists are equal")
    pairs = {"s": scene.s_output, "t": scene.t_output}
    return {f"{key}_{name}": getattr(output, name) for key, output in pairs.items() for name in OUTPUTS}


def given_boxes(
    scene: Scene,
    *,
    boxes: Literal["targets", "teacher", "proposals"] = "targets",
    score_threshold: float = 0.3,
    max_boxes: int = 100,
) -> Targets:
    """The boxes that both models are asked about, in pixels of the student's images, with the student's labels.

    targets: the learnt objects of the batch. teacher: what the teacher detects with at least score_threshold, at most
    max_boxes an image; a class the student does not know has label -1. proposals: the first max_boxes proposals of a
    two-stage teacher, without labels (-1): most are background.
    """
    if boxes == "targets":
        return objects(scene.targets)
    if boxes == "teacher":
        found = scene.teacher.detect(
            scene.t_output, score_threshold=score_threshold, iou_threshold=0.6, max_detections=max_boxes
        )
        boxes_per_image, labels = [d.boxes_xyxy for d in found], torch.cat([d.labels for d in found])
        if scene.classes is not None:
            labels = students_labels(labels, *scene.classes)
    elif boxes == "proposals":
        proposals = getattr(scene.t_output, "proposals", None)
        if proposals is None:
            raise ValueError("boxes: proposals are those of a two-stage teacher, this one has none")
        boxes_per_image = [rows[:max_boxes] for rows in proposals]
        labels = torch.full((sum(map(len, boxes_per_image)),), -1, device=boxes_per_image[0].device)
    else:
        raise ValueError(f"boxes: found {boxes!r}, expected targets, teacher or proposals")
    counts = torch.tensor([len(rows) for rows in boxes_per_image], device=labels.device)
    image = torch.arange(len(counts), device=labels.device).repeat_interleave(counts)
    boxes_xyxy = torch.cat(boxes_per_image).float() / teacher_scale(scene, labels.device)
    return Targets(boxes_xyxy, labels, image, torch.zeros_like(labels, dtype=torch.bool))


def students_labels(t_labels: Tensor, s_columns: Tensor, t_columns: Tensor) -> Tensor:
    """Labels (N,) of the teacher as the student's; -1 where the student has no such class."""
    size = max([-1, *t_labels.tolist(), *t_columns.tolist()]) + 1
    table = torch.full((size,), -1, dtype=torch.int64, device=t_labels.device)
    table[t_columns.to(t_labels.device)] = s_columns.to(t_labels.device)
    return table[t_labels]


def teacher_scale(scene: Scene, device: torch.device) -> Tensor:
    """(4,): pixels of the teacher's images for one of the student's, in the order of a box."""
    (height, width), (t_height, t_width) = scene.image_size, scene.t_output.image_size
    return torch.tensor([t_width / width, t_height / height] * 2, device=device)


def read_boxes(scene: Scene, adapter: nn.Module, *, at: Literal["boxes", "assigned"] = "boxes") -> dict[str, Tensor]:
    """s_logits (N, ...) and t_logits (N, ...): what both believe about scene.boxes.

    at: assigned lets a dense student answer at every location that learns an object (a row each) instead of at the box.
    """
    for who, model in (("student", scene.student), ("teacher", scene.teacher)):
        if not hasattr(model, "class_logits_at"):
            raise ValueError(f"the {who} cannot be asked about boxes: it has no class_logits_at")
    asked = scene.targets if at == "assigned" else scene.boxes
    per_image, row = boxes_by_image(asked.boxes_xyxy, asked.image, batch_size(scene.s_output))
    scale = teacher_scale(scene, asked.boxes_xyxy.device)
    with torch.no_grad(), in_precision_of(any_map(scene.t_output)):
        t_logits = scene.teacher.class_logits_at(scene.t_output, [rows * scale for rows in per_image])[row]
    if at == "boxes":
        with in_precision_of(any_map(scene.s_output)):
            return {"s_logits": scene.student.class_logits_at(scene.s_output, per_image)[row], "t_logits": t_logits}
    if at != "assigned":
        raise ValueError(f"at: found {at!r}, expected boxes or assigned")
    s_logits = scene.student.location_logits(scene.s_output)  # (B, A, K)
    s_logits, row = assigned_logits(s_logits, student_positives(scene))
    return {"s_logits": s_logits, "t_logits": t_logits[row]}


def any_map(output: Any) -> Tensor:
    return next(iter(output.features.values()))


def batch_size(output: Any) -> int:
    return len(any_map(output))
