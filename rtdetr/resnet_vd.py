"""ResNet-18 and -50, variant D, the backbones of the authors' RT-DETR-R18 and -R50.

ResNet (arXiv:1512.03385) with the changes of He et al., "Bag of Tricks", arXiv:1812.01187: three 3x3 convolutions
replace the 7x7 stem, and a shortcut that halves the map takes 2x2 means before its 1x1 convolution.

The released models were trained with frozen BatchNorms. A teacher is always in eval mode, in which a frozen BatchNorm
is an ordinary one, so there is no class for it here.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from rtdetr.conv_bn import ConvBN

STAGE_WIDTHS = (64, 128, 256, 512)


class Size(NamedTuple):
    """blocks: number of blocks of each stage. expansion: C_out of a block / width of its stage."""

    blocks: tuple[int, int, int, int]
    expansion: int


SIZES = {18: Size(blocks=(2, 2, 2, 2), expansion=1), 50: Size(blocks=(3, 4, 6, 3), expansion=4)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; relu(residual + shortcut)."""

    def __init__(self, c_in: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = ConvBN(c_in, width, 3, stride, activation=F.relu)
        self.conv2 = ConvBN(width, width, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions; relu(residual + shortcut)."""

    def __init__(self, c_in: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = ConvBN(c_in, width, activation=F.relu)
        self.conv2 = ConvBN(width, width, 3, stride, activation=F.relu)
        self.conv3 = ConvBN(width, 4 * width)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class Projection(nn.Module):
    """The shortcut of a stage's first block: 2x2 means if it halves H and W, then a 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.project = ConvBN(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.avg_pool2d(x, 2) if self.stride == 2 else x)


def make_stage(c_in: int, width: int, stride: int, *, blocks: int, expansion: int) -> nn.Sequential:
    """The blocks of a stage. The first one always has a projection, even if the shapes would allow the identity."""
    block: type[BasicBlock | Bottleneck] = BasicBlock if expansion == 1 else Bottleneck
    c_out = width * expansion
    first = block(c_in, width, stride, Projection(c_in, c_out, stride))
    return nn.Sequential(first, *(block(c_out, width, 1, nn.Identity()) for _ in range(blocks - 1)))


class ResNetVD(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> {"c3", "c4", "c5"} at strides 8, 16, 32. depth: a key of SIZES."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks, expansion = SIZES[depth]
        self.stem = nn.Sequential(
            ConvBN(3, 32, 3, stride=2, activation=F.relu),
            ConvBN(32, 32, 3, activation=F.relu),
            ConvBN(32, 64, 3, activation=F.relu),
        )
        c_in, stages = 64, []
        for index, width in enumerate(STAGE_WIDTHS):
            stages.append(make_stage(c_in, width, 2 if index else 1, blocks=blocks[index], expansion=expansion))
            c_in = width * expansion
        self.stages = nn.ModuleList(stages)
        self.channels = {name: width * expansion for name, width in zip(("c3", "c4", "c5"), STAGE_WIDTHS[1:])}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(self.stem(images), 3, stride=2, padding=1)  # (B, 64, H / 4, W / 4)
        c2 = self.stages[0](x)
        c3 = self.stages[1](c2)
        c4 = self.stages[2](c3)
        return {"c3": c3, "c4": c4, "c5": self.stages[3](c4)}
