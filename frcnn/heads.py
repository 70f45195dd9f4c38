"""The second stage: the class and the exact box of each pooled region (Fast R-CNN, arXiv:1504.08083, sec. 2).

    pooled (N, C, 7, 7) ── box head ── (N, D) ── predictor ── class logits (N, 1 + K), box deltas (N, 1 + K, 4)

There are two box heads. BoxHead has two fully connected layers, as in FPN (arXiv:1612.03144). ConvBoxHead, of
fasterrcnn_resnet50_fpn_v2, has four convolutions and one such layer (as in arXiv:1803.08494, but with BatchNorm, not
GroupNorm).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import clip_boxes
from frcnn.anchors import ROI_WEIGHTS, decode_boxes
from frcnn.norm import ConvNorm
from kernels.nms import batched_nms
from structures import Detections

POOLED_SIZE = 7
HIDDEN = 1024  # D
MIN_SIDE = 1e-2  # pixels; a detection thinner than this after clipping is dropped


class BoxHead(nn.Module):
    """(N, C, 7, 7) -> (N, D): relu(fc7(relu(fc6(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * POOLED_SIZE**2, HIDDEN)
        self.fc7 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(pooled.flatten(1)))))


class ConvBoxHead(nn.Module):
    """(N, C, 7, 7) -> (N, D): four 3x3 convolutions with BatchNorm and ReLU, then relu(fc(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(4))
        self.fc = nn.Linear(channels * POOLED_SIZE**2, HIDDEN)

    def forward(self, pooled: Tensor) -> Tensor:
        for conv in self.convs:
            pooled = F.relu(conv(pooled), inplace=True)
        return F.relu(self.fc(pooled.flatten(1)))


class BoxPredictor(nn.Module):
    """(N, D) -> class_logits (N, 1 + K), the background in column 0, and box_deltas (N, 1 + K, 4), one box per class.

    The background's four deltas have no meaning; the released weights have them.

    other_classes: M further classes that the layer predicts but the detector does not report, such as other classes of
    the weights it started from. They count as background:

        background = log sum_m exp(z_m) over the background's own logit and those of the M other classes

    So the K classes have the probabilities that a softmax over all 1 + K + M logits gives them.
    """

    def __init__(self, num_classes: int, other_classes: int = 0) -> None:
        super().__init__()
        self.num_classes, self.other_classes = num_classes, other_classes
        self.classify = nn.Linear(HIDDEN, 1 + num_classes + other_classes)
        self.regress = nn.Linear(HIDDEN, 4 * (1 + num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.classify.weight, std=0.01)  # arXiv:1504.08083, sec. 2.3
        nn.init.normal_(self.regress.weight, std=0.001)
        nn.init.zeros_(self.classify.bias)
        nn.init.zeros_(self.regress.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        class_logits = self.classify(x)  # (N, 1 + K + M)
        if self.other_classes:
            background, classes, others = class_logits.split((1, self.num_classes, self.other_classes), dim=1)
            background = torch.cat((background, others), dim=1).float().logsumexp(1, keepdim=True)
            class_logits = torch.cat((background.to(classes.dtype), classes), dim=1)  # (N, 1 + K)
        return class_logits, self.regress(x).unflatten(1, (-1, 4))


@torch.no_grad()
def select_boxes(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals_xyxy: Tensor,
    *,
    image_size: tuple[int, int],
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> Detections:
    """Detections of one image from its N proposals (N, 4), with class_logits (N, 1 + K) and box_deltas (N, 1 + K, 4).

    A candidate is a pair (proposal, class) with a softmax score above score_threshold; a proposal may have several. Its
    box is the one predicted for that class, clipped to the image. Only boxes of one class suppress each other.
    """
    scores = class_logits.float().softmax(1)[:, 1:]  # (N, K)
    proposal, label = (scores > score_threshold).nonzero().unbind(1)
    deltas = box_deltas[proposal, 1 + label].to(proposals_xyxy.dtype)
    boxes_xyxy = clip_boxes(decode_boxes(deltas, proposals_xyxy[proposal], ROI_WEIGHTS), *image_size)
    is_kept = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] >= MIN_SIDE).all(1)
    boxes_xyxy, scores, label = boxes_xyxy[is_kept], scores[proposal, label][is_kept], label[is_kept]
    rows = batched_nms(boxes_xyxy, scores, label, iou_threshold, max_detections)
    return Detections(boxes_xyxy[rows], scores[rows], label[rows])
