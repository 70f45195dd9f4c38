"""Other widths than those of the architecture: the shapes, the fresh values, and the way back from a state dict."""

import numpy as np
import pytest
import torch

import models
from errors import UserError
from layers.channel_groups import find_groups
from layers.widths import set_widths, widths_of_shapes

pytestmark = pytest.mark.usefixtures("one_thread")


def odd_widths(widths: dict[str, int]) -> dict[str, int]:
    """Every width another one, some of them larger than before."""
    return {name: max(1, width // 2 + index % 5 + (width if index % 11 == 0 else 0)) for index, (name, width) in
            enumerate(widths.items())}  # fmt: skip


@pytest.mark.parametrize("arch", ["yolov8_half", "yolov5n", "yolov5nu", "fasterrcnn_resnet18"])
def test_a_model_of_odd_widths_runs_and_is_found_again(arch):
    torch.manual_seed(0)
    groups = find_groups(models.build(arch, 3))
    widths = odd_widths(groups.widths())
    model = models.build(arch, 3, widths=widths).eval()
    assert find_groups(model).widths() == widths
    with torch.no_grad():
        output = model(torch.rand(1, 3, 64, 64))
    assert {name: maps.shape[1] for name, maps in output.features.items()} == model.channels
    state = model.state_dict()
    assert (
        models.widths_of(arch, 3, state) == widths == widths_of_shapes(groups, {n: v.shape for n, v in state.items()})
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2], name
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.num_features == len(module.weight), name


@pytest.mark.parametrize("arch", ["yolov8_half", "yolov5n", "fasterrcnn_resnet18"])
def test_fresh_values_follow_the_law_of_the_architecture(arch):
    """With the architecture's own widths: the constants are equal, the spread of all others is."""
    torch.manual_seed(0)
    model = models.build(arch, 3)
    before = {name: value.clone().double() for name, value in model.state_dict().items()}
    set_widths(model, find_groups(model).widths())
    for name, value in model.state_dict().items():
        old, new = before[name], value.double()
        if old.numel() < 2 or old.std() == 0 or name.endswith("anchors"):
            assert torch.equal(old, new), name
        elif name != "head.predict.0.bias":
            assert not torch.equal(old, new), name
            tolerance = 5 * np.sqrt(2 / old.numel()) + (0.4 if name.endswith("bias") else 0)
            assert abs(new.std() / old.std() - 1) < tolerance, name


def test_a_narrow_layer_draws_for_its_own_number_of_inputs():
    """Uniform in +-1 / sqrt(fan in), PyTorch's law, of 8 channels and not of the 16 that YOLOv8n has."""
    widths = find_groups(models.build("yolov8n", 1)).widths() | {"backbone.stem.conv": 8}
    weight = models.build("yolov8n", 1, widths=widths).state_dict()["backbone.down2.conv.weight"]
    assert weight.shape == (32, 8, 3, 3)
    assert 0.95 < float(weight.abs().max()) * np.sqrt(8 * 9) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.stem.conv": 0}, "found a width of 0, expected a whole number, at least 1"),
        ({"backbone.stem.conv": 8.0}, r"found a width of 8\.0"),
        ({"backbone.stem": 8}, "'backbone.stem' is not a group of channels of this model, expected .* 59 groups"),
        (None, r"'backbone\.down2\.conv' is missing"),
    ],
)
def test_mistakes_are_one_line(change, message):
    widths = find_groups(models.build("yolov8_half", 1)).widths()
    widths = widths | change if change else {"backbone.stem.conv": 8}
    with pytest.raises(UserError, match=message) as caught:
        models.build("yolov8_half", 1, widths=widths)
    assert "\n" not in str(caught.value)


def test_shapes_that_no_widths_explain_are_none():
    state = models.build("yolov8_half", 2).state_dict()
    assert models.widths_of("yolov8_half", 2, state) is None  # its own
    assert models.widths_of("yolov8_half", 2, state | {"more": torch.zeros(1)}) is None
    groups = find_groups(models.build("yolov8_half", 2))
    assert widths_of_shapes(groups, {}) is None
