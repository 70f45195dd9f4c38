"""g_theta of gradient matching: the gradient of a detector's loss for each image alone, averaged over images.

g_theta(A) = 1/|A| sum_(x in A) d/dtheta L(theta; x, boxes and labels of x)
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.condense.network_pool import reproducible
from errors import UserError
from structures import Detector, Targets


def matched_parameters(network: nn.Module, layers: tuple[str, ...] = ()) -> list[Tensor]:
    """The trainable convolution weights (out, in, k, k) whose names begin with one of `layers`; all if it is empty.

    UserError where there are none.
    """
    convolutions = {name: p for name, p in network.named_parameters() if p.dim() == 4 and p.requires_grad}
    for prefix in layers:
        if not any(name.startswith(prefix) for name in convolutions):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in convolutions))
            raise UserError(f"layers: {prefix!r} begins no convolution's name; they begin with {parts}")
    chosen: list[Tensor] = [p for name, p in convolutions.items() if not layers or name.startswith(layers)]
    if not chosen:
        raise UserError(f"gradient matching: {type(network).__name__} has no trainable convolution")
    return chosen


def summed_gradient(
    network: nn.Module,
    images: Tensor,
    targets: Targets,
    parameters: list[Tensor],
    sampling_seed: int,
    *,
    create_graph: bool,
) -> tuple[tuple[Tensor, ...], float]:
    """sum_i d L(x_i) / d parameters over the images (n, 3, S, S), and the sum of L. For L each image is a batch.

    sampling_seed: of losses that draw samples, the same for every image. A parameter that no loss reaches has
    gradient 0.
    """
    detector = cast(Detector, network)
    with torch.enable_grad():
        loss = torch.zeros(())
        for index, output in enumerate(split_output(network(images), len(images))):
            objects = targets[targets.image == index]
            objects = replace(objects, image=torch.zeros_like(objects.image))
            with reproducible(sampling_seed):
                loss = loss + sum(detector.losses(output, objects).values())
        gradient = torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)
    return gradient, loss.item()


def split_output(output: Any, count: int) -> list[Any]:
    """Split a detector's output dataclass for `count` images into one for each image, with its graph.

    Tensors whose first dimension is `count`, also those in a dict, are split; everything else is shared. (A shared
    tensor, such as the anchors of Faster R-CNN, is longer than any batch.)
    """
    if count == 1:
        return [output]

    def parts(value: Any) -> list[Any]:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return list(value.split(1))
        if isinstance(value, dict):
            columns = {key: parts(item) for key, item in value.items()}
            return [{key: column[index] for key, column in columns.items()} for index in range(count)]
        return [value] * count

    columns = {f.name: parts(getattr(output, f.name)) for f in fields(output)}
    return [replace(output, **{name: column[index] for name, column in columns.items()}) for index in range(count)]


def mean_gradient(
    network: nn.Module, batches: Iterable[tuple[Tensor, Targets]], parameters: list[Tensor], sampling_seed: int
) -> tuple[list[Tensor], float]:
    """g_theta: the mean of d L / d parameters over the images of all batches, and the mean of L. Without a graph."""
    total, total_loss, count = [torch.zeros_like(p) for p in parameters], 0.0, 0
    for images, targets in batches:
        gradient, loss = summed_gradient(network, images, targets, parameters, sampling_seed, create_graph=False)
        torch._foreach_add_(total, gradient)
        total_loss, count = total_loss + loss, count + len(images)
    torch._foreach_div_(total, count)
    return total, total_loss / count


def chunks(images: Tensor, targets: Targets, size: int) -> Iterator[tuple[Tensor, Targets]]:
    """A batch, split into batches of at most `size` images, each with its targets."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        objects = targets[(targets.image >= start) & (targets.image < start + len(part))]
        yield part, replace(objects, image=objects.image - start)
