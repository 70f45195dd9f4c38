"""g_theta of gradient matching: the mean over pictures of the gradient of a detector's loss of each alone.

g_theta(A) = 1/|A| sum_(x in A) d/dtheta L(theta; x, boxes and labels of x)
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.condense.network_pool import reproducible
from errors import UserError
from structures import Targets


def matched_parameters(network: nn.Module, layers: tuple[str, ...] = ()) -> list[Tensor]:
    """The convolution weights (out, in, k, k) whose names begin with one of `layers`, or all; UserError for none.

    Those that do not require grad are left out.
    """
    convolutions = {name: p for name, p in network.named_parameters() if p.dim() == 4 and p.requires_grad}
    for prefix in layers:
        if not any(name.startswith(prefix) for name in convolutions):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in convolutions))
            raise UserError(f"layers: {prefix!r} begins no convolution's name; they begin with {parts}")
    chosen = [p for name, p in convolutions.items() if not layers or name.startswith(layers)]
    if not chosen:
        raise UserError(f"gradient matching: {type(network).__name__} has no trainable convolution")
    return chosen


def summed_gradient(
    network: nn.Module,
    pictures: Tensor,
    targets: Targets,
    parameters: list[Tensor],
    sampling: int,
    *,
    create_graph: bool,
) -> tuple[tuple[Tensor, ...], float]:
    """sum_i d L(x_i) / d parameters over the pictures (n, 3, S, S), each a batch of its own in L, and the sum of L.

    sampling: the seed of losses that sample, the same for every picture.
    """
    with torch.enable_grad():
        loss = 0
        for index, output in enumerate(split_output(network(pictures), len(pictures))):
            objects = targets[targets.image == index]
            objects = replace(objects, image=torch.zeros_like(objects.image))
            with reproducible(sampling):
                loss = loss + sum(network.losses(output, objects).values())
        # Gradients of 0 for what no loss reaches.
        gradient = torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)
    return gradient, loss.item()


def split_output(output: Any, count: int) -> list[Any]:
    """A detector's output dataclass for `count` pictures -> one for each picture alone, with the graph.

    A tensor whose first dimension is `count`, also within a dict, belongs to the pictures; all else is shared. (What
    is shared is longer than any batch: the anchors of Faster R-CNN.)
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
    network: nn.Module, batches: Iterable[tuple[Tensor, Targets]], parameters: list[Tensor], sampling: int
) -> tuple[list[Tensor], float]:
    """g_theta: the mean of d L / d parameters over the pictures of all batches, and the mean of L. Without a graph."""
    total, total_loss, count = [torch.zeros_like(p) for p in parameters], 0.0, 0
    for pictures, targets in batches:
        gradient, loss = summed_gradient(network, pictures, targets, parameters, sampling, create_graph=False)
        torch._foreach_add_(total, gradient)
        total_loss, count = total_loss + loss, count + len(pictures)
    torch._foreach_div_(total, count)
    return total, total_loss / count


def chunks(pictures: Tensor, targets: Targets, size: int) -> Iterator[tuple[Tensor, Targets]]:
    """A batch in batches of at most `size` pictures, each with its targets."""
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        objects = targets[(targets.image >= start) & (targets.image < start + len(part))]
        yield part, replace(objects, image=objects.image - start)
