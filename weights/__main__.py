"""python -m weights inspect FILE: describe a public weights file. Nothing in it is run."""

import argparse
from pathlib import Path

from errors import run_script
from weights.load import read_state_dict


def describe(path: str | Path, num_first: int = 5) -> str:
    """A description of a weights file, one property a line, then its first `num_first` tensors."""
    state, info = read_state_dict(path)
    classes = f"{len(info.names)}: {', '.join(info.names[:10])}{', ...' if len(info.names) > 10 else ''}"
    checks = ["CRC-32 of every entry" if info.has_checksum else "the container has no checksum"]
    checks += ["SHA-256 as promised"] if info.is_hash_checked else []
    family = info.family or (f"{info.arch}, a checkpoint of train.py" if info.arch else "not recognised")
    rows = {
        "file": f"{path} ({Path(path).stat().st_size:,} bytes)",
        "sha256": info.sha256,
        "checked": "; ".join(checks),
        "container": info.container,
        "layout": info.layout,
        "family": family,
        "classes": classes if info.names else "not in the file",
        "image size": info.image_size or "not in the file",
        "tensors": f"{info.num_tensors} ({', '.join(f'{count} {dtype}' for dtype, count in info.dtypes.items())})",
        "parameters": f"{info.num_parameters:,}",
        "first": "",
    }
    lines = [f"{key:<11}{value}".rstrip() for key, value in rows.items()]
    for name, tensor in list(state.items())[:num_first]:
        lines.append(f"  {name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m weights",
        description=__doc__,
        epilog="Example: python -m weights inspect yolov8n.pt\n"
        "Exit codes: 0 described, 2 a file that is missing, damaged or refused, 130 after Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["inspect"], help="describe a file")
    parser.add_argument("file", type=Path, help="a .pt, .pth, .safetensors or .npz file")
    parser.add_argument("--tensors", type=int, default=5, help="number of entries to list (%(default)s)")
    arguments = parser.parse_args(argv)
    print(describe(arguments.file, max(arguments.tensors, 0)))


if __name__ == "__main__":
    run_script(main)
