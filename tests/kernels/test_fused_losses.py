"""What the fused losses refuse and leave out, whichever implementation runs."""

import math

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


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_what_a_mask_leaves_out_is_not_read(where, nothing):
    """Two of four pixels marked, one by half: 1/2 (1 * 3^2 + 0.5 * 4^2), gradient m (s - t). Not 0 * inf."""
    s, t = torch.tensor([[[[3.0, 4.0, 1.0, 2.0]]]]), torch.zeros(1, 1, 1, 4)
    for x in {"student": [s], "teacher": [t], "both": [s, t]}[where]:
        x[..., 2:] = nothing
    loss = masked_squares(s.requires_grad_(), t, torch.tensor([[[[1.0, 0.5, 0.0, 0.0]]]]))
    loss.backward()
    assert loss.item() == 8.5 and s.grad.flatten().tolist() == [3, 2, 0, 0]
