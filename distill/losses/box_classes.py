"""Box classification: one detector's classes of given boxes are soft labels for any other detector.

A two-stage and a one-stage detector share neither maps nor locations, but both can classify a given box:
`class_logits_at(output, boxes_per_image)` pools the box in a two-stage detector, and reads the locations near it in a
dense one. `box_class_kl` compares two such predictions, whatever the heads:

- a sigmoid head has K independent log-odds, one for each "this is a k";
- a softmax head has one distribution with the background in column 0, as torchvision's Faster R-CNN. `log_odds` turns
  it into the log-odds of each class against all else, background included, which mean the same.

`given_boxes` chooses the boxes, and `box_logits` classifies them with both models. `assigned_logits` takes a dense
student's logits at its assigned locations instead. `datasets.class_names.join_classes` joins class lists by name.
"""

from typing import Literal

import torch
from torch import Tensor

from boxes import box_area, box_iou, paired_intersection
from distill.losses.logits import as_logit_pair, bernoulli_kl, weighted_mean
from distill.losses.masks import is_learnt, objects
from distill.outputs import any_map, in_precision_of
from distill.term_inputs import TermInputs
from layers.precision import at_least_float32
from structures import Targets

Head = Literal["sigmoid", "softmax"]
Boxes = Literal["targets", "teacher", "proposals"]
At = Literal["boxes", "assigned"]


def box_class_kl(
    *,
    s_logits: Tensor,
    t_logits: Tensor,
    s_head: Head = "sigmoid",
    t_head: Head = "sigmoid",
    classes: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The student's classification of N boxes against the teacher's.

        L   = T^2 / max(sum_n w_n, 1) * sum_n w_n * sum_{(i, j)} KL(Bern(p^t_nj) || Bern(p^s_ni))
        p_n = sigmoid(z_n / T),    z_n = log_odds(logits_n)

    (i, j) runs over the classes that both have: column i of the student and column j of the teacher. Classes that only
    one of them has take no part; in a softmax they still count among "all else".

    Args:
        s_logits: (N, K_s), or (N, 1 + K_s) with the background in column 0 where s_head is "softmax".
        t_logits: (N, K_t) of the same N boxes, or (N, 1 + K_t) where t_head is "softmax".
        classes: J pairs of columns (i, j), as (student's (J,), teacher's (J,)) int64 from class_names.join_classes. The
            background is not counted. None: the class lists are equal.
        weight: w_n >= 0, (N,). None weighs all rows 1: the mean.
        temperature: T > 0.
    Returns:
        scalar ().
    """
    s_odds, t_odds = log_odds(s_logits, s_head), log_odds(t_logits, t_head)
    if classes is not None:
        s_odds, t_odds = s_odds[:, classes[0].to(s_odds.device)], t_odds[:, classes[1].to(t_odds.device)]
    s_odds, t_odds = as_logit_pair(s_odds, t_odds)
    kl = bernoulli_kl(s_odds / temperature, t_odds / temperature).sum(-1)  # (N,)
    return temperature**2 * weighted_mean(kl, weight)


def log_odds(logits: Tensor, head: Head) -> Tensor:
    """log p_k / (1 - p_k) of each class of each row, in float32 (float64 stays).

    sigmoid   (N, K) -> (N, K), the logits themselves
    softmax   (N, 1 + K) -> (N, K), column 0 the background:  z_k - log sum_{j != k} exp z_j

    The softmax form takes no logarithm of 1 - p, so a saturated row keeps its order; memory N (1 + K)^2.
    """
    logits = at_least_float32(logits)
    if head == "sigmoid":
        return logits
    if head != "softmax":
        raise ValueError(f"head {head!r} must be sigmoid or softmax")
    if logits.shape[1] < 2:
        return logits[:, 1:]
    is_self = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    others = logits[:, None, :].masked_fill(is_self, -torch.inf).logsumexp(-1)  # (N, 1 + K)
    return (logits - others)[:, 1:]


def boxes_by_image(boxes_xyxy: Tensor, image: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Split N boxes (N, 4) of images (N,), in any order, into one tensor (N_b, 4) per image for class_logits_at.

    Also returns row (N,), the place of each box among those of all images: class_logits_at(...)[row] is in the order
    of the input.
    """
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=batch_size).tolist()
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=order.device)
    return list(boxes_xyxy[order].split(counts)), row


def assigned_logits(class_logits: Tensor, gt_index: Tensor) -> tuple[Tensor, Tensor]:
    """The student's logits at the locations that learn an object, and the object of each.

    class_logits (B, A, K) and gt_index (B, A) int64, row of Targets or -1 -> logits (P, K), row (P,). If t_logits
    (N, K) are the teacher's logits of the boxes of Targets, the pair to compare is logits and t_logits[row]. An object
    counts once for each location that learns it.
    """
    if class_logits.shape[:2] != gt_index.shape:
        raise ValueError(
            f"logits {tuple(class_logits.shape)} must be (B, A, K), gt_index {tuple(gt_index.shape)} (B, A)"
        )
    is_positive = gt_index >= 0
    return class_logits[is_positive], gt_index[is_positive]


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
        return objects(inputs.targets)
    if boxes == "teacher":
        detections = inputs.teacher.detect(
            inputs.t_output, score_threshold=score_threshold, iou_threshold=0.6, max_detections=max_boxes
        )
        boxes_per_image = [d.boxes_xyxy for d in detections]
    elif getattr(inputs.t_output, "proposals", None) is None:
        raise ValueError("boxes: found proposals, but this teacher has none: only a two-stage teacher does")
    else:
        boxes_per_image = [rows[:max_boxes] for rows in inputs.t_output.proposals]
    device = boxes_per_image[0].device
    counts = torch.tensor([len(rows) for rows in boxes_per_image], device=device)
    image = torch.arange(len(counts), device=device).repeat_interleave(counts)
    boxes_xyxy = torch.cat(boxes_per_image).float() / teacher_scale(inputs, device)
    if boxes == "proposals":
        return assigned_labels(boxes_xyxy, image, inputs.targets)
    labels = torch.cat([d.labels for d in detections])
    labels = labels if inputs.classes is None else to_student_labels(labels, *inputs.classes)
    return Targets(boxes_xyxy, labels, image, torch.zeros_like(labels, dtype=torch.bool))


@torch.no_grad()
def assigned_labels(boxes_xyxy: Tensor, image: Tensor, targets: Targets) -> Targets:
    """Label N boxes (N, 4) of images (N,) as the second stage of Faster R-CNN labels proposals (arXiv:1506.01497).

    A box takes the label of the object with the highest IoU in its image (the first of equals) if that IoU is at least
    0.5; otherwise it is background, -1. A background box is marked `ignore` if half of it or more lies in an ignored
    object.
    """
    is_same = image[:, None] == targets.image  # (N, G)
    iou = box_iou(boxes_xyxy, targets.boxes_xyxy.to(boxes_xyxy)) * (is_same & is_learnt(targets))
    best, row = torch.cat((iou, iou.new_zeros(len(iou), 1)), 1).max(1)  # the last column: no object
    labels = torch.cat((targets.labels, targets.labels.new_full((1,), -1)))[row]
    labels = torch.where(best >= 0.5, labels, -1)
    covered = paired_intersection(boxes_xyxy[:, None], targets.boxes_xyxy.to(boxes_xyxy)) * (is_same & targets.ignore)
    is_covered = ((covered >= 0.5 * box_area(boxes_xyxy)[:, None]) & (covered > 0)).any(1)
    return Targets(boxes_xyxy, labels, image, is_covered & (labels < 0))


def box_logits(inputs: TermInputs, chosen: Targets, at: At = "boxes") -> dict[str, Tensor]:
    """s_logits (N, ...) and t_logits (N, ...): both models classify the chosen boxes by class_logits_at.

    at: "assigned" compares the objects of the batch instead. The student's logits are then those of every location that
    learns an object, one row per location; it has to be dense.
    """
    for role, model in (("student", inputs.student), ("teacher", inputs.teacher)):
        if not hasattr(model, "class_logits_at"):
            raise ValueError(f"the {role} cannot classify given boxes: it has no class_logits_at")
    classified = inputs.targets if at == "assigned" else chosen
    per_image, row = boxes_by_image(classified.boxes_xyxy, classified.image, len(any_map(inputs.s_output)))
    scale = teacher_scale(inputs, classified.boxes_xyxy.device)
    with torch.no_grad(), in_precision_of(any_map(inputs.t_output)):
        t_logits = inputs.teacher.class_logits_at(inputs.t_output, [rows * scale for rows in per_image])[row]
    if at == "boxes":
        with in_precision_of(any_map(inputs.s_output)):
            return {"s_logits": inputs.student.class_logits_at(inputs.s_output, per_image)[row], "t_logits": t_logits}
    if at != "assigned":
        raise ValueError(f"at: found {at!r}, expected boxes or assigned")
    s_logits, row = assigned_logits(inputs.student.location_logits(inputs.s_output), inputs.positives())
    return {"s_logits": s_logits, "t_logits": t_logits[row]}


def softmax_logits(
    inputs: TermInputs, boxes: Boxes, score_threshold: float, max_boxes: int
) -> tuple[dict[str, Tensor], Targets]:
    """box_logits of two softmax heads for given_boxes, and the boxes."""
    require_softmax(inputs)
    chosen = given_boxes(inputs, boxes, score_threshold, max_boxes)
    return box_logits(inputs, chosen), chosen


def require_softmax(inputs: TermInputs) -> None:
    """ValueError where one of the heads is not a softmax, or the columns are not the same classes."""
    for role, model in (("student", inputs.student), ("teacher", inputs.teacher)):
        activation = getattr(model, "class_activation", "no")
        if activation != "softmax":
            raise ValueError(f"the {role} has a {activation} head, this loss is for softmax heads; see box_classes")
    if inputs.classes is not None:
        raise ValueError("softmax heads of different class lists cannot be compared; see box_classes")


def teacher_scale(inputs: TermInputs, device: torch.device) -> Tensor:
    """(4,): the factors that take xyxy boxes from the student's image size to the teacher's."""
    (height, width), (t_height, t_width) = inputs.image_size, inputs.t_output.image_size
    return torch.tensor([t_width / width, t_height / height] * 2, device=device)


def to_student_labels(t_labels: Tensor, s_columns: Tensor, t_columns: Tensor) -> Tensor:
    """The teacher's labels (N,) as the student's; -1 for a class that the student lacks."""
    size = max([-1, *t_labels.tolist(), *t_columns.tolist()]) + 1
    table = torch.full((size,), -1, dtype=torch.int64, device=t_labels.device)
    table[t_columns.to(t_labels.device)] = s_columns.to(t_labels.device)
    return table[t_labels]
