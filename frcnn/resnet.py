"""ResNet-18, -34 and -50 (He et al., arXiv:1512.03385) as the backbone of a detector.

    images (B, 3, H, W) ── stem /4 ── stage2 ── c2 /4 ── stage3 ── c3 /8 ── stage4 ── c4 /16 ── stage5 ── c5 /32

`stageN` is the paper's convN_x; its map cN has stride 2^N. In a bottleneck the 3x3 convolution has the stride, as in
the released weights (often called v1.5); in the paper it is the first 1x1. A shortcut is a projection if the shape
changes, else the identity (the paper's option B).

The input is normalised with `mean` and `std`. Released files: frcnn/pretrained.py.
"""

from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from frcnn.norm import ConvNorm
from frcnn.pretrained import IMAGENET_NORMALIZATION, Backbone, backbone_layouts, read_classifier_file

STAGE_WIDTHS = (64, 128, 256, 512)  # of stage2..stage5, before a bottleneck's expansion
EXPANSION = 4  # channels out of a bottleneck, in units of its width
FILE_EPSILON = 1e-5  # of the BatchNorms in the released ImageNet files


class Size(NamedTuple):
    """depths: number of blocks in stage2..stage5. bottleneck: True for Bottleneck, False for BasicBlock."""

    depths: tuple[int, int, int, int]
    bottleneck: bool


SIZES = {
    18: Size(depths=(2, 2, 2, 2), bottleneck=False),
    34: Size(depths=(3, 4, 6, 3), bottleneck=False),
    50: Size(depths=(3, 4, 6, 3), bottleneck=True),
}


class BasicBlock(nn.Module):
    """relu(x + norm(conv3x3(relu(norm(conv3x3(x)))))), (B, C_in, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(c_in, width, 3, stride)
        self.conv2 = ConvNorm(width, width, 3)
        self.shortcut = shortcut(c_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x), inplace=True))
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1 to `width` channels, 3x3, 1x1 to 4 width: (B, C_in, H, W) -> (B, 4 width, H / stride, W / stride)."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(c_in, width, 1)
        self.conv2 = ConvNorm(width, width, 3, stride)
        self.conv3 = ConvNorm(width, EXPANSION * width, 1)
        self.shortcut = shortcut(c_in, EXPANSION * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        y = self.conv3(F.relu(self.conv2(y), inplace=True))
        return F.relu(y + self.shortcut(x), inplace=True)


def shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    """The identity if the block keeps the shape, else a strided 1x1 projection."""
    return nn.Identity() if stride == 1 and c_in == c_out else ConvNorm(c_in, c_out, 1, stride)


class ResNet(Backbone):
    """ResNet without its classifier. depth: 18, 34 or 50.

    forward: images (B, 3, H, W) -> {"c2", "c3", "c4", "c5"} of (B, channels[name], ceil(H / s), ceil(W / s)).
    """

    mean, std = IMAGENET_NORMALIZATION

    def __init__(self, depth: int) -> None:
        super().__init__()
        depths, bottleneck = SIZES[depth]
        block: type[Bottleneck | BasicBlock] = Bottleneck if bottleneck else BasicBlock
        expansion = EXPANSION if bottleneck else 1
        self.stem = ConvNorm(3, 64, 7, stride=2)
        c_in, stages = 64, []
        for stage_depth, width in zip(depths, STAGE_WIDTHS):
            blocks = []
            for index in range(stage_depth):
                stride = 2 if index == 0 and width != STAGE_WIDTHS[0] else 1
                blocks.append(block(c_in, width, stride))
                c_in = expansion * width
            stages.append(nn.Sequential(*blocks))
        self.stage2, self.stage3, self.stage4, self.stage5 = stages
        self.head_names = [("fc.", "")]
        self.strides = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
        self.channels = {name: expansion * width for name, width in zip(self.strides, STAGE_WIDTHS)}
        self.public_names = resnet_names(bottleneck)
        convert = partial(read_classifier_file, file_epsilon=FILE_EPSILON)
        self.public_layouts = backbone_layouts(self.public_names, self.head_names, convert)

    @property
    def stages(self) -> list[list[nn.Module]]:
        return [[self.stem], [self.stage2], [self.stage3], [self.stage4], [self.stage5]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(images), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        c2 = self.stage2(x)
        c3 = self.stage3(c2)
        c4 = self.stage4(c3)
        c5 = self.stage5(c4)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": c5}

    def pooled(self, images: Tensor) -> Tensor:
        return self(images)["c5"].mean((2, 3))  # (B, C)

    def make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.channels["c5"], num_classes)


def resnet_names(bottleneck: bool) -> list[tuple[str, str]]:
    """Rows (torchvision's name, our name) of the backbone, without the classifier `fc.`."""
    rows = [("conv1.", "stem.conv."), ("bn1.", "stem.norm.")]
    for n in (1, 2, 3, 4):  # their layer1 is our stage2
        for k in (1, 2, 3) if bottleneck else (1, 2):
            rows += [(f"layer{n}.{{}}.conv{k}.", f"stage{n + 1}.{{}}.conv{k}.conv.")]
            rows += [(f"layer{n}.{{}}.bn{k}.", f"stage{n + 1}.{{}}.conv{k}.norm.")]
        if bottleneck or n > 1:  # stage2 of ResNet-18 and -34 keeps the shape
            rows += [(f"layer{n}.0.downsample.0.", f"stage{n + 1}.0.shortcut.conv.")]
            rows += [(f"layer{n}.0.downsample.1.", f"stage{n + 1}.0.shortcut.norm.")]
    return rows
