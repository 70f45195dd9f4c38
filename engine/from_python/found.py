"""The detections of one picture as a user of retort.py holds them: arrays, a table, a drawing."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import structures
from engine.drawing.detections import draw_detections
from errors import counted


@dataclass(frozen=True, eq=False, repr=False)
class Detections(structures.Detections):
    """The M detections of one picture, best first; M may be 0. Printed, they are a table.

    boxes_xyxy (M, 4) float32: x1, y1, x2, y2 in pixels of the upright picture, inside it.
    scores (M,) float32: in [0, 1].
    labels (M,) int64: rows of class_names.
    class_names: of the model, K texts.
    picture (H, W, 3) uint8: RGB, what the model was shown.
    source: its file, or how it was given.
    """

    class_names: tuple[str, ...]
    picture: np.ndarray
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each detection, M texts."""
        return tuple(self.class_names[label] for label in self.labels.tolist())

    @property
    def xyxy(self) -> np.ndarray:
        """(M, 4) float32, boxes_xyxy under the name that the package supervision has for it."""
        return self.boxes_xyxy.numpy()

    @property
    def confidence(self) -> np.ndarray:
        """(M,) float32, scores as supervision calls them."""
        return self.scores.numpy()

    @property
    def class_id(self) -> np.ndarray:
        """(M,) int64, labels as supervision calls them."""
        return self.labels.numpy()

    def draw(self, *, show_scores: bool = True) -> Image.Image:
        """A copy of the picture with a box and a label for each detection."""
        return draw_detections(self.picture, self, self.class_names, show_scores=show_scores)

    def __getitem__(self, rows: Tensor | int) -> "Detections":
        """The detections chosen by an index, a list of them or a mask (M,): `found[found.scores > 0.5]`."""
        rows = torch.arange(len(self))[rows].reshape(-1)  # a single index, of any kind, gives one row too
        columns = (self.boxes_xyxy[rows], self.scores[rows], self.labels[rows])
        return Detections(*columns, self.class_names, self.picture, self.source)

    def __str__(self) -> str:
        height, width = self.picture.shape[:2]
        lines = [f"{self.source}: {width} x {height}, {counted(len(self), 'detection')}"]
        if len(self):
            longest = max(5, *map(len, self.names))
            lines += [f"{'class':<{longest}}  score" + "".join(f"{name:>9}" for name in ("x1", "y1", "x2", "y2"))]
        for name, score, box in zip(self.names, self.scores.tolist(), self.boxes_xyxy.tolist()):
            lines += [f"{name:<{longest}}  {score:5.2f}" + "".join(f"{value:9.1f}" for value in box)]
        return "\n".join(lines)

    __repr__ = __str__
