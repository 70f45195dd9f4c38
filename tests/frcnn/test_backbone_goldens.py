"""The backbones with their classifiers against the recorded outputs of torchvision's and timm's models."""

from functools import partial

import pytest
import torch

from frcnn.fpn import FPN, fpn_names
from frcnn.mobilenet import MobileNetV3
from frcnn.norm import BatchNorm, freeze_norms
from frcnn.pretrained import ImageClassifier, load_backbone
from frcnn.resnet import ResNet
from frcnn.vit import VisionTransformer
from tests.reference.golden_models import golden_image, public_state, relative_error, undrawn
from weights import load_public, rename

BACKBONES = {
    "resnet18": partial(ResNet, 18),
    "resnet34": partial(ResNet, 34),
    "resnet50": partial(ResNet, 50),
    "mobilenet_v3_small": partial(MobileNetV3, "small"),
    "mobilenet_v3_large": partial(MobileNetV3, "large"),
    "vit_tiny_patch16_224": VisionTransformer,
    "deit_tiny_patch16_224": VisionTransformer,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_reproduces_the_released_classifier(golden, name):
    arrays, meta = golden(name)
    with undrawn():
        model = ImageClassifier(BACKBONES[name]())
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    state = public_state(meta, {})
    assert set(rename(state, model.public_names)) == set(model.state_dict()) and len(state) == len(model.state_dict())
    load_public(model, state)
    model.eval()
    images = golden_image(meta)
    with torch.no_grad():
        assert relative_error(model(images), arrays["logits"]) < 1e-5
        maps = model.backbone(images)
        if "tokens" in arrays:
            tokens = model.backbone.tokens(images)
            assert relative_error(tokens[:, ::7], arrays["tokens"]) < 1e-5
            assert torch.equal(maps["c4"].flatten(2).transpose(1, 2), tokens[:, 1:])
        elif "features" in arrays:
            assert relative_error(maps["c5"][:, ::8], arrays["features"]) < 1e-5
        else:
            for level in ("c2", "c3", "c4", "c5"):
                assert relative_error(maps[level][:, ::16], arrays[level]) < 1e-5, level


@pytest.mark.parametrize("name, epsilon", [("resnet18", 1e-5), ("mobilenet_v3_small", 1e-3)])
def test_a_released_file_decides_the_epsilon_not_the_backbone(golden, name, epsilon):
    """Live or frozen, a backbone is filled so that it computes the released maps with its own epsilon; and the epsilon
    matters: with a wrong one for the file, it does not."""
    arrays, meta = golden(name)
    state = public_state(meta, {})
    level, step = ("c5", 16) if "c5" in arrays else ("features", 8)
    for is_frozen in (True, False):
        backbone = BACKBONES[name]()
        load_backbone(backbone, state)
        if is_frozen:
            freeze_norms(backbone)
        with torch.no_grad():
            maps = backbone.train(is_frozen)(golden_image(meta))
        assert relative_error(maps["c5"][:, ::step], arrays[level]) < 1e-5
    backbone = BACKBONES[name]()
    for norm in (module for module in backbone.modules() if isinstance(module, BatchNorm)):
        norm.eps = epsilon + 3e-3
    backbone.load_state_dict({key: value for key, value in rename(state, backbone.public_layouts[0].table).items()})
    with torch.no_grad():
        assert relative_error(backbone.eval()(golden_image(meta))["c5"][:, ::step], arrays[level]) > 1e-3


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_pyramid_of_the_released_detector(golden, name):
    """FPN with and without BatchNorm, the pooled level, and the two maps MobileNet's pyramid reads. In the released
    detectors even MobileNet's BatchNorms have the epsilon 1e-5."""
    arrays, meta = golden(name)
    meta = meta | {"keys": [key for key in meta["keys"] if key[0].startswith("backbone.")]}
    is_mobile = "mobilenet" in name
    backbone = MobileNetV3("large") if is_mobile else ResNet(50)
    taps = {c: backbone.channels[c] for c in (("c5_first", "c5") if is_mobile else ("c2", "c3", "c4", "c5"))}
    model = torch.nn.ModuleDict({"body": backbone, "fpn": FPN(taps, norm=not is_mobile)})
    table = [(f"backbone.body.{old.removeprefix('features.')}", f"body.{new}") for old, new in backbone.public_names]
    table += [(f"backbone.fpn.{old}", f"fpn.{new}") for old, new in fpn_names(taps, norm=not is_mobile)]
    model.load_state_dict(rename(public_state(meta, {}), table), strict=True)
    model.eval()
    with torch.no_grad():
        levels = model["fpn"](backbone(golden_image(meta)))
    expected = [key for key in arrays if key.startswith("fpn_")]
    assert len(expected) == len(levels) == len(taps) + 1 and list(levels)[-1] == "p6"
    for level, key in zip(levels.values(), expected):
        assert relative_error(level[:, ::16], arrays[key]) < 1e-5, key
