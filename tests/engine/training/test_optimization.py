"""Parameter groups, schedules and EMA against their formulas, written out again in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import models
from config import OptimizerConfig
from engine.training.optimization import Ema, apply_schedule, build_optimizer, learning_rate_factor, parameter_groups


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_cover_every_trainable_parameter_once():
    model, adapter = Small(), nn.Linear(4, 4)
    groups = {group["name"]: group for group in parameter_groups((model, adapter), 0.1)}
    names = {id(p): name for name, p in [*model.named_parameters(), *adapter.named_parameters()]}
    found = {key: [names[id(p)] for p in group["params"]] for key, group in groups.items()}
    assert found == {
        "weights": ["conv.weight", "weight"],
        "norms": ["scale", "norm.weight"],
        "biases": ["conv.bias", "norm.bias", "bias"],
    }
    assert {key: group["weight_decay"] for key, group in groups.items()} == {"weights": 0.1, "norms": 0, "biases": 0}


class WithBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Small(), nn.Linear(4, 4)


def test_a_backbone_with_a_factor_has_groups_of_its_own():
    student, adapter = WithBackbone(), nn.Linear(4, 4)
    for factor in (0.1, 1.0):
        groups = parameter_groups((student, adapter), 0.1, factor)
        numbers = [id(p) for group in groups for p in group["params"]]
        learnt = [id(p) for m in (student, adapter) for p in m.parameters() if p.requires_grad]
        assert len(numbers) == len(set(numbers)) and set(numbers) == set(learnt)
        if factor == 1:  # as without the key, so that older runs go on
            assert [group["name"] for group in groups] == ["weights", "norms", "biases"]
            assert all(group["factor"] == 1 for group in groups)
            continue
        assert [group["name"] for group in groups[3:]] == ["backbone.weights", "backbone.norms", "backbone.biases"]
        assert [group["factor"] for group in groups] == [1, 1, 1, 0.1, 0.1, 0.1]
        assert [group["weight_decay"] for group in groups] == [0.1, 0, 0] * 2
        own = {id(p) for p in student.backbone.parameters() if p.requires_grad}
        assert {id(p) for group in groups[3:] for p in group["params"]} == own


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_rate_of_a_backbone_is_its_factor_times_the_rest_at_every_step(name):
    settings = replace(RATES, name=name, weight_decay=0.1, backbone_factor=0.25)
    optimizer = build_optimizer((WithBackbone(),), settings)
    for step in (0, 3, 9, 50, 99):
        assert apply_schedule(optimizer, step, settings, **STEPS) == pytest.approx(0.1 * (1 - 0.99 * step / 100))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["backbone.weights"] == rates["backbone.norms"] == 0.25 * rates["weights"] > 0
        assert rates["backbone.biases"] == 0.25 * rates["biases"]


def tensors_held_by_no_layer(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model learns beside the weights and biases of its layers, and of more than one dimension."""
    layers = ("weight", "bias")
    return {n: p for n, p in model.named_parameters() if p.dim() > 1 and n.rpartition(".")[2] not in layers}


@pytest.mark.parametrize(("build", "tokens"), [
    (lambda: models.build("fasterrcnn_vit_tiny", 2), {"class_token", "positions"}),
    (lambda: models.build_teacher("dinov2_vits14_reg"), {"class_token", "positions", "registers"}),
    (lambda: models.build("yolov8n", 2), set()),
    (lambda: models.build("yolov5n", 2), set()),
    (lambda: models.build("fasterrcnn_resnet50_v2", 2), set()),
    (lambda: models.build("fasterrcnn_mobilenet_v3_small", 2), set()),
])  # fmt: skip
def test_tokens_and_positions_do_not_decay(build, tokens):
    with torch.device("meta"):
        model = build()
    held = tensors_held_by_no_layer(model)
    assert {name.rpartition(".")[2] for name in held} == tokens  # a new kind has to be decided upon
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups((model,), 0.1)}
    assert {id(p) for p in held.values()} <= groups["norms"]
    assert all(p.dim() > 1 for p in model.parameters() if id(p) in groups["weights"])
    assert {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)} <= groups["weights"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_factor(schedule):
    x = np.linspace(0, 1, 11)
    f = 0.05
    expected = {"linear": (1 - x) + x * f, "cosine": f + 0.5 * (1 - f) * (1 + np.cos(np.pi * x))}[schedule]
    got = [learning_rate_factor(value, final_fraction=f, schedule=schedule) for value in x]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="step"):
        learning_rate_factor(0.5, final_fraction=f, schedule="step")


STEPS = dict(total_steps=100, warmup_steps=10)
RATES = OptimizerConfig(
    learning_rate=0.1,
    final_fraction=0.01,
    schedule="linear",
    momentum=0.9,
    warmup_momentum=0.5,
    warmup_bias_learning_rate=0.3,
)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_warmup_and_schedule(name):
    optimizer = build_optimizer((Small(),), replace(RATES, name=name))
    rows = []
    for step in range(100):
        target = apply_schedule(optimizer, step, RATES, **STEPS)
        rows.append([target, *(group["lr"] for group in optimizer.param_groups)])
    target, weights, norms, biases = np.array(rows).T
    steps = np.arange(100)
    np.testing.assert_allclose(target, 0.1 * (1 - 0.99 * steps / 100), rtol=1e-12)
    warmth = np.minimum(1, (steps + 1) / 10)
    np.testing.assert_allclose(weights, target * warmth, rtol=1e-12)
    np.testing.assert_array_equal(weights, norms)
    first = 0.3 if name == "sgd" else 0.0
    np.testing.assert_allclose(biases, first + (target - first) * warmth, rtol=1e-12)
    if name == "sgd":
        apply_schedule(optimizer, 4, RATES, **STEPS)
        assert [group["momentum"] for group in optimizer.param_groups] == [pytest.approx(0.7)] * 3
    else:
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_no_warmup():
    optimizer = build_optimizer((Small(),), replace(RATES, momentum=0.0, weight_decay=0.0))
    apply_schedule(optimizer, 0, RATES, **STEPS | {"warmup_steps": 0})
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_moves_weights_only(name):
    """With zero gradients only decayed weights move, and by learning rate times decay."""
    model = Small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer((model,), OptimizerConfig(name=name, learning_rate=0.5, momentum=0.0, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.state_dict().items():
        factor = 0.95 if key == "conv.weight" else 1.0
        torch.testing.assert_close(value, before[key] * factor if value.is_floating_point() else before[key])


def test_ema_equals_the_recurrence():
    model = Small().train()
    ema = Ema(model, decay=0.99, ramp_steps=3.0)
    reference = {key: value.double().numpy().copy() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.norm(torch.randn(2, 4, 3, 3, generator=generator))  # moves running statistics and the counter
        ema.update(step)
        d = 0.99 * (1 - math.exp(-step / 3.0))
        for key, value in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                reference[key] = value.numpy()
            else:
                reference[key] = d * reference[key] + (1 - d) * value.double().numpy()
    for key, value in ema.model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), reference[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    assert model.training and model.conv.weight.requires_grad  # the model itself is as before


def test_ema_after_the_ramp_and_without_one():
    assert Ema(Small(), decay=0.9, ramp_steps=0).decay_at(1) == 0.9
    assert Ema(Small(), decay=0.9, ramp_steps=2.0).decay_at(1000) == pytest.approx(0.9)


def test_ema_reads_the_model_after_a_load():
    """load_state_dict copies in place, so a resumed model is the one the running mean follows."""
    model = Small()
    ema = Ema(model, decay=0.0, ramp_steps=0)
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    ema.update(1)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(ema.model.state_dict()[key], value)
