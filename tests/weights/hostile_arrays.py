"""Hostile and corrupt safetensors and npz files, for the corpus of hostile.py."""

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.weights.hostile import FOUR, Case, gadgets, zip_of

ROW = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def safetensors_of(header: Any, payload: bytes = FOUR, length: int | None = None) -> bytes:
    """header: bytes or what json.dumps takes; length: what the file claims the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def safetensors_files(folder: Path) -> Iterator[Case]:
    rows = {
        "shape-too-large": (dict(shape=[5]), "of shape .5,. in 16 bytes"),
        "shape-too-small": (dict(shape=[3]), "of shape .3,. in 16 bytes"),
        "shape-negative": (dict(shape=[-4]), "not whole numbers"),
        "shape-both-negative": (dict(shape=[-2, -2]), "not whole numbers"),
        "shape-float": (dict(shape=[4.0]), "not whole numbers"),
        "shape-bool": (dict(shape=[True, 4]), "not whole numbers"),
        "shape-overflow": (dict(shape=[2**32, 2**32, 4]), "in 16 bytes"),
        "shape-beyond": (dict(shape=[2**70]), "not whole numbers"),
        "shape-text": (dict(shape="4"), "not whole numbers"),
        "shape-many": (dict(shape=[1] * 500 + [4]), "501 sizes"),
        "dtype-wider": (dict(dtype="F64"), "in 16 bytes"),
        "dtype-unknown": (dict(dtype="F8_E4M3"), "dtype 'F8_E4M3'"),
        "dtype-list": (dict(dtype=["F32"]), "dtype a list"),
        "offsets-reversed": (dict(data_offsets=[16, 0]), "in -16 bytes"),
        "offsets-beyond": (dict(shape=[400], data_offsets=[0, 1600]), "ends beyond the file"),
        "offsets-negative": (dict(data_offsets=[-16, 0]), "not whole numbers"),
        "offsets-three": (dict(data_offsets=[0, 8, 16]), "3 offsets"),
        "offsets-hole": (dict(shape=[3], data_offsets=[4, 16]), "begins at byte 4, where 0"),
        "trailing": (dict(shape=[3], data_offsets=[0, 12]), "4 bytes that belong to no tensor"),
        "extra-field": (dict(code="__import__('os')"), "lacks dtype, shape or data_offsets, or has more"),
    }
    for name, (lie, reason) in rows.items():
        yield Case(f"safetensors-{name}", safetensors_of({"w": {**ROW, **lie}}), reason)
    half = {"dtype": "F32", "shape": [3]}
    two = {"a": {**half, "data_offsets": [0, 12]}, "b": {**half, "data_offsets": [4, 16]}}
    same = {"a": ROW, "b": ROW}
    text = json.dumps({"w": ROW}).encode()
    row = json.dumps(ROW)
    nested = b'{"a":' * 200_000
    headers = {
        "overlap": (two, "begins at byte 4, where 12 is expected"),
        "same-bytes-twice": (same, "begins at byte 0, where 16 is expected"),
        "key-twice": (f'{{"w": {row}, "w": {row}}}'.encode(), "a key is given twice"),
        "field-twice": (text.replace(b'"shape"', b'"dtype": "F32", "shape"'), "a key is given twice"),
        "nan": (text.replace(b"[4]", b"[NaN]"), "NaN is not a number of JSON"),
        "infinity": (text.replace(b"[4]", b"[Infinity]"), "Infinity is not a number"),
        "not-json": (b'{"w": ', "damaged safetensors header"),
        "not-utf8": (text.replace(b"w", b"\xff"), "damaged safetensors header"),
        "nested": (nested, "damaged safetensors header"),
        "digits": (text.replace(b"[4]", b"[" + b"9" * 10_000 + b"]"), "damaged safetensors header"),
        "metadata-number": ({"__metadata__": {"epoch": 3}, "w": ROW}, "__metadata__ is not text"),
        "metadata-list": ({"__metadata__": ["x"], "w": ROW}, "__metadata__ is not text"),
        "row-is-list": ({"w": [1, 2]}, "lacks dtype"),
        "key-escape": ({"a\x1b[2J": ROW}, "an entry named"),
    }
    for name, (header, reason) in headers.items():
        yield Case(f"safetensors-{name}", safetensors_of(header), reason)
    yield Case("safetensors-empty", safetensors_of({}, b""), "no state dict|no tensors")
    for name, length in {"beyond-file": 10_000, "2-63": 2**63, "2-64": 2**64 - 1, "over-cap": 101 << 20}.items():
        yield Case(f"safetensors-header-{name}", safetensors_of(text, length=length), "a safetensors header of")
    for name, length in {"short": 20, "zero": 0, "long": len(text) + 4}.items():
        yield Case(f"safetensors-header-{name}", safetensors_of(text, length=length), "damaged safetensors header")
    for name, value in {"nan": float("nan"), "inf": float("inf")}.items():
        yield Case(
            f"safetensors-value-{name}", safetensors_of({"w": ROW}, struct.pack("<4f", 1, value, 2, 3)), "finite"
        )
    as_bool = {"w": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    yield Case("safetensors-bool-of-seven", safetensors_of(as_bool, b"\x00\x01\x07\x00"), "neither 0 nor 1")
    yield Case("safetensors-truncated", safetensors_of({"w": ROW})[:-1], "ends beyond the file")
    yield Case("safetensors-flipped-named-0a1b2c3d", safetensors_of({"w": ROW}), "promises SHA-256 0a1b2c3d")


def npy_of(header: str, payload: bytes = FOUR, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text + payload


def npz_files(folder: Path) -> Iterator[Case]:
    good = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n"
    arrays = io.BytesIO()
    np.savez(arrays, w=np.array([gadgets(str(folder / "ran-npz-object"))["os-system"]], dtype=object))
    yield Case("npz-object", arrays.getvalue(), "is not a number a tensor holds")
    mark = str(folder / "ran-npz-header")
    headers = {
        "shape-too-large": (good.replace("(4,)", "(5,)"), "does not fit its 16 bytes"),
        "shape-huge": (good.replace("(4,)", "(1000000000000,)"), "does not fit"),
        "shape-negative": (good.replace("(4,)", "(-4,)"), "does not fit"),
        "shape-both-negative": (good.replace("(4,)", "(-2, -2)"), "does not fit"),
        "shape-many": (good.replace("(4,)", "(" + "1, " * 40 + "4)"), "does not fit|damaged npy header"),
        "shape-text": (good.replace("(4,)", "'4'"), "damaged npy header"),
        "code": (good.replace("(4,)", f"open({mark!r}, 'w')"), "damaged npy header"),
        "nested": ("(" * 5_000 + ")" * 5_000, "damaged npy header"),
        "missing": ("{'descr': '<f4'}\n", "damaged npy header"),
        "not-text": ("\xff\xfe", "damaged npy header"),
        "dtype-object": (good.replace("<f4", "|O"), "is not a number a tensor holds"),
        "dtype-text": (good.replace("<f4", "<U4"), "is not a number a tensor holds"),
        "dtype-void": (good.replace("<f4", "|V16"), "is not a number a tensor holds"),
        "dtype-rows": (good.replace("'<f4'", "[('a', '<f4'), ('b', '|O')]"), "is not a number a tensor holds"),
        "dtype-complex": (good.replace("<f4", "<c8"), "is not a number a tensor holds"),
        "dtype-date": (good.replace("<f4", "<M8[s]"), "is not a number a tensor holds"),
        "bool-of-seven": (good.replace("<f4", "|b1").replace("(4,)", "(16,)"), "neither 0 nor 1"),
    }
    for name, (header, reason) in headers.items():
        yield Case(f"npz-{name}", zip_of([("w.npy", npy_of(header))]), reason)
    npy = npy_of(good)
    yield Case("npz-truncated-array", zip_of([("w.npy", npy[:-3])]), "does not fit its 13 bytes")
    yield Case("npz-trailing-bytes", zip_of([("w.npy", npy + b"x")]), "does not fit its 17 bytes")
    yield Case("npz-magic", zip_of([("w.npy", b"PICKLE" + npy[6:])]), "damaged npy header")
    yield Case("npz-empty-entry", zip_of([("w.npy", b"")]), "damaged npy header")
    yield Case("npz-version-9", zip_of([("w.npy", npy_of(good, version=b"\x09\x00"))]), "npy version")
    yield Case("npz-name-twice", zip_of([("w.npy", npy), ("w.npy", npy)]), "in the archive twice")
    yield Case("npz-flipped", zip_of([("w.npy", npy)]).replace(FOUR, FOUR[:-1] + b"\x41"), "CRC")
    yield Case("npz-truncated", zip_of([("w.npy", npy)])[:-30], "truncated or damaged zip")
    nan = npy_of(good, struct.pack("<4f", 1, 2, 3, float("nan")))
    yield Case("npz-nan", zip_of([("w.npy", nan)]), "not finite")
    yield Case("npz-with-stranger", zip_of([("w.npy", npy), ("run.py", b"import os")]), "0 data.pkl")
