"""Post-training quantization of an ONNX graph to 8-bit integers, by onnxruntime.

Weights become int8, per output channel; activations uint8, per tensor, over the range they took on the calibration
pictures. Decoding stays float32: a pixel of a 640 px picture does not fit into 8 bits, and there is little to gain.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import require
from onnx_graph import without_warnings

if TYPE_CHECKING:
    from onnx import ModelProto

OPERATORS = ("Conv", "Mul", "Sigmoid", "Concat", "MaxPool", "Resize", "Add", "Split")


class _Reader:
    """What onnxruntime asks for calibration pictures."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image}


def quantize(model: "ModelProto", images: Iterable[np.ndarray]) -> "ModelProto":
    """A graph of onnx_graph.trace and calibration images (1, 3, H, W) float32 in [0, 1] -> the graph in int8.

    Inputs and outputs stay float32. Everything that some convolution still needs is quantized, as far as OPERATORS
    name it; what comes after the last convolutions, the decoding, is not.
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
            nodes_to_exclude=decoding_nodes(model),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(path)


def decoding_nodes(model: "ModelProto") -> list[str]:
    """Names of the nodes that no convolution needs, convolutions excepted."""
    needed: set[str] = set()  # values that lead to a convolution
    names = []
    for node in reversed(model.graph.node):  # nodes are in topological order
        if node.op_type == "Conv" or needed.intersection(node.output):
            needed.update(node.input)
        else:
            names.append(node.name)
    return names
