"""The decoder of RT-DETR (arXiv:2304.08069): it selects encoder cells as queries and refines their boxes.

    p3, p4, p5 ── 1x1 ── memory ── the best Q cells ── queries, boxes ── (layer ── refine) repeated ── boxes, logits

Queries are selected by the class scores of the memory (section 4.3). A layer is self-attention among the queries,
deformable attention to the memory (arXiv:2010.04159) and a network per query. After each layer an offset in logit space
refines the boxes (arXiv:2010.04159, "iterative bounding box refinement").

Not implemented: denoising queries and losses, which only training needs. Every layer has a class head, because the
released weights do; only the last one is used.

Boxes are cxcywh_norm: center x, center y, width and height as fractions of the image, float32 also under autocast.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.deformable_attention import deformable_attention
from layers.precision import at_least_float32
from teachers.conv_bn import ConvBN

ANCHOR_SIZE = 0.05  # on the finest map, as a fraction of the image; it doubles with each coarser map
ANCHOR_MARGIN = 0.01  # an anchor with a coordinate outside (margin, 1 - margin) is not a candidate


class MLP(nn.Module):
    """Linear layers with ReLU between them: c_in -> hidden -> ... -> c_out."""

    def __init__(self, c_in: int, hidden: int, c_out: int, num_layers: int) -> None:
        super().__init__()
        widths = [c_in] + [hidden] * (num_layers - 1) + [c_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DeformableAttention(nn.Module):
    """Each query reads P points per level and head, placed relative to its box.

    point = center + offset / P * size / 2
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.value = nn.Linear(width, width)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.logits = nn.Linear(width, heads * levels * points)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, boxes: Tensor, memory: Tensor, level_sizes: list[tuple[int, int]]) -> Tensor:
        """queries (B, Q, D), boxes (B, Q, 4) cxcywh_norm, memory (B, S, D) -> (B, Q, D)."""
        M, L, P = self.heads, self.levels, self.points
        value = self.value(memory).unflatten(-1, (M, -1))  # (B, S, M, D / M)
        offsets = self.offsets(queries).unflatten(-1, (M, L, P, 2))  # (B, Q, M, L, P, 2)
        prob = self.logits(queries).unflatten(-1, (M, L * P)).softmax(-1).unflatten(-1, (L, P))  # (B, Q, M, L, P)
        center, size = boxes[:, :, None, None, None].chunk(2, dim=-1)  # (B, Q, 1, 1, 1, 2) each
        points = center + offsets / P * size / 2
        return self.output(deformable_attention(value, level_sizes, points, prob).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention and a ReLU network, each added to its input and followed by LayerNorm."""

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, heads, levels, points)
        self.cross_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.network_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, position: Tensor, boxes: Tensor, memory: Tensor, level_sizes: list[tuple[int, int]]
    ) -> Tensor:
        """x and position (B, Q, D), boxes (B, Q, 4) cxcywh_norm, memory (B, S, D) -> (B, Q, D)."""
        placed = x + position
        x = self.self_norm(x + self.self_attention(placed, placed, x, need_weights=False)[0])
        x = self.cross_norm(x + self.cross_attention(x + position, boxes, memory, level_sizes))
        return self.network_norm(x + self.contract(F.relu(self.expand(x))))


class Decoder(nn.Module):
    """p3, p4, p5, each (B, in_channels, h, w) -> the boxes and class logits of Q queries."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_layers: int,
        num_queries: int = 300,
        width: int = 256,
        heads: int = 8,
        levels: int = 3,
        points: int = 4,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.enter = nn.ModuleList(ConvBN(in_channels, width) for _ in range(levels))
        self.candidate = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.candidate_class = nn.Linear(width, num_classes)
        self.candidate_box = MLP(width, width, 4, 3)
        self.query_position = MLP(4, 2 * width, width, 2)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, levels, points, hidden) for _ in range(num_layers))
        self.class_heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(num_layers))
        self.box_heads = nn.ModuleList(MLP(width, width, 4, 3) for _ in range(num_layers))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> boxes (B, Q, 4) cxcywh_norm and class logits (B, Q, K) of the last layer, in the order of selection."""
        level_sizes = [(x.shape[2], x.shape[3]) for x in maps]
        memory = torch.cat([f(x).flatten(2) for f, x in zip(self.enter, maps)], dim=2).transpose(1, 2)  # (B, S, D)
        queries, boxes = self.select(memory, level_sizes)
        for layer, box_head in zip(self.layers, self.box_heads):
            position = self.query_position(boxes.to(memory))  # (B, Q, D)
            queries = layer(queries, position, boxes, memory, level_sizes)
            boxes = (at_least_float32(box_head(queries)) + inverse_sigmoid(boxes)).sigmoid()
        return boxes, self.class_heads[-1](queries)

    def select(self, memory: Tensor, level_sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The Q cells of the memory with the highest class logit: queries (B, Q, D) and boxes (B, Q, 4) cxcywh_norm.

        A box is the anchor of its cell, moved in logit space. A cell whose anchor is not a candidate has a query from
        zeros and the box (1, 1, 1, 1), as in the released models. Q = min(num_queries, number of cells).
        """
        anchors, is_candidate = make_anchors(level_sizes, memory.device)
        cells = self.candidate(memory * is_candidate)  # (B, S, D)
        scores = self.candidate_class(cells).amax(-1)  # (B, S)
        chosen = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices  # (B, Q)
        queries = cells.gather(1, chosen[:, :, None].expand(-1, -1, cells.shape[2]))  # (B, Q, D)
        start = at_least_float32(self.candidate_box(queries))
        anchor_logits = torch.where(is_candidate, inverse_sigmoid(anchors), torch.inf)  # (S, 4)
        return queries, (start + anchor_logits[chosen].to(start)).sigmoid()


def make_anchors(level_sizes: list[tuple[int, int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """One square anchor (in fractions of the image) per cell: (S, 4) cxcywh_norm float32, and is_candidate (S, 1).

    Cell (i, j) of level l has the center ((j + 1/2) / W_l, (i + 1/2) / H_l) and the side 0.05 * 2^l. It is a candidate
    if all four numbers lie strictly within (0.01, 0.99). Cells are ordered level by level, row by row.
    """
    levels = []
    for level, (height, width) in enumerate(level_sizes):
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        y, x = torch.meshgrid(y, x, indexing="ij")  # (H, W) each
        side = torch.full_like(x, ANCHOR_SIZE * 2**level)
        levels.append(torch.stack((x, y, side, side), dim=-1).flatten(0, 1))
    anchors = torch.cat(levels)
    is_candidate = ((anchors > ANCHOR_MARGIN) & (anchors < 1 - ANCHOR_MARGIN)).all(1, keepdim=True)
    return anchors, is_candidate


def inverse_sigmoid(p: Tensor, eps: float = 1e-5) -> Tensor:
    """log(p / (1 - p)), with numerator and denominator at least eps: finite for p in [0, 1]."""
    p = p.clamp(0, 1)
    return p.clamp(min=eps).log() - (1 - p).clamp(min=eps).log()
