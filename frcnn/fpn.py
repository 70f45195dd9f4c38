"""Feature pyramid network (Lin et al., arXiv:1612.03144): the semantics of coarse maps at the resolution of fine ones.

    c5 ── lateral 1x1 ──────────────┬── output 3x3 ── p5 ── every second pixel ── p6
                               upsample
    c4 ── lateral 1x1 ──────────── + ┬── output 3x3 ── p4
                               upsample
    ...

It has two forms. The paper's has plain convolutions with a bias. In fasterrcnn_resnet50_fpn_v2 a live BatchNorm follows
each convolution, which has no bias. Neither has an activation. A map is upsampled to the size of the next lateral map
(nearest neighbour), so sizes need not be multiples of each other. Two maps of one stride (MobileNet's last two) are
added as they are.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from frcnn.norm import ConvNorm


class Pyramid(nn.Module):
    """The interface of a pyramid: maps by name -> levels by name, all of one width (FPN, SimpleFeaturePyramid).

    channels: level name -> channels, finest level first.
    """

    channels: dict[str, int]

    def level_strides(self, in_strides: dict[str, int]) -> dict[str, int]:
        """The stride of each level in pixels, from the strides of the input maps."""
        raise NotImplementedError


class FPN(Pyramid):
    """Maps {"c2": (B, C_2, h, w), ...} -> {"p2": (B, width, h, w), ...} of the same sizes, and "p6".

    "p6" is every second pixel of the coarsest level, (ceil(h / 2), ceil(w / 2)): torchvision's max-pooling of a 1x1
    window at stride 2.

    Args:
        in_channels: map name -> channels for each input map, finest first. Level "p3" is made from map "c3", and so on.
            Maps of other names are ignored.
        norm: whether BatchNorm follows each convolution.
    """

    def __init__(self, in_channels: dict[str, int], *, width: int = 256, norm: bool = False) -> None:
        super().__init__()
        self.levels = {name: "p" + name.removeprefix("c") for name in in_channels}
        self.coarsest = [*self.levels.values()][-1]
        self.lateral = nn.ModuleDict({c: convolution(in_channels[c], width, 1, norm) for c in self.levels})
        self.output = nn.ModuleDict({p: convolution(width, width, 3, norm) for p in self.levels.values()})
        self.channels = dict.fromkeys([*self.levels.values(), "p6"], width)

    def reset_parameters(self) -> None:
        for layer in (*self.lateral.values(), *self.output.values()):
            if isinstance(layer, nn.Conv2d):  # ConvNorm resets its own
                initialise(layer)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        merged = None
        for c, p in reversed(self.levels.items()):  # coarse to fine
            lateral = self.lateral[c](maps[c])  # (B, width, h, w)
            if merged is not None:
                lateral = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            merged = lateral
            outputs[p] = self.output[p](merged)
        outputs = dict(reversed(outputs.items()))
        outputs["p6"] = outputs[self.coarsest][:, :, ::2, ::2]  # (B, width, ceil(h / 2), ceil(w / 2))
        return outputs

    def level_strides(self, in_strides: dict[str, int]) -> dict[str, int]:
        """The stride of each level in pixels, from the strides of the input maps."""
        strides = {p: in_strides[c] for c, p in self.levels.items()}
        return strides | {"p6": 2 * max(strides.values())}


def convolution(c_in: int, c_out: int, kernel: int, norm: bool) -> nn.Module:
    """A convolution with a bias, or with a BatchNorm. Fresh weights: He et al., arXiv:1502.01852."""
    if norm:
        return ConvNorm(c_in, c_out, kernel)
    layer = nn.Conv2d(c_in, c_out, kernel, padding=(kernel - 1) // 2)
    initialise(layer)
    return layer


def initialise(layer: nn.Conv2d) -> None:
    assert layer.bias is not None
    nn.init.kaiming_uniform_(layer.weight, a=1)  # a = 1: no activation follows
    nn.init.zeros_(layer.bias)


def fpn_names(in_channels: dict[str, int], *, norm: bool, version: int = 2) -> list[tuple[str, str]]:
    """Rows (torchvision's name, our name), without the prefixes of the pyramid in either model.

    version 1 is that of files from before torchvision 0.13: plain convolutions, and no index after that of the level.
    """
    rows = []
    for index, c in enumerate(in_channels):
        for theirs, ours in (("inner_blocks", f"lateral.{c}"), ("layer_blocks", f"output.p{c.removeprefix('c')}")):
            if norm:
                rows += [(f"{theirs}.{index}.0.", f"{ours}.conv."), (f"{theirs}.{index}.1.", f"{ours}.norm.")]
            else:
                rows += [(f"{theirs}.{index}." + ("0." if version >= 2 else ""), f"{ours}.")]
    return rows
