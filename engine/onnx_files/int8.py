"""Post-training quantization of an ONNX graph to 8-bit integers with onnxruntime.

Weights become int8 with a scale per output channel; activations become uint8 with a scale per tensor, from their range
on the calibration pictures. The last convolutions and the decoding after them stay float32. They take 1 to 3% of the
time; 8 bits cannot hold a pixel position in a 640 px image; and YOLOv5 has boxes, objectness and class logits in one
tensor, which no single scale fits (quantizing them costs a YOLOv5s trained on BCCD 0.05 of its 0.60 mAP50-95).
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.onnx_files.graph import without_warnings
from errors import require

if TYPE_CHECKING:
    from onnx import ModelProto

OPERATORS = ("Conv", "Mul", "Sigmoid", "LeakyRelu", "Concat", "MaxPool", "Resize", "Add", "Split")


class _Reader:
    """Gives onnxruntime the calibration images."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image}


def quantize(model: "ModelProto", images: Iterable[np.ndarray]) -> "ModelProto":
    """A graph from graph.trace and calibration images (1, 3, H, W) float32 in [0, 1] -> the graph in int8.

    Inputs and outputs stay float32. Convolutions, except the last ones, and the OPERATORS before them are quantized.
    """
    import onnx

    quantization = require("onnxruntime.quantization", "export", "quantization")
    model = onnx.shape_inference.infer_shapes(model)
    with without_warnings(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            model,
            path,
            _Reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            nodes_to_exclude=float_nodes(model),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(path)


def float_nodes(model: "ModelProto") -> list[str]:
    """The names of nodes that no later convolution depends on: the last convolutions and all nodes after them."""
    needed: set[str] = set()  # values that lead to a convolution
    names = []
    for node in reversed(model.graph.node):  # nodes are in topological order
        is_needed = bool(needed.intersection(node.output))
        if not is_needed:
            names.append(node.name)
        if is_needed or node.op_type == "Conv":
            needed.update(node.input)
    return names
