"""Two processes of a gloo group, for tests of what processes share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked_processes import run_group


def in_two_processes(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """function(rank) of two new processes, each with one thread, joined in a group; what each returned.

    function: at the top level of a module; it returns tensors in lists and dicts.
    """
    finished = run_group(_work, [(function, rank, folder) for rank in (0, 1)], folder=folder)
    assert [child.code for child in finished] == [0, 0], finished  # None: waiting for the other process
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def _work(function: Callable[[int], Any], rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
