"""The decoder of RT-DETR (arXiv:2304.08069): it selects encoder cells as queries and refines their boxes.

    p3, p4, p5 ── 1x1 ── memory ── the best Q cells ── queries, boxes ── (layer ── refine) repeated ── boxes, logits

Queries are selected by the class scores of the memory (section 4.3). A layer is self-attention among the queries,
deformable attention to the memory (arXiv:2010.04159) and a network per query. After each layer an offset in logit space
refines the boxes (arXiv:2010.04159, "iterative bounding box refinement").

Every layer has heads of its own. All of them learn; detections come from the last one. Each layer gets the boxes of the
layer before without gradient, and the first one also gets its queries without gradient, so that layers and proposals
learn from their own losses.

Denoising queries (denoising.py) see the selected queries but are not seen by them. So `forward` computes the selected
queries alone, and `denoise` passes the others through the same layers, which read what `forward` kept.

Differs from the authors' code: there, a layer's box loss also trains the layer before ("look forward twice", DINO,
arXiv:2203.03605); transformers' code is as here.

Boxes are cxcywh_norm: center x, center y, width and height as fractions of the image, float32 also under autocast.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.deformable_attention import deformable_attention
from layers.precision import at_least_float32, compute_dtype
from rtdetr.attention import MultiHeadAttention
from rtdetr.conv_bn import ConvBN
from rtdetr.denoising import NoisyObjects

ANCHOR_SIZE = 0.05  # on the finest map, as a fraction of the image; it doubles with each coarser map
ANCHOR_MARGIN = 0.01  # an anchor with a coordinate outside (margin, 1 - margin) is not a candidate
FIRST_PROBABILITY = 0.01  # of every class, at the start of training (arXiv:1708.02002, section 4.1)


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
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """At first the points of a head lie on a ray from the center, a direction for each head; all count alike."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)  # (M, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]  # (P, 1)
        rays = (direction[:, None, None] * steps).expand(-1, self.levels, -1, -1)  # (M, L, P, 2)
        self.offsets.bias.copy_(rays.flatten())
        for parameter in (self.offsets.weight, self.logits.weight, self.logits.bias):
            nn.init.zeros_(parameter)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, boxes: Tensor, memory: Tensor, level_sizes: list[tuple[int, int]]) -> Tensor:
        """queries (B, Q, D), boxes (B, Q, 4) cxcywh_norm, memory (B, S, D) -> (B, Q, D)."""
        M, L, P = self.heads, self.levels, self.points
        value = self.value(memory).unflatten(-1, (M, -1))  # (B, S, M, D / M)
        offsets = self.offsets(queries).unflatten(-1, (M, L, P, 2))  # (B, Q, M, L, P, 2)
        prob = self.logits(queries).unflatten(-1, (M, L * P)).softmax(-1).unflatten(-1, (L, P))  # (B, Q, M, L, P)
        center, size = boxes[:, :, None, None, None].chunk(2, dim=-1)  # (B, Q, 1, 1, 1, 2) each
        points = center + offsets / P * size / 2
        return self.output(deformable_attention(value, level_sizes, points, prob).flatten(2))


@dataclass(frozen=True)
class OtherQueries:
    """O queries that the Q queries of a layer see besides themselves: x and position (B, O, D).

    is_hidden (B, Q, Q + O) bool: True where the row's query does not see the column's.
    """

    x: Tensor
    position: Tensor
    is_hidden: Tensor


@dataclass(frozen=True)
class Decoded:
    """The decoder's output for Q selected queries and L layers.

    memory (B, S, D): the cells that the layers attend to.
    inputs (B, L, Q, D): the queries before each layer.
    boxes (B, 1 + L, Q, 4) cxcywh_norm, logits (B, 1 + L, Q, K): of the proposals, then after each layer.
    """

    memory: Tensor
    inputs: Tensor
    boxes: Tensor
    logits: Tensor


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention and a ReLU network, each added to its input and followed by LayerNorm."""

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, heads, levels, points)
        self.cross_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.network_norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        boxes: Tensor,
        memory: Tensor,
        level_sizes: list[tuple[int, int]],
        others: "OtherQueries | None" = None,
    ) -> Tensor:
        """x and position (B, Q, D), boxes (B, Q, 4) cxcywh_norm, memory (B, S, D) -> (B, Q, D)."""
        placed = x + position
        keys, values, is_hidden = placed, x, None
        if others is not None:
            keys, values = torch.cat((placed, others.x + others.position), 1), torch.cat((x, others.x), 1)
            is_hidden = others.is_hidden  # (B, Q, Q + O)
        x = self.self_norm(x + self.self_attention(placed, keys, values, is_hidden))
        x = self.cross_norm(x + self.cross_attention(x + position, boxes, memory, level_sizes))
        return self.network_norm(x + self.contract(F.relu(self.expand(x))))


class Decoder(nn.Module):
    """p3, p4, p5, each (B, in_channels, h, w) -> Q queries with their boxes and class logits."""

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
        self.denoising_class = nn.Embedding(num_classes, width)  # the first content of a denoising query
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Every class starts with the probability 0.01, and every layer leaves the boxes where they are."""
        for layer in (self.candidate_class, *self.class_heads):
            nn.init.constant_(layer.bias, -math.log(1 / FIRST_PROBABILITY - 1))
        for mlp in (self.candidate_box, *self.box_heads):
            for parameter in mlp.layers[-1].parameters():
                nn.init.zeros_(parameter)
        for layer in (self.candidate[0], *self.query_position.layers):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, maps: list[Tensor]) -> Decoded:
        """p3, p4, p5 -> the queries in the order of their selection, layer by layer."""
        level_sizes = map_sizes(maps)
        memory = torch.cat([f(x).flatten(2) for f, x in zip(self.enter, maps)], dim=2).transpose(1, 2)  # (B, S, D)
        queries, boxes = self.select(memory, level_sizes)
        logits = self.candidate_class(queries)
        inputs, refined, classified = self.refine(queries.detach(), boxes, memory, level_sizes)
        return Decoded(
            memory, inputs, torch.cat((boxes[:, None], refined), 1), torch.cat((logits[:, None], classified), 1)
        )

    def refine(
        self,
        queries: Tensor,
        boxes: Tensor,
        memory: Tensor,
        level_sizes: list[tuple[int, int]],
        others: list[OtherQueries] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """queries (B, Q, D), boxes (B, Q, 4) -> inputs (B, L, Q, D), boxes (B, L, Q, 4), logits (B, L, Q, K)."""
        inputs, refined, logits = [], [], []
        for number, (layer, box_head, class_head) in enumerate(zip(self.layers, self.box_heads, self.class_heads)):
            boxes = boxes.detach()
            position = self.query_position(boxes.to(memory))  # (B, Q, D)
            inputs.append(queries)
            queries = layer(queries, position, boxes, memory, level_sizes, others[number] if others else None)
            boxes = (at_least_float32(box_head(queries)) + inverse_sigmoid(boxes)).sigmoid()
            refined.append(boxes)
            logits.append(class_head(queries))
        return torch.stack(inputs, 1), torch.stack(refined, 1), torch.stack(logits, 1)

    def denoise(
        self, decoded: Decoded, noisy: NoisyObjects, level_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The boxes (B, L, T, 4) and logits (B, L, T, K) of denoising queries, which see the selected ones."""
        content = self.denoising_class(noisy.labels)  # (B, T, D)
        content = torch.where(noisy.is_real[..., None], content, 0).to(decoded.memory)
        boxes = inverse_sigmoid(noisy.boxes).sigmoid()  # away from 0 and 1
        sees_selected = noisy.is_hidden.new_zeros(*noisy.labels.shape, decoded.inputs.shape[2])  # (B, T, Q)
        is_hidden = torch.cat((noisy.is_hidden, sees_selected), 2)
        others = [
            OtherQueries(x, self.query_position(b.detach().to(x)), is_hidden)
            for x, b in zip(decoded.inputs.unbind(1), decoded.boxes.unbind(1))
        ]
        _, boxes, logits = self.refine(content, boxes, decoded.memory, level_sizes, others)
        return boxes, logits

    def select(self, memory: Tensor, level_sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The Q cells of the memory with the highest class logit: queries (B, Q, D) and boxes (B, Q, 4) cxcywh_norm.

        A box is the anchor of its cell, moved in logit space. A cell whose anchor is not a candidate has a query from
        zeros and the box (1, 1, 1, 1), as in the released models. Q = min(num_queries, number of cells).
        """
        anchors, is_candidate = make_anchors(level_sizes, memory.device, compute_dtype(memory))
        cells = self.candidate(memory * is_candidate)  # (B, S, D)
        scores = self.candidate_class(cells).amax(-1)  # (B, S)
        chosen = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices  # (B, Q)
        queries = cells.gather(1, chosen[:, :, None].expand(-1, -1, cells.shape[2]))  # (B, Q, D)
        start = at_least_float32(self.candidate_box(queries))
        anchor_logits = torch.where(is_candidate, inverse_sigmoid(anchors), torch.inf)  # (S, 4)
        return queries, (start + anchor_logits[chosen].to(start)).sigmoid()


def map_sizes(maps: list[Tensor]) -> list[tuple[int, int]]:
    """(h, w) of each map (B, C, h, w)."""
    return [(x.shape[2], x.shape[3]) for x in maps]


def make_anchors(
    level_sizes: list[tuple[int, int]], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """One square anchor (in fractions of the image) per cell: (S, 4) cxcywh_norm, and is_candidate (S, 1).

    Cell (i, j) of level l has the center ((j + 1/2) / W_l, (i + 1/2) / H_l) and the side 0.05 * 2^l. It is a candidate
    if all four numbers lie strictly within (0.01, 0.99). Cells are ordered level by level, row by row.
    """
    levels = []
    for level, (height, width) in enumerate(level_sizes):
        y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
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
