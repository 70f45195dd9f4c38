"""The choice of channels by hand, and FLOPs against torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from distill.pruning.cost import count_regions, flops_of_widths
from distill.pruning.cut import channels_to_keep
from layers.channel_groups import ChannelGroups, find_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def two_groups(**widths: int) -> ChannelGroups:
    ends = torch.tensor(list(widths.values())).cumsum(0).tolist()
    groups = {name: torch.arange(end - width, end) for (name, width), end in zip(widths.items(), ends)}
    return ChannelGroups({}, groups, (), {})


def keep(groups: ChannelGroups, scores: list[float], limit: float, **options) -> dict[str, list[int]]:
    def flops(widths) -> float:
        return 3.0 * widths["a"] + widths["b"]

    options = {"per_flops": False, "multiple": 2, "floor": 0.0} | options
    is_kept = channels_to_keep(groups, torch.tensor(scores, dtype=torch.float64), flops=flops, limit=limit, **options)
    return {name: is_kept[own].nonzero().squeeze(1).tolist() for name, own in groups.groups.items()}


GROUPS = two_groups(a=4, b=6)
SCORES = [9, 1, 8, 2, 30, 20, 10, 40, 25, 50]  # mean of a: 5, of b: 29


@pytest.mark.parametrize(
    ("limit", "options", "expected"),
    [
        (18, {}, {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3, 4, 5]}),  # it costs no more than that
        (17, {}, {"a": [0, 2], "b": [0, 1, 2, 3, 4, 5]}),  # a: (1 + 2) / 2 / 5 = 0.3; b: (10 + 20) / 2 / 29 = 0.52
        (11, {}, {"a": [0, 2], "b": [0, 3, 4, 5]}),  # a is at two, the fewest
        (17, {"per_flops": True}, {"a": [0, 2], "b": [0, 1, 2, 3, 4, 5]}),  # a: 3 / 6 = 0.5; b: 30 / 2 = 15
        (11, {"floor": 0.9}, "14.*|18.*"),
        (17, {"floor": 0.6}, {"a": [0, 1, 2, 3], "b": [0, 3, 4, 5]}),  # a would keep half
        (16, {"multiple": 4}, {"a": [0, 1, 2, 3], "b": [0, 3, 4, 5]}),  # six become a multiple of four; a stays
    ],
)
def test_which_channels_go_by_hand(limit, options, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=r"GFLOPs are left where every group keeps 0\.9 of its channels"):
            keep(GROUPS, SCORES, limit, **options)
        return
    assert keep(GROUPS, SCORES, limit, **options) == expected


def test_of_equal_scores_the_first_stay():
    is_kept = two_groups(a=40, b=30).best(torch.ones(70), {"a": 20, "b": 1})
    assert is_kept.nonzero().squeeze(1).tolist() == [*range(20), 40]


def test_per_flops_prefers_the_dear_group():
    """As shares b is the worse group, 0.5 against 0.9; but two channels of a save six FLOPs, of b two."""
    scores = [9, 9, 11, 11, 5, 5, 10, 10, 15, 15]
    assert keep(GROUPS, scores, 17)["b"] == [2, 3, 4, 5]
    assert keep(GROUPS, scores, 17, per_flops=True) == {"a": [2, 3], "b": [0, 1, 2, 3, 4, 5]}


class Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        output = self.model(images)
        if hasattr(self.model, "predict_at"):
            self.model.predict_at(output, [torch.tensor([[8.0, 8.0, 90.0, 70.0]]).repeat(7, 1)])


@pytest.mark.parametrize("arch", ["yolov8_half", "yolov5n", "fasterrcnn_resnet18"])
def test_flops_are_those_that_torch_counts(arch):
    torch.manual_seed(0)
    model = models.build(arch, 3)
    groups = find_groups(model)
    flops = flops_of_widths(model.state_dict(), groups, image_size=128, regions=7 if "rcnn" in arch else 0)
    widths = {name: max(1, width // 2 + 1) for name, width in groups.widths().items()}
    for own in (groups.widths(), widths):
        whole = Whole(models.build(arch, 3, widths=own))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            whole(torch.rand(1, 3, 128, 128))
        assert flops(own) == counter.get_total_flops()
    assert count_regions(model) == (1000 if "rcnn" in arch else 0)
