"""What a teacher said of an image, kept on disk, so that it is not asked twice about the same pixels.

Of use where augmentation is off: then an image comes again every epoch, pixel by pixel. One file per image, with the
tensors of that image alone; any batch can be put together from them. Floating-point tensors are kept as float16.

    row = split_output(teacher(images))[i]          a batch's output -> one dict of tensors per image
    row = cache.put(image_key(pixels), row)         what a later `get` gives: rounded to float16
    row = cache.get(image_key(pixels))              None where it is not there
    output = join_output(OutputType, rows)          and back

`ask` does all of this for a batch. An entry belongs to the teacher, input size and settings of the cache's fingerprint:
with other ones it is not found, and grows old until it is removed.

File format: MAGIC, the CRC-32 of all that follows it, the length of a JSON header, the header (what the entry is, and
each tensor's name, dtype and shape), the tensors' bytes, all little-endian. Nothing in it is ever run.
"""

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

MAGIC = b"RTOC0001"
SUFFIX = ".output"
FLOAT16_MAX = 65504.0
KEPT_AFTER_TRIM = 0.9  # of the cap: so that not every write has to look for what is oldest
ABANDONED_SECONDS = 3600.0  # age from which an unfinished file is one of a process that died
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


@dataclass
class CacheCounts:
    """What happened since the cache was opened: found, absent, damaged (recomputed like absent), written, removed for
    space, and not_written (larger than the cap, or the disk refused)."""

    found: int = 0
    absent: int = 0
    damaged: int = 0
    written: int = 0
    removed: int = 0
    not_written: int = 0


class OutputCache:
    """Tensors of images by key, in files of `folder`, at most max_gigabytes (10^9 bytes) of them.

    fingerprint: text that names all that an output depends on besides the image; see fingerprint_of. Several processes
    may share the folder: a file appears under its name only when it is complete. The cap is then kept to about one
    batch per process. Where an entry would exceed it, the entries unused for longest go first, whoever wrote them.
    """

    def __init__(self, folder: str | Path, max_gigabytes: float, fingerprint: str) -> None:
        if not max_gigabytes > 0:
            raise ValueError(f"max_gigabytes is {max_gigabytes}, expected more than 0")
        self.folder = Path(folder)
        self.max_bytes = int(max_gigabytes * 1e9)
        self.fingerprint = fingerprint
        self.counts = CacheCounts()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._num_bytes = sum(size for _, size, _ in self._scan())

    def _path(self, key: str) -> tuple[Path, str]:
        """Where the entry is, and the name that it must say it has."""
        name = hashlib.sha256(f"{self.fingerprint}\n{key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{SUFFIX}", name

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors put under `key`, on the CPU, in the dtypes they had; None where there are none.

        A damaged entry is counted, removed, and None.
        """
        path, name = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # just used
        except OSError:
            self.counts.absent += 1
            return None
        try:
            tensors = _decode(data, name)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):  # whatever a wrong header leads to
            self.counts.damaged += 1
            path.unlink(missing_ok=True)
            return None
        self.counts.found += 1
        return tensors

    def put(self, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep one image's tensors; returns them as a later `get` will, rounded to float16 where they are floats.

        A tensor that holds finite numbers beyond float16's 65504 is kept as float32, unrounded unless it was float64.
        Use what is returned, and a run is the same whether an output was computed or found. Where the entry cannot
        be written it is counted, and nothing else happens.
        """
        path, name = self._path(key)
        data = _encode(tensors, name)
        if len(data) <= self.max_bytes:
            self._write(path, data)
        else:
            self.counts.not_written += 1
        return _decode(data, name)

    def _write(self, path: Path, data: bytes) -> None:
        if self._num_bytes + len(data) > self.max_bytes:
            self._trim(len(data))
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            self.counts.not_written += 1
        else:
            self._num_bytes += len(data)  # too much where it replaces one; _trim counts anew
            self.counts.written += 1

    def _trim(self, num_new_bytes: int) -> None:
        """Remove entries, those unused for longest first, until the new one fits with some room to spare."""
        entries = sorted(self._scan())
        self._num_bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._num_bytes + num_new_bytes <= KEPT_AFTER_TRIM * self.max_bytes:
                return
            path.unlink(missing_ok=True)
            self._num_bytes -= size
            self.counts.removed += 1

    def _scan(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every entry. Removes what dead processes left unfinished."""
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


def ask(
    teacher: Callable[[Tensor], Any], images: Tensor, keys: list[str], cache: OutputCache, output_type: type
) -> Any:
    """teacher(images), where only the images whose outputs are not in the cache are looked at.

    images (B, 3, H, W), keys: one per image. output_type: the dataclass that the teacher returns. Its tensors are on
    the device of the images, rounded as OutputCache.put says. No gradient reaches the teacher.
    """
    rows = [cache.get(key) for key in keys]
    absent = [i for i, row in enumerate(rows) if row is None]
    if absent:
        with torch.no_grad():
            output = teacher(images[absent] if len(absent) < len(rows) else images)
        for i, row in zip(absent, split_output(output), strict=True):
            rows[i] = cache.put(keys[i], row)
    return join_output(output_type, rows, images.device)


def split_output(output: Any) -> list[dict[str, Tensor]]:
    """An output of B images -> B dicts of tensors, which join_output makes an output of again.

    output: a dataclass whose fields are tensors batched along dim 0, dicts of such tensors, lists of B tensors, None,
    or whole numbers and tuples of them that hold for the whole batch (image_size). Names: "class_token"; "features/p3"
    for a tensor in a dict; "proposals[]" for one of a list; "image_size=" for numbers. TypeError for other fields.
    """
    batched: dict[str, Tensor | list[Tensor]] = {}
    constant: dict[str, Tensor] = {}
    for field in fields(output):
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
    return [{name: value[i].detach() for name, value in batched.items()} | constant for i in range(count)]


def join_output(output_type: type, rows: list[dict[str, Tensor]], device: torch.device | str = "cpu") -> Any:
    """The inverse of split_output, for at least one image; a field that no row mentions is None.

    ValueError where the images' dicts do not go together: other names, shapes or constants.
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
    """A digest of an image's dtype, shape and bytes: pixels of any shape, uint8 as they come from the loader."""
    digest = hashlib.blake2b(f"{pixels.dtype} {tuple(pixels.shape)}".encode(), digest_size=16)
    digest.update(_bytes_of(pixels))
    return digest.hexdigest()


def fingerprint_of(model: nn.Module, **settings: Any) -> str:
    """A digest of a model's class, its state dict, its `requested_outputs` and the settings.

    settings: plain values of whatever else its outputs depend on: input size, precision, class names.
    """
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    requested = getattr(model, "requested_outputs", None)
    said = {"requested_outputs": None if requested is None else sorted(requested), "settings": settings}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _encode(tensors: dict[str, Tensor], name: str) -> bytes:
    rows, parts = [], []
    for key, tensor in tensors.items():
        kept = _as_kept(tensor)
        rows.append([key, _name_of(tensor.dtype), _name_of(kept.dtype), list(tensor.shape)])
        parts.append(_bytes_of(kept))
    header = json.dumps({"entry": name, "tensors": rows}).encode()
    body = b"".join([len(header).to_bytes(4, "little"), header, *parts])
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def _as_kept(tensor: Tensor) -> Tensor:
    """float16 where a floating-point tensor's finite values fit, else float32; other dtypes as they are."""
    if not tensor.is_floating_point():
        return tensor
    is_large = tensor.isfinite() & (tensor.abs() > FLOAT16_MAX)
    return tensor.float() if is_large.any() else tensor.half()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _decode(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of an entry. ValueError for whatever is not whole, or is another entry."""
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
    for key, dtype, kept, shape in header["tensors"]:
        flat = np.frombuffer(data, np.dtype(kept), math.prod(shape), position).copy()
        tensors[key] = torch.from_numpy(flat).view(shape).to(DTYPES[dtype])
        position += flat.nbytes
    return tensors
