"""What ends a run with an exit code of its own: errors of PyTorch, and numbers that are not finite."""

import contextlib
import json
import math
from collections.abc import Iterator

import torch

from datasets.index import DatasetIndex
from datasets.loader import Batch
from engine.runtime import run_folder
from engine.runtime.processes import is_lost_process
from engine.runtime.run_folder import RunFolder
from engine.training.state import TrainingState
from errors import LOST_EXIT_CODE, MEMORY_EXIT_CODE, NOT_FINITE_EXIT_CODE, UserError, shortened


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turns an error of the machine (a lost process, no memory left) into a UserError with its exit code."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_lost_process(error):
            raise UserError("another process of this run is gone; go on with --resume", LOST_EXIT_CODE) from None
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}; use a smaller "
            f"batch_size (with optimizer.accumulate) or image_size; the last checkpoint is untouched",
            MEMORY_EXIT_CODE,
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out.

    PyTorch has a class for that on CUDA only. On the CPU it raises a plain RuntimeError, whose text names PyTorch's
    allocator or C++'s bad_alloc.
    """
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text or "bad_alloc" in text
    )


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
    raise UserError(
        f"step {state.step}: {', '.join(f'{name} is {value}' for name, value in wrong.items())}, expected finite "
        f"numbers; pictures of the batch: {shortened(pictures, 8)}; the last checkpoint is untouched",
        NOT_FINITE_EXIT_CODE,
    )
