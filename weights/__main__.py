"""Describe a weights file, or write its tensors as safetensors. Nothing in the file is run.

    python -m weights inspect FILE                           what a file holds
    python -m weights convert FILE OUT.safetensors [--half]  its tensors and its description in one file

Examples:

    python -m weights inspect yolov8n.pt
    python -m weights convert runs/bccd_yolov8n student.safetensors --half

FILE is any released layout that is read here, a checkpoint of train.py (its averaged weights are taken), or the
folder of a run. Tensors stay as they are, bit by bit. Class names, architecture, image size, versions and a
checksum are in the metadata, so every command takes OUT as it is, without --arch. --half stores float16, in half the
space; BatchNorm's statistics stay as they are.

Exit codes: 0 done, 2 a file that is missing, damaged or refused, 4 tensors that do not fit in memory, 5 a file that
could not be written, 130 after Ctrl-C.
"""

from pathlib import Path

from errors import ArgumentParser, UserError, run_script, shortened
from weights.convert import convert
from weights.load import file_of_run, read_state_dict


def describe(path: str | Path, num_first: int = 5) -> str:
    """A description of a weights file, one property a line, then its first `num_first` tensors."""
    state, info = read_state_dict(path)
    classes = f"{len(info.names)}: {shortened(info.names)}"
    checks = ["checksum of every entry" if info.has_checksum else "the container has no checksum"]
    checks += ["SHA-256 as promised"] if info.is_hash_checked else []
    family = info.family or (f"{info.arch}, a checkpoint of train.py" if info.ours else info.arch or "not recognised")
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
    parser = ArgumentParser("python -m weights", __doc__)
    parser.add_argument("command", choices=["inspect", "convert"], help="describe a file, or write it as safetensors")
    parser.add_argument("file", type=Path, help="a .pt, .pth, .safetensors or .npz file, or a run")
    parser.add_argument("output", type=Path, nargs="?", help="with convert: the file to write, NAME.safetensors")
    parser.add_argument("--tensors", type=int, default=5, help="with inspect: number of entries to list (%(default)s)")
    parser.add_argument("--half", action="store_true", help="with convert: store float16")
    parser.add_argument("--arch", help="with convert: the architecture, where the file leaves it open")
    arguments = parser.parse_args(argv)
    if arguments.command == "inspect":
        if arguments.output or arguments.half or arguments.arch:
            raise UserError("inspect: expected one FILE, and no --half or --arch")
        print(describe(file_of_run(arguments.file), max(arguments.tensors, 0)))
        return
    if arguments.output is None:
        raise UserError("convert: expected FILE and OUT.safetensors")
    print(convert(arguments.file, arguments.output, half=arguments.half, arch=arguments.arch))


if __name__ == "__main__":
    run_script(main)
