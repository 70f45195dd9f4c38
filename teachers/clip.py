"""CLIP, a foundation model used as a teacher: images and texts as vectors of one space (arXiv:2103.00020).

    images ── patches ── [class token | patch tokens] ── LayerNorm ── blocks ── class token ── LayerNorm ── W_image
    texts ── ids ── tokens ── blocks with a causal mask ── end token ── LayerNorm ── W_text

    logit_bk = exp(s) cos(image_b, class_k)        s learnt, about log 100

Sizes: the ViT-B/32 and ViT-B/16 that OpenAI released. CLIP teaches a detector in three ways: maps of any block,
`image_logits` (classes of the whole image) and `class_logits_at` (classes of given boxes).

Not implemented: the ResNet towers. Do not load OpenCLIP's LAION weights: their names fit, but they were trained with
plain GELU, and this model computes CLIP's approximation of it.

Differs from the released code in form, not in results: images are in [0, 1], at any size that is a multiple of the
patch, and are normalised here. The text tower drops the padding behind the longest text, which no token attends to.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.transformer import Block, PatchEmbedding, causal_mask, interpolate_positions, quick_gelu, tokens_to_map
from teachers.clip_prompts import BACKGROUND_TEXTS, TEMPLATES, class_embeddings
from teachers.clip_regions import average_over_boxes, crop_batches, enlarge_boxes
from teachers.clip_tokenizer import CONTEXT_LENGTH, ClipTokenizer
from weights import PublicLayout, fuse_entries

NATIVE_SIZE = 224  # pixels, the side of the square images that CLIP was trained on
VOCABULARY_SIZE = 49_408
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], over OpenAI's training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = 1e-5
TEXTS_PER_BATCH = 256


class Size(NamedTuple):
    """patch: side in pixels. depth: blocks of each tower, with one head per 64 channels. Widths are channels."""

    patch: int
    image_width: int
    text_width: int
    embedding_width: int
    depth: int


SIZES = {
    "vit_b32": Size(patch=32, image_width=768, text_width=512, embedding_width=512, depth=12),
    "vit_b16": Size(patch=16, image_width=768, text_width=512, embedding_width=512, depth=12),
}


def make_block(width: int) -> Block:
    return Block(width, width // 64, activation=quick_gelu, norm_eps=NORM_EPS)


class ImageTower(nn.Module):
    """Normalised images (B, 3, H, W) -> their vectors (B, D), and maps of the blocks."""

    def __init__(self, *, patch: int, width: int, depth: int, embedding_width: int) -> None:
        super().__init__()
        self.patch = patch
        self.patches = PatchEmbedding(width, patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.empty(1 + (NATIVE_SIZE // patch) ** 2, width))
        self.first_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(make_block(width) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.projection = nn.Parameter(torch.empty(width, embedding_width))  # W_image
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.projection, std=width**-0.5)

    def forward(self, images: Tensor, names: Collection[str]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The parts of CLIPOutput in `names`: image_embedding (B, D) or None, and maps.

        Blocks after the last one that `names` need are skipped.
        """
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        x = self.patches(images)  # (B, h w, C)
        x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)  # (B, 1 + h w, C)
        x = self.first_norm(x + interpolate_positions(self.positions[None], grid))
        maps = {}
        num_blocks = self._num_needed_blocks(names)
        for i, block in enumerate(self.blocks[:num_blocks]):
            if i == len(self.blocks) - 1 and "dense" in names:
                maps["dense"] = tokens_to_map(self._dense_tokens(cast(Block, block), x[:, 1:]), grid)
            x = block(x)
            if f"block{i}" in names:
                maps[f"block{i}"] = tokens_to_map(self.last_norm(x[:, 1:]), grid)
        if "patches" in names:
            maps["patches"] = tokens_to_map(self.last_norm(x[:, 1:]), grid)
        embedding = self.last_norm(x[:, 0]) @ self.projection if "image_embedding" in names else None  # (B, D)
        return embedding, maps

    def _num_needed_blocks(self, names: Collection[str]) -> int:
        if not {"image_embedding", "patches", "dense"}.isdisjoint(names):
            return len(self.blocks)
        return max((i + 1 for i in range(len(self.blocks)) if f"block{i}" in names), default=0)

    def _dense_tokens(self, last_block: Block, x: Tensor) -> Tensor:
        """Patch tokens before the last block (B, N, C) -> vectors in the space of the texts (B, N, D).

            z = x + W_o v(norm1(x)) + b_o,    out = LayerNorm(z + mlp(norm2(z))) W_image

        This is the last block with its attention replaced by the value path, as if each token attended to itself only
        (MaskCLIP, Zhou et al., "Extract Free Dense Labels from CLIP", arXiv:2112.01071). CLIP's loss trained the output
        of the class token, which is a mean of values, so values are aligned with the texts. The patches' outputs of the
        last block had no loss and are not aligned. The residual and the MLP of the block are kept here.
        """
        values = last_block.attention.qkv(last_block.norm1(x)).chunk(3, dim=-1)[2]  # (B, N, C)
        z = x + last_block.attention.out(values)
        return self.last_norm(z + last_block.mlp(last_block.norm2(z))) @ self.projection


class TextTower(nn.Module):
    """ids (T, 77) int64 from ClipTokenizer -> vectors (T, D), not normalised."""

    def __init__(self, *, width: int, depth: int, embedding_width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY_SIZE, width)
        self.positions = nn.Parameter(torch.empty(CONTEXT_LENGTH, width))
        self.blocks = nn.ModuleList(make_block(width) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.projection = nn.Parameter(torch.empty(width, embedding_width))  # W_text
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        end = ids.argmax(1)  # (T,): the end has the largest id of all; the first one counts
        length = int(end.max()) + 1 if len(ids) else 1
        x = self.tokens(ids[:, :length]) + self.positions[:length]  # (T, length, C)
        is_visible = causal_mask(length, ids.device)
        for block in self.blocks:
            x = block(x, is_visible)
        last = x[torch.arange(len(x), device=x.device), end]  # (T, C)
        return self.last_norm(last) @ self.projection


@dataclass(frozen=True)
class CLIPOutput:
    """The output of CLIP.forward for images (B, 3, H, W); h = H / patch, w = W / patch.

    features: maps (B, C, h, w). "block0", "block1", ...: the patch tokens after a block, through the tower's final
        LayerNorm; "patches": those of the last block. "dense" (B, D, h, w): the vector of each patch in the space of
        the texts, not normalised (ImageTower._dense_tokens).
    image_embedding (B, D): the output of the tower, not normalised.
    image_logits (B, K): exp(s) cos(image, class), in float32; None before CLIP.set_classes.
    images: the input, for crops. image_size: (H, W).
    Parts that CLIP.requested_outputs does not name may be missing from features, or None.
    """

    features: dict[str, Tensor]
    image_embedding: Tensor | None
    image_logits: Tensor | None
    images: Tensor
    image_size: tuple[int, int]


class CLIP(nn.Module):
    """images (B, 3, H, W) in [0, 1], H and W multiples of the patch -> CLIPOutput; texts -> vectors of the same space.

    Trained on 224 x 224 pixels; for other sizes the position table is resized to the grid of patches (bicubic).

    region_mode is how class_logits_at computes the vector of a box:
        "crop"  The box, enlarged by `context`, is cut from the image, resized to 224 x 224 and passed through the image
                tower: one forward pass per box, `crops_per_batch` at a time. CLIP was trained for this.
        "pool"  The mean over the box of the unit vectors of "dense": one pass for all boxes, as coarse as the patches.

    requested_outputs: the names of features, "image_embedding" and "image_logits" that the caller needs, or None for
    all, which keeps the map of every block in memory.
    """

    mean: Tensor
    std: Tensor
    classes: Tensor
    background: Tensor

    def __init__(
        self,
        *,
        patch: int,
        image_width: int,
        text_width: int,
        embedding_width: int,
        depth: int,
        region_mode: Literal["crop", "pool"] = "crop",
        context: float = 1.2,
        crops_per_batch: int = 32,
    ) -> None:
        super().__init__()
        if region_mode not in ("crop", "pool"):
            raise ValueError(f"region_mode {region_mode!r} must be crop or pool")
        self.image_tower = ImageTower(patch=patch, width=image_width, depth=depth, embedding_width=embedding_width)
        self.text_tower = TextTower(width=text_width, depth=depth, embedding_width=embedding_width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # s, its start in CLIP's training
        self.region_mode, self.context, self.crops_per_batch = region_mode, context, crops_per_batch
        self.class_names: tuple[str, ...] = ()
        for name, value in (
            ("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1)),
            ("std", torch.tensor(CLIP_STD).view(3, 1, 1)),
            ("classes", torch.zeros(0, embedding_width)),
            ("background", torch.zeros(0, embedding_width)),
        ):
            self.register_buffer(name, value, persistent=False)

        names = (*(f"block{i}" for i in range(depth)), "patches", "dense")
        self.strides = dict.fromkeys(names, patch)
        self.channels = dict.fromkeys(names, image_width) | {"dense": embedding_width}
        self.size_multiple = patch
        self.class_head = ()
        self.class_activation: Literal["softmax"] = "softmax"
        self.public_layouts = (
            PublicLayout("OpenAI", OPENAI_NAMES, convert=drop_sizes),
            PublicLayout("Hugging Face", HUGGING_FACE_NAMES, convert=join_and_transpose),
        )
        self.public_names = self.public_layouts[0].table
        self.requested_outputs: frozenset[str] | None = None

    @property
    def num_classes(self) -> int:
        """K; 0 before set_classes."""
        return len(self.class_names)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], tokenizer: ClipTokenizer) -> Tensor:
        """T texts -> (T, D), not normalised. A text too long for CLIP is a UserError (ClipTokenizer)."""
        ids = tokenizer(texts).to(self.logit_scale.device)
        return torch.cat([self.text_tower(part) for part in ids.split(TEXTS_PER_BATCH)])

    def set_classes(
        self,
        names: Sequence[str],
        tokenizer: ClipTokenizer,
        *,
        templates: Sequence[str] = TEMPLATES,
        background: Sequence[str] = BACKGROUND_TEXTS,
    ) -> None:
        """Set the K classes, with the prompts of teachers.clip_prompts, and the texts that describe the background.

        Names that cannot be prompted for are a UserError (readable_names), and nothing changes.
        """
        classes = class_embeddings(lambda texts: self.encode_texts(texts, tokenizer), names, templates)
        self.set_class_embeddings(names, classes, self.encode_texts(background, tokenizer))

    def set_class_embeddings(self, names: Sequence[str], classes: Tensor, background: Tensor) -> None:
        """set_classes from vectors: `classes` (K, D) and `background` (J, D), J >= 1, of any length."""
        shape = (len(names), self.background.shape[1])
        if tuple(classes.shape) != shape or background.shape[1:] != shape[1:] or not len(background):
            raise ValueError(
                f"classes {tuple(classes.shape)} and background {tuple(background.shape)} must be {shape} "
                f"and (J, {shape[1]}), J at least 1"
            )
        self.class_names = tuple(names)
        self.classes = F.normalize(classes.detach().float(), dim=-1).to(self.mean.device)
        self.background = F.normalize(background.detach().float(), dim=-1).to(self.mean.device)

    def forward(self, images: Tensor) -> CLIPOutput:
        """images (B, 3, H, W) in [0, 1]; H and W multiples of the patch, else ValueError."""
        names = {*self.strides, "image_embedding"} if self.requested_outputs is None else set(self.requested_outputs)
        has_logits = bool(self.class_names) and (self.requested_outputs is None or "image_logits" in names)
        if has_logits:
            names.add("image_embedding")
        embedding, features = self.image_tower((images - self.mean) / self.std, names)
        logits = self._scaled_cosines(embedding, self.classes) if has_logits else None
        return CLIPOutput(features, embedding, logits, images, (images.shape[-2], images.shape[-1]))

    def _scaled_cosines(self, embedding: Tensor, directions: Tensor) -> Tensor:
        """exp(s) cos: (N, D), unit vectors (K, D) -> (N, K), in float32 also under autocast."""
        with torch.autocast(embedding.device.type, enabled=False):
            return self.logit_scale.float().exp() * F.normalize(embedding.float(), dim=-1) @ directions.float().T

    def class_logits_at(self, output: CLIPOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """B tensors (N_b, 4) of xyxy pixels -> (sum N_b, 1 + K) for a softmax, background first.

            z_n0 = log sum_j exp(e^s cos(r_n, background_j)),    z_nk = e^s cos(r_n, class_k)

        r_n is the vector of the box (region_mode). A zero-shot softmax over classes has no background, so the J
        background texts are added to the K classes. Column 0 is their union: its probability is the sum of theirs. CLIP
        was not trained for this; a few texts may not cover everything that is not an object. Boxes are clipped to the
        image, and a side below one pixel becomes one pixel. ValueError before set_classes.
        """
        if not self.class_names:
            raise ValueError("CLIP has no classes: call set_classes first")
        if len(boxes_per_image) != len(output.images):
            raise ValueError(f"boxes of {len(boxes_per_image)} images, expected {len(output.images)}")
        describe = self._crop_vectors if self.region_mode == "crop" else self._pool_vectors
        vectors = describe(output, boxes_per_image)  # (N, D)
        classes = self._scaled_cosines(vectors, self.classes)  # (N, K)
        background = self._scaled_cosines(vectors, self.background).logsumexp(1, keepdim=True)  # (N, 1)
        return torch.cat((background, classes), dim=1)

    def _pool_vectors(self, output: CLIPOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """(N, D): the mean over each box of the unit vectors of the patches."""
        if "dense" not in output.features:
            raise ValueError(
                f"the map 'dense' was left out: requested_outputs is {sorted(self.requested_outputs or ())}, without it"
            )
        vectors = [self.background[:0]]  # (0, D)
        with torch.autocast(output.images.device.type, enabled=False):
            for dense, boxes in zip(F.normalize(output.features["dense"].float(), dim=1), boxes_per_image):
                boxes = enlarge_boxes(boxes.to(dense), output.image_size)
                vectors.append(average_over_boxes(dense, boxes, self.size_multiple))
        return torch.cat(vectors)

    @torch.no_grad()
    def _crop_vectors(self, output: CLIPOutput, boxes_per_image: list[Tensor]) -> Tensor:
        """(N, D): the image tower's vector of each box with its context. No gradient flows."""
        images = output.images.float()
        boxes = [enlarge_boxes(rows.to(images), output.image_size, self.context) for rows in boxes_per_image]
        vectors = [self.background[:0]]  # (0, D)
        for crops in crop_batches(images, boxes, NATIVE_SIZE, self.crops_per_batch):
            vectors.append(self.image_tower((crops - self.mean) / self.std, {"image_embedding"})[0])
        return torch.cat(vectors)


# fmt: off
OPENAI_NAMES = [  # each {} is one integer
    # released checkpoint                               ours
    ("visual.class_embedding",                          "image_tower.class_token"),
    ("visual.positional_embedding",                     "image_tower.positions"),
    ("visual.conv1.",                                   "image_tower.patches.project."),
    ("visual.ln_pre.",                                  "image_tower.first_norm."),
    ("visual.transformer.resblocks.{}.ln_1.",           "image_tower.blocks.{}.norm1."),
    ("visual.transformer.resblocks.{}.attn.in_proj_",   "image_tower.blocks.{}.attention.qkv."),
    ("visual.transformer.resblocks.{}.attn.out_proj.",  "image_tower.blocks.{}.attention.out."),
    ("visual.transformer.resblocks.{}.ln_2.",           "image_tower.blocks.{}.norm2."),
    ("visual.transformer.resblocks.{}.mlp.c_fc.",       "image_tower.blocks.{}.mlp.expand."),
    ("visual.transformer.resblocks.{}.mlp.c_proj.",     "image_tower.blocks.{}.mlp.contract."),
    ("visual.ln_post.",                                 "image_tower.last_norm."),
    ("visual.proj",                                     "image_tower.projection"),
    ("token_embedding.",                                "text_tower.tokens."),
    ("positional_embedding",                            "text_tower.positions"),
    ("transformer.resblocks.{}.ln_1.",                  "text_tower.blocks.{}.norm1."),
    ("transformer.resblocks.{}.attn.in_proj_",          "text_tower.blocks.{}.attention.qkv."),
    ("transformer.resblocks.{}.attn.out_proj.",         "text_tower.blocks.{}.attention.out."),
    ("transformer.resblocks.{}.ln_2.",                  "text_tower.blocks.{}.norm2."),
    ("transformer.resblocks.{}.mlp.c_fc.",              "text_tower.blocks.{}.mlp.expand."),
    ("transformer.resblocks.{}.mlp.c_proj.",            "text_tower.blocks.{}.mlp.contract."),
    ("ln_final.",                                       "text_tower.last_norm."),
    ("text_projection",                                 "text_tower.projection"),
    ("logit_scale",                                     "logit_scale"),
]
HUGGING_FACE_NAMES = [
    # released checkpoint, after join_and_transpose        ours
    ("vision_model.embeddings.class_embedding",            "image_tower.class_token"),
    ("vision_model.embeddings.position_embedding.weight",  "image_tower.positions"),
    ("vision_model.embeddings.patch_embedding.",           "image_tower.patches.project."),
    ("vision_model.pre_layrnorm.",                         "image_tower.first_norm."),
    ("vision_model.encoder.layers.{}.layer_norm1.",        "image_tower.blocks.{}.norm1."),
    ("vision_model.encoder.layers.{}.self_attn.qkv.",      "image_tower.blocks.{}.attention.qkv."),
    ("vision_model.encoder.layers.{}.self_attn.out_proj.", "image_tower.blocks.{}.attention.out."),
    ("vision_model.encoder.layers.{}.layer_norm2.",        "image_tower.blocks.{}.norm2."),
    ("vision_model.encoder.layers.{}.mlp.fc1.",            "image_tower.blocks.{}.mlp.expand."),
    ("vision_model.encoder.layers.{}.mlp.fc2.",            "image_tower.blocks.{}.mlp.contract."),
    ("vision_model.post_layernorm.",                       "image_tower.last_norm."),
    ("visual_projection.weight",                           "image_tower.projection"),
    ("text_model.embeddings.token_embedding.",             "text_tower.tokens."),
    ("text_model.embeddings.position_embedding.weight",    "text_tower.positions"),
    ("text_model.encoder.layers.{}.layer_norm1.",          "text_tower.blocks.{}.norm1."),
    ("text_model.encoder.layers.{}.self_attn.qkv.",        "text_tower.blocks.{}.attention.qkv."),
    ("text_model.encoder.layers.{}.self_attn.out_proj.",   "text_tower.blocks.{}.attention.out."),
    ("text_model.encoder.layers.{}.layer_norm2.",          "text_tower.blocks.{}.norm2."),
    ("text_model.encoder.layers.{}.mlp.fc1.",              "text_tower.blocks.{}.mlp.expand."),
    ("text_model.encoder.layers.{}.mlp.fc2.",              "text_tower.blocks.{}.mlp.contract."),
    ("text_model.final_layer_norm.",                       "text_tower.last_norm."),
    ("text_projection.weight",                             "text_tower.projection"),
    ("logit_scale",                                        "logit_scale"),
]
# fmt: on


def drop_sizes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the three sizes that OpenAI's archives hold beside the weights; the shapes give them too."""
    sizes = ("input_resolution", "context_length", "vocab_size")
    return {name: value for name, value in state.items() if name not in sizes}


def join_and_transpose(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join Hugging Face's separate q, k and v, transpose both projections, and drop the position ids of old files."""
    state = {name: value for name, value in state.items() if not name.endswith(".position_ids")}
    state = fuse_entries(state, (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."), ".self_attn.qkv.")
    for name in ("visual_projection.weight", "text_projection.weight"):
        if name not in state:
            raise KeyError(f"no entry {name!r}")
        state[name] = state[name].T
    return state


def build_clip(name: str, **settings) -> CLIP:
    """A freshly initialised CLIP; name is a key of SIZES, settings are keywords of CLIP such as region_mode.

    Draws from torch's global generator. Released weights: weights.load_public.
    """
    return CLIP(**SIZES[name]._asdict(), **settings)
