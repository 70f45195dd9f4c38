"""A released detector, frozen up to its last layer: the features that a linear class head learns from, and its boxes.

    yolov8*, yolov5*u   reads what the last layers of the class branches read: a group of locations for each level
    yolov5*, yolov7*    reads p3, p4, p5, which the one convolution of a level reads: a group for each level and anchor

An anchor head reports objectness * class. The head that is learnt has one number in its place, sigmoid(z_ak): that
location a holds an object of class k. The rows of the released convolution that move the boxes stay as they are.
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

BRANCH_MAPS = ("cls3_2", "cls4_2", "cls5_2")  # what the last layers of the class branches read
NECK_MAPS = ("p3", "p4", "p5")  # what an anchor head reads
PICTURES_AT_ONCE = 16
SMALLEST_DEVIATION = 1e-4  # of the features; a fresh network's are below, and no pixel would ever move


class FrozenBackbone:
    """What a linear class head reads of images of S pixels, and the boxes that its locations predict.

    model: a detector with the maps BRANCH_MAPS, or with anchors and the maps NECK_MAPS; it is copied. Its class head is
        not used: its classes may be others.
    num_classes: K, of the head to learn.
    """

    def __init__(self, model: nn.Module, image_size: int, num_classes: int) -> None:
        detector = cast(DenseDetector, model)
        has_anchors = hasattr(model, "anchors_pixels")
        self._maps = NECK_MAPS if has_anchors else BRANCH_MAPS
        if any(name not in detector.channels for name in self._maps):
            found = f"key 'condense.network': {type(model).__name__} has no linear layer at each location of a level"
            raise UserError(f"{found}, expected yolov8*, yolov5* or yolov7*")
        frozen = fuse(model).requires_grad_(False)
        frozen = frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's types
        self._detector, self.num_classes = cast(DenseDetector, frozen), num_classes
        self._device = next(model.parameters()).device
        strides = [detector.strides[name] for name in self._maps]
        if has_anchors:
            sides_of_level = cast(Any, model).anchors_pixels().prod(-1).sqrt().tolist()  # of 3 levels, n anchors each
        else:
            sides_of_level = [[CELLS_PER_SIDE * stride] for stride in strides]
        self._per_cell = len(sides_of_level[0])  # n: groups of a level
        centers, sides, logits = [], [], []  # of each group: (A_g, 2), (A_g,), the bias of a fresh head
        for stride, of_level in zip(strides, sides_of_level, strict=True):
            along = (torch.arange(image_size // stride) + 0.5) * stride
            x, y = torch.meshgrid(along, along, indexing="xy")
            cells = torch.stack((x, y), dim=-1).reshape(-1, 2)  # row by row, as in the head
            for side in of_level:
                centers.append(cells)
                sides.append(torch.full((len(cells),), side))
                logits.append(math.log(5 / num_classes / self._per_cell / (640 / stride) ** 2))
        sizes = tuple(map(len, sides))
        self.grid = LocationGrid(
            torch.cat(centers).to(self._device), torch.cat(sides).to(self._device), sizes, tuple(logits)
        )

    def _of_groups(self, levels: list[Any]) -> list[Any]:
        """What belongs to a level, for each of its groups."""
        return [value for value in levels for _ in range(self._per_cell)]

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in [0, 1] -> h for each group (B, A_g, D_g + 1), differentiable."""
        return self._read(self._forward(images))

    @torch.no_grad()
    def features_and_boxes(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same, and the boxes (B, A, 4) that the locations predict, xyxy in pixels of the images."""
        output = self._forward(images)
        return self._read(output), self._detector.decode(output)[0]

    def _forward(self, images: Tensor) -> Any:
        return self._detector(images.contiguous(memory_format=torch.channels_last))

    def _read(self, output: Any) -> list[Tensor]:
        maps = [output.features[name].flatten(2).transpose(1, 2) for name in self._maps]  # (B, A_g, D)
        return self._of_groups([torch.cat((h, torch.ones_like(h[..., :1])), dim=-1) for h in maps])

    @torch.no_grad()
    def data_of(self, real: RealPictures) -> HeadData:
        """Features and targets of all pictures. UserError if the features are the same everywhere."""
        sizes, widths = self.grid.group_sizes, [self._detector.channels[name] + 1 for name in self._maps]
        shapes = [(len(real), *shape) for shape in zip(sizes[:: self._per_cell], widths)]
        features = self._of_groups([torch.empty(shape, device=self._device) for shape in shapes])  # one for a level
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
