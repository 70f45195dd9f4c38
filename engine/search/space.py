"""The shapes of a search: the widths and depths of a YOLOv8, within a range and between two numbers of FLOPs."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

import models
from distill.pruning.files import widths_text
from engine.search.config import SearchConfig
from errors import UserError
from layers.channel_groups import find_groups

Value = TypeVar("Value")
MULTIPLE = 8  # of which widths are multiples
TRIES = 2000  # draws before a limit counts as too narrow


@dataclass(frozen=True, order=True)
class Shape:
    """channels: of the maps at stride 2, 4, 8, 16, 32. depths: bottlenecks of the backbone's stages at stride 4, 8, 16,
    32 and of each block of the neck.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in the names of its runs: 16-32-64-128-256_1-2-2-1-1."""
        return "-".join(map(str, self.channels)) + "_" + "-".join(map(str, self.depths))


@dataclass(frozen=True)
class Space:
    """Every stage has one of its widths and one of the depths; together they cost low <= FLOPs <= high.

    channels: for each stage the widths to choose from. depths: for all stages.
    """

    arch: str
    num_classes: int
    image_size: int
    channels: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    low: float
    high: float

    def flops(self, shape: Shape) -> int:
        """The FLOPs of a forward pass for one image."""
        return count_flops(shape, self.num_classes, self.image_size)

    def holds(self, shape: Shape) -> bool:
        """Whether its FLOPs lie within the limits."""
        return self.low <= self.flops(shape) <= self.high

    def draw(self, generator: torch.Generator, taken: Collection[Shape] = ()) -> Shape:
        """A shape, uniform over all within the limits that are not taken."""
        for _ in range(TRIES):
            channels = tuple(choose(values, generator) for values in self.channels)
            shape = Shape(channels, tuple(choose(self.depths, generator) for _ in range(len(self.channels))))
            if shape not in taken and self.holds(shape):
                return shape
        raise UserError(
            f"key 'search': none of {TRIES:,} random shapes costs {self.low / 1e9:.3f} to {self.high / 1e9:.3f} "
            "GFLOPs and is new, expected other search.flops, search.least or search.widths"
        )

    def mutate(self, shape: Shape, generator: torch.Generator, taken: Collection[Shape] = ()) -> Shape:
        """The shape with one width or depth, chosen at random, replaced by another value, also chosen at random.

        Until the result is within the limits and not taken.
        """
        count = len(self.channels)
        for _ in range(TRIES):
            genes = [*shape.channels, *shape.depths]
            place = choose(range(2 * count), generator)
            values = self.channels[place] if place < count else self.depths
            if others := [value for value in values if value != genes[place]]:
                genes[place] = choose(others, generator)
            child = Shape(tuple(genes[:count]), tuple(genes[count:]))
            if child != shape and child not in taken and self.holds(child):
                return child
        return self.draw(generator, taken)  # all its neighbours are taken

    def scaled(self) -> Shape:
        """The control without a search: the architecture's own depths, its widths times one factor, the largest.

        UserError where even its narrowest shape costs more than the limit.
        """
        own = own_shape(self.arch)

        def times(k: int) -> Shape:
            """The widths times k / 512, in multiples of 8: their FLOPs rise with k."""
            return Shape(tuple(MULTIPLE * max(1, round(c * k / 2**12)) for c in own.channels), own.depths)

        largest = bisect_right(range(2**40), self.high, key=lambda k: self.flops(times(k))) - 1
        if largest < 0:
            least = f"{self.flops(times(0)) / 1e9:.3f} GFLOPs"
            raise UserError(f"key 'search.flops': the narrowest {self.arch} costs {least}, expected a higher limit")
        return times(largest)

    def widths_text(self, shape: Shape) -> str:
        """The content of its file of widths, for `student.widths`."""
        with torch.random.fork_rng(devices=[]):
            model = models.build(self.arch, self.num_classes, channels=shape.channels, depths=shape.depths)
        return widths_text(self.arch, find_groups(model).widths())


def space_of(arch: str, num_classes: int, image_size: int, settings: SearchConfig) -> Space:
    """The space around a YOLOv8 that the section `search` of a config describes."""
    own, (narrowest, widest) = own_shape(arch), settings.widths
    channels = tuple(
        tuple(w for w in range(MULTIPLE, int(widest * c) + 1, MULTIPLE) if w >= narrowest * c) for c in own.channels
    )
    if not all(channels):
        found = f"key 'search.widths': {narrowest:g} to {widest:g} of {', '.join(map(str, own.channels))} channels"
        raise UserError(f"{found} hold no multiple of {MULTIPLE} for every stage, expected a wider range")
    high = settings.flops * count_flops(own, num_classes, image_size)
    depths = tuple(range(1, settings.depth + 1))
    return Space(arch, num_classes, image_size, channels, depths, settings.least * high, high)


def own_shape(arch: str) -> Shape:
    size = models.size_of(arch)
    assert size is not None, f"{arch} is no YOLOv8"
    return Shape(size.channels, size.all_depths)


def count_flops(shape: Shape, num_classes: int, image_size: int) -> int:
    """What engine.training.flops counts for a YOLOv8 (yolo/yolov8.py), without building it: thousands are drawn.

    Layer by layer: convolution(channels read, channels written, side of the kernel, stride of its map in pixels).
    """

    def convolution(c_in: int, c_out: int, kernel: int, stride: int) -> int:
        return 2 * c_in * c_out * kernel**2 * (image_size // stride) ** 2

    def c2f(c_in: int, c: int, depth: int, stride: int) -> int:
        half = c // 2
        blocks = depth * 2 * convolution(half, half, 3, stride)
        return convolution(c_in, c, 1, stride) + blocks + convolution((2 + depth) * half, c, 1, stride)

    c1, c2, c3, c4, c5 = shape.channels
    *stages, neck = shape.depths
    total = convolution(3, c1, 3, 2)
    for c_in, c, depth, stride in zip((c1, c2, c3, c4), (c2, c3, c4, c5), stages, (4, 8, 16, 32), strict=True):
        total += convolution(c_in, c, 3, stride) + c2f(c, c, depth, stride)
    total += convolution(c5, c5 // 2, 1, 32) + convolution(4 * (c5 // 2), c5, 1, 32)  # SPPF
    total += c2f(c5 + c4, c4, neck, 16) + c2f(c4 + c3, c3, neck, 8)
    total += convolution(c3, c3, 3, 16) + c2f(c3 + c4, c4, neck, 16)
    total += convolution(c4, c4, 3, 32) + c2f(c4 + c5, c5, neck, 32)
    for c, stride in zip((c3, c4, c5), (8, 16, 32), strict=True):
        for width, logits in ((max(64, c3 // 4), 64), (max(c3, min(num_classes, 100)), num_classes)):
            total += convolution(c, width, 3, stride) + convolution(width, width, 3, stride)
            total += convolution(width, logits, 1, stride)
    return total


def choose(values: Sequence[Value], generator: torch.Generator) -> Value:
    """One of the values, all equally likely."""
    return values[int(torch.randint(len(values), (), generator=generator))]
