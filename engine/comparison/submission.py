"""compare.py --submit: workers that each give the same compare.py, as jobs of SLURM or processes of this machine.

The workers share the runs among themselves by claims, so no scheduler has to know what needs what. Jobs are made by
submitit (github.com/facebookincubator/submitit), which is asked for where it is used.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from errors import UserError, expect, require
from yaml_files import parse_yaml

PROGRESS = ("== ", "epoch ")  # how the lines of a worker begin that say which run it trains, and how far it is
A_WEEK_MIN = 7 * 24 * 60  # submitit's own limit for a local process is two minutes


def require_submitit(cluster: str) -> None:
    """UserError if submitit (with the install command) or SLURM is missing: call it before any work."""
    require("submitit", "submit", f"--submit {cluster}")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise UserError(
            "argument --submit: found no srun here, expected a machine of a slurm cluster, or --submit local"
        )


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`timeout_min=600` and the like, as submitit's update_parameters takes them."""
    for pair in pairs:
        expect("=" in pair, "argument --submit-option", repr(pair), "key=value, such as timeout_min=600")
    split = (pair.partition("=") for pair in pairs)
    return {key: parse_yaml(value, f"argument --submit-option: {key}") for key, _, value in split}


def device_of(worker: int, count: int) -> str | None:
    """The value of CUDA_VISIBLE_DEVICES for a worker of this machine: one GPU each, in turn; None without GPUs."""
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return visible[worker % count]


def environment(worker: int, workers: int) -> dict[str, str]:
    """What a worker of this machine adds to the environment: its GPU, and its part of the cores unless that is set."""
    device = device_of(worker, torch.cuda.device_count())
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    return {"OMP_NUM_THREADS": threads} | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})


def run_workers(
    cluster: str, command: Sequence[str], *, workers: int, options: dict[str, Any], folder: Path
) -> list[str]:
    """Submit the command `workers` times, print how far each is until all have ended; the error of each that failed.

    folder: for submitit's logs. UserError if the jobs cannot be submitted.
    """
    import submitit

    jobs = []
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=cluster)
        defaults = {"name": "compare"} | ({"timeout_min": A_WEEK_MIN} if cluster == "local" else {})
        executor.update_parameters(**(defaults | options))
        for worker in range(workers):
            env = os.environ | environment(worker, workers) if cluster == "local" else None
            jobs.append(executor.submit(submitit.helpers.CommandFunction(list(command), cwd=os.getcwd(), env=env)))
    except (
        RuntimeError,
        NameError,
        TypeError,
        ValueError,
        AssertionError,
        submitit.core.utils.FailedJobError,
    ) as error:
        raise UserError(f"argument --submit: {' '.join(str(error).split())}") from None
    print(f"submitted: {', '.join(f'{job.job_id} ({job.paths.stdout})' for job in jobs)}", flush=True)
    places = [0] * len(jobs)
    waiting = True
    while waiting:
        waiting = not all(job.done() for job in jobs)
        for worker, job in enumerate(jobs):
            lines, places[worker] = new_lines(job.paths.stdout, places[worker])
            for line in lines:
                if line.startswith(PROGRESS):
                    print(f"worker {worker + 1}: {line}", flush=True)
        time.sleep(0.5 if waiting else 0)
    errors = [job.exception() for job in jobs]
    with contextlib.suppress(OSError):
        (folder / "%j").rmdir()  # submitit makes the folder by its pattern as well
    return [last_error(str(error)) for error in errors if error is not None]


def new_lines(log: Path, place: int) -> tuple[list[str], int]:
    """The whole lines of a file that is being written, from byte `place` on, and the place behind them."""
    if not log.is_file():
        return [], place
    with log.open("rb") as stream:
        stream.seek(place)
        whole, end, _ = stream.read().rpartition(b"\n")
    return whole.decode(errors="replace").splitlines(), place + len(whole) + len(end)


def last_error(text: str) -> str:
    """The last line that compare.py printed as an error, of all that submitit says; else its first line."""
    _, is_there, error = text.rpartition("error: ")
    return (error if is_there else text.strip()).partition("\n")[0]
