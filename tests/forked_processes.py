"""Child processes that do not start Python anew: forks of a server that has imported torch and the training loop.

A new Python that imports both takes three seconds of a core, a fork a few hundredths. The server is started with the
first child; each process of the test session has its own.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 800  # pytest's own limit is lower for most tests
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "train", "compare", "condense"]
FORKS.set_forkserver_preload(PRELOADED)  # torch._dynamo: DistributedDataParallel imports it, a second of a core


@dataclass(frozen=True)
class Finished:
    """code: the exit code, minus the signal's number of a killed process, None of one that did not end in time.
    text: what it printed.
    """

    code: int | None
    text: str


def run_forked(function: Callable[..., Any], *arguments: Any, folder: Path) -> Finished:
    """function(*arguments) in a child process."""
    return run_group(function, [arguments], folder=folder, is_group=False)[0]


def run_group(
    function: Callable[..., Any], arguments: list[tuple], *, folder: Path, is_group: bool = True
) -> list[Finished]:
    """function(*arguments[rank]) in a child process for each rank, at the same time, each with one thread.

    function: at the top level of a module. Its SystemExit gives the exit code, any other error the code 1.
    folder: where the processes leave what they print. is_group: with the variables that torchrun sets.
    """
    variables: dict[str, str] = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        if is_group:
            port = str(probe.getsockname()[1])
            variables |= {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank, given in enumerate(arguments):
        own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if is_group else {})
        output = folder / f"printed_by_{rank}.txt"
        children.append((FORKS.Process(target=_work, args=(function, given, own, output)), output))
    for child, _ in children:
        child.start()
    for child, _ in children:
        child.join(TIMEOUT_S)
    codes = [child.exitcode for child, _ in children]
    for child, _ in children:
        child.kill()
    return [Finished(code, output.read_text()) for code, (_, output) in zip(codes, children)]


def run_as_main(command: str, *arguments: str) -> None:
    """For run_forked: what `python command` does, or `python -m command`, where torch has been imported."""
    sys.argv = [command, *arguments]
    if command.endswith(".py"):
        runpy.run_path(str(Path(__file__).resolve().parent.parent / command), run_name="__main__")
    else:
        runpy.run_module(command, run_name="__main__")


def _work(function: Callable[..., Any], arguments: tuple, variables: dict[str, str], output: Path) -> None:
    import torch

    os.environ.update(variables)
    os.fsync = lambda descriptor: None  # as in tests/conftest.py: a kill loses nothing that was written
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py: what was imported stays
    gc.set_threshold(20_000, 50, 100)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
