"""Public weight files -> named tensors -> our models, without running anything a file names.

`read_state_dict` reads a file (weights/containers.py, inert_pickle.py) and finds the weights in it (places.py);
`rename` maps released names to ours by a table with one row per name pattern; `load_public` applies a
model's own table, or the one of its layouts that fits, strictly both ways. `python -m weights inspect FILE` says what a
file is.
"""

import hashlib
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from errors import UserError
from weights.containers import MAX_FILE_BYTES, open_weights
from weights.families import guess_family
from weights.inert_pickle import Inert, Refused, short
from weights.places import find_weights, load_entry

# Released files of torch.hub end in the first digits of their SHA-256: resnet18-f37072fd.pth
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|npz|safetensors)$")


@dataclass(frozen=True)
class WeightsInfo:
    """What a file says about itself.

    container: torch zip, TorchScript zip, legacy torch, safetensors or npz. layout: where in it the weights were.
    names: class names, () where the file has none. image_size: of training, in pixels, where the file says it.
    num_parameters: elements of all tensors but BatchNorm's running statistics and counters. dtypes: tensors of each.
    uses_ema: the weights are the running mean. train_args: the plain values among the training arguments.
    globals_seen: every name the pickle mentions; none was looked up. is_hash_checked: the file's name or the caller
    gave a SHA-256, and it was right. has_checksum: the container has a CRC-32 of every tensor, which was right.
    """

    container: str
    layout: str
    family: str | None
    names: tuple[str, ...]
    image_size: int | None
    num_tensors: int
    num_parameters: int
    dtypes: dict[str, int]
    sha256: str
    is_hash_checked: bool
    has_checksum: bool
    uses_ema: bool
    train_args: dict[str, Any] = field(default_factory=dict)
    globals_seen: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


def read_state_dict(path: str | Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The named tensors of a public weights file, in the file's order and dtypes, each in memory of its own.

    Nothing the file names is imported or called. Of a checkpoint with a running mean (`ema`), that is what is read.
    A flipped bit is noticed where the container has checksums (zip, npz); legacy torch files and safetensors have
    none: give `sha256`, or keep the released name that ends in its first digits, and it is checked.

    Raises UserError, in one line, for every file that is not whole, not weights, not finite or not harmless. The one
    infinity allowed is in an entry named attn_mask, which is made of it.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file, expected weights")
        if status.st_size > MAX_FILE_BYTES:
            raise Refused(f"{status.st_size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
        # broken text makes pickletools and numpy warn before they raise; the refusal says it all
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            digest, is_checked = _check_hash(path, file, sha256)
            content = open_weights(file, status.st_size)
            layout, records, carriers = find_weights(content)
            state = {name: load_entry(name, record, content) for name, record in records.items()}
    except Refused as refusal:
        raise UserError(f"{path}: {refusal}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected a weights file") from None
    except MemoryError:
        raise UserError(f"{path}: its tensors do not fit in memory", exit_code=4) from None
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    info = WeightsInfo(
        container=content.container,
        layout=layout,
        family=guess_family({name: tuple(tensor.shape) for name, tensor in state.items()}),
        names=next((names for carrier in carriers if (names := _class_names(carrier.get("names")))), ()),
        image_size=_image_size(carriers),
        num_tensors=len(state),
        num_parameters=sum(tensor.numel() for name, tensor in state.items() if not name.endswith(statistics)),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())),
        sha256=digest,
        is_hash_checked=is_checked,
        has_checksum=content.container in {"torch zip", "TorchScript zip", "npz"},
        uses_ema="'ema" in layout,
        train_args=_train_args(carriers),
        globals_seen=tuple(sorted(content.globals_seen)),
        metadata=content.metadata,
    )
    return state, info


def check_file(path: str | Path) -> None:
    """UserError where the container or a pickle in it is not harmless; what it holds is not looked at.

    For checkpoints of ours, before torch.load sees them: what goes on past this has the names of tensors and plain
    values alone.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            open_weights(file, path.stat().st_size)
    except Refused as refusal:
        raise UserError(f"{path}: damaged or not a checkpoint: {refusal}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected a checkpoint") from None


def _check_hash(path: Path, file: BinaryIO, expected: str | None) -> tuple[str, bool]:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    in_name = HASH_IN_NAME.search(path.name)
    if expected is not None and expected.lower() != digest:
        raise Refused(f"its SHA-256 is {digest}, expected {expected.lower()}")
    if in_name and not digest.startswith(in_name[1]) and not in_name[1].isdecimal():  # decimal: may be a date
        raise Refused(f"its name promises SHA-256 {in_name[1]}..., it is {digest[:16]}...: damaged or another file")
    return digest, expected is not None or bool(in_name and digest.startswith(in_name[1]))


def _class_names(value: Any) -> tuple[str, ...]:
    """("person", ...) of a list of texts, or of a dict 0..K-1 -> text; () of anything else."""
    if isinstance(value, dict):
        value = [value.get(k) for k in range(len(value))]
    is_list = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return tuple(name if name.isprintable() else short(name) for name in value) if is_list else ()


def _train_args(carriers: list[dict]) -> dict[str, Any]:
    for carrier in carriers:
        for key in ("train_args", "opt", "args"):
            given = carrier.get(key)
            given = given.state if isinstance(given, Inert) else given
            if isinstance(given, dict) and given:
                plain = str | int | float | bool | None
                return {k: v for k, v in given.items() if isinstance(k, str) and isinstance(v, plain)}
    return {}


def _image_size(carriers: list[dict]) -> int | None:
    args = _train_args(carriers)
    places = [args.get("imgsz"), args.get("img_size"), *(carrier.get("image_size") for carrier in carriers)]
    return next((size for size in places if type(size) is int and 0 < size < 1 << 16), None)


def row_pattern(start: str) -> re.Pattern[str]:
    """One side of a table's row as a pattern for the start of a name: each {} is one integer, the rest is literal."""
    return re.compile(re.escape(start).replace(r"\{\}", r"(\d+)"))


def rename(state: dict[str, Tensor], table: list[tuple[str, str | None]]) -> dict[str, Tensor]:
    """Rename each key by the one row that matches its start; each {} is one integer, and a None row drops the key.

    Raises KeyError for a key claimed by no row or by two, for a row no key used, and for two keys with one
    target. Values are never touched: a transpose or split gets a named function of its own, with a test.
    """
    rows = [(old, row_pattern(old), new) for old, new in table]
    renamed: dict[str, Tensor] = {}
    unused = [old for old, _ in table]
    for key, value in state.items():
        hits = [(old, match, new) for old, pattern, new in rows if (match := pattern.match(key))]
        if len(hits) != 1:
            raise KeyError(f"{key!r} is claimed by {[old for old, _, _ in hits] or 'no row'}")
        old, match, new = hits[0]
        if old in unused:
            unused.remove(old)
        if new is not None:
            target = new.format(*match.groups()) + key[match.end() :]
            if target in renamed:
                raise KeyError(f"{key!r} and another key both become {target!r}")
            renamed[target] = value
    if unused:
        raise KeyError(f"rows no key used: {sorted(unused)}")
    return renamed


def fuse_entries(state: dict[str, Tensor], parts: tuple[str, ...], fused: str) -> dict[str, Tensor]:
    """Entries whose names differ in one of `parts` alone (".query.", ".key.", ".value.") become one.

    Its name has `fused` in that place. The values are joined along dim 0 in the order of `parts`, and stand where the
    first part stood; other entries stay as they are. Raises KeyError where a part is absent or shapes do not join.
    """
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        part = next((part for part in parts if part in key), None)
        if part is None:
            joined[key] = value
            continue
        names = [key.replace(part, other) for other in parts]
        if absent := [name for name in names if name not in state]:
            raise KeyError(f"{key!r} is there without {absent[0]!r}")
        values = [state[name] for name in names]
        if any(other.dim() == 0 or other.shape[1:] != value.shape[1:] for other in values):
            raise KeyError(f"{key!r} is {tuple(value.shape)}, which does not join with the shapes of {names}")
        if part == parts[0]:
            joined[key.replace(part, fused)] = torch.cat(values)
    return joined


@dataclass(frozen=True)
class PublicLayout:
    """One way a model's weights were released: what the file's names become, and what is done to values before.

    table: the rows of `rename`. convert: state -> state, splits, joins or transposes entries, still under released
    names; what it does not know it hands on, and where an entry it needs is absent it raises KeyError with one line.
    """

    name: str
    table: list[tuple[str, str | None]]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def layouts_of(model: nn.Module) -> tuple[PublicLayout, ...]:
    """`model.public_layouts`, the most usual first; a model without has the one of `model.public_names`."""
    return getattr(model, "public_layouts", None) or (PublicLayout("released", model.public_names),)


def rename_public(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], PublicLayout]:
    """Released weights under our names, and the layout they came in: the first of the model's whose names fit.

    Where none fits it is the one that claims most of the names. KeyError as `rename` raises it, about that one; names
    that are missing or too many, and shapes, are for the caller to check.
    """
    layouts = layouts_of(model)
    own = model.state_dict().keys()
    for layout in layouts:
        try:
            renamed = _apply_layout(layout, state)
        except KeyError:
            continue
        if all(name.endswith("num_batches_tracked") for name in own ^ renamed.keys()):
            return renamed, layout
    nearest = max(layouts, key=lambda layout: _count_claimed(layout, state))  # the first of equals
    try:
        return _apply_layout(nearest, state), nearest
    except KeyError as error:
        where = f" (read as the {nearest.name} layout)" if len(layouts) > 1 else ""
        raise KeyError(f"{error.args[0]}{where}") from None


def _apply_layout(layout: PublicLayout, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return rename(layout.convert(dict(state)) if layout.convert else state, layout.table)


def _count_claimed(layout: PublicLayout, state: dict[str, Tensor]) -> int:
    with suppress(KeyError):  # a damaged file is still most like its own layout
        state = layout.convert(dict(state)) if layout.convert else state
    patterns = [row_pattern(old) for old, _ in layout.table]
    return sum(any(pattern.match(key) for pattern in patterns) for key in state)


@dataclass(frozen=True)
class LoadReport:
    """What `load_public` did: `loaded` names of ours that were filled.

    layout: the name of the PublicLayout the file was read by.
    """

    source: str
    loaded: tuple[str, ...]
    layout: str


def load_public(
    model: nn.Module,
    state_or_path: dict[str, Tensor] | str | Path,
    *,
    source: str = "the given state",
) -> LoadReport:
    """Fill `model` with public weights: every released name is claimed by one row of the table of one of the model's
    layouts (`public_layouts`, or the one of `public_names`), every parameter and buffer of ours is filled, every shape
    is equal; values are cast to the dtype of the parameter.

    Args:
        state_or_path: public names -> tensors, or a file that `read_state_dict` reads.
        source: what the report and errors call a dict; a path goes by its own name.
    Raises UserError, with the model untouched, for anything left over on either side. The one tolerance: BatchNorm's
    step counters `num_batches_tracked`, which no forward in eval mode reads, may be absent from old files.
    """
    if isinstance(state_or_path, dict):
        state = state_or_path
    else:
        source, state = str(state_or_path), read_state_dict(state_or_path)[0]
    try:
        renamed, layout = rename_public(model, state)
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]}{_family_hint(model, state)}") from None
    own = model.state_dict()
    missing = [name for name in own if name not in renamed and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in renamed if name not in own]
    if missing or unexpected:
        found = "; ".join(
            f"{len(names)} {what} ({_some(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise UserError(f"{source}: {found}{_family_hint(model, state)}")
    wrong = []
    for name, value in renamed.items():
        if value.shape != own[name].shape:
            wrong.append(name)
        elif value.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{source}: {name} is {value.dtype}, the model's is {own[name].dtype}")
    if wrong:
        shapes = f"{wrong[0]} is {tuple(renamed[wrong[0]].shape)}, the model's is {tuple(own[wrong[0]].shape)}"
        head_only = all(name.startswith(tuple(model.class_head)) for name in wrong)
        advice = (
            "; only the class head differs: checkpoint.start_model takes it over by class names" if head_only else ""
        )
        more = f" ({len(wrong)} shapes differ)" if len(wrong) > 1 else ""
        raise UserError(f"{source}: {shapes}{more}{advice or _family_hint(model, state)}")
    model.load_state_dict({**own, **{name: t.to(own[name].dtype) for name, t in renamed.items()}}, strict=True)
    return LoadReport(source, tuple(renamed), layout.name)


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _family_hint(model: nn.Module, state: dict[str, Tensor]) -> str:
    """Whose weights these are and what the model is, where the names and shapes of both tell it; else nothing."""
    theirs = guess_family({name: tuple(tensor.shape) for name, tensor in state.items()})
    ours = guess_family(_public_shapes(model))
    if theirs is None or theirs == ours:
        return ""
    if ours and len(layouts_of(model)) > 1 and theirs.partition(" (")[0] == ours.partition(" (")[0]:
        return ""  # "dinov2 (Hugging Face layout)" is dinov2
    return f"; these are {theirs} weights, the model is {ours or type(model).__name__}"


def _public_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's entries under their released names: its first layout's table, read from right to left."""
    table = layouts_of(model)[0].table
    rows = [(row_pattern(new).pattern, old) for old, new in table if new is not None]
    rows.sort(key=lambda row: len(row[0]), reverse=True)  # the most specific row first
    shapes = {}
    for name, value in model.state_dict().items():
        for pattern, old in rows:
            if (match := re.match(pattern, name)) and old.count("{}") == len(match.groups()):
                shapes[old.format(*match.groups()) + name[match.end() :]] = tuple(value.shape)
                break
    return shapes
