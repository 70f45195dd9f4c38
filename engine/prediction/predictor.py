"""A detector for pictures of any size, with boxes in their pixels: for predict.py, app.py and compare.py."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from datasets.letterbox import letterbox, unletterbox
from layers.fusion import fuse
from structures import Detections, DetectionSettings

SHOWN = DetectionSettings(score_threshold=0.25)  # enough for a person who looks at the boxes


class Predictor:
    """A copy of a detector with its BatchNorms folded, for pictures of any size."""

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        detection: DetectionSettings = SHOWN,
        device: torch.device | str = "cpu",
        bfloat16: bool = False,
    ) -> None:
        self.device = torch.device(device)
        fused = fuse(model).to(self.device)
        self.model = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's types
        self.image_size, self.detection, self.bfloat16 = image_size, detection, bfloat16

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Pictures, uint8 RGB (h, w, 3) each -> Detections on the CPU, in pixels of the picture and clipped to it."""
        squares = [letterbox(picture, self.image_size) for picture in pictures]
        images = torch.from_numpy(np.stack([square for square, _, _ in squares])).to(self.device)  # (B, S, S, 3)
        images = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S), channels_last in memory
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            output = self.model(images)
        found = []
        for picture, square, detections in zip(pictures, squares, self.model.detect(output, **asdict(self.detection))):
            _, scale, (left, top, _, _) = square
            height, width = picture.shape[:2]
            boxes = unletterbox(detections.boxes_xyxy.float(), scale, (left, top), width, height)
            found.append(Detections(boxes, detections.scores.float(), detections.labels).to("cpu"))
        return found
