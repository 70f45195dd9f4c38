"""Which box learns which object, and which boxes a step samples (Faster R-CNN, arXiv:1506.01497, sec. 3.1.2 and 3.1.3).

Matching is by IoU; sampling is random. No box learns an object marked `ignore`. A box with at least half of its area in
one such object is not background either: it is left out unless it is positive for another object. This is the crowd
rule of the COCO evaluation, applied to anchors and proposals; torchvision has no ignored objects.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from boxes import box_area, box_iou, paired_intersection
from structures import Targets

BACKGROUND, IGNORED = -1, -2
IGNORED_FRACTION = 0.5  # of a box's area within one ignored region


def match(
    boxes_xyxy: Tensor,
    objects_xyxy: Tensor,
    ignored_xyxy: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    every_object: bool,
) -> Tensor:
    """For each of N boxes (N, 4) the row of its object among G objects (G, 4), BACKGROUND or IGNORED: (N,) int64.

        the object with the highest IoU   if that IoU >= positive_iou; ties go to the first object
        BACKGROUND                        if that IoU < negative_iou
        IGNORED                           in between, or if half of a background box lies in one of ignored_xyxy (M, 4)

    every_object: an object's best boxes (highest IoU, with all ties) are positive too, if that IoU is above 0. Each of
    them learns the object that it overlaps most itself, as in public code; the paper assigns it to the object it is
    best for.
    N, G and M may be 0. Without objects every box is background.
    """
    if len(objects_xyxy) == 0:
        matched = torch.full((len(boxes_xyxy),), BACKGROUND, device=boxes_xyxy.device)
    else:
        iou = box_iou(objects_xyxy, boxes_xyxy)  # (G, N)
        best_iou, best = iou.max(0)  # (N,)
        matched = torch.where(best_iou < negative_iou, BACKGROUND, IGNORED)
        is_positive = best_iou >= positive_iou
        if every_object and len(boxes_xyxy):
            highest = iou.amax(1, keepdim=True)  # (G, 1)
            is_positive |= ((iou == highest) & (highest > 0)).any(0)
        matched = torch.where(is_positive, best, matched)
    if len(ignored_xyxy):
        covered = paired_intersection(boxes_xyxy[:, None], ignored_xyxy[None]).amax(1)  # (N,)
        is_covered = (covered >= IGNORED_FRACTION * box_area(boxes_xyxy)) & (covered > 0)
        matched = torch.where(is_covered & (matched == BACKGROUND), IGNORED, matched)
    return matched


def sample(matched: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """A random sample for one step: rows (P,) of positives and rows (Q,) of background, each in increasing order.

        P = min(number of positives, positive_fraction * count),    Q = min(number of background, count - P)

    All subsets of a size are equally likely. The draw uses torch's global CPU generator on every device, so one seed
    gives one sample everywhere. Nothing is drawn if all rows are taken.
    """
    positives = (matched >= 0).nonzero().squeeze(1)
    background = (matched == BACKGROUND).nonzero().squeeze(1)
    positives = choose(positives, int(count * positive_fraction))
    return positives, choose(background, count - len(positives))


def choose(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows (N,), each subset equally likely, in their original order."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows))[:count].sort().values
    return rows[chosen.to(rows.device)]


class ImageTargets(NamedTuple):
    """The targets of one image: G objects to learn and M ignored regions.

    objects_xyxy (G, 4), labels (G,), class_scores (G, K) or None as in Targets, ignored_xyxy (M, 4).
    """

    objects_xyxy: Tensor
    labels: Tensor
    class_scores: Tensor | None
    ignored_xyxy: Tensor


def split_targets(targets: Targets, image: int) -> ImageTargets:
    """The targets of one image of the batch. Objects without area are left out: they cannot be encoded (log 0)."""
    is_here = targets.image == image
    objects = targets[is_here & targets.is_learnt]
    ignored_xyxy = targets.boxes_xyxy[is_here & targets.ignore]
    return ImageTargets(objects.boxes_xyxy, objects.labels, objects.class_scores, ignored_xyxy)
