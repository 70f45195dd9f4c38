"""The hybrid encoder of RT-DETR (arXiv:2304.08069, section 4.2): attention within the coarsest map, convolutions across
maps.

    c5 ── AIFI ── lateral ──┬──────────────────────────> bottom-up ── p5
    c4 ────────── top-down <┘── lateral ──┬── bottom-up ─┘─────────── p4
    c3 ─────────────────────── top-down <─┘───┘────────────────────── p3

AIFI is one post-norm transformer layer (arXiv:1706.03762). The rest (CCFF) is a top-down and a bottom-up path
(arXiv:1612.03144, arXiv:1803.01534); its fusion blocks consist of RepVGG convolutions (arXiv:2101.03697).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtdetr.attention import MultiHeadAttention
from rtdetr.conv_bn import ConvBN

TEMPERATURE = 10_000.0  # of the position embedding's wavelengths, as in arXiv:1706.03762, section 3.5
BLOCK_DEPTH = 3  # RepVGG convolutions in a fusion block


def embed_positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of a cell's row and column: (height * width, channels) float64, row by row.

        e(i, j) = [sin(i w), cos(i w), sin(j w), cos(j w)],    w_f = T^(-f / F),  f = 0..F-1,  F = channels / 4

    channels must be a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a position embedding of {channels} channels, expected a multiple of 4")
    F_ = channels // 4
    frequency = TEMPERATURE ** (-torch.arange(F_, dtype=torch.float64) / F_)
    row = torch.arange(height, dtype=torch.float64)[:, None, None] * frequency  # (H, 1, F)
    column = torch.arange(width, dtype=torch.float64)[None, :, None] * frequency  # (1, W, F)
    parts = (row.sin(), row.cos(), column.sin(), column.cos())
    return torch.cat([part.expand(height, width, F_) for part in parts], dim=-1).flatten(0, 1)


class EncoderLayer(nn.Module):
    """AIFI: self-attention among the cells of one map, then a GELU network per cell, each followed by LayerNorm.

    x <- norm(x + attention(q = x + e, k = x + e, v = x)); x <- norm(x + network(x)); e is embed_positions.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.network_norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        _, C, H, W = maps.shape
        x = maps.flatten(2).transpose(1, 2)  # (B, H W, C)
        placed = x + embed_positions(H, W, C).to(x)
        x = self.attention_norm(x + self.attention(placed, placed, x))
        x = self.network_norm(x + self.contract(F.gelu(self.expand(x))))
        return x.transpose(1, 2).unflatten(2, (H, W))


class RepVGG(nn.Module):
    """y = silu(bn3(conv3x3(x)) + bn1(conv1x1(x))). In eval mode the sum is one 3x3 convolution (`fold`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3x3 = ConvBN(channels, channels, 3)
        self.conv1x1: ConvBN | None = ConvBN(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3x3(x)
        return F.silu(y if self.conv1x1 is None else y + self.conv1x1(x))

    @torch.no_grad()
    def fold(self) -> None:
        """Add the folded 1x1 kernel to the center of the folded 3x3 kernel. A second call does nothing."""
        if self.conv1x1 is None:
            return
        self.conv3x3.fold()
        self.conv1x1.fold()
        wide, narrow = self.conv3x3.conv, self.conv1x1.conv
        assert wide.bias is not None and narrow.bias is not None  # since they are folded
        wide.weight += F.pad(narrow.weight, (1, 1, 1, 1))
        wide.bias += narrow.bias
        self.conv1x1 = None


class FusionBlock(nn.Module):
    """The sum of two 1x1 convolutions of x, one with RepVGG convolutions after it; widened if `hidden` != c_out."""

    def __init__(self, c_in: int, c_out: int, hidden: int) -> None:
        super().__init__()
        self.enter = ConvBN(c_in, hidden, activation=F.silu)
        self.bypass = ConvBN(c_in, hidden, activation=F.silu)
        self.blocks = nn.Sequential(*(RepVGG(hidden) for _ in range(BLOCK_DEPTH)))
        self.leave = ConvBN(hidden, c_out, activation=F.silu) if hidden != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.blocks(self.enter(x)) + self.bypass(x))


class HybridEncoder(nn.Module):
    """c3, c4, c5 -> p3, p4, p5 of the same sizes, `width` channels each.

    in_channels: of c3, c4, c5. hidden: channels inside a fusion block. feedforward: inside AIFI's network.
    """

    def __init__(
        self, in_channels: tuple[int, ...], *, width: int, hidden: int, feedforward: int, heads: int = 8
    ) -> None:
        super().__init__()

        def fusion() -> FusionBlock:
            return FusionBlock(2 * width, width, hidden)

        self.enter3, self.enter4, self.enter5 = (ConvBN(c, width) for c in in_channels)
        self.aifi = EncoderLayer(width, heads, feedforward)
        self.lateral5 = ConvBN(width, width, activation=F.silu)
        self.top_down4 = fusion()
        self.lateral4 = ConvBN(width, width, activation=F.silu)
        self.top_down3 = fusion()
        self.down3 = ConvBN(width, width, 3, stride=2, activation=F.silu)
        self.bottom_up4 = fusion()
        self.down4 = ConvBN(width, width, 3, stride=2, activation=F.silu)
        self.bottom_up5 = fusion()

    def forward(self, c: dict[str, Tensor]) -> dict[str, Tensor]:
        x5 = self.lateral5(self.aifi(self.enter5(c["c5"])))
        x4 = self.lateral4(self.top_down4(torch.cat((upsample(x5), self.enter4(c["c4"])), 1)))
        p3 = self.top_down3(torch.cat((upsample(x4), self.enter3(c["c3"])), 1))
        p4 = self.bottom_up4(torch.cat((self.down3(p3), x4), 1))
        p5 = self.bottom_up5(torch.cat((self.down4(p4), x5), 1))
        return {"p3": p3, "p4": p4, "p5": p5}


def upsample(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): every pixel becomes a 2x2 block."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
