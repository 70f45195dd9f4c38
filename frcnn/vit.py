"""ViT-Tiny/16 (Dosovitskiy et al., arXiv:2010.11929) as the backbone of a detector, and its pyramid.

    images ── patches 16x16 ── + positions ── 12 blocks ── norm ── c4 /16 ── simple feature pyramid ── p2, p3, p4, p5

The size is DeiT's (arXiv:2012.12877): 192 channels, 3 heads. Two released files fit, and their names are the same:
timm's vit_tiny_patch16_224 ("augreg", arXiv:2106.10270), which saw images normalised by 0.5 and 0.5, and
deit_tiny_patch16_224, which saw ImageNet's mean and std. The model has the first; `adopt_normalization` makes weights
of the second compute the same.

The pyramid is ViTDet's (Li et al., arXiv:2203.16527, sec. 3): every level is made from the last map alone. Differs from
ViTDet: attention is global in every block (at 480 px a block sees 900 tokens; windows are for larger images), position
tables are absolute alone, and c4 comes after the final norm that classification was trained with.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frcnn.norm import ChannelNorm
from frcnn.pretrained import backbone_layouts, strip_wrapper
from layers.transformer import Block, PatchEmbedding, interpolate_positions, tokens_to_map

PATCH = 16  # pixels
PRETRAINED_GRID = 14  # patches of the 224 px the files were trained at
NORM_EPSILON = 1e-6


class Size(NamedTuple):
    """width: channels of a token. depth: blocks. heads: of attention in each."""

    width: int
    depth: int
    heads: int


SIZES = {"tiny": Size(width=192, depth=12, heads=3)}

# fmt: off
VIT_NAMES = [
    # timm and DeiT              ours
    ("cls_token",                "embedding.class_token"),
    ("pos_embed",                "embedding.positions"),
    ("patch_embed.proj.",        "embedding.patches.project."),
    ("blocks.{}.norm1.",         "blocks.{}.norm1."),
    ("blocks.{}.attn.qkv.",      "blocks.{}.attention.qkv."),
    ("blocks.{}.attn.proj.",     "blocks.{}.attention.out."),
    ("blocks.{}.norm2.",         "blocks.{}.norm2."),
    ("blocks.{}.mlp.fc1.",       "blocks.{}.mlp.expand."),
    ("blocks.{}.mlp.fc2.",       "blocks.{}.mlp.contract."),
    ("norm.",                    "norm."),
]
# fmt: on


class TokenEmbedding(nn.Module):
    """images (B, 3, H, W) -> tokens (B, 1 + h w, C), the class token first, each with its position added.

    h = ceil(H / 16), w = ceil(W / 16): zeros are added on the right and below, which is the mean color. Positions
    learnt on the pretrained grid are resized to h x w (bicubic with antialiasing, as timm does for other sizes).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = PatchEmbedding(width, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + PRETRAINED_GRID**2, width))
        nn.init.trunc_normal_(self.positions, std=0.02, a=-0.04, b=0.04)

    def forward(self, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        images = F.pad(images, (0, -W % PATCH, 0, -H % PATCH))
        tokens = torch.cat((self.class_token.expand(B, -1, -1), self.patches(images)), dim=1)  # (B, 1 + h w, C)
        return tokens + interpolate_positions(self.positions, grid_of(H, W), antialias=True)


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Pixels -> patches, the last one of a row or column perhaps partly outside."""
    return -(-height // PATCH), -(-width // PATCH)


class VisionTransformer(nn.Module):
    """ViT without its classifier. size: "tiny".

    forward: images (B, 3, H, W) of any size -> {"c4": (B, 192, ceil(H / 16), ceil(W / 16))}.
    `stages`, five: the embedding, then a quarter of the blocks each (the last with the final norm).
    """

    mean = (0.5, 0.5, 0.5)  # of timm's file, as std is
    std = (0.5, 0.5, 0.5)
    class_head = ()

    def __init__(self, size: str = "tiny") -> None:
        super().__init__()
        width, depth, heads = SIZES[size]
        self.embedding = TokenEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, heads, norm_eps=NORM_EPSILON) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.strides = {"c4": PATCH}
        self.channels = {"c4": width}
        self.head_names = [("head.", "")]
        self.public_names = VIT_NAMES
        self.public_layouts = backbone_layouts(VIT_NAMES, self.head_names, strip_wrapper)

    @property
    def stages(self) -> list[list[nn.Module]]:
        blocks, quarter = list(self.blocks), len(self.blocks) // 4
        quarters = [blocks[start : start + quarter] for start in range(0, len(blocks), quarter)]
        return [[self.embedding], *quarters[:-1], [*quarters[-1], self.norm]]

    def tokens(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, 1 + h w, C) after the final norm, the class token first."""
        x = self.embedding(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"c4": tokens_to_map(self.tokens(images)[:, 1:], grid_of(*images.shape[-2:]))}  # (B, C, h, w)

    def pooled(self, images: Tensor) -> Tensor:
        return self.tokens(images)[:, 0]  # (B, C), the class token

    def make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.channels["c4"], num_classes)

    @torch.no_grad()
    def adopt_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Change weights trained on (image - mean) / std to compute the same of images normalised by self.mean, .std.

            x' = (s x + m - mean) / std,    w' = w s / std,    b' = b + sum w (m - mean) / std

        with x normalised by m = self.mean and s = self.std, per color channel; the sum is over a patch. The patch
        embedding is linear and sees no padding of its own, so this is exact, but for the added zeros beyond the image.
        """
        project = self.embedding.patches.project
        weight = project.weight.double()  # (C, 3, 16, 16)
        m, s, mean, std = (weight.new_tensor(v)[:, None, None] for v in (self.mean, self.std, mean, std))
        project.bias.copy_(project.bias.double() + (weight * (m - mean) / std).sum((1, 2, 3)))
        project.weight.copy_(weight * s / std)


class SimpleFeaturePyramid(nn.Module):
    """One map at stride 16 -> levels at strides 4, 8, 16, 32 of `width` channels, and p6.

        p2: deconvolve, norm, GELU, deconvolve       p4: as it is
        p3: deconvolve                               p5: max-pool

    by 2x2 windows at stride 2, each then through a 1x1 and a 3x3 convolution with a norm over channels (ChannelNorm)
    behind. A deconvolution halves the channels. in_channels: {"c4": C}. extra: "pool" adds p6 as FPN does; None: none.

    forward: {"c4": (B, C, h, w)} -> p2 (B, width, 4h, 4w), p3 (2h, 2w), p4 (h, w), p5 (h / 2, w / 2) and p6 (h / 4,
    w / 4), both rounded up. Of an image whose sides are no multiples of 16, the levels cover the padded image.
    """

    def __init__(self, in_channels: dict[str, int], *, width: int = 256, extra: str | None = "pool") -> None:
        super().__init__()
        if list(in_channels) != ["c4"] or extra not in ("pool", None):
            raise ValueError(f"maps {list(in_channels)} and extra {extra!r}: expected ['c4'], and 'pool' or None")
        c = in_channels["c4"]
        self.extra = extra
        self.resize = nn.ModuleDict(
            {
                "p2": nn.Sequential(
                    nn.ConvTranspose2d(c, c // 2, 2, stride=2),
                    ChannelNorm(c // 2, eps=NORM_EPSILON),
                    nn.GELU(),
                    nn.ConvTranspose2d(c // 2, c // 4, 2, stride=2),
                ),
                "p3": nn.ConvTranspose2d(c, c // 2, 2, stride=2),
                "p4": nn.Identity(),
                "p5": nn.MaxPool2d(2, stride=2, ceil_mode=True),
            }
        )
        resized = {"p2": c // 4, "p3": c // 2, "p4": c, "p5": c}
        self.output = nn.ModuleDict({level: pyramid_output(channels, width) for level, channels in resized.items()})
        self.channels = dict.fromkeys([*resized, *(["p6"] if extra else [])], width)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {level: self.output[level](resize(maps["c4"])) for level, resize in self.resize.items()}
        if self.extra:
            outputs["p6"] = outputs["p5"][:, :, ::2, ::2]  # (B, width, ceil(h / 4), ceil(w / 4))
        return outputs

    def level_strides(self, in_strides: dict[str, int]) -> dict[str, int]:
        """Of each level, in pixels, from that of the map that goes in."""
        stride = in_strides["c4"]
        return dict(zip(self.channels, (stride // 4, stride // 2, stride, 2 * stride, 4 * stride)))


def pyramid_output(c_in: int, width: int) -> nn.Sequential:
    """1x1 to `width` channels, norm, 3x3, norm."""
    layers = [
        nn.Conv2d(c_in, width, 1, bias=False),
        ChannelNorm(width, eps=NORM_EPSILON),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        ChannelNorm(width, eps=NORM_EPSILON),
    ]
    for convolution in layers[::2]:
        nn.init.kaiming_uniform_(convolution.weight, a=1)  # a = 1: a linear unit
    return nn.Sequential(*layers)
