"""Which box learns what, and which are looked at in a step (Faster R-CNN, arXiv:1506.01497, sec. 3.1.2 and 3.1.3).

Matching is by IoU, sampling by chance. Objects marked `ignore` are learnt by nobody, and a box is no background where
it lies on one: at least half of its area in an ignored region (the crowd rule of the COCO evaluation turned to anchors)
takes it out, unless it is positive for another object. torchvision knows no ignored objects.
"""

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
    """For each of N boxes (N, 4) the row of its object among G (G, 4), or BACKGROUND, or IGNORED: (N,) int64.

        the object of highest IoU     where that IoU >= positive_iou (the first of equals)
        BACKGROUND                    where it is < negative_iou
        IGNORED                       between, and where half of the box or more lies in one of ignored_xyxy (M, 4)

    every_object: besides, the boxes that overlap an object most, all equals of them, are positive however small that
    IoU is, as long as it is not 0; each for the object it overlaps most itself, as in the public code. (The paper gives
    it to the object it is best for, which differs where another object covers it more.)
    N, G and M may be 0; without objects all is background.
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
    """A random choice of what a step learns from: rows (P,) of positives and rows (Q,) of background, P + Q <= count.

    P is at most positive_fraction * count, and background fills up the rest: P = min(positives, that), Q =
    min(background, count - P). Each subset of a size is equally likely, both in increasing order of rows. Drawn from
    torch's global CPU generator whatever the device, so a seed gives the same choice everywhere; where all are taken
    nothing is drawn.
    """
    positives = (matched >= 0).nonzero().squeeze(1)
    background = (matched == BACKGROUND).nonzero().squeeze(1)
    positives = choose(positives, int(count * positive_fraction))
    return positives, choose(background, count - len(positives))


def choose(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows (N,), each subset equally likely, in the order they had."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows))[:count].sort().values
    return rows[chosen.to(rows.device)]


def split_targets(targets: Targets, image: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Of one image: objects to learn, boxes (G, 4), labels (G,) and class_scores (G, K), and ignored regions (M, 4).

    class_scores are None where the targets have none.

    A box without area cannot be encoded (log 0) and is left out: it is neither.
    """
    is_here = (targets.image == image) & (targets.boxes_xyxy[:, 2:] > targets.boxes_xyxy[:, :2]).all(1)
    here, ignored = is_here & ~targets.ignore, is_here & targets.ignore
    objects = targets[here]
    return objects.boxes_xyxy, objects.labels, objects.class_scores, targets.boxes_xyxy[ignored]
