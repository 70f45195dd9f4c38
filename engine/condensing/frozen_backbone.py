"""A released detector, frozen up to the last layer of its class branch: the features that a linear head learns from.

Only for the anchor-free YOLOs (yolov8*, yolov5*u), whose class branches end in a 1 x 1 convolution for each level.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.condense.linear_head import CELLS_PER_SIDE, HeadData, LocationGrid, location_targets
from engine.condensing.real_pictures import RealPictures
from errors import UserError
from layers.fusion import fuse
from structures import DenseDetector

MAPS = ("cls3_2", "cls4_2", "cls5_2")  # what the last layers of the class branches read
PICTURES_AT_ONCE = 16
SMALLEST_DEVIATION = 1e-4  # of the features; a fresh network's are below, and no pixel would ever move


class FrozenBackbone:
    """What a linear class head reads of images of S pixels, and the boxes that its locations predict.

    model: a detector with the maps MAPS; it is copied. Its class head is not used: its classes may be others.
    num_classes: K, of the head to learn.
    """

    def __init__(self, model: nn.Module, image_size: int, num_classes: int) -> None:
        detector = cast(DenseDetector, model)
        if any(name not in detector.channels for name in MAPS):
            kind = type(model).__name__
            found = f"key 'condense.network': {kind} has no branch of convolutions for the classes of each level"
            raise UserError(f"{found}, expected yolov8* or yolov5*u")
        frozen = fuse(model).requires_grad_(False)
        frozen = frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's types
        self._detector, self.num_classes = cast(DenseDetector, frozen), num_classes
        self._device = next(model.parameters()).device
        strides = [detector.strides[name] for name in MAPS]
        cells = [image_size // stride for stride in strides]
        centers, sides = [], []
        for count, stride in zip(cells, strides):
            along = (torch.arange(count) + 0.5) * stride
            y, x = torch.meshgrid(along, along, indexing="ij")
            centers.append(torch.stack((x, y), dim=-1).reshape(-1, 2))  # (A_g, 2), row by row, as in the head
            sides.append(torch.full((count**2,), CELLS_PER_SIDE * stride))
        priors = tuple(math.log(5 / num_classes / (640 / stride) ** 2) for stride in strides)  # of a fresh head
        sizes = tuple(count**2 for count in cells)
        self.grid = LocationGrid(torch.cat(centers).to(self._device), torch.cat(sides).to(self._device), sizes, priors)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in [0, 1] -> h for each level (B, A_g, D + 1), differentiable."""
        return self._read(self._forward(images))

    @torch.no_grad()
    def features_and_boxes(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same, and the boxes (B, A, 4) that the locations predict, xyxy in pixels of the images."""
        output = self._forward(images)
        return self._read(output), self._detector.decode(output)[0]

    def _forward(self, images: Tensor) -> Any:
        return self._detector(images.contiguous(memory_format=torch.channels_last))

    def _read(self, output: Any) -> list[Tensor]:
        maps = [output.features[name].flatten(2).transpose(1, 2) for name in MAPS]  # (B, A_g, D)
        return [torch.cat((h, torch.ones_like(h[..., :1])), dim=-1) for h in maps]

    @torch.no_grad()
    def data_of(self, real: RealPictures) -> HeadData:
        """Features and targets of all pictures. UserError if the features are the same everywhere."""
        sizes, widths = self.grid.group_sizes, [self._detector.channels[name] + 1 for name in MAPS]
        features = [torch.empty(len(real), size, width, device=self._device) for size, width in zip(sizes, widths)]
        targets = [torch.empty(len(real), size, self.num_classes, device=self._device) for size in sizes]
        for rows in torch.arange(len(real)).split(PICTURES_AT_ONCE):
            batch = real.read(rows.tolist()).to(self._device)
            h = self.features(batch.images.float() / 255)
            y = location_targets(self.grid, batch.targets, count=len(batch), num_classes=self.num_classes)
            for whole, part in zip((*features, *targets), (*h, *y), strict=True):
                whole[rows] = part
        deviation = max(float(h[..., :-1].std()) for h in features)
        if deviation < SMALLEST_DEVIATION:
            found = f"key 'condense.network': its features hardly differ (standard deviation {deviation:.1g})"
            raise UserError(f"{found}, expected a trained network")
        return HeadData(features, targets)
