"""Any weights file that is read here -> one safetensors file (shared_file.py), which every command takes as it is."""

import os
from pathlib import Path

import torch

from errors import DISK_EXIT_CODE, UserError, counted
from weights.load import HASH_IN_NAME, file_of_run, read_state_dict
from weights.shared_file import FORMAT, to_bytes, to_half

SUFFIX = ".safetensors"


def convert(path: Path, output: Path, *, half: bool = False, arch: str | None = None) -> str:
    """Write the weights of `path` to `output`; returns a line about the file.

    Names, order, dtypes and bits of the tensors are the file's; of a checkpoint of train.py they are its averaged (EMA)
    weights. Class names, image size and architecture go with them.

    Args:
        path: a file for read_state_dict, or the folder of a run (file_of_run).
        half: to_half, half the size.
        arch: the architecture of a released file, where names and shapes leave it open.
    UserError, with nothing written, for a file that is refused and for a name that does not fit; with exit code 5 if
    the file could not be written.
    """
    path = file_of_run(path)
    if output.suffix != SUFFIX:
        raise UserError(f"{output}: expected a name that ends in {SUFFIX}")
    if (promised := HASH_IN_NAME.search(output.name)) and not promised[1].isdecimal():
        raise UserError(f"{output}: its name would promise the SHA-256 {promised[1]}..., expected another name")
    if output.exists() and output.samefile(path):
        raise UserError(f"{output}: is the file to convert, expected another name")
    if not output.parent.is_dir():
        raise UserError(f"{output}: no such folder: {output.parent}")
    state, info = read_state_dict(path)
    if arch is not None and arch != info.arch and (info.ours or info.arch):
        raise UserError(f"{path}: holds {info.arch}, expected {arch}")
    own_arch = arch or info.arch
    description = {
        "tensor_names": "released",
        "arch": own_arch,
        "names": list(info.names) or None,
        "image_size": info.image_size,
        **info.ours,
        "versions": {"torch": str(torch.__version__), "metadata": FORMAT, **info.ours.get("versions", {})},
        "source": f"{path.name}, SHA-256 {info.sha256}",
    }
    if info.ours:
        description["tensor_names"] = "ours"
    data = to_bytes(to_half(state, str(path)) if half else state, description)
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{output}: could not be written: {error.strerror}", DISK_EXIT_CODE) from None
    classes = counted(len(info.names), "class") if info.names else "no class names"
    named = own_arch or "architecture not known from names and shapes: give --arch here, or to every command"
    return f"written: {output} ({counted(len(state), 'tensor')}, {len(data):,} bytes; {named}; {classes})"
