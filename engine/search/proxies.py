"""What a shape promises before its training; higher is meant to be better. Parameters and FLOPs are proxies as well."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layers.channel_groups import ACTIVATIONS
from structures import Detector, Targets


def synflow(model: nn.Module, image_size: int) -> float:
    """The sum of synaptic_flows over all layers, by which shapes are compared (arXiv:2101.08134)."""
    return sum(synaptic_flows(model, image_size).values())


def synaptic_flows(model: nn.Module, image_size: int) -> dict[str, float]:
    """The synaptic flow through each layer of a detector (arXiv:2006.05467, sec. 5), by the name of its weight.

        R = sum of the logits of |f|(1)          S_l = sum over weights w of layer l of |w| dR/d|w|

    |f| is the network with every weight replaced by its absolute value, without biases, activations and normalisation;
    1 is an image of ones. R is the sum over all paths from a pixel to a logit of the product of the |w| on it, and S_l
    that of the paths through layer l. If each path passes exactly one of some layers, their S_l sum to R. A max pooling
    passes on the paths through its largest inputs alone.

    float64; the model stays as it was. Differs from the papers: they keep ReLU, which changes nothing where all is
    positive; SiLU would.
    """
    model = copy.deepcopy(model).double().train()  # in train mode no norm is folded into its convolution
    weights = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                weights[name] = value.requires_grad_(True)
            value.copy_(value.abs() if value.dim() > 1 else torch.zeros_like(value))
    with _LinearLayersOnly():
        output = model(torch.ones(1, 3, image_size, image_size, dtype=torch.float64))
    total = torch.stack([logits.sum() for logits in output.logits()]).sum()
    flows = torch.autograd.grad(total, list(weights.values()))
    return {name: float((w.detach() * flow).sum()) for (name, w), flow in zip(weights.items(), flows, strict=True)}


class _LinearLayersOnly(TorchFunctionMode):
    """Activations and normalisations return what they are given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        return args[0] if name in ACTIVATIONS or name == "batch_norm" else func(*args, **(kwargs or {}))


def gradient_norm(model: nn.Module, images: Tensor, targets: Targets) -> float:
    """The Euclidean norm of the gradient of the detection loss in all parameters, on one batch (arXiv:2101.08134).

    images: (B, 3, H, W) in [0, 1]. The model is in train mode, as at its first step, and stays as it was.
    """
    model = copy.deepcopy(model).train()
    detector, parameters = cast(Detector, model), [p.requires_grad_(True) for p in model.parameters()]
    loss = torch.stack(list(detector.losses(detector(images), targets).values())).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(sum(g.double().square().sum() for g in gradients if g is not None) ** 0.5)
