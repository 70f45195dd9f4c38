"""The region proposal network (Ren et al., "Faster R-CNN", arXiv:1506.01497, sec. 3.1) on the levels of a pyramid.

One small network slides over every level. For each anchor it predicts the probability of an object and the offsets from
the anchor to the object's box. The best boxes after non-maximum suppression are the proposals for the second stage.
"""

from collections.abc import Iterable
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import clip_boxes
from frcnn.anchors import RPN_WEIGHTS, decode_boxes
from kernels.nms import batched_nms
from kernels.roi_align import pixel_rows, sparse_product

SUPPRESSION_IOU = 0.7
MIN_SIDE = 1e-3  # pixels; a proposal thinner than this after clipping is dropped


class Selection(TypedDict):
    """How many boxes select_proposals keeps, as its keyword arguments.

    candidates: of each level, before suppression. proposals: of an image, after suppression. min_score: of a proposal.
    """

    candidates: int
    proposals: int
    min_score: float


class RPNHead(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then two 1x1 convolutions: a logit and four offsets per anchor of a cell."""

    def __init__(self, channels: int, anchors_per_cell: int, depth: int = 1) -> None:
        super().__init__()
        self.anchors_per_cell = anchors_per_cell
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors_per_cell, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in cast(Iterable[nn.Conv2d], (*self.convs, self.objectness, self.deltas)):  # sec. 3.1.3
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """maps (B, C, h_l, w_l) -> objectness_logits (B, A), box_deltas (B, A, 4), in the order of place_anchors."""
        objectness, deltas = [], []
        for x in maps:
            for conv in self.convs:
                x = F.relu(conv(x))
            objectness.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))  # (B, h w n)
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).flatten(1))  # (B, h w n 4)
        return torch.cat(objectness, 1), torch.cat(deltas, 1).unflatten(1, (-1, 4))

    def at(self, maps: list[Tensor], image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` at N anchors only: their image (N,) and their index in 0..A-1 (N,) -> logits (N,), deltas (N, 4).

        Values and gradients are those of `forward`, at the cost of the cells of these anchors. A step samples 256
        anchors of an image; nearly all gradients of the 58,000 anchors of a 480 px image would be zero.
        """
        level, y, x, which = self._cells([m.shape for m in maps], anchor)
        patches, is_inside = _patches(maps, image, level, y, x, radius=len(self.convs))
        for conv in cast(Iterable[nn.Conv2d], self.convs):  # an nn.ModuleList does not keep the type of its items
            patches = F.relu(F.conv2d(patches, conv.weight, conv.bias))
            is_inside = is_inside[:, :, 1:-1, 1:-1]
            if patches.shape[-1] > 1:
                patches = patches * is_inside  # the next convolution pads with 0 beyond the edge
        objectness = self.objectness(patches).flatten(1)  # (N, n)
        deltas = self.deltas(patches).flatten(1).unflatten(1, (-1, 4))  # (N, n, 4)
        row = torch.arange(len(anchor), device=anchor.device)
        return objectness[row, which], deltas[row, which]

    def _cells(self, shapes: list[torch.Size], anchor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The place of anchors (N,): level, row and column of the cell, and index within the cell; (N,) each."""
        sizes = torch.tensor([[h, w] for _, _, h, w in shapes], device=anchor.device)
        ends = (sizes.prod(1) * self.anchors_per_cell).cumsum(0)
        level = torch.searchsorted(ends, anchor, right=True)
        starts = F.pad(ends, (1, 0))
        cell = (anchor - starts[level]) // self.anchors_per_cell
        width = sizes[level, 1]
        return level, cell // width, cell % width, (anchor - starts[level]) % self.anchors_per_cell


def _patches(
    maps: list[Tensor], image: Tensor, level: Tensor, y: Tensor, x: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """The k x k pixels about N cells, k = 2 radius + 1: (N, C, k, k), 0 beyond the edge; is_inside (N, 1, k, k)."""
    table, start = [], 0
    for B, _, height, width in (m.shape for m in maps):
        table.append([height, width, start])
        start += B * height * width
    h, w, first = (column[:, None, None] for column in torch.tensor(table, device=y.device)[level].unbind(1))
    step = torch.arange(-radius, radius + 1, device=y.device)
    y = y[:, None, None] + step[:, None]  # (N, k, 1)
    x = x[:, None, None] + step  # (N, 1, k)
    is_inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)  # (N, k, k)
    pixel = (first + (image[:, None, None] * h + y) * w + x)[is_inside]
    offsets = F.pad(is_inside.flatten().cumsum(0), (1, 0))
    rows = pixel_rows(maps)
    patches = sparse_product(pixel, offsets, rows.new_ones(len(pixel)), rows).to(maps[0].dtype)  # (N k k, C)
    return patches.unflatten(0, is_inside.shape).permute(0, 3, 1, 2), is_inside[:, None]


@torch.no_grad()
def select_proposals(
    objectness_logits: Tensor,
    box_deltas: Tensor,
    anchors_xyxy: Tensor,
    *,
    level_counts: list[int],
    image_size: tuple[int, int],
    candidates: int,
    proposals: int,
    min_score: float = 0.0,
) -> list[Tensor]:
    """The proposals of each of B images for the second stage: (N_b, 4) xyxy within the image, best first.

    1. Decode the `candidates` anchors with the highest logits of each level, and clip them to the image.
    2. Drop boxes thinner than MIN_SIDE, and boxes with a score below min_score.
    3. Suppress boxes within their level at IoU 0.7, and keep the best `proposals` of all levels.

    objectness_logits (B, A), box_deltas (B, A, 4), anchors_xyxy (A, 4): in the order of place_anchors.
    level_counts: number of anchors of each level.
    No gradient: the second stage takes proposals as constants (sec. 3.2: approximate joint training).
    """
    chosen, labels = [], []
    for level, logits in enumerate(objectness_logits.split(level_counts, 1)):
        top = logits.topk(min(candidates, logits.shape[1]), dim=1).indices
        chosen.append(top + sum(level_counts[:level]))
        labels.append(torch.full((top.shape[1],), level, device=top.device))
    index, label = torch.cat(chosen, 1), torch.cat(labels)  # (B, n), (n,)
    logits = objectness_logits.gather(1, index).float()
    deltas = box_deltas.gather(1, index[..., None].expand(-1, -1, 4)).to(anchors_xyxy.dtype)
    boxes = clip_boxes(decode_boxes(deltas, anchors_xyxy[index], RPN_WEIGHTS), *image_size)  # (B, n, 4)
    is_kept = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(-1)
    if min_score > 0:
        is_kept &= logits.sigmoid() >= min_score
    selected = []
    for b, z, kept in zip(boxes, logits, is_kept):
        b, z = b[kept], z[kept]
        selected.append(b[batched_nms(b, z, label[kept], SUPPRESSION_IOU, proposals)])
    return selected
