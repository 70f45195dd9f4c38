"""Loading released ImageNet files into backbones, classifying with them, and freezing stages."""

import copy

import pytest
import torch

from errors import UserError
from frcnn.mobilenet import MobileNetV3
from frcnn.norm import BatchNorm, freeze_norms
from frcnn.pretrained import IMAGENET_NORMALIZATION, ImageClassifier, freeze, load_backbone, strip_wrapper
from frcnn.resnet import ResNet
from frcnn.vit import VisionTransformer
from tests.reference.golden_models import public_state
from weights import load_public


@pytest.fixture(scope="module")
def states(golden):
    """Public states of the two smallest files and of the ViT's, filled by the recipe."""
    return {
        name: public_state(golden(name)[1], {}) for name in ("resnet18", "mobilenet_v3_small", "deit_tiny_patch16_224")
    }


def same(backbone, other):
    return all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), other.state_dict().values()))


@pytest.fixture(scope="module")
def filled(states):
    backbone = ResNet(18)
    report = load_backbone(backbone, states["resnet18"])
    assert report.layout == "classifier" and not any("fc" in name for name in report.loaded)
    return backbone


VARIANTS = {
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "model.module.": lambda state: {f"model.module.{name}": value for name, value in state.items()},
    "no classifier": lambda state: {name: value for name, value in state.items() if not name.startswith("fc.")},
    "no counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "backbone. and no classifier": lambda state: {
        f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")
    },
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_layouts_that_training_scripts_leave(states, filled, change):
    backbone = ResNet(18)
    freeze_norms(backbone)
    load_backbone(backbone, change(states["resnet18"]))
    assert same(backbone, filled)


def test_wrapped_file_on_disk(states, filled, tmp_path):
    torch.save({"model": VARIANTS["module."](states["resnet18"]), "epoch": 3}, tmp_path / "checkpoint.pth")
    backbone = ResNet(18)
    load_backbone(backbone, tmp_path / "checkpoint.pth")
    assert same(backbone, filled)


def test_only_a_prefix_of_all_names_is_stripped():
    state = {"model.a": torch.zeros(1), "b": torch.ones(1)}
    assert strip_wrapper(state) == state and strip_wrapper({}) == {}
    assert list(strip_wrapper({"model.module.a": state["b"], "model.module.b": state["b"]})) == ["a", "b"]


def wrong_states(state):
    missing = {name: value for name, value in state.items() if name != "layer3.1.bn2.running_mean"}
    half_head = {name: value for name, value in state.items() if name != "fc.bias"} | {"fd.bias": torch.zeros(3)}
    shape = state | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    return [(missing, "stage4.1.conv2.norm.running_mean"), (half_head, "fd.bias"), (shape, r"\(64, 64, 1, 1\)")]


@pytest.mark.parametrize("case", range(3), ids=["missing", "unexpected", "shape"])
def test_what_does_not_fit_is_named_and_nothing_changes(states, case):
    state, message = wrong_states(states["resnet18"])[case]
    torch.manual_seed(0)
    backbone = ResNet(18)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_backbone(backbone, state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_file_of_another_family_is_named(states):
    with pytest.raises(UserError, match="mobilenet_v3_small weights, the model is resnet18"):
        load_backbone(ResNet(18), states["mobilenet_v3_small"])
    with pytest.raises(UserError, match="resnet18"):
        load_backbone(MobileNetV3("small"), states["resnet18"])
    with pytest.raises(UserError, match="resnet18 weights"):
        load_backbone(VisionTransformer(), states["resnet18"])


def test_deit_files_are_known_by_name_or_said(states, tmp_path):
    """The same entries, in a file named deit_* or with its normalisation said, change the patch embedding alike."""
    state = states["deit_tiny_patch16_224"]
    for name in ("deit_tiny_patch16_224.pth", "vit_tiny.pth"):
        torch.save({"model": state}, tmp_path / name)
    plain, named, said, as_is = (VisionTransformer() for _ in range(4))
    load_backbone(plain, state)
    load_backbone(named, tmp_path / "deit_tiny_patch16_224.pth")
    load_backbone(said, state, file_normalization=IMAGENET_NORMALIZATION)
    load_backbone(as_is, tmp_path / "vit_tiny.pth")
    assert same(named, said) and same(plain, as_is) and not same(plain, named)
    before = plain.state_dict()
    changed = {name for name, value in named.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"embedding.patches.project.weight", "embedding.patches.project.bias"}
    with pytest.raises(ValueError, match="ResNet takes images of mean and std"):
        load_backbone(ResNet(18), states["resnet18"], file_normalization=((0.5,) * 3, (0.5,) * 3))


def test_a_classifier_head_of_another_size_is_refused(states):
    model = ImageClassifier(MobileNetV3("small"), num_classes=7)
    with pytest.raises(UserError, match="only the class head differs"):
        load_public(model, states["mobilenet_v3_small"])
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)


BACKBONES = {
    "resnet18": (lambda: ResNet(18), ["stem", "stage2", "stage3", "stage4", "stage5"]),
    "mobilenet_v3_large": (
        lambda: MobileNetV3("large"),
        # torchvision counts features[0], [2], [4], [7], [13], [16] as the first of a stage; our blocks begin at [1]
        ["stem blocks.0.", "blocks.1. blocks.2.", "blocks.3. blocks.4. blocks.5.",
         "blocks.6. blocks.7. blocks.8. blocks.9. blocks.10. blocks.11.", "blocks.12. blocks.13. blocks.14.", "last"],
    ),
    "vit_tiny": (
        VisionTransformer,
        ["embedding", "blocks.0. blocks.1. blocks.2.", "blocks.3. blocks.4. blocks.5.",
         "blocks.6. blocks.7. blocks.8.", "blocks.9. blocks.10. blocks.11. norm."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("build, stages", BACKBONES.values(), ids=BACKBONES)
def test_freeze_keeps_the_last_stages_trainable(build, stages):
    with torch.device("meta"):
        backbone = build()
        prefixes = [tuple(stage.split()) for stage in stages]
        parameters = [name for name, _ in backbone.named_parameters()]
        assert all(sum(name.startswith(stage) for stage in prefixes) == 1 for name in parameters)
        for count in range(len(stages), -1, -1):  # freezing more and more of the same backbone
            freeze(backbone, count)
            trainable = sum(prefixes[len(stages) - count :], ())
            for name, parameter in backbone.named_parameters():
                assert parameter.requires_grad == name.startswith(trainable), (count, name)
            for name, part in backbone.named_modules():
                if isinstance(part, BatchNorm):
                    assert part.is_frozen != name.startswith(trainable)
    for wrong in (-1, len(stages) + 1):
        with pytest.raises(ValueError, match=f"expected 0 to {len(stages)}"):
            freeze(backbone, wrong)


def test_frozen_stages_stay_as_they_are_while_the_rest_trains(filled):
    backbone = copy.deepcopy(filled).train()
    freeze(backbone, 2)
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert not maps["c3"].requires_grad and maps["c4"].requires_grad
    maps["c5"].square().mean().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    before = filled.state_dict()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"stage4", "stage5"}
    assert any("running_mean" in name for name in changed)
