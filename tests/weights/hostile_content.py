"""Weight files whose tensors lie, whose pickles are bombs, or which are no weights at all; for hostile.py."""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tests.weights.hostile import (
    FOUR,
    LEGACY_HEAD,
    Case,
    Storage,
    dump,
    good_state,
    legacy,
    saved,
    tensor,
    torch_zip,
    zip_of,
)

# tensors that lie ---------------------------------------------------------------------------------------------------


def lying_files(folder: Path) -> Iterator[Case]:
    beyond, senseless = "reaches beyond its storage", "negative or senseless"
    views = {
        "size-too-large": (dict(size=(3, 2)), beyond),
        "size-negative": (dict(size=(-2, 2)), senseless),
        "size-both-negative": (dict(size=(-2, -2)), senseless),
        "size-float": (dict(size=(2.0, 2)), senseless),
        "size-bool": (dict(size=(True, 2)), senseless),
        "size-text": (dict(size="22"), "something else"),
        "size-huge": (dict(size=(2**62, 4)), senseless),
        "size-overflow": (dict(size=(2**32, 2**32), stride=(0, 0)), beyond),
        "size-none": (dict(size=None), "something else"),
        "stride-too-large": (dict(stride=(3, 1)), beyond),
        "stride-negative": (dict(stride=(-1, 1)), senseless),
        "stride-zero": (dict(size=(1000, 1000), stride=(0, 0)), beyond),
        "stride-missing": (dict(stride=(1,)), "2 sizes and 1 strides"),
        "stride-huge": (dict(size=(2, 2), stride=(2**47, 1)), beyond),
        "offset-beyond": (dict(offset=1), beyond),
        "offset-negative": (dict(offset=-1), senseless),
        "offset-huge": (dict(offset=2**70), senseless),
        "offset-of-empty": (dict(size=(0,), stride=(1,), offset=9), beyond),
        "many-dims": (dict(size=(1,) * 1000, stride=(1,) * 1000), "1000 sizes"),
        "storage-is-list": (dict(storage=[1, 2, 3, 4]), "something else"),
    }
    for name, (lie, reason) in views.items():
        yield Case(f"tensor-{name}", torch_zip(dump({"w": tensor(**lie)})), reason)
        raw = legacy(dump({"w": tensor(**lie)}), {"0": FOUR})
        yield Case(f"tensor-{name}-legacy", raw, reason)
    storages = {
        "dtype-wider": (dict(kind=torch.DoubleStorage), "16 bytes, not 32"),
        "dtype-narrower": (dict(kind=torch.HalfStorage), "16 bytes, not 8"),
        "dtype-complex": (dict(kind=torch.ComplexFloatStorage), "names 'torch.ComplexFloatStorage'"),
        "dtype-quantized": (dict(kind=torch.QInt8Storage), "names 'torch.QInt8Storage'"),
        "dtype-function": (dict(kind=torch._utils._rebuild_tensor_v2), "unknown type"),
        "dtype-text": (dict(kind="FloatStorage"), "unknown type"),
        "numel-too-large": (dict(numel=5), "16 bytes, not 20"),
        "numel-negative": (dict(numel=-1), "of -1 elements"),
        "numel-text": (dict(numel="4"), "of '4' elements"),
        "numel-huge": (dict(numel=2**60), "16 bytes, not"),
        "key-absent": (dict(key="7"), "is not in the archive"),
        "key-path": (dict(key="../data.pkl"), "is not in the archive"),
        "key-absolute": (dict(key="/etc/passwd"), "is not in the archive"),
        "key-arabic-digit": (dict(key="\u0660"), "is not in the archive"),
        "key-number": (dict(key=0), "storage 0 of 4"),
    }
    for name, (lie, reason) in storages.items():
        yield Case(f"storage-{name}", torch_zip(dump({"w": tensor(Storage(**lie))})), reason)
    two = dump({"a": tensor(), "b": tensor(Storage(kind=torch.IntStorage))})
    yield Case("storage-two-dtypes", torch_zip(two), "declared twice, differently")
    yield Case("storage-short", torch_zip(dump({"w": tensor()}), {"0": FOUR[:-1]}), "15 bytes, not 16")
    yield Case("storage-long-legacy", legacy(dump({"w": tensor()}), {"0": FOUR + FOUR}), "not of its declared 4")
    yield Case("storage-extra-legacy", legacy(dump({"w": tensor()}), {"0": FOUR, "1": FOUR}), "list of storages")
    yield Case("storage-view-legacy", legacy(dump({"w": tensor()}).replace(b"K\x04t", b"K\x04K\x01t", 1)), "elements")
    big_endian = torch_zip(dump({"w": tensor()})).replace(b"little", b"bigbig")
    yield Case("byteorder-flipped-in-place", big_endian, "CRC")
    entries = [("a/data.pkl", dump({"w": tensor()})), ("a/byteorder", b"big"), ("a/data/0", FOUR)]
    yield Case("byteorder-big", zip_of(entries), "not little-endian")
    as_bool = dump({"w": tensor(Storage(kind=torch.BoolStorage))})
    yield Case("bool-of-seven", torch_zip(as_bool, {"0": b"\x00\x01\x07\x01"}), "neither 0 nor 1")
    many = dump({f"w{k}": tensor(Storage(numel=100_000), size=(100_000,), stride=(1,)) for k in range(100)})
    yield Case("tensors-share-too-much", torch_zip(many, {"0": bytes(400_000)}), "more than 4 times the file")
    for value in (float("nan"), float("inf"), float("-inf")):
        state = good_state()
        state["conv.bias"][3] = value
        yield Case(f"not-finite-{value}", saved(state), "conv.bias holds numbers that are not finite")
        state = {**good_state(), "half.weight": torch.full((2,), value).half()}
        yield Case(f"not-finite-half-{value}-legacy", saved(state, zipped=False), "half.weight holds numbers")
    mask = {**good_state(), "attn_mask": torch.tensor([0.0, float("nan")])}
    yield Case("not-finite-mask", saved(mask), "attn_mask holds numbers")


# bombs --------------------------------------------------------------------------------------------------------------


def module_program(state: bytes) -> bytes:
    """models.yolo.Model with a state built by the given opcodes."""
    return b"cmodels.yolo\nModel\n)\x81" + state + b"b"


def _modules(items: bytes) -> bytes:
    text = lambda word: b"X" + struct.pack("<I", len(word)) + word
    return b"}(" + text(b"_parameters") + b"}" + text(b"_buffers") + b"}" + text(b"_modules") + b"}(" + items + b"uu"


def bomb_files(folder: Path) -> Iterator[Case]:
    programs = {
        "memo-2-31": (b"\x80\x02}r\x00\x00\x00\x80.", "stores memo 2147483648"),
        "memo-text": (b"}p99999999999\n.", "stores memo 99999999999"),
        "memo-negative": (b"}p-1\n.", "stores memo -1"),
        "memo-never-stored": (b"h\x07.", "memo 7 was never stored"),
        "marks": (b"(" * 100_000 + b".", "nests deeper than"),
        "nested-lists": (b"]" * 100_000 + b"a" * 99_999 + b".", "no state dict: it holds a list"),
        "nested-tuple-key": (b"})" + b"\x85" * 100_000 + b"K\x01s.", "a tuple as a key"),
        "nested-tuple-in-set": (b"\x8f()" + b"\x85" * 100_000 + b"\x90.", "a tuple as a key"),
        "string-2-gb": (b"\x80\x04\x8d" + struct.pack("<Q", 2 << 30) + b"x.", "damaged pickle"),
        "string-2-63": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63 + 5) + b"x.", "damaged pickle"),
        "bytes-2-gb": (b"\x80\x04\x8e" + struct.pack("<Q", 2 << 30) + b"x.", "damaged pickle"),
        "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 1) + b"x.", "uses BYTEARRAY8"),
        "string-negative": (b"T\xff\xff\xff\xffx.", "damaged pickle"),
        "string-2-mb": (b"X" + struct.pack("<I", 2 << 20) + b"x" * (2 << 20) + b".", "string of 2,097,152"),
        "frame-2-63": (b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.", "no state dict"),
        "number-long": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".", "huge whole number"),
        "number-digits": (b"L" + b"9" * 50_000 + b"L\n.", "damaged pickle"),
        "opcodes": (b"N0" * 550_000 + b"N.", "more than 1,000,000 opcodes"),
        "set-again-and-again": (
            b"](" + b"K\x01" * 50_000 + b"eq\x000" + b"cbuiltins\nset\nh\x00\x85R0" * 1000 + b"N.",
            "copies more than",
        ),
        "list-in-itself": (b"}X\x01\x00\x00\x00m]q\x00h\x00as.", "no state dict"),
        "dict-in-itself": (b"}q\x00X\x05\x00\x00\x00modelh\x00s.", "no state dict"),
        "module-in-itself": (
            b"cmodels.yolo\nModel\n)\x81q\x00" + _modules(b"X\x01\x00\x00\x00ah\x00") + b"b.",
            "nest deeper than",
        ),
        "modules-65-deep": (
            b"N" + b"".join(b"q\x000" + module_program(_modules(b"X\x01\x00\x00\x00ah\x00")) for _ in range(70)) + b".",
            "nest deeper than",
        ),
        "module-laughs": (
            b"N"
            + b"".join(
                b"q\x000" + module_program(_modules(b"X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00"))
                for _ in range(40)
            )
            + b".",
            "more than 100,000",
        ),
        "list-bomb-repr": (b"N" + b"q\x000](h\x00h\x00e" * 60 + b".", "no state dict: it holds a list"),
        "object-as-key": (b"}cmodels.yolo\nModel\n)\x81K\x01s.", "its keys are an? Inert"),
    }
    for name, (program, reason) in programs.items():
        yield Case(f"bomb-{name}", torch_zip(program), reason)
    for name in ("memo-2-31", "marks", "string-2-gb", "number-digits"):
        yield Case(f"bomb-{name}-legacy", legacy(programs[name][0]), programs[name][1])
    zeros, good = bytes(64 << 20), dump({"w": tensor(Storage(numel=16 << 20), size=(16 << 20,), stride=(1,))})
    squeezed = [("a/data.pkl", good), ("a/data/0", zeros)]
    yield Case("bomb-zip-storage", zip_of(squeezed, zipfile.ZIP_DEFLATED), "is compressed")
    yield Case("bomb-zip-pickle", zip_of([("a/data.pkl", b"}" + zeros + b"0.")], zipfile.ZIP_DEFLATED), "is compressed")
    yield Case("bomb-zip-entries", zip_of([(f"a/data/{k}", b"") for k in range(20_001)]), "20,001 entries")
    npy = io.BytesIO()
    np.save(npy, np.zeros(16 << 20, np.float32))
    yield Case("bomb-npz", zip_of([("w.npy", npy.getvalue())], zipfile.ZIP_DEFLATED), "unpack to more than")
    code = [("archive/constants.pkl", dump(())), ("archive/code/x.py", b"")]
    yield Case(
        "bomb-script-without-class", torch_zip(b"c__torch__\nM\n)\x81}b.", extra=code), "not in the archive's code"
    )


# damage -------------------------------------------------------------------------------------------------------------


def wrong_files(folder: Path) -> Iterator[Case]:
    """Not weights, or weights cut short."""
    state = good_state()
    zipped, old = saved(state), saved(state, zipped=False)
    rng = np.random.default_rng(0)
    for percent in (1, 30, 60, 90, 99):
        for name, data in {"zip": zipped, "legacy": old}.items():
            yield Case(f"truncated-{name}-{percent}", data[: len(data) * percent // 100], "truncated|damaged|storage")
    yield Case("truncated-zip-last-byte", zipped[:-1], "truncated or damaged zip")
    yield Case("truncated-legacy-last-byte", old[:-1], "where its storages end")
    yield Case("appended-legacy", old + b"\x00", "where its storages end")
    yield Case("prepended-zip", b"junk" + zipped, "no container known here")
    pages = {
        "empty": (b"", "the file is empty"),
        "one-byte": (b"\x80", "damaged pickle"),
        "zeros": (bytes(5000), "no container known here"),
        "random-a": (rng.bytes(5000), "no container known here|damaged|names"),
        "random-b": (rng.bytes(5000), "no container known here|damaged|names"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-LFS pointer"),
        "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        "html-bare": (b"<html>Sign in</html>", "web page"),
        "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        "text": (b"weights: yolov8n.pt\nepochs: 3\n", "no container known here"),
        "json": (b'{"error": "not found"}', "no container known here"),
        "gzip": (b"\x1f\x8b\x08" + bytes(50), "gzip"),
        "xz": (b"\xfd7zXZ\x00" + bytes(50), "xz archive"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG picture"),
        "jpeg": (b"\xff\xd8\xff\xe0" + bytes(50), "JPEG picture"),
        "pdf": (b"%PDF-1.7", "PDF"),
        "gguf": (b"GGUF" + bytes(50), "GGUF"),
        "npy": (b"\x93NUMPY\x01\x00" + bytes(50), "one .npy array"),
        "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.9.0", "no container known here"),
        "zip-empty": (zip_of([]), "empty zip"),
        "zip-of-text": (zip_of([("word/document.xml", b"<w/>")]), "0 data.pkl"),
        "zip-with-stranger": (torch_zip(dump({"w": tensor()}), extra=[("__MACOSX/x", b"")]), "lies outside"),
        "pickle-bare": (pickle.dumps({"w": [1.0, 2.0]}, 2), "bare pickle"),
        "pickle-bare-text": (pickle.dumps({"w": [1.0, 2.0]}, 0), "no container known here"),
        "legacy-protocol": (LEGACY_HEAD.replace(b"\xe9\x03", b"\xea\x03") + dump({}) + dump([]), "another protocol"),
        "legacy-no-keys": (LEGACY_HEAD + dump({}), "damaged pickle"),
        "legacy-keys-not-list": (LEGACY_HEAD + dump({}) + dump(3), "list of storages"),
        "legacy-keys-twice": (LEGACY_HEAD + dump({"w": tensor()}) + dump(["0", "0"]), "list of storages"),
    }
    for name, (data, reason) in pages.items():
        yield Case(f"wrong-{name}", data, reason)
    values = {
        "no-tensors": ({"epoch": 3, "loss": 0.5}, "it holds no tensors"),
        "empty-dict": ({}, "no state dict"),
        "list": ([torch.zeros(2)], "it holds a list"),
        "one-tensor": (torch.zeros(2), "it holds a TensorRecord|one tensor"),
        "number": (3, "it holds 3"),
        "mixed": ({"w": torch.zeros(2), "lr": 0.1}, "beside tensors such as 'w'"),
        "optimizer-only": ({"optimizer": {"state": {0: {"m": torch.zeros(2)}}, "param_groups": []}}, "no state dict"),
        "key-escape": ({"a\x1b[2J": torch.zeros(2)}, "an entry named"),
        "key-newline": ({"a\nb": torch.zeros(2)}, "an entry named"),
        "key-empty": ({"": torch.zeros(2)}, "an entry named"),
        "key-long": ({"a" * 600: torch.zeros(2)}, "an entry named"),
        "key-number": ({0: torch.zeros(2)}, "no state dict"),
    }
    for name, (value, reason) in values.items():
        yield Case(f"content-{name}", saved(value), reason)
    entry = b"X\x01\x00\x00\x00w" + dump(tensor())[2:-1]
    yield Case("content-key-twice", torch_zip(b"\x80\x02}(" + entry * 2 + b"u."), "key 'w' is given twice")
    yield Case("content-key-without-value", torch_zip(b"}(X\x01\x00\x00\x00wu."), "a key without a value")
    yield Case("content-pops-too-much", torch_zip(b"00."), "damaged pickle")
    yield Case("content-two-values", torch_zip(b"NN."), "not one value")
    flipped = bytearray(zipped)
    flipped[zipped.index(state["conv.bias"].numpy().tobytes()) + 5] ^= 1
    yield Case("flipped-zip-storage", bytes(flipped), "CRC")
    flipped = bytearray(old)
    flipped[old.index(state["conv.bias"].numpy().tobytes()) + 5] ^= 1
    yield Case("flipped-legacy-storage-named-0a1b2c3d", bytes(flipped), "promises SHA-256 0a1b2c3d")
    encrypted = bytearray(zipped)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = encrypted.find(signature)
        while position >= 0:
            encrypted[position + at] |= 1
            position = encrypted.find(signature, position + 1)
    yield Case("wrong-encrypted", bytes(encrypted), "encrypted")
