"""Streams of random numbers that have nothing to do with one another: one for each purpose, rank, epoch and step."""

from enum import Enum

import numpy as np
import torch


class Stream(Enum):
    """What is drawn: a number of its own, which a repeated run has to find unchanged, and what the stream depends on.

    A stream that names the rank is another one in each process of a run; the others are shared by all processes.
    """

    ORDER = 2, ("seed", "pass")  # of the pictures
    AUGMENTATION = 4, ("seed", "epoch", "batch", "rank")
    STEP = 5, ("seed", "step", "rank")  # torch's global generator: what losses and layers sample
    CHOICE = 6, ("seed",)  # of real pictures to be condensed
    CROPS = 7, ("seed",)
    NOISE = 8, ("seed",)  # that condensed pictures begin as
    MATCHING = 9, ("seed", "step")  # real pictures and their augmentation in a step of gradient matching
    NETWORK = 10, ("seed", "place", "life")  # the weights of a network of the pool
    NETWORK_STEP = 11, ("seed", "place", "life", "step")  # its training


def seeded_generator(stream: Stream, *numbers: int) -> torch.Generator:
    """A CPU generator for one stream. numbers: what it depends on, whole and in 0..2^64 - 1, in the stream's order.

    Two streams, or two different lists of numbers, give generators that draw independently.
    """
    number, names = stream.value
    if len(numbers) != len(names):
        raise ValueError(f"{stream.name}: found {len(numbers)} numbers, expected {', '.join(names)}")
    # Numbers of a fixed width and a fixed count: SeedSequence itself takes (0,) and (0, 0) for the same.
    entropy = [number, *(word for n in numbers for word in (n & 0xFFFFFFFF, n >> 32))]
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))
