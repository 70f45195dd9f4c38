"""Pascal VOC: one XML file a picture, and a list of pictures a split.

Coordinates in the files are 1-based and inclusive; the index holds (xmin - 1, ymin - 1, xmax, ymax), so a box that
covers the whole picture is (0, 0, width, height). Objects marked difficult are `ignore`. An object with xmin = xmax or
ymin = ymax is a point or a line that somebody clicked by mistake: it is dropped, although VOC's own "+1 pixel" rule
would call it one pixel wide.

Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010. Parts of objects (head, hand, foot)
and actions are not read.
"""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.parsers import expat

from datasets.folders import list_files
from datasets.images import SUFFIXES, find_picture
from datasets.index import DatasetIndex
from datasets.rows import FaultLog, LabelRows, make_sample, read_frame
from datasets.text_lines import read_lines, read_names
from errors import UserError

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
MAX_XML_BYTES = 4 << 20
MAX_XML_DEPTH = 20


def read_voc(root: str | Path, split: str, names: tuple[str, ...] | None = None) -> DatasetIndex:
    """A split of a folder in VOC's layout.

    split: a list in ImageSets/Main (`trainval`); with a year, of `VOC<year>` below root or root/VOCdevkit
    (`2007/trainval`); several, joined by + (`2007/trainval+2012/trainval`); `all`, every annotation file.
    Folders without ImageSets may have the split as a CSV with a column `filename`: <split>.csv or
    <split>_labels.csv, in root or root/data. Pictures lie in JPEGImages or images, XML in Annotations or annotations.
    Class names: `names`, else the lines of classes.txt, else VOC's 20 in a folder called VOC<year>, else all names in
    all annotation files, sorted, so that every split has the same. UserError for a root or split that is not there.
    """
    root = Path(root)
    parts = [_find_part(root, part) for part in split.split("+")]
    given = names is not None
    names = tuple(names) if given else _class_names([part.folder for part in parts])
    log, samples, seen = FaultLog(), [], set()
    for part in parts:
        for stem in _read_list(part, log):
            image_id = stem if stem not in seen else f"{part.folder.name}/{stem}"
            seen.add(stem)
            sample = _read_sample(part, stem, image_id, names, given, log)
            if sample is not None:
                samples.append(sample)
    return DatasetIndex(names, tuple(samples), tuple(log.faults), None, "voc")


@dataclass(frozen=True)
class _Part:
    folder: Path
    annotations: Path
    pictures: Path
    source: Path  # the list, or the folder of annotations


def _find_part(root: Path, part: str) -> _Part:
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
    annotations = _first_folder(folder, ("Annotations", "annotations"))
    pictures = _first_folder(folder, ("JPEGImages", "images"))
    lists = folder / "ImageSets" / "Main"
    files = [lists / f"{name}.txt"]
    files += [base / f"{name}{end}.csv" for base in (folder, folder / "data") for end in ("", "_labels")]
    source = next((file for file in files if file.is_file()), annotations if name == "all" else None)
    if source is None:
        known = sorted(path.stem for path in lists.glob("*.txt")) or [
            path.name for path in list_files(folder, (".csv",))
        ]
        raise UserError(f"{lists}: no list {name!r}, found {', '.join(known) or 'none'} (`all` takes every picture)")
    return _Part(folder, annotations, pictures, source)


def _first_folder(folder: Path, choices: tuple[str, ...]) -> Path:
    for choice in choices:
        if (folder / choice).is_dir():
            return folder / choice
    raise UserError(f"{folder}: no folder {' or '.join(choices)}, expected a VOC dataset")


def _read_list(part: _Part, log: FaultLog) -> list[str]:
    """The stems a split names, in its order."""
    if part.source.is_dir():
        files = [path.relative_to(part.source) for path in list_files(part.source, (".xml",))]
        stems = sorted(path.with_suffix("").as_posix() for path in files)
        _log_unlabelled(part, set(stems), log)
        return stems
    lines = [line for _, line in read_lines(part.source)]
    if part.source.suffix == ".csv":
        rows = list(csv.DictReader(lines))
        if rows and "filename" not in rows[0]:
            raise UserError(f"{part.source}:1: columns {', '.join(map(str, rows[0]))}, expected one called filename")
        lines = list(dict.fromkeys(row["filename"].strip() for row in rows))  # one row an object
    stems = [_stem(line, part) for line in lines]
    unique = list(dict.fromkeys(stems))
    if len(unique) < len(stems):
        log.add(part.source, None, f"{len(stems) - len(unique)} pictures are listed twice", "listed twice", "noted")
    return unique


def _stem(line: str, part: _Part) -> str:
    """A picture's name in a list, without the suffix of a picture; it may not leave the dataset's folder."""
    path = PurePosixPath(line)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{part.source}: {line!r} leaves the dataset's folder")
    if path.suffix.lower() in SUFFIXES and not (part.annotations / f"{line}.xml").is_file():
        return str(path.with_suffix(""))
    return line


def _log_unlabelled(part: _Part, stems: set[str], log: FaultLog) -> None:
    for path in list_files(part.pictures, SUFFIXES):
        stem = path.relative_to(part.pictures).with_suffix("").as_posix()
        if stem not in stems:
            log.add(path, None, "no annotation file", "picture without label file", "picture dropped", path.name)


def _class_names(folders: list[Path]) -> tuple[str, ...]:
    for folder in folders:
        if (folder / "classes.txt").is_file():
            return read_names(folder / "classes.txt")
    if all(re.fullmatch(r"VOC20\d\d", folder.name) for folder in folders):
        return tuple(CLASSES)
    names = set()
    for folder in folders:
        for path in list_files(_first_folder(folder, ("Annotations", "annotations")), (".xml",)):
            try:
                names.update(item.name for item in read_annotation(path).objects if item.name)
            except UserError:
                pass  # a fault of the split that lists it
    return tuple(sorted(names))


def _read_sample(part: _Part, stem: str, image_id: str, names: tuple[str, ...], given: bool, log: FaultLog):
    path = part.annotations / f"{stem}.xml"

    def drop(reason: str, kind: str) -> None:
        log.add(path, None, reason, kind, "picture dropped", stem)

    if not path.is_file():
        return drop("no such file, the list names it", "picture without label file")
    try:
        annotation = read_annotation(path)
    except UserError as error:
        return drop(str(error).removeprefix(f"{path}: "), "unreadable label file")
    image_path = find_picture(part.pictures, stem)
    if image_path is None and (part.pictures / Path(annotation.filename).name).is_file():
        image_path = part.pictures / Path(annotation.filename).name
    if image_path is None:
        return drop(f"no picture {stem} in {part.pictures}", "label without picture")
    frame = read_frame(image_path, log, stated=annotation.size, label_path=path)
    if frame is None:
        return None
    rows = LabelRows()
    for item in annotation.objects:
        fault = _add_object(item, names, rows)
        if fault is not None:
            reason, kind = fault
            effect = "noted" if given and kind == "unknown class" else "object dropped"
            log.add(path, item.line, reason, kind, effect, image_path.name)
    return make_sample(rows, frame, log, image_path=image_path, image_id=image_id, label_path=path)


def _add_object(item: "_Object", names: tuple[str, ...], rows: LabelRows) -> tuple[str, str] | None:
    """Add a row, or say why not: (reason, kind)."""
    if not item.name:
        return "object without a name", "malformed object"
    try:
        corners = [float(item.fields[key]) for key in ("xmin", "ymin", "xmax", "ymax")]
    except KeyError as error:
        return f"object without {error.args[0]}", "malformed object"
    except ValueError as error:
        return f"{error}, expected a number", "malformed object"
    xmin, ymin, xmax, ymax = corners
    if item.name not in names:
        return f"class {item.name!r}, expected one of {', '.join(names[:20])}", "unknown class"
    if xmin == xmax or ymin == ymax:
        return f"zero-size box: {xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}", "zero-size box"
    if xmin > xmax or ymin > ymax:
        return f"box turned inside out: {xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}", "box turned inside out"
    difficult = item.fields.get("difficult", "0").lower() in ("1", "true")
    rows.add((xmin - 1, ymin - 1, xmax, ymax), names.index(item.name), difficult=difficult, line=item.line)
    return None


@dataclass
class _Object:
    line: int
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.fields.get("name", "")


@dataclass
class Annotation:
    """What is read of one XML file: the stated (width, height), the file name, the objects' texts and lines."""

    size: tuple[int, int] | None = None
    filename: str = ""
    objects: list[_Object] = field(default_factory=list)


_FIELDS = {("object", "name"), ("object", "difficult")}
_FIELDS |= {("object", "bndbox", key) for key in ("xmin", "ymin", "xmax", "ymax")}


def read_annotation(path: Path) -> Annotation:
    """Parse a VOC XML file of at most 4 MiB, 20 deep, without DOCTYPE or entities. UserError otherwise."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_XML_BYTES:
        raise UserError(f"{path}: more than {MAX_XML_BYTES} bytes, expected a VOC annotation")
    annotation, texts = Annotation(), {}
    parser = expat.ParserCreate()
    parser.buffer_text = True
    stack: list[str] = []
    text: list[str] = []

    def refuse_doctype(*_) -> None:
        raise UserError(f"{path}:{parser.CurrentLineNumber}: a DOCTYPE, expected plain XML without entities")

    def start(tag: str, _) -> None:
        stack.append(tag)
        text.clear()
        if len(stack) > MAX_XML_DEPTH:
            raise UserError(f"{path}:{parser.CurrentLineNumber}: nested deeper than {MAX_XML_DEPTH}")
        if stack[0] != "annotation":
            raise UserError(f"{path}:{parser.CurrentLineNumber}: found <{tag}>, expected <annotation>")
        if stack[1:] == ["object"]:
            annotation.objects.append(_Object(parser.CurrentLineNumber))

    def end(_) -> None:
        key = tuple(stack[1:])
        if key in _FIELDS:
            annotation.objects[-1].fields.setdefault(key[-1], "".join(text).strip())
        elif key[:1] in (("size",), ("filename",)):
            texts.setdefault(key, "".join(text).strip())
        stack.pop()
        text.clear()

    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text.append
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two: an encoding Python does not know
        raise UserError(f"{path}: not well-formed XML: {error}") from None
    annotation.filename = texts.get(("filename",), "")
    try:
        annotation.size = (int(float(texts["size", "width"])), int(float(texts["size", "height"])))
    except KeyError:
        pass  # no size stated: nothing to compare
    except (ValueError, OverflowError):
        annotation.size = (0, 0)  # stated, and wrong
    return annotation
