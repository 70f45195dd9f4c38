"""Runs an ONNX file of export.py with onnxruntime on the CPU, with the interface of a detector.

The letterbox before it is the same as for the PyTorch model, and so is the suppression after it, for a file that ends
in boxes and scores. The results differ only by rounding.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import CheckpointInfo
from engine.onnx_files.graph import DETECTIONS, GraphInfo, read_info, selection_inputs
from errors import UserError, require
from kernels.nms import select_detections
from structures import Detections, DetectionSettings

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxOutput:
    """The result of OnnxDetector.forward for images (B, 3, H, W).

    boxes_xyxy (B, A, 4) and scores (B, A, K), or None if the file selects detections itself: OnnxDetector.detect then
    runs it, because it needs the thresholds.
    """

    images: Tensor
    boxes_xyxy: Tensor | None
    scores: Tensor | None


class OnnxDetector(nn.Module):
    """A detector without parameters, for inference only: forward, detect and num_classes.

    size: (H, W) that the file accepts; None: any multiples of 32. has_selection: whether it ends in detections. A file
    with a fixed batch of one gets the images of a batch one by one.
    """

    def __init__(self, session: "InferenceSession", info: GraphInfo, path: str | Path) -> None:
        super().__init__()
        self.session, self.info, self.path = session, info, path
        self.num_classes = len(info.names)
        self.has_selection = [output.name for output in session.get_outputs()] == list(DETECTIONS)
        batch, _, *size = session.get_inputs()[0].shape
        self.is_single = batch == 1
        self.size = None if isinstance(size[0], str) else tuple(size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxDetector":
        return self  # immutable

    def forward(self, images: Tensor) -> OnnxOutput:
        """images (B, 3, H, W) float in [0, 1]. UserError if the file needs another size."""
        self.check_size(*images.shape[2:])
        images = images.detach().float().cpu()
        if self.has_selection:
            return OnnxOutput(images, None, None)
        parts = [self.session.run(None, {"images": part.numpy()}) for part in self._parts(images)]
        boxes_xyxy, scores = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts))
        return OnnxOutput(images, boxes_xyxy, scores)

    def check_size(self, height: int, width: int) -> None:
        """UserError if the file needs another size."""
        if self.size is not None and (height, width) != self.size:
            expected = f"expected {self.size[1]}, or a file exported with --dynamic"
            raise UserError(f"{self.path}: found pictures of {width} px, {expected}")

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.contiguous().split(1 if self.is_single else max(1, len(images)))

    def detect(
        self, output: OnnxOutput, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """The same as for the PyTorch model: best first, after class-wise suppression unless it needs none."""
        if not self.info.suppresses:
            iou_threshold = 1.0  # no IoU is above it
        detection = DetectionSettings(score_threshold, iou_threshold, max_detections)
        if not self.has_selection:
            assert output.boxes_xyxy is not None and output.scores is not None  # forward ran the file
            return select_detections(output.boxes_xyxy, output.scores, **asdict(detection))
        settings = selection_inputs(detection)
        found = []
        for part in self._parts(output.images):
            rows = self.session.run(None, {"images": part.numpy(), **settings})
            boxes_xyxy, scores, labels, image = map(torch.from_numpy, rows)
            counts = image.bincount(minlength=len(part)).tolist()
            columns = (boxes_xyxy.split(counts), scores.split(counts), labels.split(counts))
            found += [Detections(*columns_of_image) for columns_of_image in zip(*columns)]
        return found


def open_session(model: str | Path | bytes) -> "InferenceSession":
    """An onnxruntime session on the CPU with as many threads as PyTorch uses, which sleep between runs."""
    runtime = require("onnxruntime", "export", "an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # spinning threads would slow whatever runs next
    options.add_session_config_entry(
        "session.x64quantprecision", "1"
    )  # without VNNI, sums of int8 products would be cut at 16 bits
    options.log_severity_level = 3  # errors only; warnings are about the graph, not about the user's input
    return runtime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


def load_onnx(path: str | Path) -> OnnxDetector:
    """The detector in a file. UserError if the file is missing, damaged or not written by export.py."""
    path = Path(path)
    require("onnxruntime", "export", f"{path}: an ONNX file")
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected an ONNX file")
    return _open_onnx(path, path)


def load_onnx_bytes(data: bytes, name: str) -> OnnxDetector:
    """As load_onnx, for a file in memory. It may refer to no other file, as large graphs do. `name` names it in errors.

    onnxruntime parses the file and runs its graph: nothing here limits what that costs.
    """
    onnx = require("onnx", "export", f"{name}: an ONNX file")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf has exceptions of its own in each of its implementations
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: damaged or not an ONNX file: {reason}") from None
    if any(isinstance(part, onnx.TensorProto) and part.external_data for part in _messages(model)):
        raise UserError(f"{name}: its weights are in another file, expected an ONNX file that holds them")
    return _open_onnx(data, Path(name))


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all in it, of which protobuf allows a hundred within another."""
    yield message
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


def _open_onnx(model: Path | bytes, path: Path) -> OnnxDetector:
    try:
        session = open_session(model)
    except Exception as error:  # onnxruntime has a separate exception class for every status
        reason = str(error).splitlines()[0].rsplit(" : ", 1)[-1]
        raise UserError(f"{path}: damaged or not an ONNX file: {reason}") from None
    info = read_info(session.get_modelmeta().custom_metadata_map, path)
    inputs = session.get_inputs()
    if not inputs or inputs[0].name != "images" or len(inputs[0].shape) != 4:
        raise UserError(f"{path}: its first input is not `images` (B, 3, H, W), expected a file that export.py wrote")
    return OnnxDetector(session, info, path)


def describe_onnx(detector: OnnxDetector) -> CheckpointInfo:
    """The description of an ONNX file, as checkpoint.load_model returns it for a checkpoint."""
    info = detector.info
    config: dict[str, Any] = {"evaluation": info.evaluation} if info.evaluation else {}
    if info.classes:
        config["data"] = {"classes": info.classes}
    if info.random_teachers:
        config["teachers"] = [{"name": name, "weights": checkpoint.RANDOM} for name in info.random_teachers]
    return CheckpointInfo(info.arch, info.names, info.image_size, source=info.source, config=config)


def load_detector(
    path: str | Path, arch: str | None = None, *, device: str = "cpu"
) -> tuple[nn.Module, CheckpointInfo]:
    """The detector in an ONNX file (suffix .onnx) or in a checkpoint (checkpoint.load_model), in eval mode.

    An ONNX file always runs on the CPU and in its own precision.
    """
    if Path(path).suffix.lower() != SUFFIX:
        return checkpoint.load_model(path, arch, device=device)
    detector = load_onnx(path)
    info = detector.info
    if arch is not None and arch != info.arch:
        raise UserError(f"{path}: holds {info.arch}, expected {arch}")
    return detector.eval(), describe_onnx(detector)


def check_precision(model: nn.Module, precision: str) -> None:
    """UserError for bfloat16 with an ONNX file, which computes in its own precision whatever is asked for."""
    if precision == "bfloat16" and isinstance(model, OnnxDetector):
        found = f"computes in {model.info.precision}, found the precision bfloat16"
        raise UserError(f"{model.path}: {found}, expected float32 or auto")
