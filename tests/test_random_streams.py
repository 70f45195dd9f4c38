"""Every purpose, rank, epoch and step has a stream of its own."""

import itertools

import pytest
import torch

from random_streams import Stream, seeded_generator


def test_no_two_streams_are_the_same():
    values = (0, 1, 2, 2**32, 2**40 + 1)  # of seeds, epochs, batches and ranks
    streams = [(s, numbers) for s in Stream for numbers in itertools.product(values, repeat=len(s.value[1]))]
    seeds = {seeded_generator(stream, *numbers).initial_seed() for stream, numbers in streams}
    assert len(seeds) == len(streams) > 1000


def test_the_numbers_of_the_purposes_differ():
    assert len({stream.value[0] for stream in Stream}) == len(Stream)
    assert len(Stream) == len(Stream.__members__)  # two of equal values would be one


def test_a_stream_is_a_pure_function_of_its_numbers():
    first, again = (torch.rand(3, generator=seeded_generator(Stream.STEP, 3, 4, 1)) for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="ORDER: found 3 numbers, expected seed, pass"):
        seeded_generator(Stream.ORDER, 1, 2, 3)
