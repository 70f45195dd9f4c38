"""YOLOv7-tiny against recorded outputs of the released implementation; its layouts; what trains and what is fused."""

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
from errors import UserError
from models import build, published_detection
from structures import DenseDetector
from tests.reference.golden_models import check_anchor_golden, public_state
from tests.weights.hostile import fake_modules
from tests.yolo.test_yolov5 import ANCHORS_CELLS
from weights import load_public, rename
from yolo.yolov7 import fold_implicit

ANCHORS = {
    "model.77.anchors": ANCHORS_CELLS,
    "model.77.anchor_grid": ANCHORS_CELLS * np.array([8, 16, 32])[:, None, None],
}
CHANNELS = (128, 256, 512)


@pytest.fixture(scope="module")
def released(golden):
    """Arrays, meta and the public state dict, as the deploy file has it."""
    arrays, meta = golden("yolov7-tiny")
    return arrays, meta, public_state(meta, ANCHORS)


def test_it_reproduces_the_released_model(released):
    arrays, meta, state = released
    model = build("yolov7_tiny", meta["nc"])
    assert sum(p.numel() for p in model.parameters()) == meta["params"] == 6_227_101
    without_twin = {name: value for name, value in state.items() if not name.endswith("anchor_grid")}
    assert set(rename(without_twin, model.public_names)) == set(model.state_dict())
    load_public(model, state)
    check_anchor_golden(model, arrays, meta, maps=("c3", "c4", "c5", "p3", "p4", "p5"))


@pytest.mark.parametrize(("num_classes", "count"), [(3, 6_019_432), (20, 6_065_281)])
def test_parameter_counts(num_classes, count):
    model = build("yolov7_tiny", num_classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert isinstance(model, DenseDetector) and published_detection("yolov7_tiny").iou_threshold == 0.65


# ------------------------------------------------------------------------------------------------ the training head


class ImplicitHead(nn.Module):
    """One level of YOLOR's head: a vector added before the convolution, one multiplied after it (arXiv:2105.04206)."""

    def __init__(self, conv, added, factor):
        super().__init__()
        self.conv, self.added, self.factor = conv, added, factor

    def forward(self, x):
        return self.factor * self.conv(x + self.added)


@pytest.fixture(scope="module")
def with_implicit(released):
    """The same state dict with implicit vectors, as a training file has it."""
    generator = torch.Generator().manual_seed(0)
    added = {f"model.77.ia.{i}.implicit": torch.randn(1, c, 1, 1, generator=generator) for i, c in enumerate(CHANNELS)}
    factor = {f"model.77.im.{i}.implicit": 1 + torch.rand(1, 255, 1, 1, generator=generator) for i in range(3)}
    return released[2] | added | factor


def test_a_training_file_computes_what_its_implicit_vectors_say(with_implicit, released):
    plain, folded = build("yolov7_tiny", 80), build("yolov7_tiny", 80)
    load_public(plain, released[2])
    load_public(folded, with_implicit)
    assert sum(value.numel() for name, value in with_implicit.items() if name.endswith("implicit")) == 1_661
    maps = [torch.randn(2, c, 3, 2, generator=torch.Generator().manual_seed(c)) for c in CHANNELS]
    with torch.no_grad():
        got = folded.head(maps)
        for i, conv in enumerate(plain.head.predict):
            added, factor = (with_implicit[f"model.77.{name}.{i}.implicit"] for name in ("ia", "im"))
            plain.head.predict[i] = ImplicitHead(conv, added, factor)
        for ours, expected in zip(got, plain.head(maps)):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(folded.neck.spp.merge.conv.weight, plain.neck.spp.merge.conv.weight)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.77.im.1.implicit", None, "without 'model.77.im.1.implicit'"),
        ("model.77.m.2.bias", None, "without 'model.77.m.2.bias'"),
        ("model.77.ia.0.implicit", torch.zeros(1, 64, 1, 1), "implicit vectors do not fit"),
    ],
)
def test_a_damaged_training_head_is_refused(with_implicit, name, value, message):
    state = {key: entry for key, entry in with_implicit.items() if key != name}
    state |= {} if value is None else {name: value}
    with pytest.raises(KeyError, match=message):
        fold_implicit(state)
    with pytest.raises(UserError, match=message):
        load_public(build("yolov7_tiny", 80), state)


# ------------------------------------------------------------------------------------------------ files


def pickled_model(state, activation):
    """The module tree of a released file, classes named models.yolo.Model and models.common.*, in half precision."""
    with fake_modules("models.yolo", "models.common") as made:
        model_class = type("Model", (nn.Module,), {"__module__": "models.yolo"})
        conv_class = type("Conv", (nn.Module,), {"__module__": "models.common"})
        made["models.yolo"].Model, made["models.common"].Conv = model_class, conv_class
        root = model_class()
        for name, value in state.items():
            *path, last = name.split(".")
            module = root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, conv_class())
                module = module._modules[part]
            is_buffer = last.startswith(("running", "num_batches", "anchor"))
            value = value.half() if value.is_floating_point() else value
            if is_buffer:
                module.register_buffer(last, value)
            else:
                setattr(module, last, nn.Parameter(value))
        root.model._modules["0"].act = activation
        root.names = [f"class {k}" for k in range(80)]
        yield root


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_pickled_file_in_half_precision(with_implicit, tmp_path):
    for root in pickled_model(with_implicit, nn.LeakyReLU(0.1)):
        torch.save({"epoch": -1, "model": root, "ema": None, "training_results": None}, tmp_path / "tiny.pt")
    model, info = checkpoint.load_model(tmp_path / "tiny.pt", "yolov7_tiny")
    expected = build("yolov7_tiny", 80)
    load_public(expected, with_implicit)
    assert info.names[79] == "class 79" and info.source == "public"
    found = model.state_dict()
    for name, value in expected.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=5e-3)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_the_variant_with_another_activation_is_refused(released, tmp_path):
    for root in pickled_model(released[2], nn.SiLU()):
        torch.save({"model": root}, tmp_path / "silu.pt")
    with pytest.raises(UserError, match=r"silu\.pt: its layers have SiLU, those of yolov7_tiny have LeakyReLU"):
        checkpoint.load_model(tmp_path / "silu.pt", "yolov7_tiny")


def test_it_does_not_load_into_another_family(released):
    with pytest.raises(UserError, match="these are yolov7-tiny weights, the model is yolov5n"):
        load_public(build("yolov5n", 80), released[2])
