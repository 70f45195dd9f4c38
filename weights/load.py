"""Public weight files -> named tensors -> our models. Nothing that a file names is run.

`read_state_dict` reads a file (containers.py, inert_pickle.py) and finds the weights in it (places.py).
`rename` maps released names to ours by a table with one row per name pattern.
`load_public` fills a model by the table of the layout that fits. It is strict: no name may be left over on either side.
"""

import hashlib
import io
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from errors import UserError, shortened
from weights.containers import MAX_FILE_BYTES, open_weights
from weights.families import arch_of_family, guess_family
from weights.inert_pickle import Inert, Refused, short
from weights.places import find_weights, load_entry
from weights.shared_file import read_description

OUR_KEYS = ("arch", "names", "image_size", "versions", "epoch", "step", "config")  # of checkpoint.py, beside `ema`
NAME_KEYS = ("names", "class_names", "classes", "CLASSES")  # under which training code keeps the names of the classes
# Released files of torch.hub end in the first digits of their SHA-256: resnet18-f37072fd.pth
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|bin|npz|safetensors)$")


@dataclass(frozen=True)
class WeightsInfo:
    """A description of a weights file.

    container: torch zip, TorchScript zip, legacy torch, safetensors or npz.
    layout: where the weights were in it.
    family: guess_family of the names and shapes.
    arch: the architecture that the file names (a checkpoint of train.py, a file of `python -m weights convert`), else
        what names and shapes tell; None where they leave it open.
    names: class names; () where the file has none.
    image_size: pixels in training; None where the file does not give it.
    num_parameters: elements of all tensors except BatchNorm's running statistics and counters.
    dtypes: name of a dtype -> number of tensors.
    is_hash_checked: the file's name or the caller gave a SHA-256, and it was right.
    has_checksum: the container has a checksum of every tensor, and all were right.
    uses_ema: the weights are the running mean.
    train_args: the plain values among the training arguments.
    globals_seen: every name that the pickle mentions; none was looked up.
    metadata: safetensors' free text.
    ours: arch, names, image_size, versions, epoch, step and config of a checkpoint of train.py; empty for other files.
    """

    container: str
    layout: str
    family: str | None
    arch: str | None
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
    ours: dict[str, Any] = field(default_factory=dict)


def read_state_dict(path: str | Path, *, sha256: str | None = None) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The named tensors of a public weights file, in the file's order and dtypes, each in memory of its own.

    Nothing that the file names is imported or called. If a checkpoint has a running mean (find_weights), that is read.
    Checksums of the container (zip, npz, safetensors of ours) reveal a flipped bit. Legacy torch files and other
    safetensors have none: give `sha256`, or keep a released file name that ends in its first digits; both are checked.

    Raises UserError, in one line, for a file that is incomplete, not weights, not finite or not harmless. Infinities
    are allowed only in an entry named attn_mask.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file, expected weights")
        with path.open("rb") as file:
            return _read(file, status.st_size, path.name, str(path), sha256)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected a weights file") from None


def read_bytes(data: bytes, name: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    """As read_state_dict, for a file in memory, which is never written to disk. `name` names it in errors."""
    return _read(io.BytesIO(data), len(data), name, name, None)


def _read(
    file: BinaryIO, size: int, name: str, source: str, sha256: str | None
) -> tuple[dict[str, Tensor], WeightsInfo]:
    """file: opened for reading, of `size` bytes. name: may promise a SHA-256. source: names it in errors."""
    try:
        if size > MAX_FILE_BYTES:
            raise Refused(f"{size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
        # broken text makes pickletools and numpy warn before they raise; the error says enough
        with warnings.catch_warnings(action="ignore"):
            digest, is_checked = _check_hash(name, file, sha256)
            content = open_weights(file, size)
            layout, records, carriers, is_mean = find_weights(content)
            if described := read_description(content.metadata):
                carriers.append(described)
            state = {entry: load_entry(entry, record, content) for entry, record in records.items()}
    except Refused as refusal:
        raise UserError(f"{source}: {refusal}") from None
    except MemoryError:
        raise UserError(f"{source}: its tensors do not fit in memory", exit_code=4) from None
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    family = guess_family({name: tuple(tensor.shape) for name, tensor in state.items()})
    ours = next((carrier for carrier in carriers if _is_ours(carrier)), {})
    info = WeightsInfo(
        container=content.container,
        layout=layout,
        family=family,
        arch=_arch(ours.get("arch") or described.get("arch")) or arch_of_family(family),
        names=next((names for row in carriers for key in NAME_KEYS if (names := _class_names(row.get(key)))), ()),
        image_size=_image_size(carriers),
        num_tensors=len(state),
        num_parameters=sum(tensor.numel() for name, tensor in state.items() if not name.endswith(statistics)),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())),
        sha256=digest,
        is_hash_checked=is_checked,
        has_checksum=content.has_checksum,
        uses_ema=is_mean or described.get("tensor_names") == "ours",
        train_args=_train_args(carriers),
        globals_seen=tuple(sorted(content.globals_seen)),
        metadata=content.metadata,
        ours={key: ours[key] for key in OUR_KEYS if key in ours},
    )
    return state, info


def file_of_run(path: str | Path) -> Path:
    """`path`, or the file that stands for the run in that folder: weights/last.pt, else weights/student.safetensors."""
    for name in ("last.pt", "student.safetensors"):
        if (file := Path(path) / "weights" / name).is_file():
            return file
    return Path(path)


def check_file(path: str | Path) -> None:
    """UserError if the container or a pickle in it is not harmless. The tensors are not read.

    Call it on checkpoints of ours before torch.load: an accepted pickle names only tensors, plain values, INERT_NAMES.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            open_weights(file, path.stat().st_size)
    except Refused as refusal:
        raise UserError(f"{path}: damaged or not a checkpoint: {refusal}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected a checkpoint") from None


def _check_hash(name: str, file: BinaryIO, expected: str | None) -> tuple[str, bool]:
    """The file's SHA-256, and whether it was compared with one that was promised. Raises Refused where they differ."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # takes any binary file
    file.seek(0)
    in_name = HASH_IN_NAME.search(name)
    if expected is not None and expected.lower() != digest:
        raise Refused(f"its SHA-256 is {digest}, expected {expected.lower()}")
    if in_name and not digest.startswith(in_name[1]) and not in_name[1].isdecimal():  # decimal: may be a date
        raise Refused(f"its name promises SHA-256 {in_name[1]}..., it is {digest[:16]}...: damaged or another file")
    return digest, expected is not None or bool(in_name and digest.startswith(in_name[1]))


def _class_names(value: Any) -> tuple[str, ...]:
    """Class names from a list of texts, or from a dict 0..K-1 or 1..K -> text; () from anything else.

    The numbers may be texts, as JSON has them.
    """
    if isinstance(value, dict):
        named = {str(number): name for number, name in value.items() if isinstance(number, int | str)}
        first = 0 if "0" in named else 1  # the ids of a dataset begin at 1
        value = [named.get(str(first + k)) for k in range(len(value))]
    is_list = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return tuple(name if name.isprintable() else short(name) for name in value) if is_list else ()


def _is_ours(carrier: dict) -> bool:
    is_checkpoint = "format" in carrier and _arch(carrier.get("arch")) is not None
    return is_checkpoint or carrier.get("tensor_names") == "ours"


def _arch(value: Any) -> str | None:
    return value if isinstance(value, str) and value.isidentifier() else None


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
    """The pattern for names that begin with `start`, one side of a table's row: each {} matches one integer."""
    return re.compile(re.escape(start).replace(r"\{\}", r"(\d+)"))


def rename(state: dict[str, Tensor], table: Sequence[tuple[str, str | None]]) -> dict[str, Tensor]:
    """Rename each key by the one row that matches its start. Each {} is one integer; a None row drops the key.

    Raises KeyError for a key that no row or two rows match, for a row that no key uses, and for two keys with the same
    new name. Values stay untouched: a transpose or split is a named function of its own, with a test.
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
    """Join entries whose names differ only in one of `parts` (".query.", ".key.", ".value.") into one entry.

    Its name has `fused` instead of the part, and its place is that of the first part. The values are concatenated along
    dim 0 in the order of `parts`. Other entries stay unchanged. KeyError if a part is absent or the shapes do not fit.
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
    """One layout in which a model's weights were released.

    table: the rows for `rename`.
    convert: runs before `rename`, state -> state: splits, joins or transposes entries under their released names. It
        keeps all other entries, and raises KeyError with one line if an entry that it needs is absent.
    """

    name: str
    table: Sequence[tuple[str, str | None]]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def layouts_of(model: nn.Module) -> tuple[PublicLayout, ...]:
    """`model.public_layouts`, the most usual first. A model without them has one layout, with `model.public_names`."""
    layouts = getattr(model, "public_layouts", None)
    # structures.Detector declares public_names; nn.Module, which models.build returns, does not
    return layouts or (PublicLayout("released", cast(list[tuple[str, str | None]], model.public_names)),)


def rename_public(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], PublicLayout]:
    """Released weights under our names, and their layout: the first of the model's layouts whose names all fit.

    If none fits, the layout that matches most names is used, and the KeyError of `rename` is about it. The caller
    checks shapes, and whether names are missing or unexpected.
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
    nearest = max(layouts, key=lambda layout: _count_claimed(layout, state))  # of equal ones the first
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
    """What `load_public` did.

    source: the file, or the name of the given state.
    loaded: our names of the entries that were filled.
    layout: the name of the file's PublicLayout.
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
    """Fill `model` with public weights by the layout that fits (rename_public). Values are cast to the model's dtypes.

    Args:
        state_or_path: public names -> tensors, or a file for `read_state_dict`.
        source: the name of a dict in the report and in errors; a path has its own.
    Raises UserError, with the model untouched, unless each released name is used, each of the model's parameters and
    buffers is filled, and all shapes are equal. One tolerance: old files may lack BatchNorm's step counters
    `num_batches_tracked`, which eval mode does not read.
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
            f"{len(names)} {what} ({shortened(names, 3)})"
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
        class_head = cast(tuple[str, ...], model.class_head)  # as public_names in layouts_of
        head_only = all(name.startswith(class_head) for name in wrong)
        advice = (
            "; only the class head differs: fine_tuning.start_model takes it over by class names" if head_only else ""
        )
        more = f" ({len(wrong)} shapes differ)" if len(wrong) > 1 else ""
        raise UserError(f"{source}: {shapes}{more}{advice or _family_hint(model, state)}")
    model.load_state_dict({**own, **{name: t.to(own[name].dtype) for name, t in renamed.items()}}, strict=True)
    return LoadReport(source, tuple(renamed), layout.name)


def _family_hint(model: nn.Module, state: dict[str, Tensor]) -> str:
    """A hint which family the weights are of and which the model is, where they differ; else ""."""
    theirs = guess_family({name: tuple(tensor.shape) for name, tensor in state.items()})
    ours = guess_family(_public_shapes(model))
    if theirs is None or theirs == ours:
        return ""
    if ours and len(layouts_of(model)) > 1 and theirs.partition(" (")[0] == ours.partition(" (")[0]:
        return ""  # "dinov2 (Hugging Face layout)" is dinov2
    return f"; these are {theirs} weights, the model is {ours or type(model).__name__}"


def _public_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's entries under their released names, by the table of its first layout."""
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
