"""A detector that rounds to 8 bits (layers/int8.py) as an ONNX graph of 8-bit integers, and its calibration.

Every rounding of an activation becomes a QuantizeLinear and a DequantizeLinear, so the graph computes what the PyTorch
model computes, except for sums that lie between two integers. Weights are stored as int8 with a scale per output
channel, biases as int32 in the steps of input times weight, as integer convolution needs them.

The last convolutions and the decoding after them stay float32. They take 1 to 3% of the time; 8 bits cannot hold a
pixel position in a 640 px image; and YOLOv5 has boxes, objectness and class logits in one tensor, which no single scale
fits (quantizing them costs a YOLOv5s trained on BCCD 0.05 of its 0.60 mAP50-95).
"""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.onnx_files import graph as onnx_graph
from errors import naming
from layers.int8 import (
    WEIGHT_LEVELS,
    Int8Range,
    Int8Weight,
    add_int8,
    has_int8,
    observe_ranges,
    weight_scales,
)

if TYPE_CHECKING:
    from onnx import ModelProto

BIAS_LEVELS = 2.0**30  # of each sign: a bit of int32 is left for the sum of the products


class GraphRange(nn.Module):
    """An Int8Range as two nodes of a graph: x of any shape -> x^."""

    scale: Tensor
    zero: Tensor

    def __init__(self, own: Int8Range) -> None:
        super().__init__()
        scale, zero = own.grid()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.scale, self.zero)
        integers = torch.onnx.ops.symbolic("QuantizeLinear", [x, *grid], dtype=torch.uint8, shape=x.shape)
        return torch.onnx.ops.symbolic("DequantizeLinear", [integers, *grid], dtype=x.dtype, shape=x.shape)


def check_quantizable(model: nn.Module, arch: str) -> None:
    """UserError for a family that has no int8 form."""
    if not has_int8(model):
        with naming(f"{arch} has no int8 form", ValueError):
            add_int8(copy.deepcopy(model))


@torch.no_grad()
def calibrate(detector: nn.Module, images: Iterable[Tensor], percentile: float) -> nn.Module:
    """A copy of a detector in eval mode that rounds to 8 bits, with ranges from images (B, 3, H, W) in [0, 1]."""
    rounding = copy.deepcopy(detector).eval()
    add_int8(rounding)
    observe_ranges(rounding, percentile)
    for batch in images:
        rounding(batch)
    observe_ranges(rounding, None)
    return rounding


def trace_int8(detector: nn.Module, image_size: int, *, dynamic: bool) -> "ModelProto":
    """graph.trace of a detector that rounds to 8 bits, with the integers in the graph. Inputs and outputs are float32.

    detector: as for graph.trace, from `calibrate` or fine-tuned with its ranges.
    """
    detector = copy.deepcopy(detector)
    for module in list(detector.modules()):
        for name, child in module.named_children():
            if isinstance(child, Int8Range):
                setattr(module, name, GraphRange(child))
            elif isinstance(child, Int8Weight):
                setattr(module, name, nn.Identity())
    graph = onnx_graph.trace(detector, image_size, dynamic=dynamic)
    _store_integers(graph)
    return graph


def _store_integers(model: "ModelProto") -> None:
    """Replace weight and bias of every convolution whose input is dequantized by integers and a DequantizeLinear."""
    from onnx import numpy_helper

    graph = model.graph
    numbers = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    input_scale = {n.output[0]: numbers[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear"}
    nodes = list(graph.node)
    del graph.node[:]
    replaced = set()
    for node in nodes:
        sum_is_rounded = any(n.op_type == "QuantizeLinear" and n.input[0] == node.output[0] for n in nodes)
        if node.op_type == "Conv" and sum_is_rounded:
            data, weight, *bias = node.input  # the tracer leaves out a bias of zeros
            own = _integers(numbers[weight], numbers[bias[0]] if bias else None, float(input_scale[data]))
            for position, (integers, scales) in enumerate(own, 1):
                node.input[position] = _add_integers(model, node.input[position], integers, scales)
            replaced |= {weight, *bias}
        graph.node.append(node)
    kept = [entry for entry in graph.initializer if entry.name not in replaced]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _integers(weight: np.ndarray, bias: np.ndarray | None, input_scale: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """int8 and scales (C,) of a weight (C, ...), int32 and scales of a bias (C,), if any.

    The scale of a channel of next to nothing is enlarged until its bias fits into 32 bits.
    """
    scales = weight_scales(torch.from_numpy(weight.copy())).numpy().astype(np.float64)
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias) / (input_scale * BIAS_LEVELS))
    scales = scales.astype(np.float32)
    whole = np.rint(weight / scales.reshape(-1, *[1] * (weight.ndim - 1)))
    whole = whole.clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    if bias is None:
        return [(whole, scales)]
    bias_scales = np.float32(input_scale) * scales
    return [(whole, scales), (np.rint(bias / bias_scales.astype(np.float64)).astype(np.int32), bias_scales)]


def _add_integers(model: "ModelProto", name: str, integers: np.ndarray, scales: np.ndarray) -> str:
    """Add integers with a scale per row and the node that makes numbers of them; returns the name of its output."""
    from onnx import helper, numpy_helper

    parts = {"integers": integers, "scales": scales, "zeros": np.zeros(len(scales), integers.dtype)}
    inputs = [f"{name}.{part}" for part in parts]
    model.graph.initializer.extend(numpy_helper.from_array(value, own) for own, value in zip(inputs, parts.values()))
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dequantized"], name=name, axis=0))
    return cast(str, f"{name}.dequantized")
