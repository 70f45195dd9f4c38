"""A disk cache of a teacher's outputs, so that the teacher runs only once on the same pixels.

An augmented image depends on seed, epoch and index alone, so the runs of a study see the same ones: each row with the
same seed, and with `view_seed` every seed. An image is known by its pixels (image_key), so that nothing that made it
can be forgotten. Each part of an output, such as one map, has a file of its own for each image: any batch can be joined
from them, and rows whose terms read different parts share what they have in common. Floating-point tensors are stored
as float16, except boxes: beyond 512 pixels float16 has only every half pixel.

    row = split_output(teacher(images))[i]          the output for a batch -> one dict of tensors per image
    part = cache.put(key, part)                     the value of a later `get`: rounded as it is stored
    part = cache.get(key)                           None if it is not in the cache
    output = join_output(OutputType, rows)          the inverse of split_output

`cached_forward` does all of this for a batch. The fingerprint of a cache names the teacher, its code, the input size
and the settings. An entry with another fingerprint is never found.

File format, little-endian: MAGIC, the CRC-32 of everything after it, the length of a JSON header, the header (the name
of the entry; name, dtype and shape of each tensor), the bytes of the tensors. Reading it runs no code from the file.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from structures import FOR_LOSSES

MAGIC = b"RTOC0001"
SUFFIX = ".output"
FLOAT16_MAX = 65504.0
BOXES = "xyxy"  # in the name of a tensor of boxes in pixels
KEPT_AFTER_TRIM = 0.9  # of the cap, so that only some writes have to scan the folder
ABANDONED_SECONDS = 3600.0  # an unfinished file of this age belongs to a process that died
STALE_SECONDS = 24 * 3600.0  # an entry that was not used for a day makes room for others
RECOUNT = 0.05  # of the cap: what is written before the bytes of other processes are counted anew
FOLDERS_OF_CODE = ("datasets", "frcnn", "kernels", "layers", "rtdetr", "teachers", "yolo")
CODE = ("boxes.py", "models.py", *(f"{folder}/**/*.py" for folder in FOLDERS_OF_CODE))
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


@dataclass
class CacheCounts:
    """Counts since the cache was opened.

    damaged: entries that cannot be read; they are recomputed like absent ones. removed: to make room.
    not_written: the cap was reached, or the write failed.
    """

    found: int = 0
    absent: int = 0
    damaged: int = 0
    written: int = 0
    removed: int = 0
    not_written: int = 0


class OutputCache:
    """The tensors of images by key, as files in `folder`, at most max_gigabytes (10^9 bytes) in all.

    fingerprint: text that names everything an output depends on besides the image; see fingerprint_of.
    If an entry would exceed the cap, entries that nobody used for STALE_SECONDS are removed first, whichever process
    wrote them. If that is not enough, nothing more is stored. (To remove what is unused for longest would be worse than
    nothing: every run reads the views in the same order, and each would be gone before its turn came.)
    Several processes may share the folder: a file gets its name only when it is complete. They may exceed the cap by
    RECOUNT each.
    """

    def __init__(self, folder: str | Path, max_gigabytes: float, fingerprint: str) -> None:
        if not max_gigabytes > 0:
            raise ValueError(f"max_gigabytes is {max_gigabytes}, expected more than 0")
        self.folder = Path(folder)
        self.max_bytes = int(max_gigabytes * 1e9)
        self.fingerprint = fingerprint
        self.counts = CacheCounts()
        self._num_bytes = sum(size for _, size, _ in self._scan())
        self._num_uncounted = 0  # bytes written since the folder was scanned
        self._is_full = False

    def _path(self, key: str) -> tuple[Path, str]:
        """The file of the entry, and the name that its header must have."""
        name = hashlib.sha256(f"{self.fingerprint}\n{key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{SUFFIX}", name

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors put under `key`, on the CPU, in their original dtypes; None if there are none.

        A damaged entry is counted and removed, and gives None.
        """
        path, name = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # the time of its last use
        except OSError:
            self.counts.absent += 1
            return None
        try:
            tensors = _decode(data, name)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):  # errors of a wrong header
            self.counts.damaged += 1
            path.unlink(missing_ok=True)
            return None
        self.counts.found += 1
        return tensors

    def put(self, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store the tensors of one image, and return them as a later `get` does: floats rounded to float16.

        A tensor of BOXES, or with finite values beyond 65504, the largest float16, is stored as float32. Use the
        returned tensors: then a run gives the same results whether an output was computed or found. If the entry cannot
        be written, that is counted and nothing else happens.
        """
        path, name = self._path(key)
        data = _encode(tensors, name)
        if self._has_room(len(data)):
            self._write(path, data)
        else:
            self.counts.not_written += 1
        return _decode(data, name)

    def _has_room(self, num_new_bytes: int) -> bool:
        if self._is_full or num_new_bytes > self.max_bytes:
            return False
        if self._num_uncounted > RECOUNT * self.max_bytes or self._num_bytes + num_new_bytes > self.max_bytes:
            self._trim(num_new_bytes)
            self._is_full = self._num_bytes + num_new_bytes > self.max_bytes
        return not self._is_full

    def _write(self, path: Path, data: bytes) -> None:
        """Write a temporary file and rename it when it is whole. A failure is counted."""
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # there may be no folder
                temporary.unlink()
            self.counts.not_written += 1
        else:
            self._num_bytes += len(data)  # too many if it replaced an entry; _trim counts again
            self._num_uncounted += len(data)
            self.counts.written += 1

    def _trim(self, num_new_bytes: int) -> None:
        """Count anew. If the new entry does not fit, remove stale ones until it fits KEPT_AFTER_TRIM of the cap."""
        entries = sorted(self._scan())
        self._num_bytes, self._num_uncounted = sum(size for _, size, _ in entries), 0
        if self._num_bytes + num_new_bytes <= self.max_bytes:
            return
        for used, size, path in entries:
            is_enough = self._num_bytes + num_new_bytes <= KEPT_AFTER_TRIM * self.max_bytes
            if is_enough or time.time() - used / 1e9 < STALE_SECONDS:
                return
            path.unlink(missing_ok=True)
            self._num_bytes -= size
            self.counts.removed += 1

    def _scan(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every entry. Removes unfinished files of dead processes."""
        entries = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            try:
                status = path.stat()
                if path.suffix == SUFFIX:
                    entries.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == ".tmp" and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
            except OSError:
                continue  # another process removed it
        return entries


def cached_forward(
    teacher: Callable[[Tensor], Any],
    images: Tensor,
    keys: list[str],
    cache: OutputCache,
    output_type: type,
    parts: tuple[str, ...],
) -> Any:
    """teacher(images), computed only if some part of it is not in the cache.

    images (B, 3, H, W), keys: one per image. output_type: the dataclass that the teacher returns. parts: of its output,
    see parts_of. Its tensors are on the device of the images, and rounded as in OutputCache.put. No gradient reaches
    the teacher. It is asked about the whole batch, even if one image is missing: a convolution may round otherwise in
    another batch, and the result must not depend on what was kept.
    """
    rows = [{part: cache.get(f"{key} {part}") for part in parts} for key in keys]
    if any(tensors is None for row in rows for tensors in row.values()):
        with torch.no_grad():
            computed = [parts_of(row) for row in split_output(teacher(images))]
        for key, row, new in zip(keys, rows, computed, strict=True):
            row |= {part: cache.put(f"{key} {part}", new[part]) for part, kept in row.items() if kept is None}
    joined = [{name: t for tensors in row.values() if tensors for name, t in tensors.items()} for row in rows]
    return join_output(output_type, joined, images.device)


def parts_of(row: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of one image, each a part by its name; all that are the same for the whole batch are the part "="."""
    parts = {name: {name: tensor} for name, tensor in row.items() if not name.endswith("=")}
    return parts | {"=": {name: tensor for name, tensor in row.items() if name.endswith("=")}}


def parts_to_keep(output: Any, requested: frozenset[str] | None) -> tuple[str, ...]:
    """The parts of an output that are worth keeping: those that are requested (structures.DenseDetector), None: all."""
    is_read = lambda part: requested is None or part.rpartition("/")[2].removesuffix("[]") in requested
    return tuple(part for part in parts_of(split_output(output)[0]) if part == "=" or is_read(part))


def split_output(output: Any) -> list[dict[str, Tensor]]:
    """The output for B images -> B dicts of tensors. join_output is the inverse.

    output: a dataclass. Its fields are tensors batched along dim 0, dicts of such tensors, lists of B tensors, None,
    or integers and tuples of integers for the whole batch (image_size). TypeError for other fields. Fields that are
    marked FOR_LOSSES are left out.
    Names: "class_token"; "features/p3" for a tensor in a dict; "proposals[]" for one of a list; "image_size=" for
    integers.
    """
    batched: dict[str, Tensor | list[Tensor]] = {}
    constant: dict[str, Tensor] = {}
    for field in fields(output):
        if field.metadata == FOR_LOSSES:
            continue
        value = getattr(output, field.name)
        if isinstance(value, Tensor):
            batched[field.name] = value
        elif isinstance(value, list) and all(isinstance(tensor, Tensor) for tensor in value):
            batched[f"{field.name}[]"] = value
        elif isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values()):
            constant[f"{field.name}="] = torch.zeros(0)  # an empty dict is not None
            batched |= {f"{field.name}/{name}": tensor for name, tensor in value.items()}
        elif _is_whole(value) or (isinstance(value, tuple) and all(map(_is_whole, value))):
            constant[f"{field.name}="] = torch.tensor(value, dtype=torch.int64)
        elif value is not None:
            raise TypeError(f"{type(output).__name__}.{field.name} is a {type(value).__name__}: it cannot be split")
    counts = {name: len(value) if isinstance(value, list) or value.dim() else None for name, value in batched.items()}
    if len(set(counts.values())) != 1 or None in counts.values():
        raise TypeError(f"{type(output).__name__} is not batched along dim 0: it has {counts} rows")
    count = next(iter(counts.values()))
    assert count is not None
    return [{name: value[i].detach() for name, value in batched.items()} | constant for i in range(count)]


def join_output(output_type: type, rows: list[dict[str, Tensor]], device: torch.device | str = "cpu") -> Any:
    """The inverse of split_output, for at least one image. A field that is in no row is None.

    ValueError if the rows differ in names, shapes or constants.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"the {len(rows)} images to join have different tensors, or there are none")
    values: dict[str, Any] = {field.name: None for field in fields(output_type)}
    for name, first in rows[0].items():
        field, _, inner = name.partition("/")
        tensors = [row[name] for row in rows]
        if name.endswith("[]"):
            values[name[:-2]] = [tensor.to(device) for tensor in tensors]
            continue
        if any(tensor.shape != first.shape for tensor in tensors):
            raise ValueError(f"{name} has different shapes: {sorted({tuple(tensor.shape) for tensor in tensors})}")
        if name.endswith("="):
            if any(not torch.equal(tensor, first) for tensor in tensors):
                raise ValueError(f"{name[:-1]} differs between the images to join")
            is_dict = first.is_floating_point()
            values[name[:-1]] = (values[name[:-1]] or {}) if is_dict else _to_numbers(first)
        elif inner:
            values[field] = (values[field] or {}) | {inner: torch.stack(tensors).to(device)}
        else:
            values[field] = torch.stack(tensors).to(device)
    return output_type(**values)


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _to_numbers(tensor: Tensor) -> int | tuple[int, ...]:
    return tuple(tensor.tolist()) if tensor.dim() else int(tensor)


def image_key(pixels: Tensor) -> str:
    """A digest of the dtype, shape and bytes of an image of any shape; uint8 from the loader."""
    digest = hashlib.blake2b(f"{pixels.dtype} {tuple(pixels.shape)}".encode(), digest_size=16)
    digest.update(_bytes_of(pixels))
    return digest.hexdigest()


def fingerprint_of(model: nn.Module, **settings: Any) -> str:
    """A digest of a model's modules and code, all its parameters and buffers, and the settings.

    For each module it includes the class and those public attributes that are JSON values, such as a stride or a number
    of proposals. It skips lists, which a module may fill while it runs. settings: JSON values of everything else that
    the outputs depend on: input size, precision, class names.
    """
    digest = hashlib.sha256(f"{code_version()} {torch.__version__}".encode())
    for name, module in model.named_modules():
        public = {key: value for key, value in vars(module).items() if key[0] != "_" and _is_setting(value)}
        public.pop("requested_outputs", None)  # parts have entries of their own
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(f"\n{name} {kind} {json.dumps(public, sort_keys=True)}".encode())
    for name, tensor in sorted(
        [*model.named_parameters(), *model.named_buffers()]
    ):  # state_dict leaves some buffers out
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """A digest of the sources that outputs depend on: those of models, and of what reads pictures for them."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for name in CODE for path in root.glob(name)):
        digest.update(f"\n{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_setting(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, list)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _encode(tensors: dict[str, Tensor], name: str) -> bytes:
    rows, parts = [], []
    for key, tensor in tensors.items():
        stored = _as_stored(key, tensor)
        rows.append([key, _name_of(tensor.dtype), _name_of(stored.dtype), list(tensor.shape)])
        parts.append(_bytes_of(stored))
    header = json.dumps({"entry": name, "tensors": rows}).encode()
    body = b"".join([len(header).to_bytes(4, "little"), header, *parts])
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def _as_stored(key: str, tensor: Tensor) -> Tensor:
    """A floating-point tensor as float16; boxes, and what does not fit, as float32; other dtypes unchanged."""
    if not tensor.is_floating_point():
        return tensor
    is_large = tensor.isfinite() & (tensor.abs() > FLOAT16_MAX)
    return tensor.float() if BOXES in key or is_large.any() else tensor.half()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _decode(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of an entry. ValueError for a damaged file and for another entry."""
    start = len(MAGIC) + 8
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise ValueError("not an entry")
    if zlib.crc32(memoryview(data)[len(MAGIC) + 4 :]) != int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "little"):
        raise ValueError("damaged")
    position = start + int.from_bytes(data[start - 4 : start], "little")
    header = json.loads(data[start:position])
    if header["entry"] != name:
        raise ValueError("another entry")
    tensors = {}
    for key, dtype, stored, shape in header["tensors"]:
        flat = np.frombuffer(data, np.dtype(stored), math.prod(shape), position).copy()
        tensors[key] = torch.from_numpy(flat).view(shape).to(DTYPES[dtype])
        position += flat.nbytes
    return tensors
