"""Helpers of the training step: groups of batches, averaging of gradients, and the check for numbers not finite."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator

from torch import nn

from datasets.index import DatasetIndex
from datasets.loader import Batch
from engine.runtime import run_folder
from engine.runtime.run_folder import RunFolder
from engine.training.state import TrainingState
from errors import NOT_FINITE_EXIT_CODE, UserError


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` consecutive batches; the last may be shorter."""
    while group := list(itertools.islice(batches, size)):
        yield group


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
