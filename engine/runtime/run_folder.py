"""The folder of a run: runs/<name>/ with config.yaml, metrics.csv, report.json and weights/.

metrics.csv: plain CSV, one row per epoch, header `epoch,time,train/<term>...,metrics/...,lr`.
report.json: the final numbers, with everything needed to reproduce them.
"""

import csv
import dataclasses
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoint import discard, previous_path, sync_folder, write_durably
from config import Config, to_tree
from engine.runtime import claims
from errors import DISK_EXIT_CODE, UserError, expect
from yaml_files import dump_yaml

AP_COLUMNS = tuple(f"metrics/AP{percent}" for percent in range(50, 100, 5))  # at each IoU threshold
PLUMBING = "plumbing"  # the column of a run that is no measurement (config.Config.plumbing)
METRIC_COLUMNS = ("metrics/precision", "metrics/recall", "metrics/mAP50", "metrics/mAP50-95", *AP_COLUMNS)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def last(self) -> Path:
        return self.path / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "weights" / "best.safetensors"

    @property
    def student(self) -> Path:
        return self.path / "weights" / "student.safetensors"

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.last.is_file() or previous_path(self.last).is_file()

    def remove_stale(self) -> None:
        """Remove files that a killed process left half written."""
        for stale in [*self.path.glob("*.tmp"), *self.path.glob("weights/*.tmp")]:
            stale.unlink(missing_ok=True)


def check_name(name: str) -> None:
    """UserError for a run's name that is not that of a folder directly in `runs`."""
    expect(name not in ("", ".", "..") and Path(name).name == name, "key 'name'", repr(name), "the name of a folder")


def create(config: Config, claim: claims.Claim | None = None) -> tuple[RunFolder, Config, claims.Claim]:
    """Make a new folder runs/<name> (<name>2, <name>3, ... if taken); return it, the config with that name, its claim.

    claim: on runs/<name>, which is not there yet, if the caller holds it. claims.Claimed if another process does, which
    is about to make that folder.
    """
    check_name(config.name)
    number = 1
    while True:
        name = config.name if number == 1 else f"{config.name}{number}"
        path = Path(config.runs) / name
        number += 1
        if claim is None and path.exists():
            continue
        held = claim or claims.take(path)
        folder, named = RunFolder(path), dataclasses.replace(config, name=name)
        try:
            path.mkdir(parents=True)
            write_config(folder, named)
            return folder, named, held
        except BaseException as error:
            held.release()
            if isinstance(error, FileExistsError) and claim is None:
                continue
            if isinstance(error, OSError):
                raise UserError(f"{path}: could not be made: {error.strerror}", DISK_EXIT_CODE) from None
            raise


def write_config(folder: RunFolder, config: Config) -> None:
    write_text(folder.config, dump_yaml(to_tree(config)))


def find(run: str | Path) -> RunFolder:
    """The run given by its folder or by a file in its weights/ folder."""
    path = Path(run)
    if path.is_file() and path.parent.name == "weights":
        path = path.parent.parent
    if not path.is_dir():
        raise UserError(f"{run}: no such run, expected a folder such as runs/name")
    folder = RunFolder(path)
    if not folder.can_resume:
        raise UserError(f"{folder.last}: no such file; the run stopped before its first checkpoint, start it again")
    return folder


def make_folder(path: Path) -> None:
    """Make a folder that may be there already. UserError with exit code 5 if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: no folder can be made there: {error.strerror}", DISK_EXIT_CODE) from None


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole. UserError with exit code 5 if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """As write_text, of bytes or of parts."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        discard(temporary)
        raise UserError(f"{path}: could not be written: {error.strerror}", DISK_EXIT_CODE) from None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, as text by column; none if there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdigit() and None not in row.values()]


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add the row of an epoch; it replaces rows of this epoch or later ones, left by a run that was killed.

    The whole file is rewritten, so that it never ends in half a row. Its columns are the union of all rows' columns,
    in the order train/..., metrics/..., lr; a value that an epoch lacks is empty. A run that is no measurement has 1
    in a last column, `plumbing`.
    """
    text = {key: _cell(value) for key, value in row.items()}
    rows = [old for old in read_metrics(path) if int(old["epoch"]) < int(row["epoch"])] + [text]
    names = list(dict.fromkeys(key for r in rows for key in r))
    train = [name for name in names if name.startswith("train/")]
    columns = ["epoch", "time", *train, *METRIC_COLUMNS, "lr", *(name for name in names if name == PLUMBING)]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, out.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write JSON; numbers that are not finite (the precision of no detection) become null."""
    write_text(path, json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def environment() -> dict[str, Any]:
    """What the results depend on besides the config: commit, versions, processor, threads."""
    import numpy
    import PIL

    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    head, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain", "--untracked-files=no")
    if head is None or changes is None:
        return None
    return f"{head}-dirty" if changes else head


def git(folder: Path, *arguments: str) -> str | None:
    """What a command of git prints in a folder; None where it fails, or git is absent."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
