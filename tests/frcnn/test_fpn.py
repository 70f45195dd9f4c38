"""FPN: the paper's sum of levels against an independent reference, names, sizes that do not divide, extra levels."""

import numpy as np
import pytest
import torch

from frcnn.fpn import FPN, fpn_names
from frcnn.norm import BatchNorm
from layers.fusion import fuse
from tests.reference.convolution import convolve
from tests.reference.random_statistics import draw_statistics

CHANNELS = {"c2": 3, "c3": 4, "c4": 5}


def maps_of(sizes, channels=CHANNELS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, c, *size, dtype=dtype, generator=generator)
        for (name, c), size in zip(channels.items(), sizes)
    }


def upsample(x, size):
    """Output place (i, j) reads the input place floor(i h / H), floor(j w / W)."""
    rows, columns = ([i * n // m for i in range(m)] for n, m in zip(x.shape[-2:], size))
    return x[:, :, rows][:, :, :, columns]


SIZES = {
    "halves": [(16, 8), (8, 4), (4, 2)],
    "odd": [(13, 7), (7, 4), (4, 2)],
    "single places": [(3, 2), (2, 1), (1, 1)],
    "one stride": [(5, 6), (5, 6), (3, 3)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matches_float64_reference(sizes):
    torch.manual_seed(0)
    fpn = FPN(CHANNELS, width=6).double()
    for name, parameter in fpn.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    maps = maps_of(sizes)
    with torch.no_grad():
        got = fpn(maps)
    p = {name: value.numpy() for name, value in fpn.state_dict().items()}
    merged, expected = None, {}
    for n in (4, 3, 2):
        lateral = convolve(maps[f"c{n}"].numpy(), p[f"lateral.c{n}.weight"], p[f"lateral.c{n}.bias"])
        merged = lateral if merged is None else lateral + upsample(merged, lateral.shape[-2:])
        expected[f"p{n}"] = convolve(merged, p[f"output.p{n}.weight"], p[f"output.p{n}.bias"])
    expected["p6"] = expected["p4"][:, :, ::2, ::2]
    assert list(got) == ["p2", "p3", "p4", "p6"] == list(fpn.channels)
    for name, value in got.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_pooled_level_is_max_pooling_of_one_place_at_stride_two():
    fpn = FPN({"c5": 2}, width=3)
    with torch.no_grad():
        levels = fpn({"c5": torch.randn(1, 2, 5, 4)})
    assert torch.equal(levels["p6"], torch.nn.functional.max_pool2d(levels["p5"], 1, stride=2))


def test_names_strides_and_channels_of_the_levels():
    fpn = FPN({"c5_first": 3, "c5": 4}, width=8)
    assert fpn.channels == {"p5_first": 8, "p5": 8, "p6": 8}
    assert fpn.level_strides({"c4": 16, "c5_first": 32, "c5": 32}) == {"p5_first": 32, "p5": 32, "p6": 64}


@pytest.mark.parametrize("norm, version", [(False, 1), (False, 2), (True, 2)])
def test_table_names_every_entry_once(norm, version):
    fpn = FPN(CHANNELS, width=2, norm=norm)
    rows = fpn_names(CHANNELS, norm=norm, version=version)
    own = list(fpn.state_dict())
    assert all(sum(name.startswith(new) for _, new in rows) == 1 for name in own)
    assert all(any(name.startswith(new) for name in own) for _, new in rows)
    first = {(False, 1): "inner_blocks.0.", (False, 2): "inner_blocks.0.0.", (True, 2): "inner_blocks.0.0."}
    assert rows[0][0] == first[norm, version]


def test_form_with_norms_has_no_bias_trains_and_fuses():
    torch.manual_seed(0)
    fpn = draw_statistics(FPN(CHANNELS, width=4, norm=True))
    maps = maps_of(SIZES["odd"], dtype=torch.float32)
    assert not any(name.endswith("conv.bias") for name, _ in fpn.named_parameters())
    assert sum(isinstance(part, BatchNorm) and not part.is_frozen for part in fpn.modules()) == 6
    sum(value.square().sum() for value in fpn(maps).values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fpn.parameters())
    with torch.no_grad():
        expected, got = fpn.eval()(maps), fuse(fpn)(maps)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_maps_it_does_not_read_are_ignored_and_channels_last_stays():
    fpn = FPN(CHANNELS, width=8).to(memory_format=torch.channels_last)
    maps = maps_of(SIZES["halves"], dtype=torch.float32)
    maps = {name: value.to(memory_format=torch.channels_last) for name, value in maps.items()}
    levels = fpn(maps | {"c5": torch.zeros(1)})
    for name in ("p2", "p3", "p4"):
        assert levels[name].is_contiguous(memory_format=torch.channels_last)
