"""The errors of PyTorch that end a run, with their exit codes."""

import contextlib
from collections.abc import Iterator

import torch

from engine.runtime.processes import is_lost_process
from errors import LOST_EXIT_CODE, MEMORY_EXIT_CODE, UserError


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
