"""A detector that finds solid red and solid blue by looking at the pixels."""

import torch
from torch import nn

from structures import Detections

NAMES = ("red thing", "blue thing")


class ColourDetector(nn.Module):
    """Finds one solid red and one solid blue rectangle by looking at the pixels: a detector whose truth is known."""

    num_classes = 2

    def forward(self, images):
        assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
        return images

    def detect(self, output, *, score_threshold, iou_threshold, max_detections):
        found = []
        for image in output:
            rows = []
            for label, channel in enumerate((0, 2)):
                others = [c for c in range(3) if c != channel]
                y, x = ((image[channel] > 0.75) & (image[others] < 0.25).all(0)).nonzero(as_tuple=True)
                if len(x) and 0.9 - 0.3 * label > score_threshold:
                    rows.append([*map(float, (x.min(), y.min(), x.max() + 1, y.max() + 1)), 0.9 - 0.3 * label, label])
            table = torch.tensor(rows).reshape(-1, 6)[:max_detections]
            found.append(Detections(table[:, :4], table[:, 4], table[:, 5].long()))
        return found
