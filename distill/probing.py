"""Tries a term before training: outputs of grey images and random ones, to find shapes and losses that are always 0."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from structures import Targets

NO_LOSS = 1e-12  # rounding can leave this much of a loss that is 0 by its formula


@torch.no_grad()
def probe(model: nn.Module, image_size: int) -> Any:
    """The model's output for two grey images, in eval mode. Afterwards the model is in the mode it was in before."""
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        return model(torch.full((2, 3, image_size, image_size), 0.5, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(was_training)


def random_output(output: Any, generator: torch.Generator) -> Any:
    """The output with all maps, all `..._logits` and a decoder's `memory` from N(0, 1). Boxes and anchors are kept."""
    draw = lambda value: torch.randn(value.shape, generator=generator).to(value)
    features = {name: draw(value) for name, value in output.features.items()}
    named = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    drawn = {name: v for name, v in named.items() if name.endswith("_logits") or name == "memory"}
    drawn = {name: draw(v) for name, v in drawn.items() if isinstance(v, Tensor)}
    return dataclasses.replace(output, features=features, **drawn)


def probe_targets(image_size: tuple[int, int], device: torch.device, label: int = 0) -> Targets:
    """Three objects of one class in each of two images, so that relations between objects have something to compare."""
    height, width = image_size
    sides = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.05, 0.1, 0.4, 0.6], [0.5, 0.45, 0.95, 0.9]], device=device)
    boxes_xyxy = (sides * sides.new_tensor([width, height, width, height])).repeat(2, 1)  # (6, 4)
    labels = torch.full((6,), label, device=device)
    is_ignored = torch.zeros(6, dtype=torch.bool, device=device)
    return Targets(boxes_xyxy, labels, torch.arange(2, device=device).repeat_interleave(3), is_ignored)


def random_positives(output: Any, targets: Targets, generator: torch.Generator) -> Tensor:
    """(B, A) int64, like `positives` of a dense student: at half the locations a random object, else -1."""
    b, a = output.class_logits.shape[:2]
    per_image = len(targets) // b
    rows = torch.randint(per_image, (b, a), generator=generator) + per_image * torch.arange(b)[:, None]
    return torch.where(torch.rand(b, a, generator=generator) < 0.5, rows, -1).to(targets.image.device)
