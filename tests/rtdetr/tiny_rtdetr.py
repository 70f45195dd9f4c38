"""An RT-DETR so small that a training step takes milliseconds, with the parts of the released ones."""

import torch
from torch import Tensor, nn

from rtdetr.conv_bn import ConvBN
from rtdetr.decoder import Decoder
from rtdetr.rtdetr import RTDETR
from weights import PublicLayout


class TinyBackbone(nn.Module):
    """Five strided convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        relu = torch.relu
        self.stem = nn.Sequential(ConvBN(3, width, 3, 2, activation=relu), ConvBN(width, width, 3, 2, activation=relu))
        self.stages = nn.ModuleList(
            nn.Sequential(ConvBN(a, b, 3, 2, activation=relu), ConvBN(b, b, 3, activation=relu))
            for a, b in ((width, width), (width, 2 * width), (2 * width, 2 * width))
        )
        self.channels = {"c3": width, "c4": 2 * width, "c5": 2 * width}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(images), {}
        for name, stage in zip(self.channels, self.stages):
            x = maps[name] = stage(x)
        return maps


def tiny_rtdetr(num_classes: int, *, width: int = 32, num_layers: int = 2, num_queries: int = 30) -> RTDETR:
    model = RTDETR(
        backbone=TinyBackbone(width), num_classes=num_classes, width=width, hidden=width // 2, feedforward=width,
        num_layers=num_layers, batchnorm_eps=1e-5, public_layout=PublicLayout("none", []),
    )  # fmt: skip
    model.decoder = Decoder(
        in_channels=width, num_classes=num_classes, num_layers=num_layers, num_queries=num_queries, width=width,
        heads=4, hidden=2 * width,
    )  # fmt: skip
    return model
