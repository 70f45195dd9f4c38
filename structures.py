"""The types that cross folder walls: Targets, Detections, and the protocol every detector satisfies.

Images are float (B, 3, H, W), RGB, in [0, 1]. Boxes are xyxy in pixels of the tensor they belong to, in
continuous coordinates: a box covers x1..x2, and its width is x2 - x1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Targets:
    """The objects of one batch of B images, as flat rows; N may be 0.

    boxes_xyxy (N, 4) float, pixels of the batch's images; labels (N,) int64 in 0..K-1; image (N,) int64, the row
    0..B-1 of the batch an object belongs to (any order); ignore (N,) bool: regions that are neither learnt nor
    punished (VOC difficult, COCO crowd, KITTI DontCare).
    class_scores (N, K) float: the share of each class in an object, 0 or more, rows that sum to 1; what a detector is
    taught of its class. None: all of it is `labels`, the same losses as for one-hot rows. A batch has it for all
    objects or for none. `labels` still says which object is whose: it decides who learns the object, and its box.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    image: Tensor
    ignore: Tensor
    class_scores: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        fits = self.boxes_xyxy.shape == (count, 4) and self.image.shape == self.ignore.shape == (count,)
        if self.class_scores is not None:
            fits = fits and self.class_scores.dim() == 2 and len(self.class_scores) == count
        if not fits:
            columns = {f.name: getattr(self, f.name) for f in fields(self)}
            shapes = {name: tuple(x.shape) for name, x in columns.items() if x is not None}
            raise ValueError(f"rows differ: {shapes}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Targets":
        """The rows chosen by an index or a mask (N,)."""
        return self._each(lambda x: x[rows])

    def to(self, device: torch.device | str) -> "Targets":
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        columns = (getattr(self, f.name) for f in fields(self))
        return Targets(*(None if column is None else change(column) for column in columns))

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> "Targets":
        return Targets(
            torch.zeros(0, 4, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image: boxes_xyxy (M, 4), scores (M,) and labels (M,) int64, best first."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(self.boxes_xyxy, self.scores, self.labels)

    def to(self, device: torch.device | str) -> "Detections":
        return Detections(self.boxes_xyxy.to(device), self.scores.to(device), self.labels.to(device))


@runtime_checkable
class Detector(Protocol):
    """What train.py, eval.py, predict.py and distill/ ask of a model. There is no base class.

    num_classes: K.
    strides, channels: for each name in `Output.features`, its stride in pixels and its channel count.
    public_names: the rows of the table that maps the released checkpoint's names to ours (see weights.rename). A model
        released in several layouts also has `public_layouts: tuple[weights.PublicLayout, ...]`, this table's first.
    class_head: prefixes of our names of the class head's parameters, which `new_head` starts fresh as a whole.
    class_rows: which outputs of its layers belong to which class (weights.ClassRows).
    class_activation: "sigmoid" or "softmax", what turns class_logits_at into probabilities.
    """

    num_classes: int
    strides: dict[str, int]
    channels: dict[str, int]
    public_names: Sequence[tuple[str, str | None]]
    class_head: tuple[str, ...]
    class_activation: str

    def __call__(self, images: Tensor) -> Any:
        """images (B, 3, H, W) -> the model's own output dataclass, the same in train and eval mode.

        `output.features: dict[str, Tensor]` names the maps distillation taps, (B, channels[name], H/s, W/s) each.
        `output.image_size` is (H, W) of the images.
        Dense detectors also expose `output.class_logits` (B, A, K), and `output.box_logits` where they have them.
        """
        ...

    def losses(self, output: Any, targets: Targets) -> dict[str, Tensor]:
        """Named, weighted float32 scalars, normalised so that their size does not depend on B. Finite for N = 0."""
        ...

    def detect(
        self, output: Any, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """One Detections per image, in pixels of the tensor that went in."""
        ...

    def class_logits_at(self, output: Any, boxes_per_image: list[Tensor]) -> Tensor:
        """What the detector believes about B tensors (N_b, 4) of boxes in pixels: logits, N = sum N_b rows.

        (N, K) where class_activation is "sigmoid", each the log-odds of "this is an object of class k"; (N, 1 + K)
        with the background in column 0 where it is "softmax".
        """
        ...


@runtime_checkable
class DenseDetector(Detector, Protocol):
    """A detector that predicts at A fixed locations (points or anchors).

    requested_outputs: names of `output.features` and of the output's logits that the caller reads, None for all. What
    is not named may be missing or None, and the parts of the model that only it needs are not run. For frozen teachers.
    """

    requested_outputs: frozenset[str] | None

    def decode(self, output: Any) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, A, 4) in pixels and scores (B, A, K) in [0, 1]: every location, before NMS."""
        ...

    def location_logits(self, output: Any) -> Tensor:
        """(B, A, K): what class_logits_at says, at each location."""
        ...

    def positives(self, output: Any, targets: Targets) -> Tensor:
        """(B, A) int64: the row of `targets` that each location learns in `losses`, or -1. No gradient."""
        ...

    def tail(self, name: str) -> nn.Module:
        """The layers between a map within the head, by its name in `output.features`, and the logits of its level.

        KeyError for a map that is not within the head.
        """
        ...
