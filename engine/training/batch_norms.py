"""Finds batches that are too small for BatchNorm before a run starts.

BatchNorm needs a variance, so PyTorch refuses one value per channel while training. One image at an image size of the
coarsest stride (32 pixels) is such a batch for every detector that normalises its deepest maps by BatchNorm: they are
1 x 1. Two images give 2 values, an image of 64 pixels gives 4.
"""

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import Config
from errors import UserError, counted


def smallest_batch(pictures: int, batch_size: int, processes: int = 1) -> int:
    """The number of images in the smallest batch of a process. `batch_size` counts all processes together."""
    on_one = -(-pictures // processes)
    return on_one % (batch_size // processes) or batch_size // processes


def norm_of_one_value(student: nn.Module, image_size: int) -> str | None:
    """The name of a BatchNorm that gets one value per channel from one image while training; None: there is none.

    Runs a copy of the student on two images in train mode; the student does not change.
    """
    student = copy.deepcopy(student).train()
    starved: list[str] = []

    def note_starved(name: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if inputs[0].numel() == 2 * norm.num_features:
            starved.append(name)

    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm) and not _is_fixed(module):
            module.register_forward_pre_hook(functools.partial(note_starved, name))
    device = next(student.parameters()).device
    with torch.no_grad(), torch.random.fork_rng():
        student(torch.zeros(2, 3, image_size, image_size, device=device))
    return starved[0] if starved else None


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
    which = (
        f"the last of {counted(pictures, 'picture')} in batches of {on_one}{each}" if on_one > 1 else f"a batch{each}"
    )
    raise UserError(
        f"key 'batch_size': found {size}: {which} is one image, which at image_size {config.image_size} gives "
        f"BatchNorm ({norm}) one value per channel, expected at least 2: use another batch_size or an image_size of "
        f"{2 * config.image_size}"
    )


def _is_fixed(norm: _BatchNorm) -> bool:
    """Whether the norm uses its running statistics while the model trains (frcnn.norm.BatchNorm)."""
    return getattr(norm, "is_fixed", False) or not norm.training
