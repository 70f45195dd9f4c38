"""Our own checkpoints: plain tensors and values, written atomically, verified when read.

torch.save writes one dict, so torch.load(path, weights_only=True) reads a checkpoint anywhere. Its keys:

    format                   FORMAT, a whole number
    arch, names, image_size  the model: a name of models.build, the class names, pixels
    config                   config.to_tree of the run
    versions                 of torch and of this format
    epoch, step              epochs done; optimizer steps done
    ema                      state dict: the running mean of the trained weights, which is evaluated
    model                    state dict: the weights being trained
    optimizer, criterion     state dicts; the criterion's holds the adapters of distillation, never a teacher
    position                 engine.training.state.TrainingState as a dict
    data                     fingerprint of the training samples
    machine                  device, precision, processes, threads, torch

The files of a run to hand on, student.safetensors and best.safetensors, are smaller: `save_student`.

Differences from plain torch.save: the file appears under its name only when it is complete and on the disk (temporary
file, fsync, rename, fsync of the folder); the previous file stays as `<name>.prev.pt`; reading checks the CRC-32 of
every record in the zip container, which torch.load does not do.
"""

import contextlib
import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

import models
import weights
from config import RANDOM, EvaluationConfig, from_tree, plumbing_mark
from datasets.class_names import released_names
from datasets.download import how_to_fetch
from errors import DISK_EXIT_CODE, UserError, counted, expect, shortened
from layers.int8 import add_int8, without_ranges

FORMAT = 1
DAMAGE = (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, KeyError, ValueError, zlib.error)
PUBLIC_IMAGE_SIZE = 640  # pixels, for a public file that does not give a size
MAX_CLASSES = 100_000  # so that a file cannot ask for a class head of any size; ImageNet-21k has 21,841

NamesFrom = Literal["the file", "the release", "nothing"]


@dataclass(frozen=True)
class CheckpointInfo:
    """A description of the model in a weights file.

    names: the file's class names; else those of class_names.released_names; else "0", "1", ...
    names_from: which of the three.
    config: the plain values of the run's config; empty where the file has none.
    """

    arch: str
    names: tuple[str, ...]
    image_size: int
    epoch: int | None = None  # epochs done; None in a public file
    step: int | None = None
    source: Literal["ours", "public"] = "ours"
    names_from: NamesFrom = "the file"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The dataset's classes that the run was limited to (data.classes); () for all of them."""
        return tuple(self.config.get("data", {}).get("classes", ()))

    @property
    def plumbing(self) -> str:
        """The mark of a run that was no measurement (config.Config.plumbing); "" of others."""
        return plumbing_mark(self.random_teachers)

    @property
    def random_teachers(self) -> tuple[str, ...]:
        """The names of the run's teachers that had random weights. The config may be a stranger's."""
        teachers = self.config.get("teachers")
        rows = [row for row in teachers if isinstance(row, dict)] if isinstance(teachers, list | tuple) else []
        return tuple(str(row.get("name")) for row in rows if row.get("weights") == RANDOM)

    @property
    def evaluation(self) -> EvaluationConfig:
        """How its run measured the model. Settings that the file does not have are the published ones of its family."""
        tree = self.config.get("evaluation", {})
        own = from_tree(EvaluationConfig, tree, source=f"the config in this {self.arch}", key="evaluation")
        return own.completed(models.published_detection(self.arch))


def save(path: str | Path, state: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write `state` to `path`. At every instant the file there is complete: the old one or the new one.

    keep_previous: keep the old file as previous_path(path).
    UserError with exit code 5 if it cannot be written; the old file is then untouched.
    """
    buffer = io.BytesIO()  # torch.save on a file would abort the process on a full disk
    torch.save({"format": FORMAT, **state}, buffer)
    _replace(Path(path), buffer.getbuffer(), keep_previous=keep_previous)


def save_student(path: str | Path, state: dict[str, Any], *, half: bool = False) -> None:
    """Write the model of a checkpoint as safetensors (weights.shared_file), as safely as `save`.

    Of `state` these keys are written: arch, names, image_size, config, versions, epoch, step and ema.
    half: weights.to_half.
    """
    ema = weights.to_half(state["ema"], str(path)) if half else state["ema"]
    _replace(Path(path), weights.to_bytes(ema, {**state, "tensor_names": "ours"}))


def _replace(path: Path, data: bytes | memoryview, *, keep_previous: bool = False) -> None:
    """Write a temporary file and rename it to `path`, which is so never half-written: see save."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(temporary, data)
        if keep_previous and path.exists():
            _keep_as(path, previous_path(path))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        discard(temporary)
        kept = "the checkpoint before it is untouched" if path.exists() else "there is no earlier checkpoint"
        raise UserError(f"{path}: could not be written: {error.strerror}; {kept}", DISK_EXIT_CODE) from None


def previous_path(path: str | Path) -> Path:
    """weights/last.pt -> weights/last.prev.pt"""
    path = Path(path)
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def discard(path: Path) -> None:
    """Remove a half-written file, where there is one; its folder may be missing, or a file."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_durably(path: Path, data: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Write all bytes, or all parts, and wait until the disk has them. Raises the system's OSError."""
    with open(path, "wb") as file:
        file.writelines([data] if isinstance(data, bytes | memoryview) else data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries; a rename then survives a power cut. No-op where unsupported."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_as(path: Path, previous: Path) -> None:
    """Give the file at `path` a second name. Where hard links exist, `path` is there at every instant."""
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
    check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint of ours: it holds more than tensors and plain values") from None
    except DAMAGE as error:
        raise UserError(f"{path}: damaged or not a checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: not a checkpoint of ours: no key 'format'")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: found checkpoint format {state['format']!r}, this code reads {FORMAT}")
    return state


def check_whole(path: Path) -> None:
    """UserError unless the bytes of a checkpoint are those that were written, by their CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except DAMAGE as error:
        raise UserError(f"{path}: damaged or not a checkpoint: {first_line(error)}") from None
    if damaged is not None:
        raise UserError(f"{path}: damaged: the checksum of record {damaged!r} does not match")


def first_line(error: Exception) -> str:
    """Of its text; the name of its class where it has none, as zipfile's EOFError."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def require_keys(state: dict[str, Any], keys: Sequence[str], path: str | Path) -> None:
    """UserError for a checkpoint without one of the keys, as other programs or other commands of ours write it."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(f"{path}: no key {missing[0]!r}, expected a checkpoint with {', '.join(keys)}")


def load_newest(path: str | Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """As `load`. If `path` cannot be read, the previous checkpoint is, and `say` is called with a line about it."""
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
    """The model in a weights file, in eval mode, float32, with the averaged (EMA) weights.

    path: a file, or the folder of a run (weights.file_of_run).
    A checkpoint of ours names its architecture, and so does a safetensors file of ours (weights.shared_file). That of a
    public one (weights.read_state_dict) follows from its names and shapes; where they leave it open, `arch` is needed.
    The shape of its class head gives its class count. The width of the class head also follows from the weights
    (models.head_of): a head started from other classes may be wider.
    UserError for a file that cannot be read, does not fit, or holds another architecture than `arch`.
    """
    model, info = read_model(Path(path), arch)
    if arch is not None and arch != info.arch:
        raise UserError(f"{path}: holds {info.arch}, expected {arch}")
    return model.to(device).float().eval().requires_grad_(False), info


def load_model_bytes(data: bytes, name: str) -> tuple[nn.Module, CheckpointInfo]:
    """As load_model on the CPU, for a file in memory, which is never written to disk. `name` names it in errors.

    torch.load has no part in it: the reader of public files (weights.read_bytes) reads checkpoints of ours as well.
    """
    state, info = weights.read_bytes(data, name)
    if info.ours:
        model, described = _build_ours({"names": None, "image_size": None, **info.ours, "ema": state}, Path(name))
    elif info.arch in models.ARCHITECTURES:
        model, described = _build_public(state, info, str(info.arch), Path(name))
    else:
        found = f"{info.family}, which is no detector" if info.family else "weights of an unknown architecture"
        raise UserError(f"{name}: found {found}, expected a checkpoint or a released detector")
    return model.float().eval().requires_grad_(False), described


def read_model(path: Path, arch: str | None) -> tuple[nn.Module, CheckpointInfo]:
    """The model in a file, ours or public. A checkpoint of ours may hold another architecture than `arch`."""
    path = weights.file_of_run(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        expected = "a weights file or the folder of a run, such as runs/NAME"
        raise UserError(f"{path}: {found}, expected {expected}{how_to_fetch(path.name)}")
    try:
        saved = load(path)
    except UserError as error:
        return _read_other(path, arch, error)
    return _build_ours(saved, path)


def _read_other(path: Path, arch: str | None, error: UserError) -> tuple[nn.Module, CheckpointInfo]:
    """The model in a public file or a safetensors file of ours. `error` says why it is no checkpoint of ours."""
    try:
        state, info = weights.read_state_dict(path)
    except UserError as refusal:
        raise (error if arch is None else refusal) from None
    if info.ours and info.container == "safetensors":
        return _build_ours({**info.ours, "ema": state}, path)
    if info.ours:
        raise error
    if arch is None and info.arch not in models.ARCHITECTURES:
        needed = "which need --arch" if info.arch is None else "which are not those of a detector"
        hint = f"; it looks like released weights of {info.family}, {needed}" if info.family else ""
        raise UserError(f"{error}{hint}", error.exit_code) from None
    return _build_public(state, info, arch or str(info.arch), path)


def _build_ours(saved: dict[str, Any], path: Path) -> tuple[nn.Module, CheckpointInfo]:
    """Build the model that one of our checkpoints describes. UserError, before that, for a missing or damaged entry."""
    require_keys(saved, ("arch", "names", "image_size", "ema"), path)
    arch, state = models.RENAMED.get(str(saved["arch"]), str(saved["arch"])), saved["ema"]
    is_state = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if arch not in models.ARCHITECTURES or not is_state:
        raise UserError(f"{path}: found weights of {arch!r:.40}, expected one of {', '.join(models.ARCHITECTURES)}")
    names, size, config = saved["names"], saved["image_size"], saved.get("config") or {}
    are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not are_names or not isinstance(config, dict):
        raise UserError(f"{path}: damaged: its class names or its config are not what this code writes")
    expect(type(size) is int and size >= 1, f"{path}: damaged", f"image_size {size!r:.40}", "a number of pixels")
    _check_count(len(names), path)
    model = build_for(arch, len(names), state)
    load_state(model, state, path)
    return model, CheckpointInfo(arch, tuple(names), size, saved.get("epoch"), saved.get("step"), config=config)


def build_for(arch: str, num_classes: int, state: dict[str, Tensor]) -> nn.Module:
    """A fresh model with the head and the widths of a state dict of the same architecture and as many classes.

    It rounds to 8 bits if that of the state dict did (layers/int8.py).
    """
    plain = without_ranges(state)
    head, before = models.head_of(arch, num_classes, plain), torch.get_rng_state()
    model = models.build(arch, num_classes, widths=None, **head)
    own = model.state_dict()
    fits = own.keys() == plain.keys() and all(value.shape == plain[name].shape for name, value in own.items())
    if not fits and (widths := models.widths_of(arch, num_classes, plain)) is not None:
        torch.set_rng_state(before)  # as if one model had been built
        model = models.build(arch, num_classes, widths=widths, **head)
    if len(plain) < len(state):
        add_int8(model)
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict whose names and shapes all equal the model's. UserError names the first three that differ."""
    ours = model.state_dict()
    differing = [
        name for name in ours | state if name not in state or name not in ours or ours[name].shape != state[name].shape
    ]
    if differing:
        raise UserError(f"{path}: parameters do not fit the model: {shortened(differing, 3)}")
    model.load_state_dict(state, strict=True)


def _build_public(
    state: dict[str, Tensor], info: weights.WeightsInfo, arch: str, path: Path
) -> tuple[nn.Module, CheckpointInfo]:
    """Build this architecture from a public state dict. Its class head tells the number of classes."""
    count, renamed = count_and_rename(state, arch, path)
    own_names = info.names
    if len(own_names) == count + 1 and own_names[0].strip("_").lower() == "background":
        own_names = own_names[1:]  # some two-stage detectors list it among the classes
    if own_names and len(own_names) != count:
        raise UserError(f"{path}: it names {counted(len(own_names), 'class')}, and its class head has {count}")
    _check_count(count, path)
    published = released_names(arch, count)
    names = own_names or published or tuple(map(str, range(count)))
    model = models.build(arch, count, widths=None, **models.head_of(arch, count, renamed))
    weights.load_public(model, state, source=str(path))
    found = {name.rpartition(".")[2] for name in info.globals_seen if name.startswith("torch.nn.modules.activation.")}
    if found and (own := getattr(model, "activation", None)) and own not in found:  # same names, another function
        raise UserError(f"{path}: its layers have {', '.join(sorted(found))}, those of {arch} have {own}")
    names_from: NamesFrom = "the file" if info.names else "the release" if published else "nothing"
    image_size = info.image_size or PUBLIC_IMAGE_SIZE
    return model, CheckpointInfo(arch, names, image_size, source="public", names_from=names_from)


def _check_count(classes: int, path: Path) -> None:
    expect(classes <= MAX_CLASSES, f"{path}", f"{classes:,} classes", f"at most {MAX_CLASSES:,}")


def class_head(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of its class head."""
    return cast(tuple[str, ...], model.class_head)  # structures.Detector declares it; models.build returns nn.Module


def count_and_rename(state: dict[str, Tensor], arch: str, path: str | Path) -> tuple[int, dict[str, Tensor]]:
    """Count the classes K of a public state dict, and rename its entries to ours.

    The last bias of the class head grows by a fixed length with each class. UserError for weights of another
    architecture, or without a class head.
    """
    one, sizes = models.of_one_class(arch)
    try:
        ours, _ = weights.rename_public(one, state)
    except KeyError as error:
        raise UserError(f"{path}: is not {arch}: {error.args[0]}") from None
    heads = [name for name in sizes if name.startswith(class_head(one)) and sizes[name][0] != sizes[name][1]]
    name = next((name for name in reversed(heads) if name in ours), None)
    if name is None:
        raise UserError(f"{path}: has no class head of {arch}")
    first, second = sizes[name]
    return 1 + (len(ours[name]) - first) // (second - first), ours
