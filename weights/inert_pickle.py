"""Pickles as torch.save writes them, read as data: a small stack machine that imports nothing and calls nothing.

A pickle is a program. Python's own reader imports what the program names, and calls it. This reader interprets the
opcodes and a dozen names (CONSTRUCTORS, STORAGE_DTYPES), for which it builds plain dicts, sets, tuples and
`TensorRecord`s itself. A name of a model's own classes (INERT_NAMES) becomes an `Inert` object: its name, its arguments
and its state, nothing more. Every other name raises `Refused` with that name.

Refused, unlike in pickle: text persistent ids, extension codes, out-of-band buffers, a key given twice in one dict,
keys that are not plain values, bytes after the end, and anything beyond the limits below.
"""

import io
import math
import pickletools
import re
import struct
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_OPCODES = 1_000_000  # a YOLOv5n has 34 thousand
MAX_STRING_BYTES = 1 << 20
MAX_MARK_DEPTH = 1_000
MAX_DIMS = 16

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
CONSTRUCTORS = frozenset(
    {
        "collections.OrderedDict",
        "builtins.set",
        "__builtin__.set",  # its name in Python 2 and protocol 2
        "torch.Size",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.jit._pickle.build_boollist",
        "torch.jit._pickle.build_doublelist",
        "torch.jit._pickle.build_intlist",
        "torch.jit._pickle.build_tensorlist",
        "torch.jit._pickle.restore_type_tag",
    }
)
INERT_NAMES = re.compile(
    r"(ultralytics|models|torch\.nn\.modules|__torch__)(\.\w+)+"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path"
    r"|numpy\._?core\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|_codecs\.encode"
    r"|argparse\.Namespace|types\.SimpleNamespace|datetime\.(datetime|date|timedelta)"
    r"|torch\.(device|float(16|32|64)?|bfloat16|half|double|u?int8|int16|int32|int64|long|bool)"
)


class Refused(Exception):
    """The reason why a file is not read: one line, without the file's name."""


class ForbiddenName(Refused):
    """The pickle names a thing that is neither part of a tensor nor a class of a model."""


@dataclass(frozen=True)
class StorageRecord:
    """A flat run of `numel` elements that lies elsewhere in the file under `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """A strided view of a storage. _view has checked that it lies inside the storage and has no more elements."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions. It is never looked up."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object of a class we do not have: the class's name, the constructor's arguments, the state set by BUILD."""

    name: str
    args: tuple = ()
    state: Any = None
    built: bool = field(default=False, repr=False)


def short(value: object, limit: int = 60) -> str:
    """repr of a plain value, cut to `limit` characters; for anything else the type's name (its repr may be huge)."""
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    elif isinstance(value, bool | int | float | bytes | None):
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a huge whole number"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."


_PLAIN = str | int | float | bool | bytes | None
_PUSH_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class InertReader:
    """The stack machine. One reader per file: its storages and globals_seen collect over the file's pickles."""

    def __init__(self) -> None:
        self.globals_seen: set[str] = set()
        self.storages: dict[str, StorageRecord] = {}
        self.copied = 0

    def read(self, file: io.BytesIO) -> Any:
        """The value of the pickle at the file's position. Afterwards the position is just behind the pickle."""
        self.stack: list = []
        self.marks: list[list] = []
        self.memo: dict[int, Any] = {}
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count >= MAX_OPCODES:
                    raise Refused(f"the pickle has more than {MAX_OPCODES:,} opcodes")
                if opcode.name == "STOP":
                    if len(self.stack) != 1 or self.marks:
                        raise Refused("the pickle ends with a stack that is not one value")
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, OverflowError, struct.error) as error:  # what pickletools raises for broken bytes
            raise Refused(f"damaged pickle: {' '.join(str(error).split())[:120]}") from None
        except IndexError:
            raise Refused("damaged pickle: an opcode takes more from the stack than is there") from None
        raise Refused("damaged pickle: it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(_checked_plain(argument))
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name])
        elif name in _TUPLES:
            stack.append(self._pop_many(_TUPLES[name]))
        elif name in {"BINGET", "GET", "LONG_BINGET"}:
            if argument not in self.memo:
                raise Refused(f"damaged pickle: memo {argument} was never stored")
            stack.append(self.memo[argument])
        elif name in {"BINPUT", "PUT", "LONG_BINPUT", "MEMOIZE"}:
            self._store(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in {"PROTO", "FRAME"}:
            pass  # neither changes what follows
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
            if len(self.marks) > MAX_MARK_DEPTH:
                raise Refused(f"the pickle nests deeper than {MAX_MARK_DEPTH}")
        elif name in {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}:
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
        elif name in {"TUPLE", "LIST", "DICT", "FROZENSET"}:
            self._build_from_mark(name)
        elif name in {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}:
            self._fill(name)
        elif name in {"GLOBAL", "STACK_GLOBAL"}:
            path = tuple(argument.split(" ")) if name == "GLOBAL" else self._pop_many(2)
            stack.append(self._mention(path))
        elif name in {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}:
            self._make(name, argument)
        elif name == "BUILD":
            self._set_state()
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif name == "POP":
            self.stack.pop() if self.stack else self._pop_mark()
        elif name == "POP_MARK":
            self._pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise Refused(f"the pickle uses {name}, which torch.save never writes")

    def _pop_many(self, count: int) -> tuple:
        if count > len(self.stack):
            raise IndexError
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def _pop_mark(self) -> list:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _store(self, index: int) -> None:
        if not 0 <= index < MAX_OPCODES:
            raise Refused(f"the pickle stores memo {index}")
        self.memo[index] = self.stack[-1]

    def _build_from_mark(self, name: str) -> None:
        values = self._pop_mark()
        if name == "DICT":
            self.stack.append({})
            self._set_items(self.stack[-1], values)
        elif name == "FROZENSET":
            self.stack.append(frozenset(_checked_key(value) for value in values))
        else:
            self.stack.append(tuple(values) if name == "TUPLE" else values)

    def _fill(self, name: str) -> None:
        count = {"APPEND": 1, "SETITEM": 2}.get(name)
        values = self._pop_mark() if count is None else self._pop_many(count)
        target = self.stack[-1]
        if isinstance(target, Inert):
            return  # items of a list or dict class we do not have: no weights are looked for there
        if name in {"APPEND", "APPENDS"} and isinstance(target, list):
            target.extend(values)
        elif name in {"SETITEM", "SETITEMS"} and isinstance(target, dict):
            self._set_items(target, values)
        elif name == "ADDITEMS" and isinstance(target, set):
            target.update(_checked_key(value) for value in values)
        else:
            raise Refused(f"damaged pickle: {name} on {short(target)}")

    @staticmethod
    def _set_items(target: dict, values: list | tuple) -> None:
        if len(values) % 2:
            raise Refused("damaged pickle: a key without a value")
        for key, value in zip(values[::2], values[1::2]):
            if _checked_key(key) in target:
                raise Refused(f"key {short(key)} is given twice")
            target[key] = value

    def _mention(self, path: tuple) -> Global:
        """path: (module, name), as the pickle has them."""
        if len(path) != 2 or not all(isinstance(part, str) for part in path):
            raise Refused("damaged pickle: a global without a module and a name")
        name = ".".join(path)
        is_storage = path[0] == "torch" and path[1] in STORAGE_DTYPES
        if not (name in CONSTRUCTORS or is_storage or (INERT_NAMES.fullmatch(name) and path[1].isidentifier())):
            raise ForbiddenName(f"it names {short(name, 100)}, which no weights need; nothing was run")
        self.globals_seen.add(name)
        return Global(name)

    def _make(self, opcode: str, argument: Any) -> None:
        if opcode == "INST":
            target, args = self._mention(tuple(argument.split(" "))), tuple(self._pop_mark())
        elif opcode == "OBJ":
            target, *rest = self._pop_mark()
            args = tuple(rest)
        elif opcode == "NEWOBJ_EX":
            target, args, _ = self._pop_many(3)
        else:
            target, args = self._pop_many(2)
        if not isinstance(target, Global) or not isinstance(args, tuple):
            raise Refused(f"damaged pickle: {opcode} on {short(target)}")
        self.copied += sum(len(value) for value in args if isinstance(value, list))
        if self.copied > MAX_OPCODES:  # one long list may be made into a set again and again
            raise Refused(f"the pickle copies more than {MAX_OPCODES:,} values")
        self.stack.append(_construct(target.name, args))

    def _set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, dict):
            return  # attributes of an OrderedDict: a state dict's _metadata
        if not isinstance(target, Inert) or target.built:
            raise Refused(f"damaged pickle: BUILD on {short(target)}")
        target.state, target.built = state, True

    def _persistent(self, identity: Any) -> StorageRecord | Global:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            if isinstance(identity[1], Global):  # a module's class in legacy files; its source is left unread
                return identity[1]
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Refused("damaged pickle: a persistent id that is not a storage")
        _, kind, key, _, numel, *view = identity
        dtype = STORAGE_DTYPES.get(kind.name.removeprefix("torch.")) if isinstance(kind, Global) else None
        if dtype is None:
            raise Refused(f"storage {short(key)} is of an unknown type")
        if not isinstance(key, str) or type(numel) is not int or numel < 0 or view not in ([], [None]):
            raise Refused(f"storage {short(key)} of {short(numel)} elements")
        record = StorageRecord(key, dtype, numel)
        if self.storages.setdefault(key, record) != record:
            raise Refused(f"storage {short(key)} is declared twice, differently")
        return record


def _checked_plain(value: Any) -> _PLAIN:
    if isinstance(value, int) and value.bit_length() > 96:  # torch.save's magic number has 77
        raise Refused("the pickle holds a huge whole number")
    if isinstance(value, str | bytes) and len(value) > MAX_STRING_BYTES:
        raise Refused(f"the pickle holds a string of {len(value):,} characters")
    return value


def _checked_key(key: Any) -> Any:
    """The key, if its hash and comparison run no code and cannot be made to collide; else Refused."""
    if isinstance(key, tuple) and len(key) < 10 and all(isinstance(part, str) for part in key):
        return key
    if not isinstance(key, _PLAIN | Global | Inert) or (isinstance(key, int) and key.bit_length() > 64):
        raise Refused(f"{short(key)} as a key")
    return key


def _construct(name: str, args: tuple) -> Any:
    """The plain value that the call `name(*args)` stands for: for CONSTRUCTORS built here, else an Inert object."""
    if name == "collections.OrderedDict":
        if not args or args == ([],):
            return {}
        made: dict = {}
        if len(args) == 1 and isinstance(args[0], list) and all(isinstance(p, list | tuple) for p in args[0]):
            for pair in args[0]:
                InertReader._set_items(made, pair)
            return made
    elif name in {"builtins.set", "__builtin__.set"}:
        if not args or (len(args) == 1 and isinstance(args[0], list)):
            return {_checked_key(value) for value in (args[0] if args else ())}
    elif name == "torch.Size":
        if len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
    elif name in {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}:
        if len(args) >= 4:
            return _view(*args[:4])
    elif name.startswith("torch._utils._rebuild_parameter"):
        if args and isinstance(args[0], TensorRecord):
            return args[0]
    elif name.startswith("torch.jit._pickle."):
        if args:
            return args[0]
    elif INERT_NAMES.fullmatch(name):
        return Inert(name, args)
    raise Refused(f"damaged pickle: {name} with arguments it does not take")


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> TensorRecord:
    if not (isinstance(storage, StorageRecord) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise Refused("a tensor whose storage, size or stride is something else")
    if len(size) != len(stride) or len(size) > MAX_DIMS:
        raise Refused(f"a tensor with {len(size)} sizes and {len(stride)} strides")
    if any(type(value) is not int or not 0 <= value < 1 << 48 for value in (offset, *size, *stride)):
        raise Refused("a tensor with a negative or senseless offset, size or stride")
    record = TensorRecord(storage, offset, size, stride)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride)) if record.numel else offset - 1
    if last >= storage.numel or record.numel > storage.numel:
        raise Refused(
            f"a tensor of shape {size}, stride {stride} and offset {offset} reaches beyond its storage of "
            f"{storage.numel} elements"
        )
    return record
