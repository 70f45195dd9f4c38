"""YOLO text labels: a data.yaml (or darknet's obj.names and lists), and one text file of labels a picture.

A row is `class center_x center_y width height`, as fractions of the UPRIGHT picture (EXIF applied), 0 at the outer edge
of the first pixel. A row of a class and three or more points x y (a segmentation) becomes the box around them. Rows
equal in all are one object; nearly equal ones are kept. An empty or missing label file means a picture without objects.
Ignore regions do not exist in this format.

Ours beside it: where there is a folder soft_labels/a, the pictures of images/a have there, under the names of labels/a,
a row of K numbers for each label row, in their order: the share of each class in the object, 0 or more and 1 in sum.

Every path is relative to the folder of the yaml file (never to the working directory or a global folder), `path` first;
`download` is never acted upon.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from datasets.folders import list_files
from datasets.images import SUFFIXES
from datasets.index import DatasetIndex
from datasets.rows import FaultLog, Frame, LabelRows, make_sample, read_frame
from datasets.text_lines import check_names, read_lines, read_names
from errors import UserError
from yaml_files import read_yaml

NORM_TOLERANCE = 0.01  # a fraction up to 1.01 is rounding; beyond, the row is in pixels or broken
SUM_TOLERANCE = 0.001  # shares that miss 1 by less were rounded, and are divided by their sum


def read_yolo(root: str | Path, split: str, names: tuple[str, ...] | None = None) -> DatasetIndex:
    """A split of a YOLO dataset.

    root: the yaml file, or a folder with data.yaml, config.yaml or one other *.yaml; or a folder of darknet's, with
    obj.names (or classes.txt) and <split>.txt. split: a key of the yaml (`train`, `val`, `test`, ...): a folder,
    a list file, or a list of both. `names` must be the dataset's own; they are only checked.
    The labels of .../images/a/b.jpg are .../labels/a/b.txt (the last `images` of the path); else beside the picture.
    """
    root = Path(root)
    yaml_path = _find_yaml(root)
    if yaml_path is not None:
        base, entries, own_names = _read_yaml(yaml_path, split)
    else:
        base, entries, own_names = _read_darknet(root, split)
    if names is not None and tuple(names) != own_names:
        raise UserError(f"{yaml_path or root}: classes {', '.join(own_names)}; expected {', '.join(names)}")
    log = FaultLog()
    image_paths: list[Path] = []
    for entry in entries:
        image_paths += _list_pictures(base, entry, log)
    unique = list(dict.fromkeys(image_paths))
    if len(unique) < len(image_paths):
        reason = f"{len(image_paths) - len(unique)} pictures are listed more than once"
        log.add(yaml_path or root, None, reason, "listed twice", "noted")
    stems = [path.stem for path in unique]
    are_unique = len(set(stems)) == len(stems)
    samples = []
    for image_path in unique:
        image_id = image_path.stem if are_unique else str(image_path.with_suffix(""))
        sample = _read_sample(image_path, image_id, own_names, log)
        if sample is not None:
            samples.append(sample)
    soft = sum(sample.class_scores is not None for sample in samples)
    if 0 < soft < len(samples):
        found = f"split {split!r}: {soft} of {len(samples)} pictures lie in folders with soft_labels"
        raise UserError(f"{yaml_path or root}: {found}, expected all or none")
    return DatasetIndex(own_names, tuple(samples), tuple(log.faults), None, "yolo")


def label_path_of(image_path: Path) -> Path:
    """Where the labels of a picture lie: its last folder `images` becomes `labels`; without one, beside the picture."""
    return (_twin_of(image_path, "labels") or image_path).with_suffix(".txt")


def soft_label_path_of(image_path: Path) -> Path | None:
    """Where its soft labels lie, None where it has none: its last folder `images` has no twin `soft_labels`."""
    path = _twin_of(image_path, "soft_labels")
    return path.with_suffix(".txt") if path is not None and path.parent.is_dir() else None


def _twin_of(image_path: Path, folder: str) -> Path | None:
    """The path with `folder` in the place of its last folder `images`; None where it has no such folder."""
    parts = list(image_path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = folder
            return Path(*parts)
    return None


def _find_yaml(root: Path) -> Path | None:
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder, expected a YOLO dataset")
    for name in ("data.yaml", "config.yaml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    others = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    if len(others) > 1:
        raise UserError(f"{root}: {', '.join(path.name for path in others)}; expected one yaml file, or name it")
    return others[0] if others else None


def _read_yaml(path: Path, split: str) -> tuple[Path, list[str], tuple[str, ...]]:
    """(base folder, entries of the split, class names). Scalars stay text: a class may be called `no` or `1e3`."""
    tree = read_yaml(path, as_text=True)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, expected the keys names, train, val")
    names = _yaml_names(tree, path)
    base = path.parent / (tree.get("path") or ".")
    if not base.is_dir():
        raise UserError(f"{path}: path {tree.get('path')!r} leads to {base.resolve()}, which is no folder")
    reserved = {"path", "names", "nc", "download"}
    if split not in tree or split in reserved:
        known = [key for key in tree if key not in reserved and isinstance(tree[key], str | list)]
        raise UserError(f"{path}: no split {split!r}, found {', '.join(known)}")
    entry = tree[split]
    entries = entry if isinstance(entry, list) else [entry]
    if not entries or not all(isinstance(item, str) and item for item in entries):
        raise UserError(f"{path}: key {split!r}: found {entry!r}, expected a folder, a list file, or a list of them")
    return base, entries, names


def _yaml_names(tree: dict[str, Any], path: Path) -> tuple[str, ...]:
    names, count = tree.get("names"), tree.get("nc")
    if count is not None and not (isinstance(count, str) and count.isdecimal()):
        raise UserError(f"{path}: key 'nc': found {count!r}, expected the number of classes")
    if isinstance(names, dict):
        keys = sorted(names, key=lambda key: int(key) if key.isdecimal() else -1)
        if keys != [str(index) for index in range(len(names))]:
            raise UserError(f"{path}: key 'names': found the keys {', '.join(keys[:20])}, expected 0..{len(names) - 1}")
        names = [names[key] for key in keys]
    if names is None and count is not None:
        names = [str(index) for index in range(int(count))] if int(count) <= 100_000 else None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: key 'names': found {names!r}, expected a list of class names")
    if count is not None and int(count) != len(names):
        raise UserError(f"{path}: nc is {count}, but there are {len(names)} names")
    return check_names(names, str(path))


def _read_darknet(root: Path, split: str) -> tuple[Path, list[str], tuple[str, ...]]:
    names_path = next((root / name for name in ("obj.names", "classes.txt") if (root / name).is_file()), None)
    if names_path is None or not (root / f"{split}.txt").is_file():
        raise UserError(f"{root}: no data.yaml, nor obj.names with {split}.txt, expected a YOLO dataset")
    return root, [f"{split}.txt"], read_names(names_path)


def _list_pictures(base: Path, entry: str, log: FaultLog) -> list[Path]:
    """The pictures of a folder (with its subfolders, sorted) or of a list file (in its order)."""
    path = base / entry
    if not path.exists() and entry.startswith("../"):
        path = base / entry.removeprefix("../")  # as some exporters write it, one folder too high
    if path.is_dir():
        found = list_files(path, SUFFIXES)
        _log_orphans(path, found, log)
        if not found:
            raise UserError(f"{path.resolve()}: no pictures in this folder, expected {', '.join(SUFFIXES)}")
        return found
    if not path.is_file():
        raise UserError(f"{path.resolve()}: no such folder or list of pictures")
    pictures = []
    for number, line in read_lines(path):
        choices = [folder / line for folder in (path.parent, base)]
        # darknet's lists start with a folder of the machine that trained: data/obj_train_data/x.jpg
        choices += [path.parent / Path(*Path(line).parts[1:])] if len(Path(line).parts) > 1 else []
        picture = next((choice for choice in choices if choice.is_file()), None)
        if picture is None:
            reason = f"no such picture: {choices[0]}"
            log.add(path, number, reason, "label without picture", "picture dropped", Path(line).name)
        else:
            pictures.append(picture)
    return pictures


def _log_orphans(folder: Path, found: list[Path], log: FaultLog) -> None:
    """Label files of a picture folder's twin that have no picture."""
    twin = label_path_of(folder / "x").parent
    if twin == folder or not twin.is_dir():
        return
    expected = {label_path_of(path) for path in found}
    for path in list_files(twin, (".txt",)):
        if path not in expected and path.name != "classes.txt":
            log.add(path, None, "labels without a picture", "label without picture", "picture dropped", path.stem)


def _read_sample(image_path: Path, image_id: str, names: tuple[str, ...], log: FaultLog):
    label_path = label_path_of(image_path)
    frame = read_frame(image_path, log)
    if frame is None:
        return None
    try:
        lines = read_lines(label_path) if label_path.is_file() else []
    except UserError as error:
        reason = str(error).removeprefix(f"{label_path}: ")
        log.add(label_path, None, reason, "unreadable label file", "picture dropped", image_path.name)
        return None
    soft_path = soft_label_path_of(image_path)
    soft_lines = [(0, None)] * len(lines)
    if soft_path is not None:
        try:
            soft_lines = read_lines(soft_path) if lines or soft_path.is_file() else []
            if len(soft_lines) != len(lines):
                found = f"{len(soft_lines)} rows, expected {len(lines)}"
                raise UserError(f"{soft_path}: {found}: one for each of {label_path.name} in {label_path.parent}")
        except UserError as error:
            reason = str(error).removeprefix(f"{soft_path}: ")
            log.add(soft_path, None, reason, "unusable soft label file", "picture dropped", image_path.name)
            return None
    rows = LabelRows()
    for (number, line), (soft_number, soft_line) in zip(lines, soft_lines, strict=True):
        shares = None if soft_line is None else _read_shares(soft_line, len(names))
        if isinstance(shares, str):
            log.add(soft_path, soft_number, shares, "malformed soft label", "object dropped", image_path.name)
            continue
        fault = _add_line(line, number, len(names), frame, rows, shares)
        if fault is not None:
            reason, kind = fault
            log.add(label_path, number, reason, kind, "object dropped", image_path.name)
    return make_sample(
        rows,
        frame,
        log,
        image_path=image_path,
        image_id=image_id,
        label_path=label_path,
        drop_duplicates=True,
        num_soft_classes=None if soft_path is None else len(names),
    )


def _read_shares(line: str, num_classes: int) -> tuple[float, ...] | str:
    """The shares of the K classes, or why the row cannot be used."""
    columns = line.split()
    if len(columns) != num_classes:
        return f"{len(columns)} values, expected {num_classes}: a share for each class"
    try:
        shares = [float(column) for column in columns]
    except ValueError as error:
        return f"{error}, expected a number"
    if not all(np.isfinite(shares)) or min(shares) < 0:
        worst = next(column for column, share in zip(columns, shares) if not 0 <= share < np.inf)
        return f"a share of {worst}, expected 0 to 1"
    total = sum(shares)
    if abs(total - 1) > SUM_TOLERANCE:
        return f"shares with the sum {total:g}, expected 1"
    return tuple(share / total for share in shares)


def _add_line(
    line: str, number: int, num_classes: int, frame: Frame, rows: LabelRows, class_scores: tuple[float, ...] | None
) -> tuple[str, str] | None:
    """Add a row, or say why not: (reason, kind)."""
    columns = line.split()
    if len(columns) != 5 and (len(columns) < 7 or len(columns) % 2 == 0):
        return (
            f"{len(columns)} values, expected a class and a box (5) or three or more points (7, 9, ...)",
            "malformed row",
        )
    if not re.fullmatch(r"\d{1,9}(\.0*)?", columns[0]):
        return f"class {columns[0]!r}, expected 0..{num_classes - 1}", "unknown class"
    label = int(float(columns[0]))
    if label >= num_classes:
        return f"class {label}, expected 0..{num_classes - 1}", "unknown class"
    try:
        values = [float(value) for value in columns[1:]]
    except ValueError as error:
        return f"{error}, expected a number", "malformed row"
    if not all(-NORM_TOLERANCE <= value <= 1 + NORM_TOLERANCE for value in values):
        kind = "not normalised" if all(np.isfinite(values)) else "not a number"
        return f"{kind}: {' '.join(columns[1:6])}, expected fractions of the picture, 0..1", kind
    if len(values) == 4:
        x, y, width, height = values
        x1, y1, x2, y2 = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
        x1, y1, x2, y2 = min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])
    box = (x1 * frame.width, y1 * frame.height, x2 * frame.width, y2 * frame.height)
    rows.add(box, label, line=number, class_scores=class_scores)
    return None
