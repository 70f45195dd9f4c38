"""YOLOv7-tiny (arXiv:2207.02696): a one-stage detector with anchors and efficient layer aggregation (ELAN).

    images ── backbone (ELAN) ── c3, c4, c5 ── neck (SPP, PANet) ── p3, p4, p5 ── head ── box, objectness, class

Head, anchors, decoding and loss terms are those of YOLOv5 (yolo/yolov5.py); which location learns which object is
decided by SimOTA (yolo/simota.py). The larger YOLOv7s, with their auxiliary heads, are not here.

Released weights have a plain head (deploy) or YOLOR's implicit vectors (training, arXiv:2105.04206), which
fold_implicit turns into a plain head. A model that trains here has a plain head. A variant with SiLU was released under
the same names; checkpoint.py refuses it where the file tells which layers it has, which a plain state dict does not.
Differs from the released recipe in the prior of a class: 0.6 / (K - 0.99999), as in YOLOv5, for 0.6 / (K - 0.99).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.fusion import fold_batchnorm
from layers.int8 import Int8Conv
from weights import PublicLayout
from yolo.layers import BATCHNORM_EPS, BATCHNORM_MOMENTUM, upsample
from yolo.released_names import YOLOV7_TINY_NAMES
from yolo.yolov5 import AnchorDetector, join_anchors

CHANNELS = (128, 256, 512, 128, 256, 512)  # of c3, c4, c5, p3, p4, p5
HEAD = "model.77"  # in the released names
SLOPE = 0.1  # of the activation below 0


class ConvBNLeaky(nn.Module):
    """Convolution without bias, BatchNorm, leaky ReLU: y = max(z, 0.1 z), z = bn(conv(x)). Stride 1 keeps H and W."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(c_out, eps=BATCHNORM_EPS, momentum=BATCHNORM_MOMENTUM)
        self.int8: Int8Conv | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.int8 is not None:
            return self.int8(x, self.conv, self.bn, lambda z: F.leaky_relu(z, SLOPE))
        return F.leaky_relu(self.bn(self.conv(x)), SLOPE, inplace=True)  # its gradient needs the output alone

    def fold(self) -> None:
        """Replace bn(conv(x)) by one convolution with a bias, for inference only. A second call does nothing."""
        if not isinstance(self.bn, nn.Identity):
            fold_batchnorm(self.conv, self.bn)
            self.bn = nn.Identity()

    def add_int8(self) -> None:
        self.int8 = Int8Conv(has_gate=False)


class ELAN(nn.Module):
    """Two 1x1 projections; two 3x3 convolutions in a row continue the second; a 1x1 convolution merges all four."""

    def __init__(self, c_in: int, width: int, c_out: int) -> None:
        super().__init__()
        self.bypass = ConvBNLeaky(c_in, width)
        self.main = ConvBNLeaky(c_in, width)
        self.conv1 = ConvBNLeaky(width, width, 3)
        self.conv2 = ConvBNLeaky(width, width, 3)
        self.merge = ConvBNLeaky(4 * width, c_out)

    def forward(self, x: Tensor) -> Tensor:
        bypass, main = self.bypass(x), self.main(x)
        first = self.conv1(main)
        return self.merge(torch.cat((self.conv2(first), first, main, bypass), 1))  # (B, C_out, H, W)


class SPPCSP(nn.Module):
    """Spatial pyramid pooling (arXiv:1406.4729) of one projection, beside a second one that bypasses it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.bypass = ConvBNLeaky(c_in, c_out)
        self.main = ConvBNLeaky(c_in, c_out)
        self.pooled = ConvBNLeaky(4 * c_out, c_out)
        self.merge = ConvBNLeaky(2 * c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        windows = [self.main(x)]
        for _ in range(3):  # 5x5, 9x9, 13x13: two 5x5 maxima in a row are one 9x9 maximum
            windows.append(F.max_pool2d(windows[-1], 5, stride=1, padding=2))
        pooled = self.pooled(torch.cat(windows[::-1], 1))  # (B, C_out, H, W)
        return self.merge(torch.cat((pooled, self.bypass(x)), 1))


class Backbone(nn.Module):
    """images (B, 3, H, W) -> c3, c4, c5 at strides 8, 16, 32. `stageN` works at stride 2^N."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNLeaky(3, 32, 3, stride=2)
        self.down2 = ConvBNLeaky(32, 64, 3, stride=2)
        self.stage2 = ELAN(64, 32, 64)
        self.stage3 = ELAN(64, 64, 128)
        self.stage4 = ELAN(128, 128, 256)
        self.stage5 = ELAN(256, 256, 512)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c2 = self.stage2(self.down2(self.stem(images)))
        c3 = self.stage3(F.max_pool2d(c2, 2))
        c4 = self.stage4(F.max_pool2d(c3, 2))
        c5 = self.stage5(F.max_pool2d(c4, 2))
        return {"c3": c3, "c4": c4, "c5": c5}


class Neck(nn.Module):
    """c3, c4, c5 -> p3, p4, p5 of the same sizes and channels: SPP, a top-down path, a bottom-up path, and a 3x3
    convolution for each level.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spp = SPPCSP(512, 256)
        self.reduce5 = ConvBNLeaky(256, 128)
        self.lateral4 = ConvBNLeaky(256, 128)
        self.top_down4 = ELAN(256, 64, 128)
        self.reduce4 = ConvBNLeaky(128, 64)
        self.lateral3 = ConvBNLeaky(128, 64)
        self.top_down3 = ELAN(128, 32, 64)
        self.down3 = ConvBNLeaky(64, 128, 3, stride=2)
        self.bottom_up4 = ELAN(256, 64, 128)
        self.down4 = ConvBNLeaky(128, 256, 3, stride=2)
        self.bottom_up5 = ELAN(512, 128, 256)
        self.out3 = ConvBNLeaky(64, 128, 3)
        self.out4 = ConvBNLeaky(128, 256, 3)
        self.out5 = ConvBNLeaky(256, 512, 3)

    def forward(self, c: dict[str, Tensor]) -> dict[str, Tensor]:
        n5 = self.spp(c["c5"])
        n4 = self.top_down4(torch.cat((self.lateral4(c["c4"]), upsample(self.reduce5(n5))), 1))
        n3 = self.top_down3(torch.cat((self.lateral3(c["c3"]), upsample(self.reduce4(n4))), 1))
        m4 = self.bottom_up4(torch.cat((self.down3(n3), n4), 1))
        m5 = self.bottom_up5(torch.cat((self.down4(m4), n5), 1))
        return {"p3": self.out3(n3), "p4": self.out4(m4), "p5": self.out5(m5)}


def plain_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict, deploy or training, with a plain head and its anchors in one entry (join_anchors)."""
    has_implicit = any(name.startswith((f"{HEAD}.ia.", f"{HEAD}.im.")) for name in state)
    return join_anchors(fold_implicit(state) if has_implicit else state, HEAD)


def fold_implicit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold YOLOR's implicit vectors into the last convolution: a, added before it, and m, multiplied after it.

        m (W (x + a) + b) = (m W) x + m (W a + b)

    a is `model.77.ia.<level>.implicit` (1, C, 1, 1), m is `model.77.im.<level>.implicit` (1, C_out, 1, 1). Computed in
    float32. KeyError if an entry is missing or the shapes do not fit.
    """
    folded = {name: value for name, value in state.items() if not name.startswith((f"{HEAD}.ia.", f"{HEAD}.im."))}
    for level in range(3):
        names = [f"{HEAD}.{name}" for name in (f"m.{level}.weight", f"m.{level}.bias")]
        names += [f"{HEAD}.{name}.{level}.implicit" for name in ("ia", "im")]
        if absent := [name for name in names if name not in state]:
            raise KeyError(f"a head with implicit vectors is without {absent[0]!r}")
        weight, bias, added, factor = (state[name].float() for name in names)
        if weight.dim() != 4 or added.numel() != weight.shape[1] or not len(weight) == len(bias) == factor.numel():
            shapes = ", ".join(str(tuple(state[name].shape)) for name in names)
            raise KeyError(f"{names[0]!r}, its bias and its implicit vectors do not fit: {shapes}")
        factor = factor.flatten()
        folded[names[0]] = weight * factor[:, None, None, None]
        folded[names[1]] = factor * (weight.flatten(1) @ added.flatten() + bias)
    return folded


def build_yolov7_tiny(num_classes: int) -> AnchorDetector:
    """A freshly initialised YOLOv7-tiny. Draws from torch's global generator."""
    return AnchorDetector(
        backbone=Backbone(),
        neck=Neck(),
        channels=CHANNELS,
        num_classes=num_classes,
        public_layouts=(PublicLayout("released", YOLOV7_TINY_NAMES, plain_head),),
        activation="LeakyReLU",
        simota=True,
    )
