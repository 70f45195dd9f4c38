"""Generator of hostile and corrupt weight files: each a name, its bytes, and what the refusal has to say.

`corpus(folder)` yields them all. Files that carry code would, if anything ran it, create `folder/ran-<name>`.
Pickles are written by `dump`, which spells storages as torch.save does but lets every number lie.
"""

import contextlib
import io
import multiprocessing.util
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import timeit
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.testing._private import utils as numpy_testing
from torch.fx import graph_module
from torch.jit import unsupported_tensor_ops
from torch.utils import collect_env

LEGACY_HEAD = b"".join(
    pickle.dumps(value, 2)
    for value in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)


@dataclass(frozen=True)
class Case:
    """One file. reason: a regular expression the one-line refusal matches."""

    name: str
    data: bytes
    reason: str


@dataclass(frozen=True)
class Storage:
    """Pickled as the persistent id of a storage; `kind` is the class it claims to be of."""

    key: Any = "0"
    numel: Any = 4
    kind: Any = torch.FloatStorage


class Call:
    """Pickled as a call of `function` with `args` (REDUCE)."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


def dump(value: Any, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> tuple | None:
            return ("storage", obj.kind, obj.key, "cpu", obj.numel) if isinstance(obj, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def tensor(storage: Any = None, offset: Any = 0, size: Any = (2, 2), stride: Any = (2, 1)) -> Call:
    storage = Storage() if storage is None else storage
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def zip_of(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries:
            with warnings.catch_warnings(action="ignore"):  # of names given twice
                archive.writestr(name, data)
    return file.getvalue()


def torch_zip(program: bytes, storages: dict[str, bytes] | None = None, extra: list[tuple[str, bytes]] = ()) -> bytes:
    storages = {"0": FOUR} if storages is None else storages
    data = [(f"archive/data/{key}", raw) for key, raw in storages.items()]
    return zip_of([("archive/data.pkl", program), ("archive/byteorder", b"little"), *data, *extra])


def legacy(program: bytes, storages: dict[str, bytes] | None = None, itemsize: int = 4) -> bytes:
    storages = {} if storages is None else storages
    raw = b"".join(struct.pack("<q", len(data) // itemsize) + data for data in storages.values())
    return LEGACY_HEAD + program + pickle.dumps(list(storages), 2) + raw


def good_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=generator),
        "conv.bias": torch.randn(8, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
        "half.weight": torch.randn(5, 6, generator=generator).half(),
    }


def saved(value: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@contextlib.contextmanager
def fake_modules(*names: str) -> Iterator[dict[str, types.ModuleType]]:
    """Modules (and their parents) that exist inside the block only, so that classes in them can be pickled."""
    every = sorted({".".join(name.split(".")[: k + 1]) for name in names for k in range(name.count(".") + 1)})
    before = {name: sys.modules.get(name) for name in every}
    made = {name: types.ModuleType(name) for name in every}
    sys.modules.update(made)
    try:
        yield made
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


# code ---------------------------------------------------------------------------------------------------------------


def gadgets(path: str) -> dict[str, Call]:
    """Calls that create `path` when they are made, by name."""
    write = f"open({path!r}, 'w').close()"
    return {
        "os-system": Call(os.system, f"touch {path}"),
        "exec": Call(exec, write),
        "eval": Call(eval, write),
        "open": Call(open, path, "w"),
        "file-io": Call(io.FileIO, path, "w"),
        "popen": Call(subprocess.Popen, ["touch", path]),
        "check-output": Call(subprocess.check_output, ["touch", path]),
        "copy": Call(shutil.copy, __file__, path),
        "timeit": Call(timeit.timeit, write, "pass", timeit.default_timer, 1),
        "nested-pickle": Call(pickle.loads, pickle.dumps(Call(exec, write))),
        "map": Call(list, Call(map, exec, [write])),
        "mkdir": Call(os.mkdir, path),
        "torch-save": Call(torch.save, {}, path),
        "numpy-save": Call(np.save, path, 1),
        # missed by public scanners in 2026: harmless looking functions of libraries that every such program has
        "collect-env": Call(collect_env.run, f"touch {path}"),
        "spawnv": Call(multiprocessing.util.spawnv_passfds, shutil.which("touch").encode(), ["touch", path], ()),
        "torch-exec-wrapper": Call(unsupported_tensor_ops.execWrapper, write, {}, {}),
        "torch-fx-exec": Call(graph_module._exec_with_source, write, {}),
        "torch-from-file": Call(torch.from_file, path, True, 1),
        "numpy-runstring": Call(numpy_testing.runstring, write, {}),
        "numpy-memmap": Call(np.memmap, path, "uint8", "w+", 0, 1),
        "numpy-open-memmap": Call(np.lib.format.open_memmap, path, "w+", "u1", (1,)),
        "numpy-savetxt": Call(np.savetxt, path, [1]),
    }


NAMED = r"it names .*, which no weights need"


def code_files(folder: Path) -> Iterator[Case]:
    """Code to be run, where a pickle has a value."""

    def gadget(name: str, kind: str = "os-system") -> Call:
        return gadgets(str(folder / f"ran-{name}"))[kind]

    for protocol in range(6):
        for container, wrap in {"bare": bytes, "zip": torch_zip, "legacy": legacy}.items():
            name = f"code-{container}-protocol{protocol}"
            yield Case(name, wrap(dump({"model": gadget(name)}, protocol)), NAMED)
    for kind in gadgets(""):
        name = f"code-{kind}"
        yield Case(name, torch_zip(dump({"w": tensor(), "x": gadget(name, kind)})), NAMED)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for entry in ("storages", "tensors", "pickle"):
            info, data = tarfile.TarInfo(entry), dump(gadget("code-tar"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    yield Case("code-tar", tar.getvalue(), "tar archive")

    state = good_state()
    hidden = {
        "train-args": {"model": state, "train_args": {"imgsz": 640, "callbacks": gadget("code-in-train-args")}},
        "extra-key": {**state, "zz": gadget("code-in-extra-key")},
        "unused-key": {"ema": state, "model": gadget("code-in-unused-key")},
        "list": {"model": state, "history": [1, [2, [gadget("code-in-list")]]]},
        "dict-key": {"model": state, "history": {(gadget("code-in-dict-key"),): 1}},
    }
    for where, value in hidden.items():
        yield Case(f"code-in-{where}", saved(value), NAMED)
        yield Case(f"code-in-{where}-legacy", saved(value, zipped=False), NAMED)
    name = "code-in-hooks"
    hooked = Call(torch._utils._rebuild_tensor_v2, Storage(), 0, (4,), (1,), False, gadget(name))
    yield Case(name, torch_zip(dump({"w": hooked})), NAMED)
    for field in ("key", "numel"):
        name = f"code-in-storage-{field}"
        yield Case(name, torch_zip(dump({"w": tensor(Storage(**{field: gadget(name)}))})), NAMED)
    good = dump({"w": tensor()})
    yield Case("code-after-stop", torch_zip(good + dump(gadget("code-after-stop"))), "bytes after its end")
    evil = dump({"w": tensor(), "x": gadget("code-second-pickle")})
    twice = [("archive/data.pkl", evil), ("archive/data/0", FOUR)]
    yield Case("code-second-pickle-same-name", torch_zip(good, extra=twice[:1]), "in the archive twice")
    yield Case("code-second-pickle-elsewhere", torch_zip(good, extra=[("other/data.pkl", evil)]), "2 data.pkl")
    yield Case("code-appended-zip", torch_zip(good) + zip_of(twice), "bytes before the first entry|it names")
    yield Case("code-prepended-pickle", dump(gadget("code-prepended-pickle")) + torch_zip(good), NAMED)
    script = [("archive/constants.pkl", dump(gadget("code-in-constants"))), ("archive/code/a.py", b"")]
    yield Case("code-in-constants", torch_zip(good, extra=script), NAMED)
    head = dump(0x1950A86A20F9469CFC6C) + dump(1001)
    yield Case("code-in-legacy-system", head + dump(gadget("code-in-legacy-system")) + dump({}) + dump([]), NAMED)
    yield Case("code-in-legacy-keys", LEGACY_HEAD + dump({}) + dump([gadget("code-in-legacy-keys")]), NAMED)


def absent_libraries(folder: Path) -> Iterator[Case]:
    """Functions of libraries that are not here, and ones that read and send files instead of writing them."""
    with fake_modules("pandas.io.parsers.readers", "mlflow.projects.backend.local", "requests.api") as made:
        for module, function in (
            ("pandas.io.parsers.readers", "read_csv"),
            ("mlflow.projects.backend.local", "_run_entry_point"),
            ("requests.api", "get"),
        ):
            exec(f"def {function}(*args): pass", made[module].__dict__)
            call = Call(getattr(made[module], function), "http://127.0.0.1:9/?secret")
            yield Case(f"code-absent-{function}", torch_zip(dump({"w": tensor(), "x": call})), NAMED)
    for function in (np.load, np.fromfile, np.genfromtxt, np.loadtxt, torch.load, torch.hub.load):
        call = Call(function, "/etc/hostname")
        name = f"code-reads-{function.__module__}-{function.__name__}"
        yield Case(name, torch_zip(dump({"w": tensor(), "x": call})), NAMED)
    on_tensor = dump({"w": tensor()}, 2)[:-1] + b"X\x01\x00\x00\x00wK\x01s."  # an item set on a tensor
    set_item = dump(tensor(), 2)[:-1] + b"K\x00K\x07s."
    yield Case("setitem-on-a-tensor", torch_zip(set_item), "SETITEM on a TensorRecord")
    yield Case("setitem-twice", torch_zip(on_tensor), "key 'w' is given twice")
    hashed = dump(Storage(), 2)[:-1] + b"K\x00K\x07s."
    yield Case("setitem-on-a-storage", torch_zip(hashed), "SETITEM on a StorageRecord")


def changed(data: bytes, entry: str, *, at: int, value: int, central: bool) -> bytes:
    """A zip archive with one 16-bit field of an entry changed, in its own header or in the directory's copy of it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        own = archive.getinfo(entry).header_offset
        place = archive.start_dir
    if central:
        while data[place + 46 : place + 46 + int.from_bytes(data[place + 28 : place + 30], "little")] != entry.encode():
            place += 46 + sum(int.from_bytes(data[place + k : place + k + 2], "little") for k in (28, 30, 32))
    start = (place + 8 if central else own + 6) + at
    return data[:start] + struct.pack("<H", value) + data[start + 2 :]


def header_files(folder: Path) -> Iterator[Case]:
    """Zip archives whose two descriptions of an entry differ: a scanner reads one, a loader the other."""
    good, evil = torch_zip(dump({"w": tensor()})), torch_zip(dump({"w": gadgets(str(folder / "ran-header"))["exec"]}))
    otherwise = "is described otherwise|damaged zip archive"
    for what, data in (("good", good), ("evil", evil)):
        for central in (False, True):
            where = f"{what}-{'directory' if central else 'place'}"
            for kind, at, value in (("encrypted", 0, 1), ("streamed", 0, 8), ("deflated", 2, 8), ("unknown", 2, 99)):
                lied = changed(data, "archive/data.pkl", at=at, value=value, central=central)
                yield Case(f"header-{kind}-{where}", lied, otherwise)
    both = changed(evil, "archive/data.pkl", at=0, value=1, central=True)
    both = changed(both, "archive/data.pkl", at=0, value=1, central=False)
    yield Case("header-encrypted-both", both, "is encrypted")
    renamed = good.replace(b"archive/data.pkl", b"archive/code.txt", 1)  # where it lies; the directory keeps the name
    yield Case("header-renamed", renamed, otherwise)


def opcode_files(folder: Path) -> Iterator[Case]:
    """Programs of a pickle written by hand, that name code or would run it."""
    path = str(folder / "ran-opcode").encode()
    touch = b"touch " + path
    by_hand = {
        "inst": b"(S'" + touch + b"'\niposix\nsystem\n.",
        "obj": b"(cposix\nsystem\nS'" + touch + b"'\no.",
        "newobj": b"\x80\x02cposix\nsystem\nS'" + touch + b"'\n\x85\x81.",
        "newobj-ex": b"\x80\x04cposix\nsystem\nS'" + touch + b"'\n\x85}\x92.",
        "stack-global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93S'" + touch + b"'\n\x85R.",
        "stack-global-dotted": b"\x80\x04\x8c\x0bmodels.yolo\x8c\x09os.system\x93S'" + touch + b"'\n\x85R.",
        "stack-global-memo": b"\x80\x04\x8c\x05posix\x940\x8c\x06system\x940h\x00h\x01\x93S'" + touch + b"'\n\x85R.",
        "dunder": b"cbuiltins\n__import__\nS'os'\n\x85R.",
        "getattr-chain": b"cbuiltins\ngetattr\ncos\n__dict__\nS'system'\n\x86R.",
        "reconstructor": b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\nh\x00NtR.",
        "script-name": b"c__torch__.posix\nsystem.x\nS'" + touch + b"'\n\x85R.",
        "not-a-name": b"cmodels.yolo\nsystem('x')\n)R.",
        "homoglyph": "cm\N{CYRILLIC SMALL LETTER O}dels.yolo\nsystem\n)R.".encode(),
    }
    for name, program in by_hand.items():
        yield Case(f"code-opcode-{name}", torch_zip(program), NAMED + "|damaged pickle")
    yield Case("code-opcode-extension", torch_zip(b"\x80\x02\x82\x01."), "EXT1|extension")
    yield Case("code-opcode-text-id", torch_zip(b"Pstorage\n."), "PERSID")
    # legacy files keep a module's class with its source beside it: the class is checked, the source is only text
    with_source = b"\x80\x02(X\x06\x00\x00\x00module%bS'a.py'\nS'import os; os.system(\"touch %b\")'\ntQ)\x81}b."
    good_class, bad_class = b"cmodels.yolo\nModel\n", b"cposix\nsystem\n"
    yield Case("code-in-module-source", legacy(with_source % (good_class, path)), "models.yolo.Model has no parameters")
    yield Case("code-in-module-class", legacy(with_source % (bad_class, path)), NAMED)
    setstate = b"\x80\x02cmodels.yolo\nModel\n)\x81}X\x0c\x00\x00\x00__setstate__cmodels.yolo\nrun\nsb."
    yield Case("code-set-attribute", torch_zip(setstate), "not a module")
    on_class = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb."
    yield Case("code-build-on-function", torch_zip(on_class), "BUILD on a Global")


def corpus(folder: Path) -> list[Case]:
    """Every case; names are unique. `folder` is where code, if it ran, would leave its mark."""
    from tests.weights.hostile_arrays import npz_files, safetensors_files
    from tests.weights.hostile_content import bomb_files, lying_files, wrong_files

    makers = (
        code_files,
        absent_libraries,
        header_files,
        opcode_files,
        lying_files,
        bomb_files,
        wrong_files,
        safetensors_files,
        npz_files,
    )
    cases = [case for make in makers for case in make(folder)]
    assert len({case.name for case in cases}) == len(cases)
    return cases
