"""What stands around a training step: batches in groups, gradients that wait, and numbers that are not finite."""

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
from engine.training.exits import NOT_FINITE_EXIT_CODE
from engine.training.state import TrainingState
from errors import UserError


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive batches, `size` at a time, as long as there are any; the last group may be smaller."""
    while group := list(itertools.islice(batches, size)):
        yield group


def averaging(learner: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager:
    """Gradients of all batches but the last stay in this process: those of the sum are averaged over processes once."""
    return learner.no_sync() if hasattr(learner, "no_sync") and not is_last else contextlib.nullcontext()


def check_finite(
    values: list[float],
    names: list[str],
    batches: list[Batch],
    index: DatasetIndex,
    state: TrainingState,
    folder: RunFolder,
) -> None:
    """Stop before the weights take it in: UserError with the terms and the pictures, all of them in nonfinite.json."""
    if all(map(math.isfinite, values)):
        return
    *terms, norm = values
    found = {f"{name}": value for name, value in zip(names * len(batches), terms) if not math.isfinite(value)}
    found = found or {"the gradient's norm": norm}
    pictures = [str(index.samples[row].image_path) for batch in batches for row in batch.indices.tolist()]
    with contextlib.suppress(UserError):
        details = {"step": state.step, "terms": {k: str(v) for k, v in found.items()}, "pictures": pictures}
        run_folder.write_text(folder.path / "nonfinite.json", json.dumps(details, indent=2) + "\n")
    shown = ", ".join(pictures[:8]) + (f" and {len(pictures) - 8} more" if len(pictures) > 8 else "")
    raise UserError(
        f"step {state.step}: {', '.join(f'{name} is {value}' for name, value in found.items())}, expected finite "
        f"numbers; pictures of the batch: {shown}; the last checkpoint is untouched",
        NOT_FINITE_EXIT_CODE,
    )
