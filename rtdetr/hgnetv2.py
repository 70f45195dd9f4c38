"""HGNetV2 L and X, the backbones of RT-DETR-L and -X (arXiv:2304.08069). It has no paper of its own; the architecture
is the released one.

    images ── stem (stride 4) ── stage 1 ── stage 2 (stride 8: c3) ── stage 3 (16: c4) ── stage 4 (32: c5)

A block is one-shot aggregation (VoVNet, arXiv:1904.09730): layers in a row, and 1x1 convolutions that join all of their
outputs. From stage 3 on a layer is light: a 1x1 convolution and a depthwise 5x5 one.

Not implemented: the learnable affine block of the smaller sizes, and the classifier.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtdetr.conv_bn import ConvBN

LAYERS_PER_BLOCK = 6


class StageSize(NamedTuple):
    """width: channels of a layer. c_out: channels of a block. light: whether the layers are LightConv."""

    width: int
    c_out: int
    kernel: int
    light: bool
    num_blocks: int


class Size(NamedTuple):
    """stem_width, stem_out: channels within the stem and of its output."""

    stem_width: int
    stem_out: int
    stages: tuple[StageSize, StageSize, StageSize, StageSize]


# fmt: off
SIZES = {
    "l": Size(32, 48, (
        StageSize(48, 128, 3, False, 1),
        StageSize(96, 512, 3, False, 1),
        StageSize(192, 1024, 5, True, 3),
        StageSize(384, 2048, 5, True, 1),
    )),
    "x": Size(32, 64, (
        StageSize(64, 128, 3, False, 1),
        StageSize(128, 512, 3, False, 2),
        StageSize(256, 1024, 5, True, 5),
        StageSize(512, 2048, 5, True, 2),
    )),
}
# fmt: on


class Stem(nn.Module):
    """images (B, 3, H, W) -> (B, C_out, H / 4, W / 4): two 2x2 convolutions beside a maximum over 2x2.

    Zero padding on the right and below keeps H and W under the 2x2 windows.
    """

    def __init__(self, width: int, c_out: int) -> None:
        super().__init__()
        self.enter = ConvBN(3, width, 3, stride=2, activation=F.relu)
        self.narrow = ConvBN(width, width // 2, 2, activation=F.relu)
        self.widen = ConvBN(width // 2, width, 2, activation=F.relu)
        self.down = ConvBN(2 * width, width, 3, stride=2, activation=F.relu)
        self.leave = ConvBN(width, c_out, activation=F.relu)

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(self.enter(images), (0, 1, 0, 1))  # (B, C, H / 2 + 1, W / 2 + 1)
        convolved = self.widen(F.pad(self.narrow(x), (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)
        pooled = F.max_pool2d(x, 2, stride=1)  # (B, C, H / 2, W / 2)
        return self.leave(self.down(torch.cat((pooled, convolved), 1)))


class LightConv(nn.Module):
    """A 1x1 convolution mixes channels, then a depthwise one mixes pixels."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.pointwise = ConvBN(c_in, c_out)
        self.depthwise = ConvBN(c_out, c_out, kernel, groups=c_out, activation=F.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.pointwise(x))


class Block(nn.Module):
    """Concatenate x and the outputs of six layers in a row, squeeze them to C_out / 2 and widen them to C_out.

    If C_in = C_out, x is added to the result.
    """

    def __init__(self, c_in: int, width: int, c_out: int, kernel: int, light: bool) -> None:
        super().__init__()
        inputs = [c_in] + [width] * (LAYERS_PER_BLOCK - 1)
        self.layers = nn.ModuleList(
            LightConv(c, width, kernel) if light else ConvBN(c, width, kernel, activation=F.relu) for c in inputs
        )
        self.squeeze = ConvBN(c_in + LAYERS_PER_BLOCK * width, c_out // 2, activation=F.relu)
        self.widen = ConvBN(c_out // 2, c_out, activation=F.relu)
        self.has_shortcut = c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts[-1]))
        y = self.widen(self.squeeze(torch.cat(parts, 1)))
        return x + y if self.has_shortcut else y


class Stage(nn.Module):
    """Blocks at one stride. With `downsample` a depthwise convolution first halves H and W."""

    def __init__(
        self, c_in: int, width: int, c_out: int, kernel: int, light: bool, num_blocks: int, downsample: bool
    ) -> None:
        super().__init__()
        self.down = ConvBN(c_in, c_in, 3, stride=2, groups=c_in) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *(Block(c_out if i else c_in, width, c_out, kernel, light) for i in range(num_blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(x))


class HGNetV2(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> {"c3", "c4", "c5"} at strides 8, 16, 32. size: a key of SIZES."""

    def __init__(self, size: str) -> None:
        super().__init__()
        stem_width, c_in, stages = SIZES[size]
        self.stem = Stem(stem_width, c_in)
        self.stages = nn.ModuleList()
        for index, stage in enumerate(stages):
            self.stages.append(Stage(c_in, *stage, downsample=index > 0))
            c_in = stage.c_out
        self.channels = {name: stage.c_out for name, stage in zip(("c3", "c4", "c5"), stages[1:])}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c2 = self.stages[0](self.stem(images))
        c3 = self.stages[1](c2)
        c4 = self.stages[2](c3)
        return {"c3": c3, "c4": c4, "c5": self.stages[3](c4)}
