"""Which channels of a network belong together, so that it can be made narrower: pruning, and a start from a teacher.

A layer writes channels (the rows of its weight) and reads channels (the columns). Written and read channels hang
together:

    x = conv1(images)        conv1 writes x                         a channel that is removed is
    y = x + conv2(x)         conv2 reads x and writes y, and the    - a row of conv1 and its BatchNorm
                             addition makes channel k of x and      - a row of conv2 and its BatchNorm
                             channel k of y one channel             - a column of conv2
    z = conv3(cat(x, y))     conv3 reads every channel twice        - two columns of conv3

A *group* is a set of layers with the same channels, here n channels that conv1 and conv2 write, and conv2 and conv3
read. Each of the n can be removed alone, from all of these layers at once; what is left computes the same as the whole
network in which the removed channels are 0. Channels that no layer reads (the predictions), and the three of the image,
are in no group: they stay.

Groups are not written down for each model. `find_groups` lets labels ride through the model's own `forward`, in the
place of pixels: a convolution, instead of computing, writes down the labels that it finds in its columns, and sends a
new label into every channel of its output. Whatever moves channels about (concatenation, chunks, pooling, upsampling,
flattening, RoIAlign) moves the labels with them. Two labels that are added are one channel from then on. So residual
connections, C2f, C3, SPPF, a pyramid whose levels share a head, and blocks that are written tomorrow need no rule.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layers.int8 import has_int8

IMAGE_SIZE = 128  # pixels: the coarsest map of the trace has 4 x 4 cells
BOX_XYXY = (32.0, 32.0, 96.0, 96.0)  # the region in which the second stage of a detector is traced
PIXEL = float("nan")  # the label of the image: it stays nan in every normalisation
STAYS = -1  # the channel of rows and columns that are never removed
TOLERANCE = 1e-12  # labels are numbers in 0..1; pooling may round them
ACTIVATIONS = {"silu", "silu_", "relu", "relu_", "leaky_relu", "leaky_relu_", "hardswish", "hardswish_"}
ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class ChannelGroups:
    """The channels of a model, numbered 0..C-1, and where they are in its state dict.

    axes: (entry of the state dict, dimension) -> (size,) int64: the channel at every index of that dimension, or STAYS.
        Entries and dimensions that are not named have no channels.
    groups: name -> (n,) int64, the channels of the group in the order in which its layers have them. The name is that
        of the first layer that writes them; where this layer's rows are of several groups, /1, /2, ... follow.
    norms: the names of the BatchNorms.
    cells: the weight of each convolution and linear layer -> how often it is applied, per pixel of the image, and per
        region in the second stage of a detector.
    """

    axes: dict[tuple[str, int], Tensor]
    groups: dict[str, Tensor]
    norms: tuple[str, ...]
    cells: dict[str, tuple[float, float]]

    @property
    def count(self) -> int:
        """C: the number of channels that can be removed."""
        return sum(len(channels) for channels in self.groups.values())

    def widths(self) -> dict[str, int]:
        """The number of channels of each group."""
        return {name: len(channels) for name, channels in self.groups.items()}

    def best(self, scores: Tensor, widths: Mapping[str, int]) -> Tensor:
        """(C,) bool: the widths[name] channels of each group with the highest scores (C,); of equal ones the first."""
        is_best = torch.zeros(self.count, dtype=torch.bool)
        for name, channels in self.groups.items():
            order = scores[channels].argsort(descending=True, stable=True)
            is_best[channels[order[: widths[name]]]] = True
        return is_best

    def select(self, state: dict[str, Tensor], is_kept: Tensor) -> dict[str, Tensor]:
        """The state dict of the narrower model: without the rows and columns of the channels that are not kept.

        is_kept: (C,) bool. Entries that lose nothing are the same objects.
        """
        selected = dict(state)
        for (entry, dim), channels in self.axes.items():
            stays = (channels == STAYS) | is_kept[channels]
            if not stays.all():
                index = stays.nonzero().squeeze(1).to(selected[entry].device)
                selected[entry] = selected[entry].index_select(dim, index)
        return selected


def find_groups(model: nn.Module) -> ChannelGroups:
    """The channel groups of a detector, which stays as it was, mode and statistics included.

    ValueError, with the layer, for what is not understood: a convolution in several blocks, or one whose input was
    computed by an operation that neither moves channels nor is known here. Also for a model that rounds to 8 bits.
    """
    if has_int8(model):
        raise ValueError("its layers round to 8 bits (student.int8), expected one before that: prune it first")
    modes = [(module, module.training) for module in model.modules()]  # train: no norm is folded into its convolution
    trace = _Trace(model)
    try:
        model.train()
        with torch.no_grad(), trace:
            output = model(torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), PIXEL, dtype=torch.float64))
            predict_at: Callable[..., Any] | None = getattr(model, "predict_at", None)  # a second stage
            if predict_at is not None:
                trace.stage = 1
                predict_at(output, [torch.tensor([BOX_XYXY], dtype=torch.float64)])
    finally:
        for module, mode in modes:
            module.training = mode
    return trace.groups()


class _Trace(TorchFunctionMode):
    """Replaces the layers of a forward pass by ones that read and write labels.

    `axes` is as in ChannelGroups, with labels by their number instead of channels. The label of number n is the value
    labels[n]: random numbers, so that no sum or product of labels is a label. Number 0 is the image's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
        most = sum(len(p) for p in model.parameters() if p.dim() >= 2)
        self.labels = torch.rand(1 + most, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.sorted, self.order = self.labels[1:].sort()
        self.used = 1
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.norms: list[str] = []
        self.stage = 0  # 1 in the second stage
        self.cells: dict[str, list[float]] = {}  # of each stage
        self.parents = list(range(1 + most))  # of a label: another one of the same channel, or itself

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "linear"):
            return self._mix(func, *args, **(kwargs or {}))
        if name == "batch_norm":
            return self._normalise(*args, **(kwargs or {}))
        if name in ACTIVATIONS:
            return args[0]
        if name == "add_" and id(args[0]) in self.names:  # a BatchNorm counts its batches
            return args[0]
        if name in ADDITIONS and all(isinstance(x, Tensor) and x.dim() == 4 for x in args[:2]):
            return self._add(*args[:2])
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:  # it does not take labels, which are float64
            raise ValueError(f"{name}, an operation that channel groups do not know") from error

    def _mix(self, func, x: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any, **more: Any) -> Tensor:
        """A convolution or a linear layer: joins what it reads with what it read before, and writes new labels."""
        entry = self._name(weight)
        meta = [value.to("meta", weight.dtype) for value in (x, weight)]
        empty = func(*meta, None, *settings, **more)  # only its shape counts
        self.cells.setdefault(entry, [0.0, 0.0])[self.stage] += empty.numel() / len(weight)
        read = self._read(x, entry)
        is_depthwise = func is torch.conv2d and weight.shape[1] == 1 and len(weight) == len(read) > 1
        if not is_depthwise:
            if weight.shape[1] != len(read):
                raise ValueError(f"{entry}: a convolution in several blocks, expected one or a depthwise one")
            self._put(entry, 1, read)
        written = read if is_depthwise else self.axes.get((entry, 0))
        if written is None:
            written = torch.arange(self.used, self.used + len(weight))
            self.used += len(weight)
        self._put(entry, 0, written)
        if bias is not None:
            self._put(self._name(bias), 0, written)
        shape = (1, -1, 1, 1) if x.dim() == 4 else (1, -1)
        return self.labels[written].view(shape).expand(empty.shape).clone()

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, **settings: Any) -> Tensor:
        channels = self._read(x, self._name(weight))
        for entry in map(self._name, (mean, var, weight, bias)):
            self._put(entry, 0, channels)
        norm = self._name(weight).removesuffix(".weight")
        if norm not in self.norms:
            self.norms.append(norm)
        return x

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        self._join(self._read(x, "an addition"), self._read(y, "an addition"))
        return x

    def _name(self, value: Tensor) -> str:
        if id(value) not in self.names:
            raise ValueError("a layer whose weight is computed, expected a parameter; frozen norms cannot be traced")
        return self.names[id(value)]

    def _read(self, x: Tensor, reader: str) -> Tensor:
        """The numbers of the labels in x (B, C, H, W) or (B, C), as they stand in its first pixel: (C,) int64."""
        values = x[0, :, 0, 0] if x.dim() == 4 else x[0]
        place = torch.searchsorted(self.sorted, values.nan_to_num(0.0) - TOLERANCE).clamp(max=len(self.sorted) - 1)
        is_pixel = values.isnan()
        is_label = (self.sorted[place] - values).abs() <= TOLERANCE
        if not (is_label | is_pixel).all():
            raise ValueError(f"{reader}: its input was computed by an operation that channel groups do not know")
        return torch.where(is_pixel, 0, 1 + self.order[place])

    def _put(self, entry: str, dim: int, channels: Tensor) -> None:
        if (entry, dim) in self.axes:
            self._join(self.axes[entry, dim], channels)
        self.axes[entry, dim] = channels

    def _join(self, a: Tensor, b: Tensor) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            i, j = sorted((self._root(i), self._root(j)))
            self.parents[j] = i

    def _root(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return label

    def groups(self) -> ChannelGroups:
        """The groups that the trace found. One of a channel's labels, its root, stands for the channel."""
        roots = torch.tensor([self._root(label) for label in range(self.used)])
        axes = {place: roots[labels] for place, labels in self.axes.items()}
        is_read = torch.zeros(self.used, dtype=torch.bool)
        places: dict[int, list[tuple[str, int]]] = {}  # of each root: where it is, as often as it is there
        for place, own in axes.items():
            for root in own.tolist():
                places.setdefault(root, []).append(place)
            if place[1] == 1:
                is_read[own] = True
        is_read[0] = False
        alike: dict[tuple[tuple[str, int], ...], list[int]] = {}  # roots at the same places are one group
        for root in sorted(places):
            if is_read[root]:
                alike.setdefault(tuple(places[root]), []).append(root)
        of_layer: dict[str, list[list[int]]] = {}  # the groups of the first layer that writes them
        for where, members in alike.items():
            of_layer.setdefault(where[0][0].removesuffix(".weight"), []).append(members)
        members_of = {
            layer if len(parts) == 1 else f"{layer}/{number}": members
            for layer, parts in of_layer.items()
            for number, members in enumerate(parts, 1)
        }
        in_order = torch.tensor([root for members in members_of.values() for root in members], dtype=torch.int64)
        channel_of = torch.full((self.used,), STAYS)
        channel_of[in_order] = torch.arange(len(in_order))
        groups = {name: channel_of[members] for name, members in members_of.items()}
        channel_axes = {place: channel_of[own] for place, own in axes.items()}
        cells = {entry: (first / IMAGE_SIZE**2, second) for entry, (first, second) in self.cells.items()}
        return ChannelGroups(channel_axes, groups, tuple(self.norms), cells)
