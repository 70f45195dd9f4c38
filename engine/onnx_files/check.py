"""Whether a graph computes what the PyTorch model does: every box and score, and the detections that it chooses."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.onnx_files.detector import open_session
from engine.onnx_files.graph import DETECTIONS, PREDICTIONS, selection_inputs
from errors import UserError
from kernels.nms import select_detections
from structures import SIZE_MULTIPLE, DenseDetector, DetectionSettings

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

# Rounding stays below these limits even in a badly conditioned network; a wrong graph does not.
BOX_TOLERANCE = 0.05  # pixels
SCORE_TOLERANCE = 1e-3
CHECK_CANDIDATES = 1000  # pairs of location and class in an image that the check of the selection uses


@dataclass(frozen=True)
class Difference:
    """The largest differences between a graph and the PyTorch model over all locations; boxes in pixels."""

    boxes: float
    scores: float

    def is_small(self) -> bool:
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE  # False for nan


def check_batches(images: Tensor, dynamic: bool, least: int = SIZE_MULTIPLE) -> list[Tensor]:
    """The batches to check: one by one; if dynamic: all images, one image, and two at half the height."""
    if not dynamic:
        return list(images.split(1))
    half = max(least, images.shape[2] // 2 // SIZE_MULTIPLE * SIZE_MULTIPLE)
    return [images, images[:1], images[:2, :, :half].contiguous()]


def compare_outputs(
    model: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], batches: Iterable[Tensor], *, suppresses: bool
) -> Difference:
    """The largest differences of `run` from the PyTorch model over images (B, 3, H, W): boxes and scores."""
    detector = cast(DenseDetector, model)  # PyTorch types every attribute of a module as Tensor | Module
    largest = Difference(0.0, 0.0)
    for images in batches:
        for rows in zip(*detector.decode(detector(images)), *run(images)):
            boxes, scores = differences(*rows, in_order=suppresses)
            # This form makes nan larger than any number.
            largest = Difference(
                largest.boxes if boxes <= largest.boxes else boxes,
                largest.scores if scores <= largest.scores else scores,
            )
    return largest


@torch.no_grad()
def compare(model: nn.Module, graph: "ModelProto", batches: Iterable[Tensor], *, suppresses: bool) -> Difference:
    """Run both on images (B, 3, H, W) and compare every box and score before selection.

    If the graph ends in detections, they must be those that kernels.nms selects from the graph's own boxes and scores,
    in the same order; otherwise UserError.
    """
    names = list(PREDICTIONS)
    has_selection = graph.graph.output[0].name == DETECTIONS[0] and len(graph.graph.output) == len(DETECTIONS)
    if has_selection:
        names = [f"all_{name}" for name in PREDICTIONS]
        graph = _with_outputs(graph, names)
    session = open_session(graph.SerializeToString())

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        feed = {"images": images.numpy()}
        if has_selection:
            _check_selection(session, feed, names, suppresses)
        boxes_xyxy, scores = map(torch.from_numpy, session.run(names, feed))
        return boxes_xyxy, scores

    return compare_outputs(model, run, batches, suppresses=suppresses)


def _with_outputs(graph: "ModelProto", names: Sequence[str]) -> "ModelProto":
    """A copy with the float32 values `names` as additional outputs."""
    from onnx import TensorProto, helper

    copy = type(graph)()
    copy.CopyFrom(graph)
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return copy


def differences(
    expected_xyxy: Tensor, expected_scores: Tensor, xyxy: Tensor, scores: Tensor, *, in_order: bool
) -> tuple[float, float]:
    """The largest differences of boxes and scores in one image.

    in_order False: RT-DETR's queries are sorted by score, and rounding may swap them. Each is compared to the nearest.
    """
    if not in_order:
        distance = torch.cdist(expected_xyxy, xyxy) + len(scores) * torch.cdist(expected_scores, scores)  # (Q, Q)
        nearest = distance.argmin(1)
        xyxy, scores = xyxy[nearest], scores[nearest]
    return (expected_xyxy - xyxy).abs().max().item(), (expected_scores - scores).abs().max().item()


def _check_selection(
    session: "InferenceSession", feed: dict[str, np.ndarray], names: list[str], suppresses: bool
) -> None:
    """UserError if the graph selects other detections, at a threshold with CHECK_CANDIDATES in the first image."""
    all_scores = torch.from_numpy(session.run(names[1:], feed)[0])
    score_threshold = all_scores[0].flatten().topk(min(CHECK_CANDIDATES, all_scores[0].numel())).values[-1].item()
    detection = DetectionSettings(score_threshold, 0.7 if suppresses else 1.0, 100)
    feed = feed | selection_inputs(detection)
    *found, image, all_boxes, all_scores = map(torch.from_numpy, session.run([*DETECTIONS, *names], feed))
    candidates = max(1, all_scores[0].numel())
    expected = select_detections(all_boxes, all_scores, **asdict(detection), max_candidates=candidates)
    for row, detections in enumerate(expected):
        columns = (detections.boxes_xyxy, detections.scores, detections.labels)
        if not all(torch.equal(ours[image == row], theirs) for ours, theirs in zip(found, columns)):
            raise UserError("the graph chooses other detections than PyTorch does; nothing was written")
