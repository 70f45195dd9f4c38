"""Files of released weights -> named tensors -> our models. Nothing that a file names is run.

load          what other folders call: read_state_dict, load_public, and renaming released names to ours by tables
class_rows    which outputs of a class head belong to which class
containers    torch zip, TorchScript, legacy torch, safetensors and npz, read as bytes
inert_pickle  pickles, read as data
places        where the weights are in an opened container
families      guess a released model by its names and shapes
shared_file   the safetensors file a model is handed on in, with its description and a checksum
convert       any of these files -> such a file

`python -m weights inspect FILE` describes a file, `python -m weights convert FILE OUT.safetensors` converts it.
"""

from weights.class_rows import ClassRows, take_rows
from weights.families import arch_of_family, guess_family
from weights.load import (
    LoadReport,
    PublicLayout,
    WeightsInfo,
    check_file,
    file_of_run,
    fuse_entries,
    layouts_of,
    load_public,
    read_bytes,
    read_state_dict,
    rename,
    rename_public,
    row_pattern,
)
from weights.shared_file import to_bytes, to_half

__all__ = [
    "ClassRows",
    "LoadReport",
    "PublicLayout",
    "WeightsInfo",
    "arch_of_family",
    "check_file",
    "file_of_run",
    "fuse_entries",
    "guess_family",
    "layouts_of",
    "load_public",
    "read_bytes",
    "read_state_dict",
    "rename",
    "rename_public",
    "row_pattern",
    "take_rows",
    "to_bytes",
    "to_half",
]
