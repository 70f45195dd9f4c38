"""A file of widths: the shape of a model, as `student.widths` takes it and engine.pruning and engine.search write it.

arch: yolov8n                 # its layers
widths:
  backbone.stem.conv: 8       # channels of each group (layers/channel_groups.py)
  ...

A YOLOv8 has the blocks that are named here, also fewer or more than its arch (models.build): the file of a shape that
a search found holds its depths as well.
"""

from pathlib import Path

from errors import UserError, expect
from yaml_files import dump_yaml, read_yaml


def widths_text(arch: str, widths: dict[str, int]) -> str:
    """The content of the file."""
    return dump_yaml({"arch": arch, "widths": widths})


def read_widths(path: str | Path, arch: str) -> dict[str, int]:
    """The widths in a file for this architecture; UserError with the key that is wrong."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file, expected a file of widths, as engine.pruning writes it")
    tree = read_yaml(path)
    if not isinstance(tree, dict) or tree.keys() != {"arch", "widths"} or not isinstance(tree["widths"], dict):
        raise UserError(f"{path}: expected the keys 'arch' and 'widths', as engine.pruning writes them")
    expect(tree["arch"] == arch, f"{path}: key 'arch'", tree["arch"], arch)
    return tree["widths"]
