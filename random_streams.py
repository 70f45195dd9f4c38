"""Independent streams of random numbers: one for each purpose, rank, epoch and step."""

from enum import Enum

import numpy as np
import torch


class Stream(Enum):
    """The purpose of a stream: its own number, which must never change, and the numbers that the stream depends on.

    A stream that depends on the rank differs between the processes of a run; all processes share the others.
    """

    ORDER = 2, ("seed", "pass")  # the order of the pictures
    AUGMENTATION = 4, ("seed", "epoch", "batch", "rank")
    STEP = 5, ("seed", "step", "rank")  # torch's global generator, from which losses and layers draw
    CHOICE = 6, ("seed",)  # which real pictures are condensed
    CROPS = 7, ("seed",)
    NOISE = 8, ("seed",)  # the first pixels of condensed pictures
    MATCHING = 9, ("seed", "step")  # real pictures and their augmentation in a step of gradient matching
    NETWORK = 10, ("seed", "place", "life")  # the first weights of a network of the pool
    NETWORK_STEP = 11, ("seed", "place", "life", "step")  # the training of that network
    LABELLED = 12, ("seed",)  # which pictures keep their labels
    UNLABELLED_ORDER = 13, ("seed", "pass")  # the order of the pictures without labels
    CHANNELS = 15, ("seed",)  # the channels that a student inherits at random
    SHAPES = 16, ("seed", "number")  # of a search: the shapes drawn at random
    MUTATION = 17, ("seed", "number")  # of a search: parents, and how a child differs


def seeded_generator(stream: Stream, *numbers: int) -> torch.Generator:
    """A CPU generator for one stream. numbers: those it depends on, integers in 0..2^64 - 1, in the stream's order.

    Different streams or different numbers give independent generators.
    """
    number, names = stream.value
    if len(numbers) != len(names):
        raise ValueError(f"{stream.name}: found {len(numbers)} numbers, expected {', '.join(names)}")
    # Each number as two words of 32 bits, because SeedSequence treats (0,) and (0, 0) alike.
    entropy = [number, *(word for n in numbers for word in (n & 0xFFFFFFFF, n >> 32))]
    high, low = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(high) << 32 | int(low))
