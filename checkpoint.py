"""Our own checkpoints: plain tensors and values, written atomically, verified when read.

A checkpoint is what torch.save makes of one dict, so torch.load(path, weights_only=True) reads it anywhere:

    format       FORMAT, a whole number
    arch, names, image_size     what the model is: a name of models.build, the class names, pixels
    model, ema   state dicts: the weights being trained, and their running mean (what is evaluated and shipped)
    optimizer, criterion        state dicts; the criterion's holds the adapters of distillation. No teacher, ever
    step, epoch, batch          optimizer steps done; the epoch in progress, and how many of its batches are done
    best, sums, seconds         early-stop state, running means of the epoch in progress, training time so far
    config       config.to_tree of the run
    data         fingerprint of the training samples
    versions     of Python, torch and this file format's writer

A file made for shipping (`best.pt`) has no `model`, `optimizer`, `criterion` or loop state.

Deliberate differences from plain torch.save: the file appears under its name only when it is complete and on the
disk (temporary file, fsync, rename, fsync of the folder), the file before it stays as `<name>.prev.pt`, and the
zip container's CRC-32 of every record is checked on reading, which torch.load does not do.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
import weights
from config import EvaluationConfig, from_tree
from errors import UserError
from evaluation.class_names import released_names

FORMAT = 1
DISK_EXIT_CODE = 5
PUBLIC_IMAGE_SIZE = 640  # of a public file that does not say


@dataclass(frozen=True)
class CheckpointInfo:
    """What a weights file says about its model.

    names: where a public file has none, those of class_names.released_names, else "0", "1", ...
    config: the plain values of the run's config; empty in a file that carries none.
    """

    arch: str
    names: tuple[str, ...]
    image_size: int
    epoch: int | None = None  # epochs done; None in a public file
    step: int | None = None
    source: str = "ours"  # or "public"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of a dataset's classes that its run was about (data.classes); none where it was about all."""
        return tuple(self.config.get("data", {}).get("classes", ()))

    @property
    def evaluation(self) -> EvaluationConfig:
        """How the model was measured in its run; what the file does not carry is as its family was published."""
        own = self.config.get("evaluation", {})
        own = from_tree(EvaluationConfig, own, source=f"the config in this {self.arch}", key="evaluation")
        return own.completed(models.published_detection(self.arch))


def save(path: str | Path, state: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write `state` to `path` so that at every instant the file there is either the old one or the new one, whole.

    keep_previous: the file that was there stays readable as previous_path(path).
    Raises UserError with exit code 5 where the disk refuses; the old file is then untouched.
    """
    path = Path(path)
    buffer = io.BytesIO()  # torch.save on a file would abort the process on a full disk
    torch.save({"format": FORMAT, **state}, buffer)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(temporary, buffer.getbuffer())
        if keep_previous and path.exists():
            _keep_as(path, previous_path(path))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "the checkpoint before it is untouched" if path.exists() else "there is no earlier checkpoint"
        raise UserError(f"{path}: could not be written: {error.strerror}; {kept}", DISK_EXIT_CODE) from None


def previous_path(path: str | Path) -> Path:
    """weights/last.pt -> weights/last.prev.pt"""
    path = Path(path)
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write all bytes and wait until the disk has them. OSError as the system raises it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries, so that a rename survives a power cut. No-op where unsupported."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_as(path: Path, previous: Path) -> None:
    """Give the file at `path` a second name; `path` itself never goes missing where hard links exist."""
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def load(path: str | Path) -> dict[str, Any]:
    """The dict that `save` wrote, on the CPU. UserError for a file that is missing, damaged, foreign or newer."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path}: damaged: the checksum of record {damaged!r} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint of ours: it holds more than tensors and plain values") from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of ours: no key 'format'")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: found checkpoint format {state['format']!r}, this code reads {FORMAT}")
    return state


def load_newest(path: str | Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """As `load`, but where `path` cannot be read the checkpoint before it is, and `say` gets a line about it."""
    try:
        return load(path)
    except UserError as error:
        previous = previous_path(path)
        if not previous.is_file():
            raise
        state = load(previous)
        say(f"{error}; going on from {previous} (step {state.get('step')})")
        return state


def load_model(path: str | Path, arch: str | None = None, *, device: str = "cpu") -> tuple[nn.Module, CheckpointInfo]:
    """The model a weights file holds, in eval mode, float32, with the averaged (EMA) weights.

    A checkpoint of ours, also one of a run in progress, says what it is. For a public checkpoint (read by
    weights.read_state_dict) `arch` names the model; its class count is read off the class head.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, expected a checkpoint")
    state = _load_ours(path) if arch is None else _load_if_ours(path)
    if state is not None:
        if arch is not None and arch != state["arch"]:
            raise UserError(f"{path}: holds {state['arch']}, expected {arch}")
        info = CheckpointInfo(
            state["arch"],
            tuple(state["names"]),
            state["image_size"],
            state.get("epoch"),
            state.get("step"),
            config=state.get("config") or {},
        )
        model = models.build(info.arch, len(info.names))
        load_state(model, state["ema"], path)
    else:
        model, info = _load_public_model(Path(path), arch)
    return model.to(device).float().eval().requires_grad_(False), info


def _load_ours(path: str | Path) -> dict[str, Any]:
    """As `load`; of a public file the error says what it looks like, and what is missing."""
    try:
        return load(path)
    except UserError as error:
        try:
            family = weights.read_state_dict(path)[1].family
        except UserError:
            raise error from None
        hint = f"; it looks like released weights of {family}, which need --arch" if family else ""
        raise UserError(f"{error}{hint}", error.exit_code) from None


def _load_if_ours(path: str | Path) -> dict[str, Any] | None:
    try:
        return load(path)
    except UserError:
        return None  # a public file, or a damaged one: weights.read_state_dict says which


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Strictly: every name and shape. The error names the first three that differ."""
    ours = model.state_dict()
    differing = [
        name
        for name in [*ours, *state]
        if name not in state or name not in ours or ours[name].shape != state[name].shape
    ]
    if differing:
        names = ", ".join(dict.fromkeys(differing[:3]))
        raise UserError(f"{path}: {len(set(differing))} parameters do not fit the model, first: {names}")
    model.load_state_dict(state, strict=True)


def load_into(model: nn.Module, path: str | Path, *, new_head: bool = False) -> None:
    """Fill `model` with the (averaged) weights of a file, ours or public, strictly.

    new_head: a class head of another size keeps the model's own values, and a line says so.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, expected a weights file")
    saved = _load_if_ours(path)
    if saved is None:
        weights.load_public(model, path, new_head=new_head)
        return
    state, own = dict(saved["ema"]), model.state_dict()
    fresh = [name for name in own if name in state and state[name].shape != own[name].shape]
    if new_head and fresh and all(name.startswith(tuple(model.class_head)) for name in fresh):
        print(f"{path}: {len(fresh)} entries of the class head start fresh: {', '.join(fresh)}")
        state |= {name: own[name] for name in fresh}
    load_state(model, state, path)


def _load_public_model(path: Path, arch: str) -> tuple[nn.Module, CheckpointInfo]:
    state, said = weights.read_state_dict(path)
    if not (names := said.names):
        count = count_classes(state, arch, path)
        names = released_names(arch, count) or tuple(map(str, range(count)))
    model = models.build(arch, len(names))
    weights.load_public(model, state, source=str(path))
    return model, CheckpointInfo(arch, names, said.image_size or PUBLIC_IMAGE_SIZE, source="public")


def count_classes(state: dict[str, Tensor], arch: str, path: str | Path) -> int:
    """K of a public state dict: the length of the class head's last bias grows by the same amount with each class."""
    with torch.device("meta"):
        one, two = (models.build(arch, k) for k in (1, 2))
    try:
        ours, _ = weights.rename_public(one, state)
    except KeyError as error:
        raise UserError(f"{path}: is not {arch}: {error.args[0]}") from None
    sizes = {name: (len(t), len(two.state_dict()[name])) for name, t in one.state_dict().items() if t.dim() == 1}
    heads = [name for name in sizes if name.startswith(one.class_head) and sizes[name][0] != sizes[name][1]]
    name = next((name for name in reversed(heads) if name in ours), None)
    if name is None:
        raise UserError(f"{path}: has no class head of {arch}")
    first, second = sizes[name]
    return 1 + (len(ours[name]) - first) // (second - first)
