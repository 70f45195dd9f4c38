"""The shapes of a search: the widths and depths of a YOLOv8, within a range and between two numbers of FLOPs."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

import models
from distill.pruning.files import widths_text
from engine.training.flops import forward_flops
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
        """Of a forward pass for one image (engine/training/flops.py)."""
        return flops_of(self.arch, self.image_size, self.num_classes, shape)

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
        """The control without a search: the architecture's own depths, its widths times one factor, the largest."""
        own = own_shape(self.arch)
        low, high = 0, 2**10
        shape_of = lambda k: Shape(tuple(MULTIPLE * max(1, round(c * k / 2**12)) for c in own.channels), own.depths)
        while high - low > 1:  # FLOPs rise with the factor k / 512
            middle = (low + high) // 2
            low, high = (middle, high) if self.flops(shape_of(middle)) <= self.high else (low, middle)
        return shape_of(low)

    def widths_text(self, shape: Shape) -> str:
        """The content of its file of widths, for `student.widths`."""
        with torch.random.fork_rng(devices=[]):
            model = models.build(self.arch, self.num_classes, channels=shape.channels, depths=shape.depths)
        return widths_text(self.arch, find_groups(model).widths())


def space_of(
    arch: str,
    num_classes: int,
    image_size: int,
    *,
    flops: float,
    least: float,
    widths: tuple[float, ...],
    depth: int,
) -> Space:
    """The space around a YOLOv8. flops: the limit, as a share of its own; least: as a share of the limit.

    widths: the least and the largest factor of a stage's channels. depth: the largest.
    """
    own = own_shape(arch)
    channels = tuple(
        tuple(w for w in range(MULTIPLE, int(widths[1] * c) + 1, MULTIPLE) if w >= widths[0] * c) for c in own.channels
    )
    if not all(channels):
        found = f"key 'search.widths': {widths[0]:g} to {widths[1]:g} of {', '.join(map(str, own.channels))} channels"
        raise UserError(f"{found} hold no multiple of {MULTIPLE} for every stage, expected a wider range")
    high = flops * flops_of(arch, image_size, num_classes, own)
    return Space(arch, num_classes, image_size, channels, tuple(range(1, depth + 1)), least * high, high)


def own_shape(arch: str) -> Shape:
    size = models.size_of(arch)
    assert size is not None, f"{arch} is no YOLOv8"
    return Shape(size.channels, size.all_depths)


@functools.cache
def flops_of(arch: str, image_size: int, num_classes: int, shape: Shape) -> int:
    return forward_flops(arch, image_size, num_classes, channels=shape.channels, depths=shape.depths)


def choose(values: Sequence[Value], generator: torch.Generator) -> Value:
    """One of the values, all equally likely."""
    return values[int(torch.randint(len(values), (), generator=generator))]
