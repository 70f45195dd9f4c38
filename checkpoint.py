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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import models
import weights
from config import EvaluationConfig, from_tree
from datasets.class_names import released_columns, released_names
from errors import UserError

FORMAT = 1
DISK_EXIT_CODE = 5
PUBLIC_IMAGE_SIZE = 640  # of a public file that does not say


@dataclass(frozen=True)
class CheckpointInfo:
    """What a weights file says about its model.

    names: where a public file has none, those of class_names.released_names, else "0", "1", ... `names_from` tells.
    config: the plain values of the run's config; empty in a file that carries none.
    """

    arch: str
    names: tuple[str, ...]
    image_size: int
    epoch: int | None = None  # epochs done; None in a public file
    step: int | None = None
    source: str = "ours"  # or "public"
    names_from: Literal["the file", "the release", "nothing"] = "the file"
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
    weights.check_file(path)
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
    weights.read_state_dict) `arch` names the model; its class count is read off the class head. The width of a class
    head that was started from another one is read off the weights as well (models.head_of).
    """
    model, info = _read_model(Path(path), arch)
    if arch is not None and arch != info.arch:
        raise UserError(f"{path}: holds {info.arch}, expected {arch}")
    return model.to(device).float().eval().requires_grad_(False), info


def _read_model(path: Path, arch: str | None) -> tuple[nn.Module, CheckpointInfo]:
    """The model of a file, ours or public; ours may be of another architecture than `arch`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a weights file")
    state = _load_ours(path) if arch is None else _load_if_ours(path)
    if state is None:
        return _read_public_model(path, arch)
    info = CheckpointInfo(
        models.RENAMED.get(state["arch"], state["arch"]),
        tuple(state["names"]),
        state["image_size"],
        state.get("epoch"),
        state.get("step"),
        config=state.get("config") or {},
    )
    model = models.build(info.arch, len(info.names), **models.head_of(info.arch, len(info.names), state["ema"]))
    load_state(model, state["ema"], path)
    return model, info


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


def start_model(
    arch: str,
    names: Sequence[str],
    path: str | Path,
    *,
    new_head: bool = False,
    say: Callable[[str], None] = lambda line: print(line),
) -> nn.Module:
    """A detector for the classes `names`, in train mode, started from a weights file of other classes, ours or public.

    Classes go by their names (class_names.released_columns: case, spaces and other words for the same do not matter),
    never by their place. A class that the file has takes over its rows of the class head; the others keep fresh rows,
    drawn from torch's global generator as models.build draws them. Everything else is the file's, the width of the
    class branch too, so that before any training the classes taken over get the scores that the file's model gives
    them: a Faster R-CNN's softmax head keeps the file's other classes as background for that, and an RT-DETR gives them
    where it chooses the same queries. `say` gets one line with what was taken over and what starts fresh.

    new_head: the class head as a whole starts fresh, also where it would fit.
    UserError for a file that does not fit, or whose classes are not known: there is nothing to join them by.
    """
    path = Path(path)
    with torch.random.fork_rng(devices=[]):  # the fresh rows do not depend on how the file is read
        released, info = _read_model(path, arch)
    theirs = released.state_dict()
    if new_head:
        model = models.build(arch, len(names))
        own = model.state_dict()
        fresh = {name: own[name] for name in own if name.startswith(model.class_head)}
        kept = {name: value for name, value in theirs.items() if not name.startswith(model.class_head)}
        say(f"{path}: the class head starts fresh as a whole (new_head): {len(fresh)} entries")
        load_state(model, kept | fresh, path)
        return model
    if info.names_from == "nothing":
        raise UserError(
            f"{path}: it does not say which classes its {len(info.names)} are, expected a file with class names; "
            "new_head=true starts the class head fresh"
        )
    if info.names_from == "the release":
        say(f"{path}: it does not name its classes; taken for COCO's {len(info.names)}, as {arch} was released")
    columns = released_columns(names, info.names, str(path))
    head = models.head_of(arch, len(info.names), theirs)
    if arch.startswith("fasterrcnn_"):
        num_left = len(info.names) - len({column for column in columns if column is not None})
        head = {"other_classes": num_left + head.get("other_classes", 0)}
    model = models.build(arch, len(names), **head)
    load_state(model, join_heads(model, released, columns), path)
    say(f"{path}: {describe_join(names, info.names, columns)}")
    return model


def join_heads(model: nn.Module, released: nn.Module, columns: Sequence[int | None]) -> dict[str, Tensor]:
    """The state of `released` with the class rows that `model` has, from both: see weights.take_rows."""
    own, state = model.state_dict(), dict(released.state_dict())
    for fresh_rows, released_rows in zip(model.class_rows, released.class_rows):
        pattern = weights.row_pattern(fresh_rows.layer)
        for name in [name for name in own if name in state and pattern.match(name)]:
            state[name] = weights.take_rows(
                own[name], state[name], columns, fresh_rows=fresh_rows, released_rows=released_rows
            )
    return state


def describe_join(names: Sequence[str], released_names: Sequence[str], columns: Sequence[int | None]) -> str:
    taken = [(name, released_names[column]) for name, column in zip(names, columns) if column is not None]
    words = [name if name == theirs else f"{name} from {theirs}" for name, theirs in taken]
    fresh = [name for name, column in zip(names, columns) if column is None]
    num_left = len(set(range(len(released_names))) - set(columns))
    return (
        f"class rows taken over by name: {', '.join(words) or 'none'}; start fresh: {', '.join(fresh) or 'none'}; "
        f"left in the file: {num_left} of {len(released_names)} classes"
    )


def _read_public_model(path: Path, arch: str) -> tuple[nn.Module, CheckpointInfo]:
    state, said = weights.read_state_dict(path)
    count, renamed = _count_and_rename(state, arch, path)
    if said.names and len(said.names) != count:
        raise UserError(f"{path}: it names {len(said.names)} classes, and its class head has {count}")
    known = released_names(arch, count)
    names = said.names or known or tuple(map(str, range(count)))
    model = models.build(arch, count, **models.head_of(arch, count, renamed))
    weights.load_public(model, state, source=str(path))
    names_from = "the file" if said.names else "the release" if known else "nothing"
    image_size = said.image_size or PUBLIC_IMAGE_SIZE
    return model, CheckpointInfo(arch, names, image_size, source="public", names_from=names_from)


def count_classes(state: dict[str, Tensor], arch: str, path: str | Path) -> int:
    """K of a public state dict: the length of the class head's last bias grows by the same amount with each class."""
    return _count_and_rename(state, arch, path)[0]


def _count_and_rename(state: dict[str, Tensor], arch: str, path: str | Path) -> tuple[int, dict[str, Tensor]]:
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
    return 1 + (len(ours[name]) - first) // (second - first), ours
