"""The containers weights are published in, read as bytes: torch zip, TorchScript zip, legacy torch, safetensors, npz.

`open_weights` tells them apart by their first bytes, checks the container (no entry twice, sizes that agree, CRC-32
where the format has one) and returns a `Content`. inert_pickle reads the pickles inside. Formats: torch.save's two
layouts, as found in its files; safetensors, by its format description; npy 1.0 and 2.0.

Not read: files that need code of their own, the tar layout of torch before 0.2, sparse and quantized tensors, float8.
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from weights.inert_pickle import (
    MAX_DIMS,
    ForbiddenName,
    InertReader,
    Refused,
    StorageRecord,
    TensorRecord,
    short,
)
from weights.shared_file import SAFETENSORS_DTYPES, digest_of

MAX_FILE_BYTES = 4 << 30
MAX_PICKLE_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
MAX_ZIP_ENTRIES = 20_000
MAX_COPIES = 4  # tensors may share storage; all together they may have this many times the size of the file

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
NUMPY_DTYPES = {
    kind: getattr(torch, name)
    for kind, name in {
        "f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8",
        "u1": "uint8", "b1": "bool",
    }.items()
}  # fmt: skip
FOREIGN = (  # first bytes -> the kind of file
    (b"version https://git-lfs", "a git-LFS pointer, not the file it stands for: fetch it with `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a rar archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras): not read here"),
    (b"GGUF", "a GGUF file: not read here"),
    (b"\x93NUMPY", "one .npy array without names: not a state dict"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x05\x06", "an empty zip archive"),
)


@dataclass
class Content:
    """An opened container.

    container: its name.
    value: the value of the pickle, or names -> Tensor where there is no pickle.
    load: a TensorRecord in `value` -> its Tensor, copied out of the file; None where there is no pickle.
    globals_seen: every name that the pickle mentions.
    attributes: for TorchScript, class name -> its parameters and buffers.
    metadata: safetensors' free text.
    has_checksum: the container has a checksum of every tensor, and all were right.
    """

    container: str
    value: Any
    load: Callable[[TensorRecord], Tensor] | None = None
    globals_seen: frozenset[str] = frozenset()
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    has_checksum: bool = False


def open_weights(file: BinaryIO, size: int) -> Content:
    """file: opened for reading, of `size` bytes. Raises Refused, with one line, for a file that is not weights."""
    if size == 0:
        raise Refused("the file is empty")
    head = file.read(512)
    file.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, meaning in FOREIGN:
        if head.startswith(magic):
            raise Refused(f"this is {meaning}")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise Refused("this is a web page, not weights: the download answered with an error or a login page")
    if head[257:262] == b"ustar":
        raise Refused("this is a tar archive (torch before 0.2 saved so): not read here")
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if len(head) >= 9 and head[8:9] == b"{":
        return _open_safetensors(file, size)
    return _open_legacy(file, size)


class _Storages:
    """Storages by key as raw bytes, and tensors cut from them."""

    def __init__(self, read_bytes: Callable[[StorageRecord], bytes], file_size: int) -> None:
        self.read_bytes = read_bytes
        self.raw: dict[str, Tensor] = {}
        self.bytes_left = MAX_COPIES * file_size

    def load(self, record: TensorRecord) -> Tensor:
        storage = record.storage
        self.bytes_left -= record.numel * storage.dtype.itemsize
        if self.bytes_left < 0:
            raise Refused(f"its tensors together are more than {MAX_COPIES} times the file")
        if storage.key not in self.raw:
            self.raw[storage.key] = tensor_from_bytes(self.read_bytes(storage), storage.dtype)
        return (
            self.raw[storage.key]
            .as_strided(record.size, record.stride, record.offset)
            .clone(memory_format=torch.contiguous_format)
        )


def tensor_from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """Little-endian elements -> (numel,), in memory of its own. Raises Refused for a bool that is neither 0 nor 1."""
    if dtype == torch.bool and data.strip(b"\x00\x01"):
        raise Refused("a bool tensor holds a byte that is neither 0 nor 1")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


# zip ----------------------------------------------------------------------------------------------------------------


def _open_zip(file: BinaryIO, size: int) -> Content:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise Refused(f"truncated or damaged zip archive: {error}") from None
    entries = archive.infolist()
    _check_entries(archive, entries)
    names = [entry.filename for entry in entries]
    if entries and all(name.endswith(".npy") for name in names):
        return _open_npz(archive, entries, size)
    root = _find_root(entries)
    main, is_script = f"{root}data.pkl", f"{root}constants.pkl" in names
    if f"{root}byteorder" in names and _read_entry(archive, f"{root}byteorder", 16) != b"little":
        raise Refused("its tensors are not little-endian")
    entry_names = set(names)
    reader = InertReader()
    pickle_file = io.BytesIO(_read_entry(archive, main, MAX_PICKLE_BYTES))
    value = reader.read(pickle_file)
    if pickle_file.read(1):
        raise Refused("data.pkl has bytes after its end")

    for name in names:  # TorchScript's other pickles hold no weights; reading them refuses code in them
        if name.endswith(".pkl") and name != main and not name.startswith((f"{root}code/", f"{root}extra/")):
            InertReader().read(io.BytesIO(_read_entry(archive, name, MAX_PICKLE_BYTES)))

    def read_bytes(storage: StorageRecord) -> bytes:
        name, expected = f"{root}data/{storage.key}", storage.numel * storage.dtype.itemsize
        if not storage.key.isdecimal() or not storage.key.isascii() or name not in entry_names:
            raise Refused(f"storage {short(storage.key)} is not in the archive")
        if archive.getinfo(name).file_size != expected:
            raise Refused(f"storage {storage.key} has {archive.getinfo(name).file_size:,} bytes, not {expected:,}")
        return _read_entry(archive, name, expected)

    attributes = _script_attributes(archive, f"{root}code/") if is_script else {}
    container = "TorchScript zip" if is_script else "torch zip"
    load = _Storages(read_bytes, size).load
    return Content(container, value, load, frozenset(reader.globals_seen), attributes, has_checksum=True)


def _check_entries(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    """Refused for too many entries, and for an archive in which two programs could see different ones."""
    names = [entry.filename for entry in entries]
    if len(entries) > MAX_ZIP_ENTRIES:
        raise Refused(f"the archive has {len(entries):,} entries; the limit is {MAX_ZIP_ENTRIES:,}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(f"entry {short(twice)} is in the archive twice")
    if entries and min(entry.header_offset for entry in entries) != 0:
        raise Refused("bytes before the first entry of the zip archive")
    for entry in entries:
        _check_local_header(archive, entry)


def _find_root(entries: list[zipfile.ZipInfo]) -> str:
    """The folder in an archive of torch.save, "" or "name/". Refused for entries that torch.save never writes."""
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise Refused(f"a zip archive with {len(pickles)} data.pkl, not one: nothing that torch.save wrote")
    root = pickles[0].removesuffix("data.pkl")
    is_script = f"{root}constants.pkl" in names
    for entry in entries:
        inside = entry.filename.removeprefix(root)
        if not entry.filename.startswith(root):
            raise Refused(f"entry {short(entry.filename)} lies outside {short(root)}")
        if entry.compress_type != zipfile.ZIP_STORED and not (is_script and inside.startswith(("code/", "extra/"))):
            raise Refused(f"entry {short(entry.filename)} is compressed, which torch.save never does")
    return root


def _check_local_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """A zip describes each entry twice, before its data and in the directory at the end; readers use one or the other.

    Raises Refused if flags, compression or name differ: another reader would find another file. Also if encrypted.
    """
    assert archive.fp is not None  # the archive is open
    archive.fp.seek(entry.header_offset)
    head = archive.fp.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise Refused(f"truncated or damaged zip archive: entry {short(entry.filename)} has no header of its own")
    flags, method, name_length = (int.from_bytes(head[at : at + 2], "little") for at in (6, 8, 26))
    name = archive.fp.read(name_length).decode("utf-8" if flags & 0x800 else "cp437", errors="replace")
    if (flags, method, name) != (entry.flag_bits, entry.compress_type, entry.orig_filename):
        raise Refused(f"entry {short(entry.filename)} is described otherwise in the archive's directory than in place")
    if flags & 1:
        raise Refused(f"entry {short(entry.filename)} is encrypted")


def _read_entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """The whole entry, its CRC-32 checked. Raises Refused for more than `limit` bytes."""
    if archive.getinfo(name).file_size > limit:
        raise Refused(f"entry {short(name)} is {archive.getinfo(name).file_size:,} bytes; the limit is {limit:,}")
    try:
        with archive.open(name) as entry:
            data = entry.read(limit + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError) as error:
        raise Refused(f"damaged zip archive: {error}") from None
    if len(data) != archive.getinfo(name).file_size:
        raise Refused(f"entry {short(name)} is truncated")
    return data


_SCRIPT_CLASS = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$", re.M)


def _script_attributes(archive: zipfile.ZipFile, folder: str) -> dict[str, tuple[str, ...]]:
    """TorchScript's class name -> its parameters, then buffers, from the text at the head of each class."""
    attributes, bytes_left = {}, MAX_PICKLE_BYTES
    for name in archive.namelist():
        if name.startswith(folder) and name.endswith(".py"):
            bytes_left -= archive.getinfo(name).file_size
            source = _read_entry(archive, name, max(bytes_left, 0)).decode("utf-8", errors="replace")
            module = name.removeprefix(folder).removesuffix(".py").replace("/", ".")
            for class_name, parameters, buffers in _SCRIPT_CLASS.findall(source):
                attributes[f"{module}.{class_name}"] = tuple(re.findall(r'"([^"]*)"', parameters + buffers))
    return attributes


def _open_npz(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], size: int) -> Content:
    if sum(entry.file_size for entry in entries) > MAX_COPIES * size + (1 << 20):
        raise Refused(f"its arrays unpack to more than {MAX_COPIES} times the file")
    tensors = {}
    for entry in entries:
        tensors[entry.filename.removesuffix(".npy")] = _read_npy(
            io.BytesIO(_read_entry(archive, entry.filename, entry.file_size)), entry.filename
        )
    return Content("npz", tensors, has_checksum=True)


def _read_npy(file: io.BytesIO, name: str) -> Tensor:
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise Refused(f"{short(name)}: npy version {version}")
        shape, is_fortran, dtype = read_header[version](file)
    except Refused:
        raise
    except Exception as error:  # numpy's header reader raises a dozen kinds (SyntaxError, TypeError, ...)
        raise Refused(f"{short(name)}: damaged npy header ({type(error).__name__})") from None
    if dtype.hasobject or dtype.str[1:] not in NUMPY_DTYPES:
        raise Refused(f"{short(name)}: dtype {short(str(dtype))} is not a number a tensor holds")
    data = file.read()
    if len(shape) > MAX_DIMS or any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise Refused(f"{short(name)}: shape {short(str(shape))} does not fit its {len(data):,} bytes")
    array = np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("<"))
    flat = tensor_from_bytes(array.tobytes(), NUMPY_DTYPES[dtype.str[1:]])
    return flat.view(shape[::-1]).permute(*range(len(shape))[::-1]).contiguous() if is_fortran else flat.view(shape)


# torch.save before 1.6 ----------------------------------------------------------------------------------------------


def _open_legacy(file: BinaryIO, size: int) -> Content:
    """Five pickles (magic number, protocol, system, the value, the storages' keys), then the storages in that order.

    Each storage is its element count as int64 and its bytes. The format has no checksum.
    """
    reader = InertReader()
    start = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    head = start.getvalue()[:8]
    is_pickle = head[:1] == b"\x80"
    unknown = f"no container known here (first bytes {short(head)})"
    try:
        first = reader.read(start)
    except ForbiddenName:
        raise
    except Refused:
        if is_pickle:
            raise
        raise Refused(unknown) from None
    if type(first) is not int or first != LEGACY_MAGIC:
        raise Refused("a bare pickle, not a checkpoint that torch.save wrote" if is_pickle else unknown)
    protocol, system = reader.read(start), reader.read(start)
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("a legacy torch file of another protocol or byte order")
    value, keys = reader.read(start), reader.read(start)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise Refused("a legacy torch file whose list of storages is damaged")
    if set(keys) != set(reader.storages):
        raise Refused("a legacy torch file whose list of storages is not what its tensors use")
    places = _place_storages(file, [reader.storages[key] for key in keys], start.tell(), size)

    def read_bytes(storage: StorageRecord) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return Content("legacy torch", value, _Storages(read_bytes, size).load, frozenset(reader.globals_seen))


def _place_storages(file: BinaryIO, storages: list[StorageRecord], position: int, size: int) -> dict[str, int]:
    """Key -> position of each storage's bytes. The first begins at `position`; Refused unless they fill the file."""
    places = {}
    for storage in storages:
        key, numel = storage.key, storage.numel
        file.seek(position)
        if file.read(8) != numel.to_bytes(8, "little"):
            raise Refused(f"storage {short(key)} is truncated or not of its declared {numel:,} elements")
        places[key] = position + 8
        position = places[key] + numel * storage.dtype.itemsize
    if position != size:
        raise Refused(f"a legacy torch file of {size:,} bytes, where its storages end at {position:,}")
    return places


# safetensors --------------------------------------------------------------------------------------------------------


def _open_safetensors(file: BinaryIO, size: int) -> Content:
    """The length of a JSON header as u64, the header, the tensors' bytes. Each byte belongs to exactly one tensor.

    The format has no checksum; files of ours have one in their metadata (shared_file.digest_of).
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise Refused(f"a safetensors header of {length:,} bytes in a file of {size:,}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_nan)
    except (ValueError, RecursionError) as error:
        raise Refused(f"damaged safetensors header: {' '.join(str(error).split())[:120]}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Refused("damaged safetensors header: __metadata__ is not text")
    rows = sorted(_safetensors_row(name, entry) for name, entry in header.items())
    position, tensors = 0, {}
    for begin, end, name, dtype, shape in rows:
        if begin != position:
            raise Refused(f"tensor {short(name)} begins at byte {begin:,}, where {position:,} is expected")
        if end > size - 8 - length:
            raise Refused(f"tensor {short(name)} ends beyond the file")
        file.seek(8 + length + begin)
        tensors[name] = tensor_from_bytes(file.read(end - begin), SAFETENSORS_DTYPES[dtype]).view(shape)
        position = end
    if position != size - 8 - length:
        raise Refused(f"{size - 8 - length - position:,} bytes that belong to no tensor")
    is_ours = "retort" in metadata
    if is_ours:
        file.seek(8 + length)
        blocks = iter(lambda: file.read(1 << 20), b"")
        if digest_of(header, metadata, blocks) != metadata.get("sha256"):
            raise Refused("the checksum in its metadata does not match: damaged, or changed since it was written")
    return Content("safetensors", {name: tensors[name] for name in header}, metadata=metadata, has_checksum=is_ours)


def _safetensors_row(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """One header entry -> (begin, end, name, dtype, shape). Raises Refused for an entry that is wrong in itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"tensor {short(name)} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise Refused(f"tensor {short(name)} is of dtype {short(dtype)}, which is not read here")
    is_list = isinstance(shape, list) and isinstance(offsets, list)
    if not is_list or any(type(value) is not int or not 0 <= value < 1 << 48 for value in shape + offsets):
        raise Refused(f"tensor {short(name)} has a shape or offsets that are not whole numbers")
    if len(offsets) != 2 or len(shape) > MAX_DIMS:
        raise Refused(f"tensor {short(name)} has {len(shape)} sizes and {len(offsets)} offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
        raise Refused(f"tensor {short(name)} of shape {tuple(shape)} in {offsets[1] - offsets[0]:,} bytes")
    return offsets[0], offsets[1], name, dtype, tuple(shape)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is given twice")
    return made


def _no_nan(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")
