"""MobileNetV3-Small and -Large (Howard et al., arXiv:1905.02244) as the backbone of a detector.

    images (B, 3, H, W) ── stem /2 ── inverted residual blocks ── last 1x1 convolution ── c5 /32
                                        │ c2 /4, c3 /8, c4 /16: after the last block of each stride
                                        │ c5_first /32: after the first block of stride 32

torchvision's fasterrcnn_mobilenet_v3_* build their pyramid on `c5_first` and `c5`. SIZES are tables 1 and 2 of the
paper, with one difference that the released weights have: the last convolution of Small has no squeeze. A squeeze
reduces to a quarter of the expanded channels, rounded to a multiple of 8.

h_swish(x) = x * relu6(x + 3) / 6, h_sigmoid(x) = relu6(x + 3) / 6. The input is normalised with `mean` and `std`.
Released files: frcnn/pretrained.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from frcnn.norm import ConvNorm
from frcnn.pretrained import IMAGENET_NORMALIZATION, Backbone, backbone_layouts, read_classifier_file

FILE_EPSILON = 1e-3  # of the BatchNorms in the released ImageNet files
STEM_CHANNELS = 16


class Bneck(NamedTuple):
    """A row of the paper's tables: kernel size, expanded and output channels, squeeze, activation, stride."""

    kernel: int
    expanded: int
    c_out: int
    has_squeeze: bool
    activation: Callable[[Tensor], Tensor]
    stride: int


class Size(NamedTuple):
    """blocks: the rows of the table. last: channels of c5. hidden: width of the classifier's hidden layer."""

    blocks: tuple[Bneck, ...]
    last: int
    hidden: int


RE, HS = F.relu, F.hardswish
# fmt: off
SIZES = {
    "small": Size(
        blocks=(
            Bneck(3, 16, 16, True, RE, 2),
            Bneck(3, 72, 24, False, RE, 2),
            Bneck(3, 88, 24, False, RE, 1),
            Bneck(5, 96, 40, True, HS, 2),
            Bneck(5, 240, 40, True, HS, 1),
            Bneck(5, 240, 40, True, HS, 1),
            Bneck(5, 120, 48, True, HS, 1),
            Bneck(5, 144, 48, True, HS, 1),
            Bneck(5, 288, 96, True, HS, 2),
            Bneck(5, 576, 96, True, HS, 1),
            Bneck(5, 576, 96, True, HS, 1),
        ),
        last=576, hidden=1024,
    ),
    "large": Size(
        blocks=(
            Bneck(3, 16, 16, False, RE, 1),
            Bneck(3, 64, 24, False, RE, 2),
            Bneck(3, 72, 24, False, RE, 1),
            Bneck(5, 72, 40, True, RE, 2),
            Bneck(5, 120, 40, True, RE, 1),
            Bneck(5, 120, 40, True, RE, 1),
            Bneck(3, 240, 80, False, HS, 2),
            Bneck(3, 200, 80, False, HS, 1),
            Bneck(3, 184, 80, False, HS, 1),
            Bneck(3, 184, 80, False, HS, 1),
            Bneck(3, 480, 112, True, HS, 1),
            Bneck(3, 672, 112, True, HS, 1),
            Bneck(5, 672, 160, True, HS, 2),
            Bneck(5, 960, 160, True, HS, 1),
            Bneck(5, 960, 160, True, HS, 1),
        ),
        last=960, hidden=1280,
    ),
}
# fmt: on


def round_to_eight(channels: float) -> int:
    """The nearest multiple of 8, at least 8; the next one above if rounding down would remove more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class SqueezeExcite(nn.Module):
    """x * h_sigmoid(expand(relu(reduce(mean_hw x)))): a factor per channel (arXiv:1709.01507). Keeps (B, C, H, W)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 1)  # (B, C, 1, 1)
        # F.hardsigmoid cannot be differentiated twice.
        return x * (F.relu6(self.expand(F.relu(self.reduce(mean))) + 3) / 6)


class InvertedResidual(nn.Module):
    """1x1 to `expanded` channels, depthwise, squeeze, 1x1 without activation; plus the identity if the shape is kept.

    (B, C_in, H, W) -> (B, c_out, ceil(H / stride), ceil(W / stride)). Without expansion there is no first 1x1.
    """

    def __init__(self, c_in: int, row: Bneck) -> None:
        super().__init__()
        width = row.expanded
        self.activation = row.activation
        self.is_residual = row.stride == 1 and c_in == row.c_out
        self.expand = ConvNorm(c_in, width, 1) if width != c_in else None
        self.depthwise = ConvNorm(width, width, row.kernel, row.stride, groups=width)
        self.squeeze = SqueezeExcite(width, round_to_eight(width / 4)) if row.has_squeeze else None
        self.project = ConvNorm(width, row.c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.activation(self.depthwise(y))
        y = self.project(y if self.squeeze is None else self.squeeze(y))
        return x + y if self.is_residual else y


class MobileNetV3(Backbone):
    """MobileNetV3 without its classifier. size: "small" or "large".

    forward: images (B, 3, H, W) -> {"c2", "c3", "c4", "c5_first", "c5"}, (B, channels[name], ceil(H / s), ceil(W / s)).
    The released ImageNet files have an epsilon of 1e-3 (norm.py), torchvision's detectors 1e-5. The six `stages` begin
    at the stem, at each strided block and at the last convolution.
    """

    mean, std = IMAGENET_NORMALIZATION

    def __init__(self, size: str) -> None:
        super().__init__()
        rows, last, self.hidden = SIZES[size]
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2)
        c_in, stride = STEM_CHANNELS, 2
        self.blocks = nn.ModuleList()
        taps: dict[str, int] = {}  # map -> index of its block
        for index, row in enumerate(rows):
            self.blocks.append(InvertedResidual(c_in, row))
            c_in, stride = row.c_out, stride * row.stride
            if stride == 32:
                taps.setdefault("c5_first", index)
            elif stride >= 4:
                taps[f"c{stride.bit_length() - 1}"] = index
        self.last = ConvNorm(c_in, last, 1)
        self.taps = {index: name for name, index in taps.items()}
        self.first_blocks = [index for index, row in enumerate(rows) if row.stride == 2]
        self.strides = {"c2": 4, "c3": 8, "c4": 16, "c5_first": 32, "c5": 32}
        self.channels = {name: rows[index].c_out for name, index in taps.items()} | {"c5": last}
        self.head_names = [("classifier.0.", "0."), ("classifier.3.", "2.")]
        self.public_names = mobilenet_names(rows)
        convert = partial(read_classifier_file, file_epsilon=FILE_EPSILON)
        self.public_layouts = backbone_layouts(self.public_names, self.head_names, convert)

    @property
    def stages(self) -> list[list[nn.Module]]:
        blocks = list(self.blocks)
        bounds = [*self.first_blocks, len(blocks)]
        middle = [blocks[start:end] for start, end in pairwise(bounds)]
        return [[self.stem, *blocks[: bounds[0]]], *middle, [self.last]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.hardswish(self.stem(images))
        maps = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                maps[self.taps[index]] = x
        maps["c5"] = F.hardswish(self.last(x))
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        return self(images)["c5"].mean((2, 3))  # (B, C)

    def make_head(self, num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.channels["c5"], self.hidden), nn.Hardswish(), nn.Linear(self.hidden, num_classes)
        )


def mobilenet_names(rows: Sequence[Bneck]) -> list[tuple[str, str]]:
    """Rows (torchvision's name, our name) of the backbone, without the classifier `classifier.`.

    torchvision counts all layers in one list, `features`, and in `block` only those layers that a block has.
    """
    names = [("features.0.0.", "stem.conv."), ("features.0.1.", "stem.norm.")]
    c_in = STEM_CHANNELS
    for index, row in enumerate(rows):
        parts = ["expand"] if row.expanded != c_in else []
        parts += ["depthwise", "squeeze", "project"] if row.has_squeeze else ["depthwise", "project"]
        for k, part in enumerate(parts):
            theirs, ours = f"features.{index + 1}.block.{k}", f"blocks.{index}.{part}"
            if part == "squeeze":
                names += [(f"{theirs}.fc1.", f"{ours}.reduce."), (f"{theirs}.fc2.", f"{ours}.expand.")]
            else:
                names += [(f"{theirs}.0.", f"{ours}.conv."), (f"{theirs}.1.", f"{ours}.norm.")]
        c_in = row.c_out
    n = len(rows) + 1
    return [*names, (f"features.{n}.0.", "last.conv."), (f"features.{n}.1.", "last.norm.")]
