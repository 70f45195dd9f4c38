"""Progress of a run: a bar on a terminal, else a line now and then; scalars and images for TensorBoard."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LINE_EVERY_SECONDS = 30.0


class Progress:
    """Progress through the steps of an epoch, or through other units of work.

    A bar on a terminal with tqdm installed; otherwise a line every LINE_EVERY_SECONDS; with `quiet` nothing.
    mark: stands in brackets before every line.
    """

    def __init__(self, *, quiet: bool = False, unit: str = "step", mark: str = "") -> None:
        self.quiet, self.unit, self.mark = quiet, unit, f"[{mark}] " if mark else ""
        self._bar: Any = None
        self._tqdm = _import_tqdm() if not quiet and sys.stdout.isatty() else None

    def start(self, label: str, total: int | None, done: int = 0) -> None:
        """total: None if unknown."""
        self.label, self.total, self.done = self.mark + label, total, done
        self._printed_at = time.monotonic()
        if self._tqdm is not None:
            self._bar = self._tqdm(total=total, initial=done, desc=label, unit=self.unit, leave=False, file=sys.stdout)

    def advance(self, terms: dict[str, float]) -> None:
        """Count one more step. terms: the values to show."""
        self.done += 1
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(format_values(terms), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._printed_at >= LINE_EVERY_SECONDS:
            self._printed_at = time.monotonic()
            of_total = "" if self.total is None else f"/{self.total}"
            print(f"{self.label}  {self.unit} {self.done}{of_total}  {format_values(terms)}", flush=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.quiet:
            return
        line = self.mark + line
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def format_values(values: Mapping[str, float | None]) -> str:
    """`box 1.234  cls 0.5`, without the values that are None."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)


def _import_tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


class ScalarLog:
    """Scalars (under the names of metrics.csv) and images for TensorBoard; does nothing if it is not installed."""

    def __init__(self, folder: Path, *, purge_step: int | None = None, enabled: bool = True) -> None:
        self._writer = None
        self.missing = ""
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.missing = "tensorboard"
            return
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)  # a resumed run replaces what it redoes

    def add(self, row: Mapping[str, float | None], step: int) -> None:
        if self._writer is None:
            return
        for name, value in row.items():
            if name not in ("epoch", "time") and value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def add_pictures(self, make: Callable[[], dict[str, Image.Image]], step: int) -> None:
        """Write the images that make() returns, by name. It is not called if nothing is written."""
        if self._writer is None:
            return
        for name, picture in make().items():
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
