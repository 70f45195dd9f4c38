"""Parts of the training step: groups of batches, losses, averaging of gradients, the check for numbers not finite."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from datasets.index import DatasetIndex
from datasets.loader import Batch
from engine.runtime import run_folder
from engine.runtime.run_folder import RunFolder
from engine.training.building import TrainingSetup
from engine.training.exits import NOT_FINITE_EXIT_CODE
from engine.training.state import TrainingState
from errors import UserError
from structures import Detector, Targets


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` consecutive batches; the last may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


def losses_of_batch(
    setup: TrainingSetup,
    images: Tensor,
    targets: Targets,
    t_outputs: dict[str, Any],
    epoch: float,
    content: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every loss of a batch by name, weighted: those of detection, then the distillation terms.

    images, targets: augmented (building.augment_batch). content: building.content_of_batch.
    epoch: fractional; the schedules of the terms follow it.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=setup.bfloat16):
        s_output = setup.student(images)
    detection = cast(Detector, setup.student).losses(s_output, targets)  # the same module, typed by its own methods
    detection = {name: setup.config.detection_weight * value for name, value in detection.items()}
    return detection | setup.criterion(s_output, t_outputs, targets, epoch, content)


def averaging(learner: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager:
    """The context of a backward pass: only after the last batch of a step are gradients averaged over the processes."""
    if isinstance(learner, nn.parallel.DistributedDataParallel) and not is_last:
        return learner.no_sync()
    return contextlib.nullcontext()


def check_finite(
    values: list[float],
    names: list[str],
    batches: list[Batch],
    index: DatasetIndex,
    state: TrainingState,
    folder: RunFolder,
) -> None:
    """UserError, before the weights change, where a value is not finite; nonfinite.json lists the batch's pictures.

    values: every loss of every batch in the order of `names`, then the norm of the gradient.
    """
    if all(map(math.isfinite, values)):
        return
    *terms, norm = values
    wrong = {name: value for name, value in zip(names * len(batches), terms) if not math.isfinite(value)}
    wrong = wrong or {"the gradient's norm": norm}
    pictures = [str(index.samples[row].image_path) for batch in batches for row in batch.indices.tolist()]
    with contextlib.suppress(UserError):
        details = {"step": state.step, "terms": {k: str(v) for k, v in wrong.items()}, "pictures": pictures}
        run_folder.write_text(folder.path / "nonfinite.json", json.dumps(details, indent=2) + "\n")
    shown = ", ".join(pictures[:8]) + (f" and {len(pictures) - 8} more" if len(pictures) > 8 else "")
    raise UserError(
        f"step {state.step}: {', '.join(f'{name} is {value}' for name, value in wrong.items())}, expected finite "
        f"numbers; pictures of the batch: {shown}; the last checkpoint is untouched",
        NOT_FINITE_EXIT_CODE,
    )
