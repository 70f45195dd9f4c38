"""DINOv2, a foundation model used as a teacher (arXiv:2304.07193), also with register tokens (arXiv:2309.16588).

    images ── patches of 14 x 14 ── [class token | registers | patch tokens] ── pre-norm blocks ── LayerNorm ── output

A ViT (arXiv:2010.11929) with layer scale, trained by self-distillation without labels. A detector's features can learn
from its patch tokens, as maps. Sizes: S, B and L. Not implemented: the giant size, which has a gated MLP.

Differs from the released code in form, not in results: the mask token, which only training uses, is dropped; images are
in [0, 1] and are normalised here.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from layers.transformer import Block, PatchEmbedding, interpolate_positions, tokens_to_map
from weights import PublicLayout, fuse_entries

PATCH = 14  # pixels, the side of a patch
TABLE_SIDE = 37  # patches: the position table was learnt on 518 x 518 pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]


class Size(NamedTuple):
    """width: channels of a token. depth: number of blocks. heads: attention heads of a block."""

    width: int
    depth: int
    heads: int


SIZES = {
    "vits14": Size(width=384, depth=12, heads=6),
    "vitb14": Size(width=768, depth=12, heads=12),
    "vitl14": Size(width=1024, depth=24, heads=16),
}
NUM_REGISTERS = 4  # in the models whose names end in _reg


@dataclass(frozen=True)
class DINOv2Output:
    """The output of DINOv2.forward for images (B, 3, H, W); h = H / 14, w = W / 14.

    features: maps (B, C, h, w). "block0", "block1", ...: the patch tokens after each block, through the final
        LayerNorm, as the released model returns intermediate layers; "patches": those of the last block.
    class_token (B, C): after the final LayerNorm.
    class_attention (B, heads, h, w): the attention of the class token to the patches in the last block. The rest of its
        attention, up to a sum of 1, is on itself and the registers.
    image_size: (H, W).
    Parts that DINOv2.requested_outputs does not name may be missing from features, or None.
    """

    features: dict[str, Tensor]
    class_token: Tensor | None
    class_attention: Tensor | None
    image_size: tuple[int, int]


class DINOv2(nn.Module):
    """images (B, 3, H, W) in [0, 1], H and W multiples of 14 -> DINOv2Output, at any size.

    The position table is resized to the grid of patches (bicubic) as each model was published: without registers with
    a sampling offset of 0.1 patches, with registers without offset and antialiased. Hugging Face's code drops the
    offset, so its maps differ slightly from the released model's at sizes other than 518 x 518.

    requested_outputs: the names of features, "class_token" and "class_attention" that the caller needs, or None for
    all, which keeps the map of every block in memory. Blocks after the last requested one are skipped.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, width: int, depth: int, heads: int, num_registers: int = 0, table_side: int = TABLE_SIDE
    ) -> None:
        super().__init__()
        self.patches = PatchEmbedding(width, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + table_side**2, width))
        self.registers = nn.Parameter(torch.zeros(1, num_registers, width)) if num_registers else None
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.positions, std=0.02)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

        names = (*(f"block{i}" for i in range(depth)), "patches")
        self.strides = dict.fromkeys(names, PATCH)
        self.channels = dict.fromkeys(names, width)
        self.size_multiple = PATCH
        self.class_head = ()
        self.public_layouts = (
            PublicLayout("facebookresearch", _with_registers(FACEBOOK_NAMES, "register_tokens", num_registers)),
            PublicLayout(
                "Hugging Face",
                _with_registers(HUGGING_FACE_NAMES, "embeddings.register_tokens", num_registers),
                convert=fuse_query_key_value,
            ),
        )
        self.public_names = self.public_layouts[0].table
        self.requested_outputs: frozenset[str] | None = None

    def _is_requested(self, name: str) -> bool:
        return self.requested_outputs is None or name in self.requested_outputs

    def _num_needed_blocks(self) -> int:
        """The number of blocks that have to run."""
        if any(self._is_requested(name) for name in ("patches", "class_token", "class_attention")):
            return len(self.blocks)
        return max((i + 1 for i in range(len(self.blocks)) if self._is_requested(f"block{i}")), default=0)

    def _embed(self, images: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
        """images (B, 3, H, W) -> the first block's input (B, N, C), and the row of its first patch token."""
        x = self.patches((images - self.mean) / self.std)  # (B, h w, C)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1)  # (B, 1 + h w, C)
        if self.registers is None:
            return x + interpolate_positions(self.positions, grid, offset=0.1), 1
        x = x + interpolate_positions(self.positions, grid, antialias=True)
        registers = self.registers.expand(len(x), -1, -1)  # they have no position
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1), 1 + registers.shape[1]  # (B, 1 + R + h w, C)

    def forward(self, images: Tensor) -> DINOv2Output:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of 14, else ValueError."""
        height, width = images.shape[-2:]
        grid = (height // PATCH, width // PATCH)
        x, first = self._embed(images, grid)  # (B, N, C); tokens[:, first:] are patches
        features, attention = {}, None
        num_blocks = self._num_needed_blocks()
        for i, block in enumerate(self.blocks[:num_blocks]):
            if i == len(self.blocks) - 1 and self._is_requested("class_attention"):
                last_block = cast(Block, block)
                attention = last_block.attention.probabilities_of(last_block.norm1(x), token=0)  # (B, heads, N)
                attention = attention[:, :, first:].unflatten(2, grid)
            x = block(x)
            if self._is_requested(f"block{i}"):
                features[f"block{i}"] = tokens_to_map(self.norm(x[:, first:]), grid)
        if num_blocks < len(self.blocks):
            return DINOv2Output(features, None, None, (height, width))
        x = self.norm(x)  # (B, 1 + R + h w, C)
        if self._is_requested("patches"):
            features["patches"] = tokens_to_map(x[:, first:], grid)
        return DINOv2Output(features, x[:, 0], attention, (height, width))


def _with_registers(table: list[tuple[str, str | None]], name: str, num_registers: int) -> list[tuple[str, str | None]]:
    return [*table, (name, "registers")] if num_registers else table


# fmt: off
FACEBOOK_NAMES = [  # each {} is one integer
    # released checkpoint         ours
    ("cls_token",                 "class_token"),
    ("pos_embed",                 "positions"),
    ("mask_token",                None),  # only the training of DINOv2 used it
    ("patch_embed.proj.",         "patches.project."),
    ("blocks.{}.norm1.",          "blocks.{}.norm1."),
    ("blocks.{}.attn.qkv.",       "blocks.{}.attention.qkv."),
    ("blocks.{}.attn.proj.",      "blocks.{}.attention.out."),
    ("blocks.{}.ls1.gamma",       "blocks.{}.attention_scale"),
    ("blocks.{}.norm2.",          "blocks.{}.norm2."),
    ("blocks.{}.mlp.fc1.",        "blocks.{}.mlp.expand."),
    ("blocks.{}.mlp.fc2.",        "blocks.{}.mlp.contract."),
    ("blocks.{}.ls2.gamma",       "blocks.{}.mlp_scale"),
    ("norm.",                     "norm."),
]
HUGGING_FACE_NAMES = [
    # released checkpoint, after fuse_query_key_value     ours
    ("embeddings.cls_token",                              "class_token"),
    ("embeddings.position_embeddings",                    "positions"),
    ("embeddings.mask_token",                             None),
    ("embeddings.patch_embeddings.projection.",           "patches.project."),
    ("encoder.layer.{}.norm1.",                           "blocks.{}.norm1."),
    ("encoder.layer.{}.attention.attention.qkv.",         "blocks.{}.attention.qkv."),
    ("encoder.layer.{}.attention.output.dense.",          "blocks.{}.attention.out."),
    ("encoder.layer.{}.layer_scale1.lambda1",             "blocks.{}.attention_scale"),
    ("encoder.layer.{}.norm2.",                           "blocks.{}.norm2."),
    ("encoder.layer.{}.mlp.fc1.",                         "blocks.{}.mlp.expand."),
    ("encoder.layer.{}.mlp.fc2.",                         "blocks.{}.mlp.contract."),
    ("encoder.layer.{}.layer_scale2.lambda1",             "blocks.{}.mlp_scale"),
    ("layernorm.",                                        "norm."),
]
# fmt: on


def fuse_query_key_value(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join Hugging Face's separate q, k and v: `...attention.query.weight` and so on -> `...attention.qkv.weight`."""
    return fuse_entries(state, (".attention.query.", ".attention.key.", ".attention.value."), ".attention.qkv.")


def build_dinov2(name: str) -> DINOv2:
    """A freshly initialised DINOv2; name is a key of SIZES, with the suffix "_reg" for 4 register tokens.

    Draws from torch's global generator. Released weights: weights.load_public.
    """
    size = name.removesuffix("_reg")
    return DINOv2(**SIZES[size]._asdict(), num_registers=NUM_REGISTERS if name != size else 0)


@torch.no_grad()
def patch_pca(features: Tensor) -> Tensor:
    """A map as colors: its first three principal components over the whole batch, as red, green and blue.

    With rows x_n in R^C, n = 1..B h w, and u_j the unit eigenvectors of cov(x), largest eigenvalue first:

        y_nj = (x_n - mean(x)) . u_j,    out_nj = (y_nj - min_n y_nj) / (max_n y_nj - min_n y_nj)

    The sign of an eigenvector is chosen so that its entry of largest magnitude is positive. A component without
    variance (below 1e-9 of the first one's; C < 3; a constant map) is 0 everywhere.

    features (B, C, h, w) -> (B, 3, h, w) float32 in [0, 1]. B = 0 gives (0, 3, h, w).
    """
    batch, channels, height, width = features.shape
    out = torch.zeros(batch * height * width, 3, dtype=torch.float32, device=features.device)
    if len(out) == 0:
        return out.view(batch, 3, height, width)
    rows = features.double().permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
    rows = rows - rows.mean(0)
    variances, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending; the columns are the eigenvectors
    for j in range(min(3, channels)):
        variance, vector = variances[-1 - j], vectors[:, -1 - j]
        if variance <= 1e-9 * variances[-1] or variances[-1] <= 0:
            break
        component = rows @ (vector * vector[vector.abs().argmax()].sign())  # (N,)
        low, high = component.aminmax()
        out[:, j] = ((component - low) / (high - low)).float()
    return out.view(batch, height, width, 3).permute(0, 3, 1, 2)
