"""D4: a disk that fills at every file that a command writes: exit code 5 in one line, and what was there stays."""

import builtins
import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import condense
import models
import predict
import train
from config import to_tree
from datasets import convert, scan, shapes
from tests.faults.matrix import Case, Outcome, refusal
from tests.tiny_training import tiny_config, write_dataset
from weights import __main__ as weights_command
from yaml_files import dump_yaml


class FullDisk:
    """The disk is full at the n-th file that is opened for writing below a folder, and for all after it.

    A file that is opened then gets its first bytes and stays so, while what is written goes to /dev/full, which takes
    none. count: the files that were opened. n of None: there is room for all.
    """

    def __init__(self, folder: Path, n: int | None = None) -> None:
        self.folder, self.n, self.count = str(folder), n, 0

    def open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+") or not str(file).startswith(self.folder):
            return self.original(file, mode, *args, **options)
        self.count += 1
        if self.n is None or self.count <= self.n:
            return self.original(file, mode, *args, **options)
        with self.original(file, "ab") as begun:
            begun.write(b"{")
        return self.original("/dev/full", mode.replace("x", "w"), *args, **options)

    def __enter__(self) -> "FullDisk":
        self.original = builtins.open
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(builtins, "open", self.open)
        self.patch.setattr(io, "open", self.open)
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(call: Callable[[], object], folder: Path, n: int) -> Outcome:
    """The call with room for n files: refused with the exit code 5, or done where the file was no result of its."""
    with FullDisk(folder, n), contextlib.redirect_stdout(io.StringIO()):
        return refusal(call, str(folder), "No space left on device", exit_code=5)


def count_files(call: Callable[[], object], folder: Path) -> int:
    with FullDisk(folder) as disk, contextlib.redirect_stdout(io.StringIO()):
        call()
    return disk.count


def at_every_file(folder: Path) -> Iterator[Case]:
    if not os.path.exists("/dev/full"):
        return
    data = write_dataset(folder / "data", train=8, test=4)
    yield from in_training(folder, data)
    yield from in_other_commands(folder, data)


def at_every_byte(folder: Path) -> Iterator[Case]:
    """A file size limit cuts the checkpoint off after some of its bytes: the one before stays."""
    path = folder / "checkpoint" / "last.pt"
    state = {"arch": "yolov8n", "names": ["a"], "image_size": 64, "ema": {"w": torch.ones(900)}}

    def run(fraction: float) -> Outcome:
        import resource

        checkpoint.save(path, state | {"step": 1})
        before = files_in(path.parent)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before["last.pt"]) * fraction), hard))
        try:
            found = refusal(lambda: checkpoint.save(path, state | {"step": 2}), path, "untouched", exit_code=5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files_in(path.parent) == before
        return found

    for fraction in np.linspace(0, 0.99, 20).tolist():
        yield Case("D4", f"checkpoint at {fraction:.2f} of its bytes", lambda f=fraction: run(f))


def in_training(folder: Path, data: Path) -> Iterator[Case]:
    """A run stops at any file it writes, and resumed, or begun anew before its first checkpoint, ends the same."""
    changes = {"batch_size": 4, "save_every_steps": 1, "evaluation": {"every_epochs": 1}, "epochs": 2}
    config = tiny_config(data, folder / "runs", data={"holdout_fraction": 0.25}, **changes)
    run_folder, ends = folder / "runs" / "tiny", []

    def end() -> dict[str, torch.Tensor]:
        return checkpoint.load(run_folder / "weights" / "last.pt")["ema"]

    def run(n: int) -> Outcome:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        found = fails(lambda: train.run(config, quiet=True), folder / "runs", n)
        assert not list(run_folder.rglob("*.tmp"))
        can_resume = (run_folder / "weights" / "last.pt").exists()
        if not can_resume:
            shutil.rmtree(folder / "runs", ignore_errors=True)
        train.run(config, resume=can_resume, quiet=True)
        assert all(torch.equal(value, ends[0][name]) for name, value in end().items()), "ends with other weights"
        assert (run_folder / "report.json").exists()
        return found

    total = count_files(lambda: train.run(config, quiet=True), folder / "runs")
    ends.append(end())
    for n in range(total):
        yield Case("D4", f"training, file {n + 1} of {total}", lambda n=n: run(n), 20)


def in_other_commands(folder: Path, data: Path) -> Iterator[Case]:
    """Every other command that writes files, at each of the first that it writes."""
    model = {"arch": "yolov8_narrow", "names": ["green", "red"], "image_size": 64}
    checkpoint.save(folder / "model.pt", model | {"ema": models.build("yolov8_narrow", 2).state_dict()})
    tree = to_tree(tiny_config(data, folder / "runs"))
    (folder / "set.yaml").write_text(dump_yaml(tree | {"condense": {"method": "random", "pictures": 2}}))
    Image.new("RGB", (64, 64)).save(folder / "photo.png")
    out = folder / "out"
    shutil.copytree(data, folder / "lists")
    commands: dict[str, Callable[[], object]] = {
        "scan": lambda: scan.main(["yolo", str(data), "train", "--out", str(out)]),
        "shapes": lambda: shapes.main([str(out), "--train", "2", "--test", "1", "--image-size", "64"]),
        "predict": lambda: predict.main(
            [str(folder / "model.pt"), str(folder / "photo.png"), "--output", str(out), "--json", "--txt"]
        ),
        "weights": lambda: weights_command.main(["convert", str(folder / "model.pt"), str(out / "a.safetensors")]),
        "init": lambda: train.main(["--init", str(out / "new.yaml"), "--data", str(data)]),
        "condense": lambda: condense.main([str(folder / "set.yaml"), f"runs={out}"]),
    }
    for form in convert.WRITERS:
        commands[f"convert to {form}"] = lambda f=form: convert.main(
            ["yolo", str(data), "train", f, str(out / "set"), "--max-bad-fraction", "1"]
        )

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    def run(command: Callable[[], object], n: int) -> Outcome:
        prepare()
        found = fails(command, out, n)
        assert not list(out.rglob("*.tmp")), "left half a file behind"
        return found

    for name, command in commands.items():
        prepare()
        total = count_files(command, out)
        for n in range(min(total, 6)):
            yield Case("D4", f"{name}, file {n + 1} of {total}", lambda c=command, n=n: run(c, n), 20)
