"""Files of released weights -> named tensors -> our models, without running anything that a file names.

load          read_state_dict, load_public, and the tables that map released names to ours: what others call
class_rows    which outputs of a class head belong to which class
containers    torch zip, TorchScript, legacy torch, safetensors, npz, as bytes
inert_pickle  pickles read as data
places        where in an opened container the weights are
families      which released model a set of names looks like

`python -m weights inspect FILE` describes a file.
"""

from weights.class_rows import ClassRows, take_rows
from weights.families import guess_family
from weights.load import (
    LoadReport,
    PublicLayout,
    WeightsInfo,
    check_file,
    fuse_entries,
    layouts_of,
    load_public,
    read_state_dict,
    rename,
    rename_public,
    row_pattern,
)

__all__ = [
    "ClassRows",
    "LoadReport",
    "PublicLayout",
    "WeightsInfo",
    "check_file",
    "fuse_entries",
    "guess_family",
    "layouts_of",
    "load_public",
    "read_state_dict",
    "rename",
    "rename_public",
    "row_pattern",
    "take_rows",
]
