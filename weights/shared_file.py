"""The file a model is handed on in: safetensors, with the model's description and a checksum in its metadata.

The format, by its public description: the length of a JSON header as u64, the header, the bytes of all tensors. The
header has dtype, shape and place of each tensor, and `__metadata__`, which is text by key. Ours has these keys; every
value that is not text by nature is JSON:

    format        "pt", as in other files of PyTorch's tensors
    retort        FORMAT; without it the metadata is somebody else's and not read
    tensor_names  "ours", or "released": the names of the model's released file
    arch          a name of models.build or models.build_teacher; absent where it is not known
    names         class names; absent where the file had none
    image_size    pixels
    versions      of torch and of this format
    source        name and SHA-256 of a file that was converted
    epoch, step, config   of a run of ours
    sha256        of everything else in the header and of all tensors: `digest_of`

Any program that reads safetensors reads the tensors.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from weights.inert_pickle import Refused, short

FORMAT = "1"
MAX_TEXT = 1 << 20  # characters of one value of the metadata
KINDS: dict[str, type] = {
    "tensor_names": str, "arch": str, "names": list, "image_size": int, "versions": dict, "source": str,
    "epoch": int, "step": int, "config": dict,
}  # fmt: skip
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STATISTICS = ("running_mean", "running_var")  # of BatchNorm


def to_bytes(state: dict[str, Tensor], description: dict[str, Any]) -> bytes:
    """A safetensors file of named tensors, in their order and dtypes. Equal input gives equal bytes.

    description: values for the keys of KINDS; others and None are left out.
    The bytes of wide dtypes come first and the header is a multiple of 8 long, so that each tensor begins at a multiple
    of its element size. UserError for a dtype that the format does not have.
    """
    code_of = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    for name, tensor in state.items():
        if tensor.dtype not in code_of or name == "__metadata__":
            raise UserError(f"{name} of dtype {tensor.dtype} is nothing that a safetensors file holds")
    parts, places, position = [], {}, 0
    for name in sorted(state, key=lambda name: -state[name].dtype.itemsize):
        data = _bytes_of(state[name])
        places[name] = [position, position + len(data)]
        position += len(data)
        parts.append(data)
    rows = {
        name: {"dtype": code_of[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places[name]}
        for name, tensor in state.items()
    }
    metadata = {"format": "pt", "retort": FORMAT}
    for key, kind in KINDS.items():
        if (value := description.get(key)) is not None:
            metadata[key] = value if kind is str else json.dumps(value)
    metadata["sha256"] = digest_of(rows, metadata, parts)
    header = json.dumps({"__metadata__": metadata, **rows}).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def _bytes_of(tensor: Tensor) -> bytes:
    """Its elements in order, little-endian."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest_of(rows: dict[str, Any], metadata: dict[str, str], data: Iterable[bytes]) -> str:
    """SHA-256 of the tensors' rows, the metadata without `sha256`, and the tensors' bytes, as 64 hex digits."""
    described = {"rows": rows, "metadata": {key: text for key, text in metadata.items() if key != "sha256"}}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def read_description(metadata: dict[str, str]) -> dict[str, Any]:
    """The values of KINDS in a file's metadata; {} for a file of somebody else. Raises Refused for damaged ones."""
    if "retort" not in metadata:
        return {}
    if metadata["retort"] != FORMAT:
        raise Refused(f"its metadata is of format {short(metadata['retort'])}, this code reads {FORMAT}")
    description: dict[str, Any] = {}
    for key, kind in KINDS.items():
        if (text := metadata.get(key)) is None:
            continue
        value: Any = text
        if len(text) > MAX_TEXT:
            raise Refused(f"its metadata has {len(text):,} characters of {key!r}; the limit is {MAX_TEXT:,}")
        if kind is not str:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                raise Refused(f"its metadata is damaged: {key!r} is {short(text)}, expected JSON") from None
        if type(value) is not kind:
            raise Refused(f"its metadata is damaged: {key!r} is {short(text)}, expected {kind.__name__}")
        description[key] = value
    is_named = all(isinstance(name, str) for name in description.get("names", []))
    if description.get("tensor_names") not in ("ours", "released") or not is_named:
        raise Refused("its metadata is damaged: 'tensor_names' or 'names' is not what this code writes")
    needed = [key for key in ("arch", "names", "image_size") if key not in description]
    if description["tensor_names"] == "ours" and needed:
        raise Refused(f"its metadata is damaged: {needed[0]!r} is missing")
    return description


def to_half(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Floating-point entries as float16, except BatchNorm's statistics: a small variance would become 0.

    UserError for a number that is too large for float16. Infinities that were there before stay.
    """
    half = {}
    for name, tensor in state.items():
        half[name] = tensor
        if tensor.is_floating_point() and not name.endswith(STATISTICS):
            half[name] = tensor.half()
            if not torch.equal(half[name].isfinite(), tensor.isfinite()):
                largest = tensor[tensor.isfinite()].abs().max().item()
                raise UserError(f"{source}: {name} has {largest:g}, float16 ends at {torch.finfo(torch.half).max:g}")
    return half
