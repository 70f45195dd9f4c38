"""The parts of a plain vision transformer (arXiv:2010.11929): patches to tokens, pre-norm blocks, position tables.

    x = x + s1 * attention(norm1(x))
    x = x + s2 * mlp(norm2(x))          s1, s2: 1, or learnt per channel (layer scale, CaiT, arXiv:2103.17239)

ViT and DeiT detectors, DINOv2 and both towers of CLIP are built from these parts. Arguments cover their differences
(activation, epsilon, mask, layer scale); everything else is in their own files.

Not implemented: dropout, stochastic depth, relative positions, windows. Fresh weights are normal with standard
deviation 0.02, and biases are zero, as in published ViT training.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU (arXiv:1606.08415, sec. 2) that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def causal_mask(num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """is_visible (N, N) bool: token i (a row) attends to the tokens 0..i."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()


class Attention(nn.Module):
    """Self-attention of `heads` heads of D = width / heads channels each (arXiv:1706.03762).

        out = concat_h softmax(q_h k_h^T / sqrt(D)) v_h W_o + b_o,    [q; k; v] = x W_qkv + b_qkv

    `qkv.weight` (3 width, width) holds the rows of q, then k, then v; within each, the heads are in order.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, C) -> q, k, v (B, heads, N, D) each."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, is_visible: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C). is_visible (N, N) bool: True where the row's token attends to the column's."""
        q, k, v = self._split(x)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible)  # (B, heads, N, D)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, N, C)

    def probabilities_of(self, x: Tensor, token: int = 0) -> Tensor:
        """x (B, N, C) -> (B, heads, N): the attention of one token to all N; sums to 1 over them."""
        w_q, w_k, _ = self.qkv.weight.chunk(3)  # (C, C) each; v is not needed, nor the other tokens' q
        b_q, b_k, _ = self.qkv.bias.chunk(3)
        q = F.linear(x[:, token], w_q, b_q).unflatten(-1, (self.heads, -1))  # (B, heads, D)
        k = F.linear(x, w_k, b_k).unflatten(-1, (self.heads, -1))  # (B, N, heads, D)
        logits = torch.einsum("bhd,bnhd->bhn", q, k) / math.sqrt(q.shape[-1])
        return logits.softmax(-1)


class MLP(nn.Module):
    """contract(activation(expand(x))), token by token: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, hidden: int, activation: Activation = F.gelu) -> None:
        super().__init__()
        self.expand = linear(width, hidden)
        self.contract = linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))


class Block(nn.Module):
    """One pre-norm block, the equation at the top of this file: (B, N, C) -> (B, N, C).

    layer_scale: s1 and s2 are the parameters `attention_scale` and `mlp_scale` (C,), which start at 1e-5; else 1.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        activation: Activation = F.gelu,
        norm_eps: float = 1e-6,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(mlp_ratio * width), activation)
        self.attention_scale = nn.Parameter(torch.full((width,), 1e-5)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.full((width,), 1e-5)) if layer_scale else None

    def forward(self, x: Tensor, is_visible: Tensor | None = None) -> Tensor:
        """x (B, N, C), is_visible as Attention.forward."""
        attended = self.attention(self.norm1(x), is_visible)
        x = x + (attended if self.attention_scale is None else self.attention_scale * attended)
        expanded = self.mlp(self.norm2(x))
        return x + (expanded if self.mlp_scale is None else self.mlp_scale * expanded)


class PatchEmbedding(nn.Module):
    """images (B, 3, H, W) -> tokens (B, h w, C), h = H / patch, w = W / patch: one linear map of each square patch.

    Patches run row by row. H and W must be multiples of `patch`, else ValueError.
    """

    def __init__(self, width: int, patch: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Conv2d(3, width, patch, stride=patch, bias=bias)
        nn.init.normal_(self.project.weight, std=0.02)
        if self.project.bias is not None:
            nn.init.zeros_(self.project.bias)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(f"images are {height} x {width} pixels, expected multiples of {self.patch}")
        return self.project(images).flatten(2).transpose(1, 2)  # (B, h w, C)


def interpolate_positions(
    positions: Tensor, grid: tuple[int, int], *, offset: float = 0.0, antialias: bool = False
) -> Tensor:
    """Resize a position table that was learnt on a square of patches to a grid of h x w patches (bicubic).

    positions (1, 1 + G G, C): the class token, which has no place, then the patches row by row.
    Returns (1, 1 + h w, C) in the dtype of the table. The first position is copied, and a table that fits the grid is
    returned as it is. Resized in float32. Gradient flows.

    offset: scale by (h + offset) / G, not h / G. DINOv2 was published with 0.1; 0 is plain resizing.
    antialias: widen the kernel if the grid shrinks; not together with an offset.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise ValueError(f"{positions.shape[1]} positions are not 1 and a square")
    if grid == (side, side):
        return positions
    table = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # (1, C, G, G)
    if offset:
        scale = tuple((length + offset) / side for length in grid)
        resized = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(table, size=grid, mode="bicubic", antialias=antialias)
    patches = resized.flatten(2).transpose(1, 2).to(positions.dtype)  # (1, h w, C)
    return torch.cat((positions[:, :1], patches), dim=1)


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (B, h w, C), row by row -> map (B, C, h, w); a view."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def linear(c_in: int, c_out: int) -> nn.Linear:
    layer = nn.Linear(c_in, c_out)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
