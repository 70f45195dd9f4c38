"""The types that all folders share: Targets, Detections, and the protocols that detectors satisfy.

Images are float (B, 3, H, W), RGB, in [0, 1]. Boxes are xyxy in pixels of the tensor they belong to, in
continuous coordinates: a box covers x1..x2, and its width is x2 - x1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from errors import expect

SIZE_MULTIPLE = 32  # the coarsest stride of every detector; the sides of its images are multiples of it, in pixels


@dataclass(frozen=True)
class Targets:
    """The N objects of one batch of B images, as flat rows in any order; N may be 0.

    boxes_xyxy (N, 4) float: pixels of the batch's images. nan and infinity are a ValueError on the CPU; elsewhere the
        host would have to wait.
    labels (N,) int64: in 0..K-1.
    image (N,) int64: the image of the object, a row 0..B-1 of the batch.
    ignore (N,) bool: regions that are neither learnt as objects nor as background (VOC difficult, COCO crowd, KITTI
        DontCare).
    class_scores (N, K) float, or None: soft class targets, at least 0, rows that sum to 1. None gives the same losses
        as one-hot rows of `labels`. Assignment and box losses use `labels` in both cases.
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
        # As an index or a mask, a tensor of another kind would select other rows.
        for name, kind in (("labels", torch.int64), ("image", torch.int64), ("ignore", torch.bool)):
            if getattr(self, name).dtype != kind:
                found, expected = (str(x).removeprefix("torch.") for x in (getattr(self, name).dtype, kind))
                raise ValueError(f"{name}: found {found}, expected {expected}")
        # An object at nan would be left out without a word: it has no area.
        if self.boxes_xyxy.device.type == "cpu" and not (is_finite := self.boxes_xyxy.isfinite().all(1)).all():
            row = int(is_finite.int().argmin())
            raise ValueError(f"boxes_xyxy: row {row} is {self.boxes_xyxy[row].tolist()}, expected finite numbers")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Targets":
        """The rows chosen by an index or a mask (N,)."""
        return self._map(lambda x: x[rows])

    @property
    def is_learnt(self) -> Tensor:
        """(N,) bool: not ignored, with an area."""
        return (self.boxes_xyxy[:, 2:] > self.boxes_xyxy[:, :2]).all(1) & ~self.ignore

    def learnt(self) -> "Targets":
        """The objects that are learnt. On a GPU the host waits here, for their number."""
        return self[self.is_learnt]

    def of_images(self, chosen: Tensor) -> "Targets":
        """The objects of the images where chosen (B,) bool is True; the first of these images becomes image 0."""
        if chosen.dtype != torch.bool:
            raise ValueError(f"chosen: found {str(chosen.dtype).removeprefix('torch.')}, expected bool")
        if bool(chosen.all()):
            return self
        chosen = chosen.to(self.image.device)
        rows = self[chosen[self.image]]
        return replace(rows, image=(chosen.cumsum(0) - 1)[rows.image])

    def to(self, device: torch.device | str) -> "Targets":
        return self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        scores = None if self.class_scores is None else change(self.class_scores)
        return Targets(change(self.boxes_xyxy), change(self.labels), change(self.image), change(self.ignore), scores)

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
    """The detections of one image, best first: boxes_xyxy (M, 4), scores (M,) and labels (M,) int64."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(self.boxes_xyxy, self.scores, self.labels)

    def to(self, device: torch.device | str) -> "Detections":
        return Detections(self.boxes_xyxy.to(device), self.scores.to(device), self.labels.to(device))


OF_BATCH = {"rows": "whole batch"}  # metadata of a field of an output: a tensor that has no row for each image
FOR_LOSSES = {"only": "losses"}  # of a field that only the model's losses read: no cache of outputs keeps it


def select_images(output: Any, chosen: Tensor) -> Any:
    """A model's output for the chosen images of a batch, as if it had been computed for them alone, in their order.

    output: a frozen dataclass. Its tensors, and tensors in its dicts, have a row for each image, except those marked
        OF_BATCH; a list of tensors has one for each image. Other fields are facts about the whole batch (image_size).
    chosen: (B,) bool, on any device; on the host, no device is waited for. With all True it is `output` itself.
    """
    if bool(chosen.all()):
        return output
    rows = chosen.nonzero().squeeze(1)
    index: dict[torch.device, Tensor] = {}

    def pick(value: Tensor) -> Tensor:
        if value.device not in index:
            index[value.device] = rows.to(value.device, non_blocking=True)
        return value[index[value.device]]

    picked: dict[str, Any] = {}
    for f in fields(output):
        value = getattr(output, f.name)
        if f.metadata == OF_BATCH:
            continue
        if isinstance(value, Tensor):
            picked[f.name] = pick(value)
        elif isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values()):
            picked[f.name] = {name: pick(x) for name, x in value.items()}
        elif isinstance(value, list) and len(value) == len(chosen) and all(isinstance(x, Tensor) for x in value):
            picked[f.name] = [value[row] for row in rows.tolist()]
        elif isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
            raise TypeError(f"{type(output).__name__}.{f.name}: {len(value)} tensors for {len(chosen)} images")
    return replace(output, **picked)


@dataclass(frozen=True)
class DetectionSettings:
    """The arguments of a detector's `detect`: which detections it keeps."""

    score_threshold: float = 0.001
    iou_threshold: float = 0.7  # of non-maximum suppression; 1 suppresses nothing
    max_detections: int = 300  # in an image

    def changed(self, **given: Any) -> "DetectionSettings":
        """A copy with those of the given values that are not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def check(self, *, score: str, iou: str, most: str) -> None:
        """UserError for a value out of range. score, iou, most: what the user calls the three."""
        for what, value in ((score, self.score_threshold), (iou, self.iou_threshold)):
            expect(0 <= value <= 1, what, f"{value:g}", "a number in 0..1")
        expect(self.max_detections >= 1, most, self.max_detections, "at least 1")


def image_size_of(images: Tensor) -> tuple[int, int]:
    """(H, W) of the images (B, 3, H, W) of a detector; ValueError unless both are positive multiples of 32."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
    height, width = images.shape[2:]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or not height or not width:
        expected = f"multiples of {SIZE_MULTIPLE}"
        raise ValueError(f"images are {height}x{width} pixels (height x width), expected {expected}")
    return height, width


@runtime_checkable
class Detector(Protocol):
    """The interface of a model for train.py, eval.py, predict.py and distill/. There is no base class.

    num_classes: K.
    strides, channels: name in `output.features` -> stride in pixels, number of channels.
    public_names: rows (released name, our name) of the released checkpoint; see weights.rename. A model with several
        released layouts also has `public_layouts: tuple[weights.PublicLayout, ...]`; the first has this table.
    class_head: prefixes of the parameters of the class head, in our names; `new_head` replaces all of them.
    class_rows: the outputs of the head's layers that belong to each class (weights.ClassRows).
    class_activation: "sigmoid" or "softmax"; it turns class_logits_at into probabilities.
    """

    num_classes: int
    strides: dict[str, int]
    channels: dict[str, int]
    public_names: Sequence[tuple[str, str | None]]
    class_head: tuple[str, ...]
    class_activation: str

    def __call__(self, images: Tensor) -> Any:
        """images (B, 3, H, W) -> the output dataclass of the model, the same in train and eval mode.

        `output.features: dict[str, Tensor]`: the maps for distillation, (B, channels[name], H / s, W / s) each.
        `output.image_size`: (H, W) of the images.
        Every tensor has a row for each image; a field that has none, such as anchors, is marked OF_BATCH.
        Dense detectors also have `output.class_logits` (B, A, K), and `output.box_logits` if their head has them.
        """
        ...

    def losses(self, output: Any, targets: Targets) -> dict[str, Tensor]:
        """Loss terms by name: weighted float32 scalars whose size does not depend on B. Finite for N = 0."""
        ...

    def detect(
        self, output: Any, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """One Detections per image, in pixels of the input tensor."""
        ...

    def class_logits_at(self, output: Any, boxes_per_image: list[Tensor]) -> Tensor:
        """Class logits of B tensors (N_b, 4) of boxes in pixels, N = sum N_b rows.

        "sigmoid": (N, K), each the log-odds that the box holds an object of class k.
        "softmax": (N, 1 + K), with the background in column 0.
        """
        ...


@runtime_checkable
class DenseDetector(Detector, Protocol):
    """A detector that predicts at A fixed locations (points or anchors).

    requested_outputs: names of `output.features` and of the output's logits that the caller needs, or None for all.
        Other features may be missing and other logits None; parts of the model that only they need are skipped. Used
        for frozen teachers.
    """

    requested_outputs: frozenset[str] | None

    def decode(self, output: Any) -> tuple[Tensor, Tensor]:
        """boxes_xyxy (B, A, 4) in pixels and scores (B, A, K) in [0, 1]: every location, before NMS."""
        ...

    def location_logits(self, output: Any) -> Tensor:
        """(B, A, K): the quantity of class_logits_at at each location."""
        ...

    def positives(self, output: Any, targets: Targets) -> Tensor:
        """(B, A) int64: the row of `targets` that each location learns in `losses`, or -1. No gradient."""
        ...

    def tail(self, name: str) -> nn.Module:
        """The layers between a map within the head, named as in `output.features`, and the logits of its level.

        KeyError for a map that is not within the head.
        """
        ...
