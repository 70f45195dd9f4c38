"""Pascal VOC: one XML file a picture, and a list of pictures a split.

Coordinates in the files are 1-based and inclusive. The index holds (xmin - 1, ymin - 1, xmax, ymax), so a box that
covers the whole picture is (0, 0, width, height). Objects marked difficult are `ignore`. An object with xmin = xmax or
ymin = ymax is a point or a line, usually a stray click: it is dropped, although it is one pixel wide by VOC's "+1
pixel" rule.

Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010. Parts of objects (head, hand, foot)
and actions are not read.
"""

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets.folders import files_in, find_label, is_left_out, list_files
from datasets.images import SUFFIXES, UNREAD, find_picture
from datasets.index import DatasetIndex, Effect, Sample
from datasets.rows import (
    FaultLog,
    LabelRows,
    log_passed_over,
    log_unread,
    make_sample,
    read_frame,
    refuse_misread,
    refuse_resized,
)
from datasets.text_lines import read_lines, read_names
from datasets.values import box_fault, read_flag, read_number
from datasets.voc_xml import Object, read_annotation
from errors import UserError, counted, shortened

XML = (".xml", ".XML")
CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


def read_voc(root: str | Path, split: str, names: tuple[str, ...] | None = None) -> DatasetIndex:
    """A split of a folder in VOC's layout, or in a layout of the tools that export it.

    split: the name of a list in ImageSets/Main (`trainval`). With a year, the list is that of `VOC<year>` below root or
        root/VOCdevkit (`2007/trainval`). A + joins several (`2007/trainval+2012/trainval`). `all` takes every
        annotation file. Without ImageSets, the split may be a CSV with a column `filename` (<split>.csv or
        <split>_labels.csv, in root or root/data); or a folder <split> with annotations and pictures; or a folder
        <split> among the annotations.
    annotations: in Annotations or annotations, else in the only folder with XML files, else beside the pictures.
    pictures: in JPEGImages or images, else in the only folder with pictures.
    class names: `names`, else the lines of classes.txt, else VOC's 20 in a folder called VOC<year>, else all names in
        all annotation files, sorted, so that every split has the same.
    UserError for a root or split that does not exist, and for pictures that were resized after labelling.
    """
    root = Path(root)
    parts = [find_part(root, part) for part in split.split("+")]
    given = names is not None
    names = _class_names(parts) if names is None else tuple(names)
    log, samples, stems = FaultLog(), [], set()
    label_of: dict[Path, Path] = {}
    read: set[Path] = set()
    for part in parts:
        listed = [(stem, part.annotations / f"{stem}.xml") for stem in _read_list(part, log)]
        fresh = [(stem, label) for stem, label in listed if label not in read]
        if len(fresh) < len(listed):
            reason = f"in a list before it in {split} too: {counted(len(listed) - len(fresh), 'picture')}"
            log.add(part.source, None, reason, "listed twice", "noted")
        for stem, label in fresh:
            read.add(label)
            image_id = stem if stem not in stems else f"{part.folder.name}/{stem}"
            stems.add(stem)
            sample = _read_sample(part, stem, image_id, names, given, log)
            if sample is None:
                continue
            first = label_of.setdefault(sample.image_path, label)
            if first != label:
                raise UserError(f"{label}: {sample.image_path} is the picture of {first.name} too, expected one file")
            samples.append(sample)
        if part.source.is_dir() and part.has_own_pictures:
            _log_unlabelled(part, set(label_of), log)
    for folder in dict.fromkeys(part.pictures for part in parts):
        log_passed_over(folder, samples, log)
    refuse_resized(log, root)
    refuse_misread(log, root)
    places = dict.fromkeys(str(part.annotations) for part in parts)
    return DatasetIndex(names, tuple(samples), tuple(log.faults), None, "voc", ", ".join(places))


@dataclass(frozen=True)
class _Part:
    folder: Path  # has the annotation files of all splits, for the class names
    annotations: Path
    pictures: Path
    source: Path  # the list, or the folder of annotations
    has_own_pictures: bool = True  # pictures without an annotation file belong to the split


def find_part(root: Path, part: str) -> _Part:
    """The files of one part of a split (between two +). UserError where there are none."""
    year, slash, name = part.rpartition("/")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder, expected a VOC dataset")
    choices = [root]
    if slash:
        bases = (root, root / "VOCdevkit")
        choices = [base / folder for base in bases for folder in (year, f"VOC{year}")]
    folder = next((choice for choice in choices if choice.is_dir()), None)
    if folder is None:
        raise UserError(f"split {part!r}: found none of {', '.join(map(str, choices))}")
    lists = folder / "ImageSets" / "Main"
    files = [lists / f"{name}.txt"]
    files += [base / f"{name}{end}.csv" for base in (folder, folder / "data") for end in ("", "_labels")]
    source = next((file for file in files if file.is_file()), None)
    if source is None and name != "all" and _holds(folder / name, (".xml",)):
        annotations, pictures = _find_folders(folder / name, part)
        return _Part(folder, annotations, pictures, annotations)
    annotations, pictures = _find_folders(folder, part)
    if source is None and name != "all" and _holds(annotations / name, (".xml",)):
        is_own = (pictures / name).is_dir()
        source, pictures = annotations / name, pictures / name if is_own else pictures
        return _Part(folder, source, pictures, source, is_own)
    source = annotations if name == "all" else source
    if source is None:
        others = [path.stem for path in files_in(lists, (".txt",))] or [
            path.name for path in list_files(folder, (".csv",))
        ]
        raise UserError(f"{lists}: no list {name!r}, found {shortened(others) or 'none'} (`all` takes every picture)")
    return _Part(folder, annotations, pictures, source)


def _find_folders(folder: Path, split: str) -> tuple[Path, Path]:
    """(folder of the annotations, folder of the pictures), by their names or by their files."""
    named = (folder / name for name in ("Annotations", "annotations"))
    annotations = next((path for path in named if _holds(path, (".xml",))), None)
    if annotations is None:
        holders = _holders(folder, (".xml",))
        if not holders:
            count = len(list_files(folder, SUFFIXES))
            found = f"no XML file in Annotations or in any other folder, for {counted(count, 'picture')}"
            raise UserError(f"{folder}: found {found}; expected a VOC dataset")
        if len(holders) > 1:
            found = shortened(path.name for path in holders)
            raise UserError(f"{folder}: no split {split!r}, found XML files in {found}")
        annotations = holders[0]
    named = (folder / name for name in ("JPEGImages", "images"))
    pictures = next((path for path in named if _holds(path, (*SUFFIXES, *UNREAD))), None)
    if pictures is None:
        is_beside = annotations != folder and _holds(annotations, (*SUFFIXES, *UNREAD))
        holders = [annotations] if is_beside else _holders(folder, SUFFIXES) or _holders(folder, tuple(UNREAD))
        if len(holders) > 1:  # the pictures, and perhaps masks or previews of them
            stem = list_files(annotations, (".xml",))[0].stem
            holders = [path for path in holders if find_picture(path, stem)]
        if len(holders) != 1:
            found = "pictures in " + shortened(path.name for path in holders) if holders else "no pictures"
            raise UserError(f"{folder}: found {found}; expected a VOC dataset with one folder JPEGImages")
        pictures = holders[0]
    return annotations, pictures


def _holders(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The folder itself if it directly has files with such a suffix, else those of its folders that have some."""
    if _holds_directly(folder, suffixes):
        return [folder]
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not is_left_out(path.name))
    return [path for path in inner if _holds(path, suffixes)]


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return folder.is_dir() and (_holds_directly(folder, suffixes) or bool(list_files(folder, suffixes)))


def _holds_directly(folder: Path, suffixes: tuple[str, ...]) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(suffixes) and not is_left_out(entry.name) for entry in entries)


def _read_list(part: _Part, log: FaultLog) -> list[str]:
    """The stems in a split, in its order."""
    if part.source.is_dir():
        files = [path.relative_to(part.source) for path in list_files(part.source, (".xml",))]
        return sorted(path.with_suffix("").as_posix() for path in files)
    lines = [line for _, line in read_lines(part.source)]
    if part.source.suffix == ".csv":
        rows = list(csv.DictReader(lines))
        if rows and "filename" not in rows[0]:
            raise UserError(f"{part.source}:1: columns {shortened(rows[0])}, expected one called filename")
        lines = list(dict.fromkeys(row["filename"].strip() for row in rows))  # one row an object
    return log.once_each([_stem(line, part) for line in lines], part.source)


def _stem(line: str, part: _Part) -> str:
    """A line of a list without a picture's suffix. UserError for a path that leaves the dataset's folder."""
    if not (part.annotations / f"{line}.xml").is_file():
        line = line.replace("\\", "/")
    path = PurePosixPath(line)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{part.source}: {line!r} leaves the dataset's folder")
    if path.suffix.lower() in (*SUFFIXES, *UNREAD) and not (part.annotations / f"{line}.xml").is_file():
        return str(path.with_suffix(""))
    return str(path)


def _log_unlabelled(part: _Part, read: set[Path], log: FaultLog) -> None:
    """Log the pictures without an annotation file. read: those that have one, of their own or any other name."""
    for path in list_files(part.pictures, (*SUFFIXES, *UNREAD)):
        stem = path.relative_to(part.pictures).with_suffix("").as_posix()
        if path in read or find_label(part.source, stem, XML).is_file():
            continue
        if path.suffix.lower() in UNREAD:
            log_unread([path], log)
        else:
            log.add(path, None, "no annotation file", "picture without label file", "picture dropped", path.name)


def _class_names(parts: list[_Part]) -> tuple[str, ...]:
    """The class names of a set if the caller gives none: see read_voc."""
    for part in parts:
        for folder in (part.folder, part.annotations):
            if (folder / "classes.txt").is_file():
                return read_names(folder / "classes.txt")
    if all(re.fullmatch(r"VOC20\d\d", part.folder.name) for part in parts):
        return tuple(CLASSES)
    names: set[str] = set()
    for folder in dict.fromkeys(part.folder for part in parts):
        for path in list_files(folder, (".xml",)):
            try:
                names.update(item.name for item in read_annotation(path).objects if item.name)
            except UserError:
                pass  # reported by the split that lists this file
    return tuple(sorted(names))


def _read_sample(
    part: _Part, stem: str, image_id: str, names: tuple[str, ...], given: bool, log: FaultLog
) -> Sample | None:
    """The Sample of one annotation file; None, and a fault, for a file or picture that cannot be used."""
    path = find_label(part.annotations, stem, XML)
    if not path.is_file():
        log.add(path, None, "no such file, the list names it", "picture without label file", "picture dropped", stem)
        return None
    try:
        annotation = read_annotation(path)
    except UserError as error:
        log.add_error(path, error, "unreadable label file", "picture dropped", stem)
        return None
    image_path = _find_image(part, stem, annotation.filename)
    if image_path is None:
        log.add(path, None, f"no picture {stem} in {part.pictures}", "label without picture", "left out", stem)
        return None
    if image_path.suffix.lower() in UNREAD:
        log_unread([image_path], log)
        return None
    frame = read_frame(image_path, log, stated=annotation.size, label_path=path)
    if frame is None:
        return None
    rows = LabelRows()
    for item in annotation.objects:
        fault = _add_object(item, names, rows)
        if fault is not None:
            reason, kind = fault
            effect: Effect = "noted" if given and kind == "unknown class" else "object dropped"
            log.add(path, item.line, reason, kind, effect, image_path.name)
    return make_sample(rows, frame, log, image_path=image_path, image_id=image_id, label_path=path)


def _find_image(part: _Part, stem: str, filename: str) -> Path | None:
    """The picture of an annotation file: with the file's stem, of any format; else with the name stated in the file."""
    stated = re.split(r"[/\\]", filename)[-1]
    folder = part.pictures / PurePosixPath(stem).parent
    choices = [place / stated for place in (folder, part.pictures) if stated]
    own = find_picture(part.pictures, stem) or find_picture(part.pictures, stem, UNREAD)
    return own or next((path for path in choices if path.is_file()), None)


def _add_object(item: Object, names: tuple[str, ...], rows: LabelRows) -> tuple[str, str] | None:
    """Add a row and return None, or return (reason, kind) of the fault."""
    if not item.name:
        return "object without a name", "malformed object"
    corners = []
    try:
        for key in ("xmin", "ymin", "xmax", "ymax"):
            corners.append(read_number(item.fields[key]))
        key = "difficult"
        difficult = read_flag(item.fields.get(key))
    except KeyError:
        return f"object without {key}", "malformed object"
    except ValueError as error:
        return f"{key}: {error}", "malformed object"
    if item.name not in names:
        return f"class {item.name!r}, expected one of {shortened(names)}", "unknown class"
    fault = box_fault(*corners)
    if fault is not None:
        return fault
    xmin, ymin, xmax, ymax = corners
    rows.add((xmin - 1, ymin - 1, xmax, ymax), names.index(item.name), difficult=difficult, line=item.line)
    return None
