"""YOLO text labels: a data.yaml (or names and folders or lists), and one text file of labels a picture.

A row is `class center_x center_y width height`, as fractions of the UPRIGHT picture (EXIF applied); 0 is the outer edge
of the first pixel. For longer rows see datasets.yolo_rows. Equal rows are one object; nearly equal ones are kept. A
picture with an empty label file has no objects; so has one without a label file, which is counted. The format has no
ignored regions.

The labels of .../images/a/b.jpg are .../labels/a/b.txt, or lie beside the picture: see LabelFolders.

Soft labels are our own extension. If there is a folder soft_labels/a beside labels/a, it has a file of the same name
for each label file, with a row of K numbers for each label row: the share of each class in the object, 0 or more, with
sum 1.

Every path is relative to the folder of the yaml file (never to the working directory or a global folder), with its
`path` in front. `download` is never acted upon.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets.folders import files_in, find_label, list_files, spellings
from datasets.images import SUFFIXES, UNREAD
from datasets.index import NO_LABEL_FILE, DatasetIndex, Sample
from datasets.rows import FaultLog, LabelRows, log_unread, make_sample, read_frame, refuse_misread
from datasets.text_lines import check_names, read_lines, read_names
from datasets.yolo_rows import LongRows, add_row, read_kpt_shape, read_shares
from errors import UserError, counted, shortened
from yaml_files import read_mapping

NAME_FILES = ("obj.names", "classes.txt", "_darknet.labels")
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class _Set:
    """The files of a split.

    entries: folders or list files, relative to base. names: None where no file has them.
    source: the file or folder to name in errors.
    """

    base: Path
    entries: list[str]
    names: tuple[str, ...] | None
    source: Path
    kpt_shape: tuple[int, int] | None = None
    is_polygons: bool = False


def read_yolo(root: str | Path, split: str, names: tuple[str, ...] | None = None) -> DatasetIndex:
    """A split of a YOLO dataset.

    root: the yaml file, or a folder with data.yaml, config.yaml or one other *.yaml, or an exported folder without any.
    split: with a yaml file one of its keys (`train`, `val`, `test`, ...), whose value is a folder, a list file, or a
        list of both. Without, a list <split>.txt, a folder images/<split>, <split>/images or <split>, or `all` for
        every picture; class names are then in obj.names or classes.txt, in root or beside the labels, and without such
        a file the numbers are the names.
    names: must equal the dataset's own; they are only checked.
    UserError for a root or split that does not exist, and for rows of labels that are unclear (LongRows).
    """
    root = Path(root)
    yaml_path = find_yaml(root)
    found = _read_yaml(yaml_path, split) if yaml_path is not None else _read_folders(root, split)
    log = FaultLog()
    image_paths: list[Path] = []
    folders = LabelFolders(found.base)
    for entry in found.entries:
        image_paths += _list_pictures(found, entry, folders, log)
    unique = log.once_each(image_paths, found.source, key=os.path.abspath)  # a path may be spelled in several ways
    folders.choose(unique)
    _log_shared_labels(unique, folders, log)
    own_names = found.names or names or _number_names(found.base, log)
    if names is not None and tuple(names) != own_names:
        raise UserError(f"{found.source}: classes {', '.join(own_names)}; expected {', '.join(names)}")
    stems = [path.stem for path in unique]
    are_unique = len(set(stems)) == len(stems)
    samples, long_rows = [], LongRows(found.kpt_shape, found.is_polygons)
    for image_path in unique:
        image_id = image_path.stem if are_unique else str(image_path.with_suffix(""))
        sample = _read_sample(image_path, image_id, own_names, folders, long_rows, log)
        if sample is not None:
            samples.append(sample)
    long_rows.decide()
    refuse_misread(log, found.source, is_centered=True)
    soft = sum(sample.class_scores is not None for sample in samples)
    if 0 < soft < len(samples):
        raise UserError(
            f"{found.source}: split {split!r}: {soft} of {len(samples)} pictures lie in folders with soft_labels, "
            "expected all or none"
        )
    return DatasetIndex(own_names, tuple(samples), tuple(log.faults), None, "yolo", folders.in_words())


def list_pictures(root: Path, split: str) -> tuple[list[Path], FaultLog]:
    """The pictures of a split, as read_yolo lists them, without a look at any label; and the pictures not found."""
    yaml_path, log = find_yaml(root), FaultLog()
    found = _read_yaml(yaml_path, split) if yaml_path is not None else _read_folders(root, split)
    return [path for entry in found.entries for path in _list_pictures(found, entry, None, log)], log


class Place(NamedTuple):
    """The folders of labels and of soft labels (None: there are none) for a folder of pictures."""

    labels: Path
    soft: Path | None


class LabelFolders:
    """The folder of labels for each folder of pictures.

    Candidates, in this order: the path with its last folder `images` replaced by `labels`; the folder of the pictures;
    the path with an `images` above the set (`base`) replaced, which is usually accidental, as in /data/images/project;
    for a linked folder, the same for its target. The first candidate with a label file of a picture counts; if there
    is none, the first candidate.
    """

    def __init__(self, base: Path) -> None:
        self.base = os.path.abspath(base)
        self.places: dict[Path, Place] = {}

    def choose(self, image_paths: Iterable[Path]) -> None:
        """Set `places` for the folders of these pictures, if they are not yet set."""
        stems: dict[Path, list[str]] = {}
        for path in image_paths:
            if path.parent not in self.places:
                stems.setdefault(path.parent, []).append(path.stem)
        for folder, names in stems.items():
            choices = self.choices(folder)
            held = (place for place in choices if any(find_label(place.labels, name).is_file() for name in names))
            self.places[folder] = next(held, choices[0])

    def choices(self, folder: Path) -> list[Place]:
        whole = Path(os.path.abspath(folder))
        below_base = whole.relative_to(self.base).parts if whole.is_relative_to(self.base) else folder.parts
        twins, inside = self._twins(folder), below_base.count("images")
        choices = [*twins[:inside], Place(folder, None), *twins[inside:]]
        real = folder.resolve()  # a linked folder may have its labels beside its target
        return choices if real == whole else [*choices, *self._twins(real), Place(real, None)]

    @staticmethod
    def _twins(folder: Path) -> list[Place]:
        """The path with a folder `images` replaced by `labels`, for each such folder, the last one first."""
        places, parts = [], folder.parts
        for n in reversed([n for n, part in enumerate(parts) if part == "images"]):
            soft = Path(*parts[:n], "soft_labels", *parts[n + 1 :])
            places.append(Place(Path(*parts[:n], "labels", *parts[n + 1 :]), soft if soft.is_dir() else None))
        return places

    def label_path(self, image_path: Path) -> Path:
        return find_label(self.places[image_path.parent].labels, image_path.stem)

    def in_words(self) -> str:
        folders = list(dict.fromkeys(str(place.labels) for place in self.places.values()))
        return shortened(folders, 3)


def find_yaml(root: Path) -> Path | None:
    """The yaml file of a set, given by itself or by its folder; None for a folder without one."""
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder, expected a YOLO dataset")
    for name in ("data.yaml", "config.yaml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    others = files_in(root, (".yaml", ".yml"))
    others = [path for path in others if not path.name.endswith("split.yaml")]  # of datasets.split
    if len(others) > 1:
        raise UserError(f"{root}: {shortened(path.name for path in others)}; expected one yaml file, or name it")
    return others[0] if others else None


def _read_yaml(path: Path, split: str) -> _Set:
    """The files of a split by the yaml file. Scalars stay text: a class may be called `no` or `1e3`."""
    tree = read_mapping(path, "the keys names, train, val", as_text=True)
    names = yaml_names(tree, path)
    base = path.parent / (tree.get("path") or ".")
    if not base.is_dir():
        raise UserError(f"{path}: path {tree.get('path')!r} leads to {base.resolve()}, which is no folder")
    reserved = {"path", "names", "nc", "download", "kpt_shape", "flip_idx", "task"}
    if split not in tree or split in reserved:
        others = [key for key in tree if key not in reserved and isinstance(tree[key], str | list)]
        raise UserError(f"{path}: no split {split!r}, found {shortened(others)}")
    entry = tree[split]
    entries = entry if isinstance(entry, list) else [entry]
    if not entries or not all(isinstance(item, str) and item for item in entries):
        raise UserError(f"{path}: key {split!r}: found {entry!r}, expected a folder, a list file, or a list of them")
    kpt_shape = read_kpt_shape(tree.get("kpt_shape"), path)
    return _Set(base, entries, names, path, kpt_shape, tree.get("task") in ("segment", "obb"))


def yaml_names(tree: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The class names in a data.yaml: `names`, a list or 0.. -> name, or the numbers below `nc`. Else UserError."""
    names, count = tree.get("names"), tree.get("nc")
    if count is not None and not (isinstance(count, str) and count.isdecimal()):
        raise UserError(f"{path}: key 'nc': found {count!r}, expected the number of classes")
    if isinstance(names, dict):
        keys = sorted(names, key=lambda key: int(key) if key.isdecimal() else -1)
        if keys != [str(index) for index in range(len(names))]:
            raise UserError(f"{path}: key 'names': found the keys {shortened(keys)}, expected 0..{len(names) - 1}")
        names = [names[key] for key in keys]
    if names is None and count is not None:
        names = [str(index) for index in range(int(count))] if int(count) <= MAX_CLASSES else None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: key 'names': found {names!r}, expected a list of class names")
    if count is not None and int(count) != len(names):
        raise UserError(f"{path}: nc is {count}, but there are {counted(len(names), 'name')}")
    return check_names(names, str(path))


def _read_folders(root: Path, split: str) -> _Set:
    """A set without a yaml file: darknet's lists and obj.names, or folders with classes.txt or without names."""
    folders = [root / "images" / split, root / split / "images", root / split]
    folders += [root / "images", root] if split == "all" else []
    folder = next((path for path in folders if path.is_dir()), None)
    if (root / f"{split}.txt").is_file():
        entry = f"{split}.txt"
    elif folder is not None:
        entry = str(folder.relative_to(root))
    else:
        others = sorted({path.parent.relative_to(root).as_posix() for path in list_files(root, SUFFIXES)})
        found = f"found pictures in {shortened(others)} (`all` takes every one)" if others else "and no pictures"
        raise UserError(
            f"{root}: no data.yaml, nor a list {split}.txt, nor a folder images/{split} or {split}, {found}; "
            "expected a YOLO dataset"
        )
    inner = (".", split, "labels", "images", f"labels/{split}", f"images/{split}", f"{split}/labels", f"{split}/images")
    files = [root / place / name for place in inner for name in NAME_FILES]
    names_path = next((path for path in files if path.is_file()), None)
    return _Set(root, [entry], None if names_path is None else read_names(names_path), root)


def _number_names(base: Path, log: FaultLog) -> tuple[str, ...]:
    """The numbers up to the largest class in all label files of a set, as class names where no file has names."""
    image_paths = list_files(base, SUFFIXES)
    folders, largest = LabelFolders(base), -1
    folders.choose(image_paths)
    for path in map(folders.label_path, image_paths):
        for _, line in read_lines(path) if path.is_file() else ():
            word = line.split()[0]
            largest = max(largest, int(word) if word.isdecimal() and int(word) < MAX_CLASSES else -1)
    if largest < 0:
        raise UserError(f"{base}: no data.yaml, obj.names or classes.txt, and no label file; expected a YOLO dataset")
    reason = f"no data.yaml, obj.names or classes.txt: the classes are called 0 to {largest}, as in the label files"
    log.add(base, None, reason, "classes without names", "noted")
    return tuple(map(str, range(largest + 1)))


def _list_pictures(found: _Set, entry: str, folders: LabelFolders | None, log: FaultLog) -> list[Path]:
    """The pictures of a folder (with its subfolders, sorted) or of a list file (in its order).

    folders: gets the place of their labels; None: labels do not matter.
    """
    base = found.base
    straight = entry.replace("\\", "/")  # Windows' separator; some exporters write paths one folder too high
    choices = [base / spelled for spelled in (entry, straight, straight.removeprefix("../"))]
    path = next((choice for choice in choices if choice.exists()), choices[0])
    if path.is_dir():
        return _list_folder(path, folders, log)
    if not path.is_file():
        raise UserError(f"{found.source}: {entry!r} leads to {path.resolve()}, no such folder or list of pictures")
    pictures = []
    for number, line in read_lines(path):
        choices = [folder / spelled for spelled in _spellings(line) for folder in (path.parent, base)]
        picture = next((choice for choice in choices if choice.is_file()), None)
        if picture is None:
            reason = f"no such picture: {choices[0]}"
            log.add(path, number, reason, "label without picture", "left out", Path(line).name)
        else:
            pictures.append(picture)
    return pictures


def _spellings(line: str) -> list[str]:
    """A line of a list: unchanged; with / instead of Windows' \\; also without darknet's first folder, `data/`."""
    straight = line.replace("\\", "/")
    lines = (line, straight, straight.removeprefix("data/"))
    return list(dict.fromkeys(spelled for line in lines for spelled in spellings(line)))


def _list_folder(path: Path, folders: LabelFolders | None, log: FaultLog) -> list[Path]:
    """The pictures below a folder, sorted; logs those in other formats, and labels without a picture."""
    files = list_files(path, (*SUFFIXES, *UNREAD))
    found = [file for file in files if file.suffix.lower() not in UNREAD]
    unread = [file for file in files if file.suffix.lower() in UNREAD]
    log_unread(unread, log)
    if not found:
        also = f"; {len(unread)} in formats that are not read, the first {unread[0].name}" if unread else ""
        raise UserError(f"{path.resolve()}: no pictures in this folder, expected {', '.join(SUFFIXES)}{also}")
    if folders is not None:
        folders.choose(found)
        folders.choose(unread)
        _log_orphans(path, files, folders, log)
    return found


def _log_orphans(path: Path, files: list[Path], folders: LabelFolders, log: FaultLog) -> None:
    """Log the label files without a picture in the label folders of a folder of pictures."""
    tops = set()
    for folder in {file.parent for file in files}:
        top, depth = folders.places[folder].labels, len(folder.relative_to(path).parts)
        tops.add(top.parents[depth - 1] if depth else top)
    expected = set(map(folders.label_path, files))
    for top in sorted(tops):
        for file in list_files(top, (".txt",)) if top.is_dir() else ():
            if file in expected or file.name in NAME_FILES:
                continue
            if file.with_suffix(".txt") in expected:
                raise UserError(f"{file}: a label file with the suffix {file.suffix}, expected .txt")
            if holds_labels(file):
                log.add(file, None, "labels without a picture", "label without picture", "left out", file.stem)


def _log_shared_labels(image_paths: list[Path], folders: LabelFolders, log: FaultLog) -> None:
    """Log each label file that two pictures share, such as a.jpg and a.png; it may be wrong for one of them."""
    first_of: dict[Path, Path] = {}
    for path in image_paths:
        label_path = folders.label_path(path)
        first = first_of.setdefault(label_path, path)
        if first != path:
            reason = f"the labels of {first.name} and of {path.name}"
            log.add(label_path, None, reason, "one label file for two pictures", "noted", path.name)


def holds_labels(path: Path) -> bool:
    """Whether a text file begins with a row of labels: five numbers or more."""
    try:
        lines = read_lines(path)
        return bool(lines) and len([float(word) for word in lines[0][1].split()]) >= 5
    except (UserError, ValueError):
        return False


def _read_sample(
    image_path: Path, image_id: str, names: tuple[str, ...], folders: LabelFolders, long_rows: LongRows, log: FaultLog
) -> Sample | None:
    """The Sample of one picture; None, and a fault, for a picture or label file that cannot be used."""
    label_path = folders.label_path(image_path)
    frame = read_frame(image_path, log)
    if frame is None:
        return None
    soft_folder = folders.places[image_path.parent].soft
    soft_path = None if soft_folder is None else soft_folder / label_path.name
    lines = _label_lines(label_path, log, image_path.name)
    soft_lines = None if lines is None else _soft_lines(soft_path, label_path, len(lines), log, image_path.name)
    if lines is None or soft_lines is None:
        return None
    rows = LabelRows()
    for (number, line), (soft_number, soft_line) in zip(lines, soft_lines, strict=True):
        shares = None if soft_line is None else read_shares(soft_line, len(names))
        if isinstance(shares, str):
            assert soft_path is not None  # without it there are no soft lines
            log.add(soft_path, soft_number, shares, "malformed soft label", "object dropped", image_path.name)
            continue
        fault = add_row(line, f"{label_path}:{number}", len(names), frame, rows, shares, long_rows, number)
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
        num_soft_classes=None if soft_path is None else len(names),
    )


def _label_lines(path: Path, log: FaultLog, picture: str) -> list[tuple[int, str]] | None:
    """The lines of a label file with their numbers, none without a file; None, and a fault, if it is unreadable."""
    if not path.is_file():
        log.add(path, None, "no such file: a picture without objects", NO_LABEL_FILE, "noted", picture)
        return []
    try:
        return read_lines(path)
    except UserError as error:
        log.add_error(path, error, "unreadable label file", "picture dropped", picture)
        return None


def _soft_lines(
    path: Path | None, label_path: Path, count: int, log: FaultLog, picture: str
) -> Sequence[tuple[int, str | None]] | None:
    """The lines of soft labels beside `count` lines of labels: (0, None) each without a path; None, and a fault, where
    they are unreadable or not as many.
    """
    if path is None:
        return [(0, None)] * count
    try:
        lines = read_lines(path) if count or path.is_file() else []
        if len(lines) != count:
            found = f"{counted(len(lines), 'row')}, expected {count}"
            raise UserError(f"{path}: {found}: one for each of {label_path.name} in {label_path.parent}")
        return lines
    except UserError as error:
        log.add_error(path, error, "unusable soft label file", "picture dropped", picture)
        return None
