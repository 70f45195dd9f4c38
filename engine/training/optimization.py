"""Parameter groups, the choice of an optimizer, the schedules of its rates, and the running mean of the weights (EMA).

The schedules are pure functions of the step, so a resumed run needs only its step number.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from config import OptimizerConfig
from engine.training.optimizers import AdamW, Optimizer, Sgd

TOKENS = ("class_token", "registers", "positions")  # names of the learnt inputs in our vision transformers
BACKBONE = "backbone."  # how the names of a detector's backbone parameters begin


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float, backbone_factor: float = 1.0) -> list[dict]:
    """Three groups over the trainable parameters: `weights` decay; `norms` and `biases` do not.

    `norms` holds all other vectors and, as usual for ViTs, a transformer's TOKENS: decay is meant for factors of an
    input, and a token is an input itself. Parameters keep the order of the modules, so that an optimizer state saved by
    one process fits the next.

    `factor`: what apply_schedule multiplies the group's learning rate by. If backbone_factor is not 1, the backbone has
    three groups of its own with that factor: `backbone.weights`, `backbone.norms`, `backbone.biases`.
    """
    kinds = ("weights", "norms", "biases")
    names = kinds if backbone_factor == 1 else (*kinds, *(BACKBONE + kind for kind in kinds))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                prefix = BACKBONE if backbone_factor != 1 and name.startswith(BACKBONE) else ""
                rows[prefix + kind_of(name, parameter)].append(parameter)
    return [
        {
            "name": name,
            "params": rows[name],
            "weight_decay": weight_decay if name.endswith("weights") else 0.0,
            "factor": backbone_factor if name.startswith(BACKBONE) else 1.0,
        }
        for name in names
    ]


def kind_of(name: str, parameter: Tensor) -> str:
    """weights, norms or biases, as parameter_groups describes them."""
    own_name = name.rpartition(".")[2]
    if own_name == "bias":
        return "biases"
    return "weights" if parameter.dim() > 1 and own_name not in TOKENS else "norms"


def build_optimizer(modules: Iterable[nn.Module], settings: OptimizerConfig) -> Optimizer:
    """`sgd` (Nesterov momentum) or `adamw` (betas = momentum, 0.999) over parameter_groups(modules)."""
    groups = parameter_groups(modules, settings.weight_decay, settings.backbone_factor)
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return Sgd(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return AdamW(groups, lr=settings.learning_rate, betas=(settings.momentum, 0.999))


def learning_rate_factor(progress: float, *, final_fraction: float, schedule: str) -> float:
    """From 1 at progress 0 to final_fraction f at progress 1:

    linear  1 - (1 - f) progress
    cosine  f + (1 - f) (1 + cos(pi progress)) / 2        (SGDR, arXiv:1608.03983, without restarts)
    """
    if schedule == "linear":
        return 1 - (1 - final_fraction) * progress
    if schedule == "cosine":
        return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f"schedule {schedule!r}: expected linear or cosine")


def apply_schedule(
    optimizer: Optimizer, step: int, settings: OptimizerConfig, *, total_steps: int, warmup_steps: int
) -> float:
    """Set the rates for optimizer step `step` of 0..total_steps-1 and return the scheduled learning rate.

    During the first warmup_steps the learning rates rise linearly from 0 to the schedule, and SGD's momentum from
    warmup_momentum. The rate of SGD's biases falls from warmup_bias_learning_rate, which lets a fresh detector find the
    base rate of its classes in a few steps. AdamW does not need that: its biases rise from 0 like the rest.
    All of this is multiplied by the `factor` of a group; the scheduled learning rate is that of a factor of 1.
    """
    final, schedule = settings.final_fraction, settings.schedule
    target = settings.learning_rate * learning_rate_factor(step / total_steps, final_fraction=final, schedule=schedule)
    warmth = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    is_sgd = isinstance(optimizer, Sgd)
    for group in optimizer.param_groups:
        start = settings.warmup_bias_learning_rate if is_sgd and group["name"].endswith("biases") else 0.0
        group["lr"] = group["factor"] * (start + (target - start) * warmth)
        if is_sgd:
            first = settings.warmup_momentum
            group["momentum"] = first + (settings.momentum - first) * warmth
    return target


class Ema:
    """The running mean of a model's weights and buffers (Polyak averaging; Tarvainen & Valpola, arXiv:1703.01780).

        d(step) = decay (1 - exp(-step / ramp_steps)),   mean <- d mean + (1 - d) model

    The ramp makes the mean forget the random start quickly. Integer buffers are copied. `model`: the mean, a detached
    copy in eval mode.
    """

    def __init__(self, model: nn.Module, *, decay: float, ramp_steps: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp_steps = decay, ramp_steps
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        others = [(mean, value) for mean, value in pairs if not mean.is_floating_point()]
        self._means, self._values = [m for m, _ in floats], [v for _, v in floats]
        self._counts, self._counted = [m for m, _ in others], [v for _, v in others]

    def decay_at(self, step: int) -> float:
        return self.decay * (1 - math.exp(-step / self.ramp_steps)) if self.ramp_steps > 0 else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the mean after optimizer step number `step`, from 1. Reads the model given at construction."""
        torch._foreach_lerp_(self._means, self._values, 1 - self.decay_at(step))
        if self._counts:
            torch._foreach_copy_(self._counts, self._counted)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in model.state_dict(keep_vars=True).values()]
