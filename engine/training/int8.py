"""A student that is fine-tuned for int8 (student.int8): the ranges of its activations, and when they move."""

import torch
from torch import nn

from config import Config
from datasets.index import DatasetIndex
from datasets.loader import Loader
from engine.drawing.predictions import spread
from engine.runtime.processes import use_bfloat16
from errors import UserError, expect, naming
from layers.int8 import add_int8, has_int8, observe_ranges

CALIBRATION_BATCH = 8  # pictures whose percentiles are taken together


def check_int8(config: Config) -> None:
    """UserError for keys that contradict student.int8."""
    settings = config.student.int8
    if settings is None:
        return
    if config.student.weights is None:
        raise UserError("key 'student.int8': needs a trained student to begin from, expected student.weights")
    percentile = settings.percentile
    expect(50 < percentile <= 100, "key 'student.int8.percentile'", percentile, "above 50 and at most 100")
    for key, value, least in (("pictures", settings.pictures, 1), ("frozen_epochs", settings.frozen_epochs, 0)):
        expect(value >= least, f"key 'student.int8.{key}'", value, f"at least {least}")
    expect(not config.compile, "key 'compile'", "true beside student.int8, whose ranges move", "false")
    expected = "float32 or auto"
    expect(config.precision != "bfloat16", "key 'precision'", "bfloat16, which is coarser than int8's steps", expected)


def prepare_int8(student: nn.Module, config: Config) -> None:
    """Let the student round to 8 bits, if the config asks for it; a resumed one does already."""
    if config.student.int8 is None or has_int8(student):
        return
    with naming(f"key 'student.int8': {config.student.arch}", ValueError):
        add_int8(student)


def student_bfloat16(config: Config, device: torch.device) -> bool:
    """Whether the student computes in bfloat16. Rounding to 8 bits needs float32: bfloat16 has as few itself."""
    return config.student.int8 is None and use_bfloat16(config.precision, device)


@torch.no_grad()
def start_ranges(
    student: nn.Module, mean: nn.Module, index: DatasetIndex, config: Config, device: torch.device
) -> None:
    """The first ranges of the student and of its EMA: those of export.py --int8, on whole training pictures.

    Every process takes the same pictures.
    """
    assert config.student.int8 is not None
    chosen = spread(index, config.student.int8.pictures)
    observe_ranges(student.eval(), config.student.int8.percentile)
    for batch in Loader(
        chosen, image_size=config.image_size, batch_size=CALIBRATION_BATCH, seed=0, shuffle=False
    ).epoch(0):
        student(batch.images.to(device).float() / 255)
    observe_ranges(student.train(), None)
    mean.load_state_dict(student.state_dict())


def move_ranges(student: nn.Module, config: Config, epoch: int) -> None:
    """In the last student.int8.frozen_epochs the ranges stay, before they follow every batch."""
    if (settings := config.student.int8) is not None:
        is_frozen = epoch >= config.epochs - settings.frozen_epochs
        observe_ranges(student, None if is_frozen else settings.percentile)
