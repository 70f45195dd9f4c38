"""Two processes of a gloo group, for tests of what processes share."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120


def in_two_processes(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """function(rank) of two new processes, each with one thread, joined in a group; what each returned.

    function: at the top level of a module; it returns tensors in lists and dicts. A process that fails prints why.
    """
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_work, args=(function, rank, folder)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT_S)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0, 0], f"exit codes {codes} (None: waiting for the other process)"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def _work(function: Callable[[int], Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
