"""What the fused losses refuse, whichever implementation runs."""

import pytest
import torch

from kernels.channel_wise_kl import channel_kl
from kernels.masked_mse import masked_squares
from kernels.sigmoid_kl import sigmoid_kl
from kernels.temperature_kl import temperature_kl


@pytest.mark.parametrize("loss", [temperature_kl, sigmoid_kl])
def test_rows_of_other_shapes(loss):
    """Eager arithmetic would broadcast them; a kernel would read beyond their end."""
    s = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"t_logits: found shape \(1, 4\), expected \(3, 4\)"):
        loss(s, s[:1])
    with pytest.raises(ValueError, match=r"weight: found shape \(1,\), expected \(3,\)"):
        loss(s, s, weight=torch.ones(1))
    with pytest.raises(ValueError, match=r"weight: found shape \(3, 2\), expected \(2, 3\)"):
        loss(s.expand(2, 3, 4), s.expand(2, 3, 4), weight=torch.ones(3, 2))


def test_maps_of_other_shapes():
    s, mask = torch.zeros(2, 3, 4, 5), torch.ones(2, 1, 4, 5)
    for loss in (channel_kl, lambda s, t: masked_squares(s, t, mask)):
        with pytest.raises(ValueError, match=r"t_map: found shape \(1, 3, 4, 5\), expected \(2, 3, 4, 5\)"):
            loss(s, s[:1])
    for other in (mask[:1], mask.expand(2, 3, 4, 5), mask[..., :1]):
        with pytest.raises(ValueError, match=r"mask: found shape .*, expected \(2, 1, 4, 5\)"):
            masked_squares(s, s, other)
