"""A detector of two convolutions and a BatchNorm, whose targets depend on the boxes alone: exact to differentiate."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structures import Targets

STRIDE = 4


@dataclass(frozen=True)
class TinyOutput:
    features: dict[str, Tensor]
    logits: Tensor  # (B, K, h, w)
    stride: int


class TinyDetector(nn.Module):
    """K logits per cell of 4 x 4 pixels: BCE against the boxes its center lies in, over the number of such cells.

    Cells with their center in a box to be ignored are left out, unless it is in another's too.
    """

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, STRIDE, STRIDE, bias=False), nn.BatchNorm2d(4), nn.SiLU())
        self.head = nn.Conv2d(4, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> TinyOutput:
        x = self.stem(images)
        return TinyOutput({"stem": x}, self.head(x), STRIDE)

    def losses(self, output: TinyOutput, targets: Targets) -> dict[str, Tensor]:
        logits, wanted = output.logits, torch.zeros_like(output.logits)
        h, w = logits.shape[2:]
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        counts = torch.ones_like(logits)
        for box, label, image, ignore in zip(
            targets.boxes_xyxy / output.stride, targets.labels, targets.image, targets.ignore
        ):
            inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
            if ignore:
                counts[image, :, inside] = 0
            else:
                wanted[image, label, inside] = 1
        counts = torch.maximum(counts, wanted.amax(1, keepdim=True))
        total = wanted.sum().clamp(min=1)
        return {
            "cls": F.binary_cross_entropy_with_logits(logits, wanted, counts, reduction="sum") / total,
            "size": 0.1 * (logits.square() * wanted).sum() / total,
        }


def build_tiny(seed: int) -> TinyDetector:
    return TinyDetector().double()


def tiny_scene(count: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Targets]:
    """float64 pictures away from 0 and 1, with one to three objects of two classes each; the last has none."""
    generator = torch.Generator().manual_seed(seed)
    pictures = 0.2 + 0.6 * torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)
    image = torch.arange(count - 1).repeat_interleave(1 + torch.arange(count - 1) % 3)
    corner = torch.rand(len(image), 2, generator=generator) * size / 2
    side = size / 4 + torch.rand(len(image), 2, generator=generator) * size / 4
    boxes_xyxy = torch.cat((corner, corner + side), dim=1)
    labels = torch.randint(0, 2, (len(image),), generator=generator)
    return pictures, Targets(boxes_xyxy, labels, image, torch.zeros_like(labels, dtype=torch.bool))
