"""Detectors of the demo: from a file, a run or an upload; what they find in a picture, and how long they take.

Uploads come from strangers as soon as the server's address is opened. A weights file is read as data
(weights/inert_pickle.py), nothing is written to disk, and `ONE_AT_A_TIME` keeps many sessions from working at once: the
memory that pictures and models take on their way is that of one of them.
"""

import copy
import functools
import html
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

import checkpoint
from checkpoint import CheckpointInfo
from engine.drawing.detections import class_color, text_color
from engine.onnx_files.detector import SUFFIX, OnnxDetector, describe_onnx, load_detector, load_onnx_bytes
from engine.prediction.predictor import Predictor
from engine.runtime.processes import choose_device
from engine.runtime.timing import rotate, wall_seconds
from engine.web_demo.gallery import ONE_AT_A_TIME
from errors import UserError, counted, expect
from structures import SIZE_MULTIPLE, Detections, DetectionSettings

MAX_WEIGHTS_MEGABYTES = 200  # of an uploaded file; YOLOv8x has 137 MB, Faster R-CNN 160
MAX_IMAGE_SIZE = 2048  # pixels: a file's own image size decides how much memory a picture takes
TIMED_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 1.0, 3, 15
MAX_CHIPS = 16


@dataclass(frozen=True)
class Detector:
    """A detector and the facts that the page shows of it. parameters: None for an ONNX file."""

    name: str
    module: nn.Module
    info: CheckpointInfo
    predictor: Predictor
    parameters: int | None

    @property
    def names(self) -> tuple[str, ...]:
        return self.info.names

    def describe(self) -> str:
        """`yolov8n, 3.01 M parameters, 8 classes, 160 px`, and the mark of a run that was no measurement."""
        precision = f"ONNX, {self.module.info.precision}" if isinstance(self.module, OnnxDetector) else ""
        size = f"{self.parameters / 1e6:.2f} M parameters" if self.parameters is not None else precision
        mark = f", {self.info.plumbing}" if self.info.plumbing else ""
        return f"{self.info.arch}, {size}, {counted(len(self.names), 'class')}, {self.info.image_size} px{mark}"


def load_file(path: Path, name: str) -> Detector:
    """The detector in a weights file or an ONNX file. UserError if it cannot be read or shown here."""
    with ONE_AT_A_TIME:
        return _detector(name, *load_detector(path, device=str(choose_device("auto"))))


def load_upload(data: bytes, file_name: str) -> Detector:
    """The detector in an uploaded file, whose architecture follows from its contents. UserError for any other file."""
    if len(data) > MAX_WEIGHTS_MEGABYTES * 2**20:
        found = f"{len(data) / 2**20:.1f} MB"
        raise UserError(f"{file_name}: {found}, expected a weights file of at most {MAX_WEIGHTS_MEGABYTES} MB")
    with ONE_AT_A_TIME:
        if not file_name.lower().endswith(SUFFIX):
            model, info = checkpoint.load_model_bytes(data, file_name)
            return _detector(file_name, model.to(choose_device("auto")), info)
        onnx = load_onnx_bytes(data, file_name)
        detector = _detector(file_name, onnx.eval(), describe_onnx(onnx))
        try:
            detector.predictor([np.zeros((32, 32, 3), np.uint8)])
        except Exception as error:  # a graph may do anything that onnxruntime raises an error for
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file_name}: an ONNX file that does not run as a detector: {reason}") from None
        return detector


def _detector(name: str, model: nn.Module, info: CheckpointInfo) -> Detector:
    size = info.image_size
    is_met = 0 < size <= MAX_IMAGE_SIZE and size % SIZE_MULTIPLE == 0
    expected = f"a multiple of {SIZE_MULTIPLE} in {SIZE_MULTIPLE}..{MAX_IMAGE_SIZE}"
    expect(is_met, name, f"image_size {size}", expected)
    is_onnx = isinstance(model, OnnxDetector)
    predictor = Predictor(model, image_size=size, device="cpu" if is_onnx else choose_device("auto"))
    parameters = None if is_onnx else sum(parameter.numel() for parameter in model.parameters())
    return Detector(name, model, info, predictor, parameters)


def detect(detector: Detector, picture: np.ndarray, *, score: float, iou: float) -> Detections:
    """The detections in a picture, uint8 RGB (H, W, 3), in its pixels, best first."""
    predictor = copy.copy(detector.predictor)  # sessions share the detector and have thresholds of their own
    predictor.detection = DetectionSettings(score, iou)
    with ONE_AT_A_TIME:
        return predictor([picture])[0]


# ------------------------------------------------------------------- what the page shows of detections


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one picture, from letterbox to suppression: the median, the least and the most of some rounds."""

    median: float
    least: float
    most: float
    rounds: int

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1
        return f"{self.median:.{digits}f} ms ({self.least:.{digits}f} to {self.most:.{digits}f})"


def measure_latency(pair: Sequence[Detector], picture: np.ndarray) -> list[Latency]:
    """The latency of each detector at the thresholds predictor.SHOWN.

    They take turns after a round that is not counted, so that other load on the machine affects all of them alike.
    """
    calls = {number: functools.partial(detector.predictor, [picture]) for number, detector in enumerate(pair)}
    with ONE_AT_A_TIME:
        rough = sum(rotate(calls, 1, wall_seconds)[number][0] for number in calls)
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(TIMED_SECONDS / max(rough, 1e-9))))
        seconds = rotate(calls, rounds, wall_seconds)
    times = [[1000 * value for value in seconds[number]] for number in calls]
    return [Latency(statistics.median(row), min(row), max(row), rounds) for row in times]


def class_chips(found: Detections, names: Sequence[str]) -> str:
    """HTML: each class as a chip, those that were found first, with their counts and in the colours of their boxes."""
    counts = Counter(found.labels.tolist())
    rows = [*(label for label, _ in counts.most_common()), *(k for k in range(len(names)) if k not in counts)]
    chips = []
    for label in rows[: max(MAX_CHIPS, len(counts))]:
        name = html.escape(names[label] if 0 <= label < len(names) else str(label))
        if count := counts[label]:
            fill, ink = class_color(label), text_color(class_color(label))
            chips.append(f'<span class="chip" style="background:rgb{fill};color:rgb{ink}">{name} <b>{count}</b></span>')
        else:
            chips.append(f'<span class="chip chip-none">{name}</span>')
    if rest := rows[len(chips) :]:
        title = html.escape(", ".join(names[label] for label in rest), quote=True)
        chips.append(f'<span class="chip chip-none" title="{title}">and {len(rest)} more</span>')
    return f'<div class="chips">{"".join(chips)}</div>'
