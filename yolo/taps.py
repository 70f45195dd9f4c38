"""What distillation takes from the YOLO detectors besides their predictions.

- `is_requested`: which parts of an output the caller needs.
- `branch_maps`, `branch_tail`: the maps within the branches of the anchor-free head, and the layers behind each.
- `logits_at_boxes`: class logits for given boxes. `joint_logits`: the same for a head with objectness.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from boxes import box_iou
from yolo.assigners import is_inside

BRANCH_MAPS = {  # name: branch of the head, index of the level, number of the branch's layers in front of the map
    f"{kind}{level}_{count}": (kind, row, count)
    for kind in ("box", "cls")
    for row, level in enumerate((3, 4, 5))
    for count in (1, 2)
}


def is_requested(requested: frozenset[str] | None, names: Iterable[str]) -> bool:
    """Whether `requested` contains one of `names`. None requests everything."""
    return requested is None or any(name in requested for name in names)


def layer_outputs(layers: nn.Module, x: Tensor) -> list[Tensor]:
    """The output of every layer of an nn.Sequential in turn; the last one is layers(x)."""
    outputs = []
    for layer in cast(nn.Sequential, layers):  # an nn.ModuleList does not keep the type of its items
        outputs.append(x := layer(x))
    return outputs


def branch_maps(outputs: dict[str, list[list[Tensor]]], requested: frozenset[str] | None) -> dict[str, Tensor]:
    """The requested maps of BRANCH_MAPS by name (None: all).

    outputs: "box" and "cls" -> for each level the `layer_outputs` of that branch.
    """
    return {
        name: outputs[kind][row][count - 1]
        for name, (kind, row, count) in BRANCH_MAPS.items()
        if is_requested(requested, {name})
    }


def branch_tail(head: nn.Module, name: str) -> nn.Sequential:
    """The layers of an anchor-free head between the map `name` and the logits of its level.

    (B, C, H / s, W / s) -> (B, K, H / s, W / s) in a class branch, (B, 4 R, H / s, W / s) in a box branch, edge by
    edge. The layers are the head's own, not copies, in its current train or eval mode. CrossKD feeds a student's map to
    those of a teacher (distill/losses/crosskd.py). KeyError for a name that is not in BRANCH_MAPS.
    """
    if name not in BRANCH_MAPS:
        raise KeyError(f"{name!r} is not a map within the head; those are {', '.join(BRANCH_MAPS)}")
    kind, row, count = BRANCH_MAPS[name]
    tail = getattr(head, kind)[row][count:]
    tail.training = head.training  # a slice is a new module around the same layers
    return tail


def joint_logits(objectness_logits: Tensor, class_logits: Tensor) -> Tensor:
    """Logits of the scores the detector reports, sigmoid(o) sigmoid(c): (..., 1) and (..., K) -> (..., K).

    With p = sigmoid(o) sigmoid(c):  logit(p) = log p / (1 - p) = -log(e^-o + e^-c + e^-(o + c))
    """
    objectness_logits = objectness_logits.expand_as(class_logits)
    terms = torch.stack((-objectness_logits, -class_logits, -objectness_logits - class_logits))
    return -terms.logsumexp(0)


def logits_at_boxes(
    logits: Tensor,
    *,
    decoded_xyxy: Tensor,
    centers: Tensor,
    boxes_per_image: list[Tensor],
    locations: int = 10,
) -> Tensor:
    """Logits of given boxes, as weighted means over the locations that predict them: (B, A, K) -> (sum N_b, K).

        out_n = sum_a w_na z_a / sum_a w_na,    w_na = IoU(decoded_a, box_n) where center a lies in box n, else 0

    Only the `locations` largest w_na count; the default is the assigner's topk. If all w_na of a box are 0, it gets the
    logits of the location whose center is nearest to its own.

    Args (all in pixels):
        decoded_xyxy: predicted boxes (B, A, 4). centers: centers of the locations (A, 2).
        boxes_per_image: B tensors (N_b, 4) of xyxy; N_b may be 0. ValueError if there are not B tensors.
    Returns:
        (sum N_b, K). The gradient flows into `logits`, not through w.
    """
    return torch.cat(
        [
            _at_boxes_of_image(z, decoded.detach(), centers, boxes, locations)
            for z, decoded, boxes in zip(logits, decoded_xyxy, boxes_per_image, strict=True)
        ]
    )


def _at_boxes_of_image(z: Tensor, decoded_xyxy: Tensor, centers: Tensor, boxes_xyxy: Tensor, locations: int) -> Tensor:
    """z (A, K), decoded_xyxy (A, 4), centers (A, 2), boxes_xyxy (N, 4) -> (N, K)."""
    with torch.no_grad():
        boxes_xyxy = boxes_xyxy.to(decoded_xyxy)
        weight = box_iou(boxes_xyxy, decoded_xyxy) * is_inside(centers, boxes_xyxy)  # (N, A)
        weight, index = weight.topk(min(locations, len(centers)), dim=1)  # (N, k)
        middles = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        nearest = (middles[:, None] - centers).square().sum(-1).argmin(1)  # (N,)
        has_no_overlap = weight[:, 0] == 0
        index[:, 0] = torch.where(has_no_overlap, nearest, index[:, 0])
        weight[:, 0] = torch.where(has_no_overlap, 1.0, weight[:, 0])
        weight = weight / weight.sum(1, keepdim=True)
    return (weight[:, :, None] * z[index]).sum(1)  # (N, k, K) -> (N, K)
