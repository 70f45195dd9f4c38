"""Weights of several teachers, batch by batch: a teacher that predicts the labels better counts more.

Zhang, Chen and Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", arXiv:2201.00007.

Differs from the paper: it takes a cross-entropy for each image, we take one for all labelled boxes of a batch. We
multiply the weights by the number of teachers, so that another teacher does not weaken the terms of the others. A
teacher that has the class of no object of a batch weighs 1 in it: nothing is known of it there.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.losses.box_classes import Head, boxes_by_image, log_odds, teacher_scale
from distill.outputs import any_map
from layers.over_processes import sum_over_processes
from layers.precision import in_precision_of
from structures import Detector, Targets


def confidence_weights(cross_entropy: Tensor, num_objects: Tensor) -> Tensor:
    """The weight of each of at least 2 teachers, from its cross-entropy H with the labels of num_objects objects:

        w_m = M / (M - 1) * (1 - exp(H_m) / sum_j exp(H_j))

    over the M teachers with objects. The others weigh 1, and so do all where M < 2. The weights lie in
    [0, M / (M - 1)], and their mean is 1. Invariant to a constant added to all H. All three have a row for each
    teacher.
    """
    if len(cross_entropy) < 2:
        raise ValueError(f"found {len(cross_entropy)} teachers, expected at least 2 to compare")
    is_judged = num_objects > 0
    count = is_judged.sum()  # M, on the device: the host does not wait for it
    shares = cross_entropy.where(is_judged, -torch.inf).softmax(0)
    return (count / (count - 1) * (1 - shares)).where(is_judged & (count > 1), 1.0)


def of_labelled(targets: Targets, is_labelled: Tensor | None) -> Targets:
    """The objects of labelled images: pseudo boxes would favour the teacher that made them. is_labelled (B,) bool."""
    return targets if is_labelled is None else targets[is_labelled.to(targets.image.device)[targets.image]]


@torch.no_grad()
def teacher_cross_entropy(
    teacher: nn.Module,
    t_output: Any,
    targets: Targets,
    image_size: tuple[int, int],
    *,
    classes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy H of a teacher with the labels of the objects of a batch, and their number N, scalars ():

        H = -1 / N * sum_n log p_n(y_n),    p = sigmoid(log odds of "this box is a y" against all else)

    over the objects whose class the teacher has, in all processes, so that all of them get the same weights. 0 and 0
    without any.

    Args:
        targets: boxes in pixels of images of image_size (H, W), the student's.
        classes: (student's columns, teacher's columns) from class_names.join_classes; None: the class lists are equal.
    """
    detector = cast(Detector, teacher)
    labelled = targets.learnt()
    labels = labelled.labels
    if classes is not None:
        s_columns, t_columns = (columns.to(labels.device) for columns in classes)
        is_same = labels[:, None] == s_columns  # (N, J)
        labelled, is_same = labelled[is_same.any(1)], is_same[is_same.any(1)]
        labels = t_columns[is_same.int().argmax(1)]
    scale = teacher_scale(image_size, t_output.image_size, like=labelled.boxes_xyxy)
    per_image, row = boxes_by_image(labelled.boxes_xyxy * scale, labelled.image, len(any_map(t_output)))
    with in_precision_of(any_map(t_output)):
        logits = detector.class_logits_at(t_output, per_image)[row]
    odds = log_odds(logits, cast(Head, detector.class_activation)).gather(1, labels[:, None])
    total = sum_over_processes(-nn.functional.logsigmoid(odds).sum())
    count = sum_over_processes(total.new_full((), len(labelled)))
    return total / count.clamp(min=1), count
