"""The region proposal network (Ren et al., "Faster R-CNN", arXiv:1506.01497, sec. 3.1) on the levels of a pyramid.

One small network slides over every level and says of each anchor how likely it holds an object, and how to move and
stretch it to fit. The best of them, after suppression, are what the second stage looks at.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxes import clip_boxes
from frcnn.anchors import RPN_WEIGHTS, decode_boxes
from kernels.nms import batched_nms
from kernels.roi_align import pixel_rows, sparse_product

SUPPRESSION_IOU = 0.7
MIN_SIDE = 1e-3  # pixels; a proposal thinner than this after clipping is no region


class RPNHead(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then two 1x1: per cell one logit and four offsets for each of its anchors."""

    def __init__(self, channels: int, anchors_per_cell: int, depth: int = 1) -> None:
        super().__init__()
        self.anchors_per_cell = anchors_per_cell
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors_per_cell, 1)
        for layer in (*self.convs, self.objectness, self.deltas):  # sec. 3.1.3
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """maps (B, C, h_l, w_l) -> objectness_logits (B, A), box_deltas (B, A, 4) in the order of place_anchors."""
        objectness, deltas = [], []
        for x in maps:
            for conv in self.convs:
                x = F.relu(conv(x))
            objectness.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))  # (B, h w n)
            deltas.append(self.deltas(x).permute(0, 2, 3, 1).flatten(1))  # (B, h w n 4)
        return torch.cat(objectness, 1), torch.cat(deltas, 1).unflatten(1, (-1, 4))

    def at(self, maps: list[Tensor], image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """The same for N anchors alone: their rows in the batch (N,) and among A (N,) -> logits (N,), deltas (N, 4).

        Values and gradients are those of `forward`, at the cost of the few cells the anchors stand in: a step looks at
        256 anchors of an image, and a backward pass through all 58,000 of a 480 px image would move zeros.
        """
        level, y, x, which = self._cells([m.shape for m in maps], anchor)
        patches, is_inside = _patches(maps, image, level, y, x, radius=len(self.convs))
        for conv in self.convs:
            patches = F.relu(F.conv2d(patches, conv.weight, conv.bias))
            is_inside = is_inside[:, :, 1:-1, 1:-1]
            if patches.shape[-1] > 1:
                patches = patches * is_inside  # what the next convolution finds beyond the edge is 0
        objectness = self.objectness(patches).flatten(1)  # (N, n)
        deltas = self.deltas(patches).flatten(1).unflatten(1, (-1, 4))  # (N, n, 4)
        row = torch.arange(len(anchor), device=anchor.device)
        return objectness[row, which], deltas[row, which]

    def _cells(self, shapes: list[torch.Size], anchor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where anchors (N,) stand: level, row and column of the cell, and which of the cell's anchors; (N,) each."""
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
    """The k x k pixels about N places, k = 2 radius + 1: (N, C, k, k), 0 beyond the edge; is_inside (N, 1, k, k)."""
    table, first = [], 0
    for B, _, h, w in (m.shape for m in maps):
        table.append([h, w, first])
        first += B * h * w
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
    """The boxes worth a second look in each of B images: (N_b, 4) xyxy within the image, best first.

    Of each level the `candidates` highest logits are decoded, clipped, freed of slivers and of scores below min_score,
    suppressed within their level at IoU 0.7; the best `proposals` of all levels remain. objectness_logits (B, A),
    box_deltas (B, A, 4) and anchors_xyxy (A, 4) are in the order of place_anchors; level_counts: anchors of each level.
    Without gradient: the second stage takes proposals as given (sec. 3.2: approximate joint training).
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
