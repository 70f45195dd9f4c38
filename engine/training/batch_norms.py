"""BatchNorm learns from the variance over a batch: one value per channel has none, and PyTorch refuses it in mid-run.

A batch of one image, at an image size of one coarsest stride (32 pixels), is such a batch for every detector whose
deepest maps are normalised by BatchNorm: they are 1 x 1 there. Two images give 2 values, and 64 pixels 4. Here it
is found before a run starts.
"""

import copy
import functools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import Config
from errors import UserError


def smallest_batch(pictures: int, batch_size: int, processes: int = 1) -> int:
    """The images of the smallest batch of an epoch on a process. `batch_size` is of all processes together."""
    on_one = -(-pictures // processes)
    return on_one % (batch_size // processes) or batch_size // processes


def norm_of_one_value(student: nn.Module, image_size: int) -> str | None:
    """The name of a BatchNorm that gets one value per channel from one image while training; None: there is none.

    A copy of the student is run on two images, as in training; nothing in the student changes.
    """
    student = copy.deepcopy(student).train()
    found: list[str] = []

    def look(name: str, norm: nn.Module, inputs: tuple) -> None:
        if inputs[0].numel() == 2 * norm.num_features:
            found.append(name)

    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm) and not _is_fixed(module):
            module.register_forward_pre_hook(functools.partial(look, name))
    device = next(student.parameters()).device
    with torch.no_grad(), torch.random.fork_rng():
        student(torch.zeros(2, 3, image_size, image_size, device=device))
    return found[0] if found else None


def check_batches(config: Config, pictures: int, student: nn.Module, processes: int = 1) -> None:
    """UserError where a batch of the run would give a BatchNorm one value per channel."""
    pictures = config.data.pictures_per_epoch or pictures
    if smallest_batch(pictures, config.batch_size, processes) > 1:
        return
    norm = norm_of_one_value(student, config.image_size)
    if norm is None:
        return
    size, on_one = config.batch_size, config.batch_size // processes
    each = f" on each of {processes} processes" if processes > 1 else ""
    which = f"the last of {pictures} pictures in batches of {on_one}{each}" if on_one > 1 else f"a batch{each}"
    raise UserError(
        f"key 'batch_size': found {size}: {which} is one image, which at image_size {config.image_size} gives "
        f"BatchNorm ({norm}) one value per channel, expected at least 2: use another batch_size or an image_size of "
        f"{2 * config.image_size}"
    )


def _is_fixed(norm: _BatchNorm) -> bool:
    """Whether it uses its running statistics while the model trains (frcnn.norm.BatchNorm)."""
    return getattr(norm, "is_fixed", False) or not norm.training
