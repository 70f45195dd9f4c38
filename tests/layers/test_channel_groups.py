"""Channel groups: what is left after a cut computes what the whole model computes with these channels at zero.

In the whole model, all rows of a removed channel are set to zero: weight, bias, and what its BatchNorm adds. So every
layer reads silu(0) = relu(0) = 0 there, whichever layers the groups say read it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import models
from frcnn.norm import freeze_norms
from layers.channel_groups import STAYS, ChannelGroups, find_groups
from tests.distill.losses.mutants.machinery import Edit, apply_edit
from tests.layers.test_fusion import random_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
BOX_XYXY = torch.tensor([[5.0, 5.0, 50.0, 40.0]])


class Crossroads(nn.Module):
    """Every way that channels take through the models here, in a few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.back = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)  # a residual branch on one half of the stem
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.left, self.right = nn.Conv2d(12, 5, 1), nn.Conv2d(9, 5, 1)  # two levels that one head reads
        self.head = nn.Conv2d(5, 4, 1)
        self.hidden, self.out = nn.Linear(5 * 4, 7), nn.Linear(7, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.silu(self.bn(self.stem((images - 0.5) / 0.2)))
        a, b = x.split((x.shape[1] - self.inner.weight.shape[1], self.inner.weight.shape[1]), 1)  # 3 and 3
        back, weight = self.back(F.relu(self.inner(b), inplace=True)), self.depthwise.weight
        b = b + F.conv2d(back, weight, self.depthwise.bias, padding=1, groups=len(weight))
        pooled = F.max_pool2d(b, 5, stride=1, padding=2)
        left = self.left(torch.cat((a, b, b, pooled), 1))
        right = self.right(F.interpolate(F.max_pool2d(torch.cat((a, pooled, a), 1), 2), scale_factor=2.0))
        maps = torch.cat([self.head(level).flatten(2) for level in (left, right)], 2)
        vectors = F.relu(self.hidden(F.adaptive_max_pool2d(right, 2).flatten(1)))
        return {"maps": maps, "vectors": self.out(vectors)}


CROSSROADS_WIDTHS = {"stem/1": 3, "stem/2": 3, "inner": 4, "left": 5, "hidden": 7}


def crossroads() -> nn.Module:
    torch.manual_seed(0)
    model = Crossroads()
    random_statistics(model)
    return model.double().eval()


def outputs_of(model: nn.Module, state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = functional_call(Whole(model), {f"model.{name}": value for name, value in state.items()}, (images,))
    return [value for value in output if value is not None]


class Whole(nn.Module):
    """A detector with its second stage, in one forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        output = self.model(images)
        if isinstance(output, dict):
            return list(output.values())
        if hasattr(self.model, "predict_at"):
            return [output.objectness_logits, output.box_deltas, *self.model.predict_at(output, [BOX_XYXY])]
        return [output.box_logits, output.class_logits, getattr(output, "objectness_logits", None)]


def without(groups: ChannelGroups, state: dict[str, Tensor], is_kept: Tensor) -> dict[str, Tensor]:
    """The whole state dict in which the channels that are not kept are 0."""
    state = dict(state)
    for (entry, dim), channels in groups.axes.items():
        goes = (channels != STAYS) & ~is_kept[channels]
        if dim == 0 and goes.any() and not entry.endswith("running_var"):
            state[entry] = state[entry].clone()
            state[entry][goes] = 0
    return state


def check_cut(model: nn.Module, groups: ChannelGroups, is_kept: Tensor, images: Tensor, tolerance: float) -> None:
    state = model.state_dict()
    try:
        found = outputs_of(model, groups.select(state, is_kept), images)
    except (RuntimeError, IndexError) as error:
        raise AssertionError(f"the narrower model does not run: {error}") from None
    for own, expected in zip(found, outputs_of(model, without(groups, state, is_kept), images), strict=True):
        torch.testing.assert_close(own, expected, atol=tolerance, rtol=tolerance)
        assert own.std() > 1e-3


def all_but(groups: ChannelGroups, *channels: int) -> Tensor:
    is_kept = torch.ones(groups.count, dtype=torch.bool)
    is_kept[list(channels)] = False
    return is_kept


def check_crossroads(find) -> None:
    """Every channel alone, in float64, and the groups that one reads off the code."""
    model, images = crossroads(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    try:
        groups = find(model)
    except ValueError as error:
        raise AssertionError from error
    for channel in range(groups.count):
        check_cut(model, groups, all_but(groups, channel), images, 1e-10)
    assert groups.widths() == CROSSROADS_WIDTHS
    assert groups.norms == ("bn",)


def test_every_channel_of_a_small_network():
    check_crossroads(find_groups)


READ = "self._put(entry, 1, read)"
SAME_PLACES = "alike.setdefault(tuple(places[root]), [])"
ADDED = 'self._join(self._read(x, "an addition"), self._read(y, "an addition"))'
MUTANTS = {
    "an addition joins nothing": Edit(ADDED, "pass"),
    "a second use of a layer joins nothing": Edit("self._join(self.axes[entry, dim], channels)", "pass"),
    "a BatchNorm keeps its channels": Edit("self._put(entry, 0, channels)", "pass"),
    "a BatchNorm keeps its statistics": Edit("(mean, var, weight, bias)", "(weight, bias)"),
    "biases stay": Edit("self._put(self._name(bias), 0, written)", "pass"),
    "a depthwise layer writes new channels": Edit("written = read if is_depthwise else", "written ="),
    "predictions can go": Edit("if is_read[root]:", "if root:"),
    "groups of one layer are one": Edit(SAME_PLACES, "alike.setdefault(places[root][0], [])"),
    "columns in the order of their labels": Edit(READ, "self._put(entry, 1, read.sort().values)"),
    "every column is the first": Edit(READ, "self._put(entry, 1, read[:1].expand_as(read))"),
    "the image's channels can go": Edit("is_read[0] = False", "pass"),
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_mutant_is_killed(wrong):
    edit = MUTANTS[wrong]
    mutant = apply_edit(find_groups, Edit(edit.old, edit.new, within="_Trace"))
    with pytest.raises(AssertionError):
        check_crossroads(mutant)


ARCHITECTURES = ("yolov8_half", "yolov5n", "yolov5nu", "yolov7_tiny", "fasterrcnn_resnet18", "fasterrcnn_resnet50")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def traced(request):
    torch.manual_seed(0)
    model = models.build(request.param, 2)
    random_statistics(model)
    return request.param, model.eval(), find_groups(model)


def test_removing_any_group_leaves_the_others_alone(traced):
    """A third of every group at once, then one channel of one group: of every third group, to save time."""
    arch, model, groups = traced
    images = torch.rand(1, 3, 64, 64) if "rcnn" in arch else torch.rand(1, 3, 32, 32)
    third = torch.cat([own[::3] for own in groups.groups.values()]).tolist()
    check_cut(model, groups, all_but(groups, *third), images, 1e-5)
    for name in list(groups.groups)[:: 12 if arch in ("yolov5nu", "fasterrcnn_resnet50") else 3]:
        check_cut(model, groups, all_but(groups, int(groups.groups[name][1])), images, 1e-5)


def layers_of(groups: ChannelGroups, name: str) -> tuple[list[str], list[str]]:
    """Who writes and who reads a group, of the convolutions and linear layers."""
    channel = groups.groups[name][0]
    places = [
        (entry.removesuffix(".weight").removesuffix(".conv"), dim)
        for (entry, dim), channels in groups.axes.items()
        if entry in groups.cells
        for _ in range(int((channels == channel).sum()))
    ]
    return sorted(entry for entry, dim in places if dim == 0), sorted(entry for entry, dim in places if dim == 1)


KNOWN = {  # read off the figures: who writes, who reads (as often as it does)
    "yolov8_half": {
        "backbone.stage3.split.conv/1": "split | merge",
        "backbone.stage3.split.conv/2": "split blocks.0.conv2 blocks.1.conv2 | blocks.0.conv1 blocks.1.conv1 merge*3",
        "backbone.stage3.merge.conv": "merge | backbone.down4 neck.top_down3.split",
        "backbone.spp.reduce.conv": "reduce | merge*4",
        "neck.top_down4.split.conv/2": "split | blocks.0.conv1 merge",
        "neck.top_down4.blocks.0.conv2.conv": "conv2 | neck.top_down4.merge",
        "neck.top_down4.merge.conv": "merge | neck.bottom_up4.split neck.top_down3.split",
        "neck.bottom_up4.merge.conv": "merge | head.box.1.0 head.cls.1.0 neck.down4",
        "head.cls.1.1.conv": "1 | head.cls.1.2",
    },
    "yolov5n": {
        "backbone.stage3.main.conv": "main blocks.0.conv2 blocks.1.conv2 | blocks.0.conv1 blocks.1.conv1 merge",
        "backbone.stage3.bypass.conv": "bypass | merge",
        "neck.lateral5.conv": "lateral5 | neck.bottom_up5.main neck.bottom_up5.bypass neck.top_down4.main "
        "neck.top_down4.bypass",
        "neck.bottom_up5.merge.conv": "merge | head.predict.2",
    },
    "yolov7_tiny": {
        "backbone.stage3.main.conv": "main | conv1 merge",
        "backbone.stage4.merge.conv": "merge | backbone.stage5.main backbone.stage5.bypass neck.lateral4",
        "neck.spp.main.conv": "main | pooled*4",
        "neck.top_down3.merge.conv": "merge | neck.down3 neck.out3",
        "neck.out4.conv": "out4 | head.predict.1",
    },
    "fasterrcnn_resnet18": {
        "backbone.stem.conv": "stem backbone.stage2.0.conv2 backbone.stage2.1.conv2 | backbone.stage2.0.conv1 "
        "backbone.stage2.1.conv1 backbone.stage3.0.conv1 backbone.stage3.0.shortcut pyramid.lateral.c2",
        "backbone.stage3.0.conv2.conv": "conv2 backbone.stage3.0.shortcut backbone.stage3.1.conv2 | "
        "backbone.stage3.1.conv1 backbone.stage4.0.conv1 backbone.stage4.0.shortcut pyramid.lateral.c3",
        "backbone.stage4.1.conv1.conv": "conv1 | backbone.stage4.1.conv2",
        "pyramid.lateral.c5": "c5 pyramid.lateral.c2 pyramid.lateral.c3 pyramid.lateral.c4 | pyramid.output.p2 "
        "pyramid.output.p3 pyramid.output.p4 pyramid.output.p5",
        "pyramid.output.p5": "p5 pyramid.output.p2 pyramid.output.p3 pyramid.output.p4 | rpn.convs.0 box_head.fc6*49",
        "box_head.fc7": "fc7 | predictor.classify predictor.regress",
    },
    "fasterrcnn_resnet50": {
        "backbone.stage2.0.conv3.conv": "conv3 backbone.stage2.0.shortcut backbone.stage2.1.conv3 "
        "backbone.stage2.2.conv3 | backbone.stage2.1.conv1 backbone.stage2.2.conv1 backbone.stage3.0.conv1 "
        "backbone.stage3.0.shortcut pyramid.lateral.c2",
        "backbone.stem.conv": "stem | backbone.stage2.0.conv1 backbone.stage2.0.shortcut",
    },
}


def test_the_groups_are_those_one_reads_off_the_figures(traced):
    arch, _, groups = traced
    for name, text in KNOWN.get(arch, {}).items():
        own = name.split("/")[0].removesuffix(".conv")
        folder = own.rsplit(".", 1)[0]
        sides = []
        for side in text.split(" | "):
            layers = []
            for word in side.split():
                layer, _, times = word.partition("*")
                is_full = layer.split(".")[0] in ("backbone", "neck", "head", "pyramid", "rpn", "box_head", "predictor")
                in_block = own.rsplit(".blocks", 1)[0] if ".blocks" in own else folder
                layers += [layer if is_full else f"{in_block}.{layer}"] * int(times or 1)
            sides.append(layers)
        sides[0][0] = own  # the first writer is the group's name
        found = layers_of(groups, name)
        assert found == (sorted(sides[0]), sorted(sides[1])), name


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(x * self.gate(x).sigmoid())


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match=r"last\.weight: its input was computed by an operation that .* do not know"):
        find_groups(Gated())
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2))
    with pytest.raises(ValueError, match=r"1\.weight: a convolution in several blocks"):
        find_groups(grouped)
    frozen = models.build("fasterrcnn_resnet18", 1)
    freeze_norms(frozen)
    with pytest.raises(ValueError, match="frozen norms cannot be traced"):
        find_groups(frozen)
    with pytest.raises(ValueError, match="layer_norm, an operation that channel groups do not know"):
        find_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(128)))


def test_the_model_stays_as_it_was():
    model = crossroads().train()
    model.depthwise.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_groups(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.bn.training and not model.depthwise.training
