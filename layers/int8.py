"""Networks that compute as their 8-bit file will: fake quantization, for calibration and for fine-tuning.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877: in the forward pass weights and activations are rounded to 8 bits, in floating point; the backward
pass takes the rounding for the identity (straight-through estimator, arXiv:1308.3432).

    weights       s_c = max |w_c| / 127 per output channel c,    w^ = s_c clip(round(w / s_c), -127, 127)
    activations   s = (high - low) / 255 per tensor, z = round(-low / s),    x^ = s (clip(round(x / s) + z, 0, 255) - z)

round() goes to the nearest integer, from halfway to the even one. low <= 0 <= high, so that 0 is exact. A module that
can round its results has a method `add_int8()` (yolo.layers.ConvBNAct); the function `add_int8` calls all of them. Last
convolutions and decoding stay float32; engine/onnx_files/int8.py has the reason.

Differences from the paper: BatchNorm is folded with its running statistics, which stay as they are, and not with those
of the batch: a run starts from trained weights. Ranges are means of percentiles, not of extremes, unless the percentile
is 100. Biases are not rounded here; the file has them as 32-bit integers, whose rounding is 1e4 times finer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.eval_mode import in_eval_mode
from layers.fusion import folded

WEIGHT_LEVELS = 127  # of each sign
ACTIVATION_LEVELS = 255
SMALLEST_SCALE = 1e-12  # of a weight: no number of a trained network is as small
SILU_FLOOR = -8.0  # below it silu(z) > -0.003: such z need no steps of their own
MOMENTUM = 0.01  # of a range, once 1 / MOMENTUM batches were seen; before, it is their mean
SAMPLE = 2**16  # numbers of a tensor that a percentile is taken of; 99.9 then has 65 above it
NAME = "int8"  # of every module below in its owner, and so in the names of a state dict

Value = TypeVar("Value")


def weight_scales(weight: Tensor) -> Tensor:
    """s_c of a weight (C, ...): (C,), at least SMALLEST_SCALE, which a channel of zeros gets."""
    return (weight.detach().flatten(1).abs().amax(1) / WEIGHT_LEVELS).clamp(min=SMALLEST_SCALE)


class Int8Weight(nn.Module):
    """w^ of a weight (C, ...). Every number is within its range, so the gradient passes as a whole."""

    def forward(self, weight: Tensor) -> Tensor:
        scales = weight_scales(weight)
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)


class Int8Range(nn.Module):
    """Rounds one activation: x of any shape -> x^. The gradient passes where x is within the range, else it is 0.

    low, high: the range. seen: how many tensors it is the mean of. A range without width rounds to itself: all zeros.
    floor: the lowest `low`.
    observed_percentile: None, or p: each tensor that passes moves the range towards its percentiles 100 - p and p.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, floor: float = -math.inf) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.observed_percentile: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observed_percentile is not None and x.numel():
            self.observe(x.detach(), self.observed_percentile)
        scale, zero = self.grid()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, ACTIVATION_LEVELS)

    def grid(self) -> tuple[Tensor, Tensor]:
        """s () float32 and z () int32."""
        width = self.high - self.low
        scale = torch.where(width > 0, width / ACTIVATION_LEVELS, 1.0)
        return scale, (-self.low / scale).round().clamp(0, ACTIVATION_LEVELS).int()

    @torch.no_grad()
    def observe(self, x: Tensor, percentile: float) -> None:
        low, high = percentiles(x, percentile)
        self.seen += 1
        weight = (1 / self.seen).clamp(min=MOMENTUM)
        self.low.lerp_(low.clamp(self.floor, 0).float(), weight)
        self.high.lerp_(high.clamp(min=0).float(), weight)


def percentiles(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The values below which 100 - p and p percent of x lie; the least and the largest for 100.

    They are taken of at most SAMPLE evenly spaced numbers, the extremes of all.
    """
    if percentile >= 100:
        return x.amin(), x.amax()
    flat = x.flatten()
    flat = flat[:: math.ceil(len(flat) / SAMPLE) | 1]  # an odd step passes through all columns of a map
    rank = max(1, math.ceil(len(flat) * percentile / 100))
    return flat.kthvalue(len(flat) + 1 - rank).values, flat.kthvalue(rank).values


class Int8Conv(nn.Module):
    """A convolution, its BatchNorm and its activation in 8 bits. `has_gate`: the activation is SiLU, z sigmoid(z).

        z = [ w^ * [x] + b ],    y = [ z [sigmoid(z)] ]   or   y = [ leaky(z) ]        [ ] rounds by a range of its own

    [x] is there where x is not rounded yet: a concatenation, the image (add_int8 finds that out).
    In float32 under autocast, too: bfloat16 has 8 bits itself, and would round what is rounded already.
    """

    def __init__(self, *, has_gate: bool) -> None:
        super().__init__()
        self.input: Int8Range | None = None
        self.weight, self.output = Int8Weight(), Int8Range()
        self.sum = Int8Range(SILU_FLOOR if has_gate else -math.inf)
        self.gate = Int8Range() if has_gate else None

    def forward(self, x: Tensor, conv: nn.Conv2d, bn: nn.Module, activation: Callable[[Tensor], Tensor]) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # asked first: the exporter cannot trace the context below
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.float(), conv, bn, activation)
        weight, bias = folded(conv, bn) if isinstance(bn, nn.BatchNorm2d) else (conv.weight, conv.bias)
        x = x if self.input is None else self.input(x)
        z = self.sum(F.conv2d(x, self.weight(weight), bias, conv.stride, conv.padding, conv.dilation, conv.groups))
        return self.output(activation(z) if self.gate is None else z * self.gate(z.sigmoid()))


@runtime_checkable
class Quantizable(Protocol):
    """A module that can round its results to 8 bits."""

    def add_int8(self) -> None: ...


def add_int8(model: nn.Module) -> None:
    """Let a detector round to 8 bits, in place. Its ranges are empty: they must be observed or loaded.

    ValueError, in one line, for a family whose layers cannot.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Quantizable)}
    if not modules:
        raise ValueError("its layers do not round to 8 bits, those of the YOLOs do")
    for module in modules.values():
        module.add_int8()
    rounded: list[Tensor] = []  # kept, so that no later tensor takes the place of one of them

    def look(conv: Int8Conv, inputs: tuple) -> None:
        if not any(inputs[0] is known for known in rounded):
            conv.input = Int8Range().to(inputs[0].device)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, Int8Conv)]
    hooks += [model.get_submodule(n).register_forward_hook(lambda *call: rounded.append(call[2])) for n in modules]
    try:
        with torch.no_grad(), in_eval_mode(model):
            model(torch.zeros(1, 3, 64, 64, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()


def remove_int8(model: nn.Module) -> None:
    """The inverse of add_int8, in place: the same weights, in float32."""
    for module in model.modules():
        if isinstance(module, Quantizable):
            setattr(module, NAME, None)


def has_int8(model: nn.Module) -> bool:
    return any(True for _ in ranges_of(model))


def ranges_of(model: nn.Module) -> Iterator[Int8Range]:
    return (module for module in model.modules() if isinstance(module, Int8Range))


def observe_ranges(model: nn.Module, percentile: float | None) -> None:
    """From now on every forward pass moves the ranges of the model towards this percentile; None: they stay."""
    for module in ranges_of(model):
        module.observed_percentile = percentile


def without_ranges(state: Mapping[str, Value]) -> dict[str, Value]:
    """The entries of a state dict that the model has without add_int8."""
    return {name: value for name, value in state.items() if NAME not in name.split(".")}
