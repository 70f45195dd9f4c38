"""ViT-Tiny/16 (Dosovitskiy et al., arXiv:2010.11929) as the backbone of a detector, and its pyramid.

    images ── patches 16x16 ── + positions ── 12 blocks ── norm ── c4 /16 ── simple feature pyramid ── p2, p3, p4, p5

The size is DeiT's (arXiv:2012.12877): 192 channels, 3 heads. Two released files with the same names fit. timm's
vit_tiny_patch16_224 ("augreg", arXiv:2106.10270) was trained on images normalised with mean 0.5 and std 0.5, as this
model is; deit_tiny_patch16_224 with ImageNet's mean and std. `adopt_normalization` converts weights of the second.

The pyramid is that of ViTDet (Li et al., arXiv:2203.16527, sec. 3): every level is made from the last map. Differs from
ViTDet: attention is global in every block (900 tokens at 480 px; windows are for larger images), positions are absolute
only, and c4 is taken after the final norm, with which classification was trained.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frcnn.fpn import Pyramid
from frcnn.norm import ChannelNorm
from frcnn.pretrained import Backbone, backbone_layouts, strip_wrapper
from layers.transformer import Block, PatchEmbedding, interpolate_positions, tokens_to_map

PATCH = 16  # pixels
PRETRAINED_GRID = 14  # patches per side at 224 px, the training size of the files
NORM_EPSILON = 1e-6


class Size(NamedTuple):
    """width: channels of a token. depth: number of blocks. heads: attention heads of a block."""

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
    """images (B, 3, H, W) -> tokens (B, 1 + h w, C), the class token first, plus their positions.

    h = ceil(H / 16), w = ceil(W / 16): the right and lower edges are padded with zeros, the mean color. The positions
    of the pretrained grid are resized to h x w (bicubic with antialiasing, as in timm).
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
    """Pixels -> patches, rounded up: the last patch of a row or column may lie partly outside the image."""
    return -(-height // PATCH), -(-width // PATCH)


class VisionTransformer(Backbone):
    """ViT without its classifier. size: "tiny".

    forward: images (B, 3, H, W) of any size -> {"c4": (B, 192, ceil(H / 16), ceil(W / 16))}.
    The five `stages` are the embedding, then a quarter of the blocks each; the last one includes the final norm.
    """

    mean = (0.5, 0.5, 0.5)  # mean and std of timm's file
    std = (0.5, 0.5, 0.5)

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
        """Convert weights trained on (image - mean) / std: they then compute the same from our normalisation.

            x' = (s x + m - m') / s',    w' = w s / s',    b' = b + sum w (m - m') / s'

        Here x is an image normalised with m = self.mean and s = self.std, and x' with m' = mean and s' = std, per color
        channel; the sum is over a patch. The patch embedding is linear and has no padding, so the result is exact,
        except in patches that TokenEmbedding pads with zeros.
        """
        project = self.embedding.patches.project
        assert project.bias is not None
        weight = project.weight.double()  # (C, 3, 16, 16)
        m, s, file_m, file_s = (weight.new_tensor(v)[:, None, None] for v in (self.mean, self.std, mean, std))
        project.bias.copy_(project.bias.double() + (weight * (m - file_m) / file_s).sum((1, 2, 3)))
        project.weight.copy_(weight * s / file_s)


class SimpleFeaturePyramid(Pyramid):
    """One map at stride 16 -> levels at strides 4, 8, 16, 32 of `width` channels, and p6.

        p2: deconvolve, norm, GELU, deconvolve       p4: identity
        p3: deconvolve                               p5: max-pool

    Windows are 2x2 at stride 2, and a deconvolution halves the channels. A 1x1 and a 3x3 convolution follow, each with
    a norm over channels (ChannelNorm). in_channels: {"c4": C}. p6 is every second pixel of p5.

    forward: {"c4": (B, C, h, w)} -> p2 (B, width, 4h, 4w), p3 (2h, 2w), p4 (h, w), p5 (h / 2, w / 2), p6 (h / 4,
    w / 4), the last two rounded up. If the sides of an image are not multiples of 16, the levels cover its padding.
    """

    def __init__(self, in_channels: dict[str, int], *, width: int = 256) -> None:
        super().__init__()
        if list(in_channels) != ["c4"]:
            raise ValueError(f"maps {list(in_channels)}: expected ['c4']")
        c = in_channels["c4"]
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
        self.channels = dict.fromkeys([*resized, "p6"], width)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {level: self.output[level](resize(maps["c4"])) for level, resize in self.resize.items()}
        outputs["p6"] = outputs["p5"][:, :, ::2, ::2]  # (B, width, ceil(h / 4), ceil(w / 4))
        return outputs

    def level_strides(self, in_strides: dict[str, int]) -> dict[str, int]:
        """The stride of each level in pixels, from the stride of the input map."""
        stride = in_strides["c4"]
        return dict(zip(self.channels, (stride // 4, stride // 2, stride, 2 * stride, 4 * stride)))


def pyramid_output(c_in: int, width: int) -> nn.Sequential:
    """1x1 to `width` channels, norm, 3x3, norm."""
    reduce = nn.Conv2d(c_in, width, 1, bias=False)
    smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
    for convolution in (reduce, smooth):
        nn.init.kaiming_uniform_(convolution.weight, a=1)  # a = 1: no activation follows
    norms = [ChannelNorm(width, eps=NORM_EPSILON) for _ in range(2)]
    return nn.Sequential(reduce, norms[0], smooth, norms[1])
