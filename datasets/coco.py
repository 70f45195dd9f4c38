"""COCO JSON: one file a split, boxes as x, y, width, height in 0-based continuous pixels.

Category ids may have gaps: labels are their ranks in id order, and DatasetIndex.category_ids has the ids. Ids may
exceed 32 bits, and may be texts. `iscrowd` objects are `crowd`; objects with `ignore` (some tools write VOC's difficult
so) are `ignore`. The area is the file's value (of the mask) where there is one. Masks are checked and taken out before
parsing: they are most of a file's bytes. datasets.values reads the values.

Two habits of tools that merge and export are corrected. A picture listed under several ids is one picture with the
objects of all of them, and counted as a fault. A root category without objects, the supercategory of others, is no
class; nor is a category `background` without objects, as labelme's exporters write.

Lin et al., "Microsoft COCO: Common Objects in Context", arXiv:1405.0312. Keypoints, captions and stuff are not read.
"""

import gc
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from datasets.folders import files_in, spellings
from datasets.index import DatasetIndex, Effect
from datasets.kept_index import Sources
from datasets.rows import FaultLog, LabelRows, make_sample, read_frame, refuse_misread, refuse_resized
from datasets.values import read_area, read_flag, read_id, read_number, read_size, short
from errors import UserError, counted, shortened

MAX_JSON_BYTES = 4 << 30
TRIED = 100  # pictures of a file to look for in each folder
# Nothing is tried twice. A group is atomic, (?>(?:...)?), not possessive, (?:...)?+: before Python 3.11.5 the latter
# keeps what a failed group has read, and "1." was a number.
_NUMBER = rb"-?+(?:0|[1-9][0-9]*+)(?>(?:\.[0-9]++)?)(?>(?:[eE][+-]?+[0-9]++)?)"
_SPACE = rb"[ \t\r\n]*+"


def _list_of(item: bytes) -> bytes:
    """The pattern of a JSON list with any number of items of a pattern."""
    comma = _SPACE + b"," + _SPACE
    return rb"\[" + _SPACE + rb"(?>(?:" + item + rb"(?>(?:" + comma + item + rb")*))?)" + _SPACE + rb"\]"


MASK = re.compile(rb'"segmentation"' + _SPACE + b":" + _SPACE + _list_of(_list_of(_NUMBER)))


def read_coco(
    root: str | Path, split: str, names: tuple[str, ...] | None = None, sources: Sources | None = None
) -> DatasetIndex:
    """A split of a folder in COCO's layout, or in a layout of the tools that export it.

    labels: annotations/instances_<split>.json; or <split>.json or instances_<split>.json there or in root; else
        _annotations.coco.json in the folder <split>, or the only JSON file there.
    pictures: images/<split>, <split>, <split>/images, images, root, or the folder of the labels: the first that has a
        picture of the file.
    names: must equal the file's own; they are only checked.
    sources: get every file and folder that the index depends on.
    UserError for files that are missing or not COCO's, and for pictures that were resized after labelling.
    """
    root, sources = Path(root), sources or Sources()
    json_path = find_json(root, split, sources)
    with _no_collections():
        tree = read_json(json_path)
        folder = find_folder(root, split, json_path, read_records(tree, "images", json_path), sources)
        index = index_coco(tree, json_path, folder, names, sources)
    if names is not None and tuple(names) != index.names:
        raise UserError(f"{json_path}: classes {', '.join(index.names)}; expected {', '.join(names)}")
    return index


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pause the search for cycles among Python's objects: parsed labels are millions of them, and have none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def find_json(root: Path, split: str, sources: Sources | None = None) -> Path:
    """The labels of a split, and `sources`: see read_coco. UserError where there is no such file, or several."""
    sources = sources or Sources()
    choices = [base / f"{start}{split}.json" for base in (root / "annotations", root) for start in ("instances_", "")]
    choices.append(root / split / "_annotations.coco.json")
    for path in choices:
        if sources.is_file(path):
            return path
    beside = _json_files(root / split, sources)
    if len(beside) == 1 and sources.is_file(beside[0]):
        return beside[0]
    if beside:
        raise UserError(f"{root / split}: {shortened(path.name for path in beside)}; expected one file of labels")
    if root.is_file():
        raise UserError(f"{root}: a file, expected the folder with annotations/instances_{split}.json and the pictures")
    inner = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    others = [str(path.relative_to(root)) for folder in (root, *inner) for path in _json_files(folder, sources)]
    found = f", found {shortened(others)}" if others else ""
    raise UserError(f"{choices[0]}: no such file{found}; expected the labels of split {split!r}")


def find_folder(root: Path, split: str, json_path: Path, records: list[dict], sources: Sources | None = None) -> Path:
    """The folder of a split's pictures, which `records` name, and `sources`: see read_coco."""
    sources = sources or Sources()
    folders = [root / "images" / split, root / split, root / split / "images", root / "images", root, json_path.parent]
    tried = islice(records, TRIED)
    held = (folder for record in tried for folder in folders if find_image(folder, record.get("file_name"), sources))
    return next(held, None) or next(path for path in folders if sources.is_folder(path) or path == root)


def _json_files(folder: Path, sources: Sources) -> list[Path]:
    return files_in(folder, (".json",)) if sources.is_folder(folder) else []


def find_image(folder: Path, name: Any, sources: Sources | None = None) -> Path | None:
    """The picture `file_name` in a folder; its parts are separated by / or Windows' \\. None if there is none.

    sources: see read_coco.
    """
    if not isinstance(name, str) or "\0" in name:
        return None
    for spelled in dict.fromkeys((*spellings(name), *spellings(name.replace("\\", "/")))):
        path = folder / spelled
        if os.path.isfile(path) if sources is None else sources.is_file(path):
            return path
    return None


def read_json(path: Path) -> Any:
    """The plain values in a JSON file, with null for each mask that is a list of polygons.

    UserError for NaN, Infinity, deep nesting, and a key that an object gives twice: a parser would drop the first.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes, expected COCO labels")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None

    def refuse(constant: str) -> None:
        raise UserError(f"{path}: {constant} in the file, expected finite numbers")

    def keep(pairs: list[tuple[str, Any]]) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            _refuse_twice(pairs, path)
        return record

    try:
        text = _without_masks(data).decode("utf-8-sig")
        del data  # of a set of COCO's size, as much as the parsed values
        return json.loads(text, parse_constant=refuse, object_pairs_hook=keep)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}, expected a COCO file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply, expected COCO labels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{path}: not valid JSON: {error}, expected a COCO file") from None


def _refuse_twice(pairs: list[tuple[str, Any]], path: Path) -> None:
    names, record = [name for name, _ in pairs], dict(pairs)
    twice = next(name for name in names if names.count(name) > 1)
    place = next((f" by the object with {key} {short(record[key])}" for key in ("id", "image_id") if key in record), "")
    raise UserError(f"{path}: key {twice!r} is given twice{place}, expected once")


def _without_masks(data: bytes) -> bytearray:
    """The JSON text with null for each mask that is a list of lists of numbers; piece by piece, for its memory.

    Whatever else stands there stays, and is refused or read by the parser: a mask that is not valid JSON, NaN, a mask
    in run lengths. Inside a string the first quote of a match is escaped, so a string is never cut. (The test for that
    stands here because a pattern that begins with plain letters is searched for twice as fast.)
    """
    kept, end = bytearray(), 0
    for match in MASK.finditer(data):
        start, stop = match.span()
        if data[start - 1] == ord("\\"):
            continue
        kept += data[end:start]
        kept += b'"segmentation":null'
        kept += b"\n" * data.count(b"\n", start, stop)  # faults are named by their lines
        end = stop
    kept += data[end:]
    return kept


def index_coco(
    tree: Any,
    json_path: Path,
    folder: Path,
    names: tuple[str, ...] | None = None,
    sources: Sources | None = None,
) -> DatasetIndex:
    """The index of parsed COCO labels whose pictures are in `folder`. names, sources: see read_coco.

    It takes the annotations out of the tree as it reads them: those of a set of COCO's size take half a gigabyte.
    """
    log = FaultLog()
    categories = read_categories(read_records(tree, "categories", json_path), json_path)
    annotations = read_records(tree, "annotations", json_path)
    categories = without_root(categories, annotations, names, json_path, log, sources)
    label_of = {category: label for label, category in enumerate(categories)}
    images, first_id = _read_images(read_records(tree, "images", json_path), json_path, log)

    source = f"{json_path} ({counted(len(annotations), 'annotation')})"
    rows_of: dict[int | str, LabelRows] = {}
    annotations.reverse()
    while annotations:
        record = annotations.pop()
        fault = _add_annotation(record, first_id, label_of, rows_of)
        if fault is not None:
            reason, kind = fault
            effect: Effect = "left out" if kind == "label without picture" else "object dropped"
            picture = record.get("image_id", "")
            log.add(json_path, None, f"annotation {record.get('id')!r}: {reason}", kind, effect, picture)

    samples = []
    for image_id, record in images.items():
        name = record["file_name"]
        image_path = find_image(folder, name, sources)
        if image_path is None:
            log.add(folder / name, None, "no such file", "label without picture", "left out", name)
            continue
        stated = read_size(record.get("width"), record.get("height"))
        frame = read_frame(image_path, log, stated=stated, label_path=json_path)
        if frame is not None:
            rows = rows_of.pop(image_id, None) or LabelRows()
            samples.append(
                make_sample(rows, frame, log, image_path=image_path, image_id=image_id, label_path=json_path)
            )
    refuse_resized(log, json_path)
    refuse_misread(log, json_path, is_centered=False)
    names, ids = tuple(record["name"] for record in categories.values()), tuple(categories)
    return DatasetIndex(names, tuple(samples), tuple(log.faults), ids, "coco", source)


def read_records(tree: Any, key: str, path: Path) -> list[dict]:
    records = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: no list of objects under {key!r}, expected COCO labels")
    return records


def read_categories(records: list[dict], path: Path) -> dict[int | str, dict]:
    """id -> category, in the order of the ids. UserError for any fault: a wrong class list makes all labels wrong."""
    if not records:
        raise UserError(f"{path}: no categories, expected at least one class")
    categories: dict[int | str, dict] = {}
    for record in records:
        try:
            category = read_id(record.get("id"))
        except ValueError:
            category = None
        if not isinstance(record.get("name"), str) or category is None:
            raise UserError(f"{path}: category {record!r}, expected an id and a name")
        if category in categories:
            raise UserError(f"{path}: category {category!r} stands there twice")
        categories[category] = record
    if all(isinstance(category, int) for category in categories):
        return dict(sorted(categories.items()))
    return categories  # texts have no order, so the file's order stays


def without_root(
    categories: dict,
    annotations: list[dict],
    names: tuple[str, ...] | None,
    path: Path,
    log: FaultLog,
    sources: Sources | None = None,
) -> dict[int | str, dict]:
    """The categories without those that are no class: without objects, and a supercategory of others or `background`.

    A category with objects in another file of the set stays. If the caller's `names` are all of the file's categories,
    all stay. UserError for two classes with the same name.
    """
    all_names = [record["name"] for record in categories.values()]
    groups = {i for i in categories if any(_is_group(categories[i], categories[k]) for k in categories if k != i)}
    groups |= {i for i, record in categories.items() if record["name"].strip("_ ").casefold() == "background"}
    if groups and (names is None or list(names) != all_names):
        groups -= _used(annotations, categories)
        if groups:
            groups -= _used_elsewhere(path, {i: categories[i]["name"] for i in groups}, sources or Sources())
        for category in sorted(groups, key=str):
            reason = f"category {category!r} {categories[category]['name']!r}: a supercategory or the background"
            reason += ", without objects"
            log.add(path, None, f"{reason}; it is no class", "supercategory", "noted")
        categories = {i: record for i, record in categories.items() if i not in groups}
        all_names = [record["name"] for record in categories.values()]
    twice = next((name for name in all_names if all_names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: category {twice!r} stands there twice")
    return categories


def _is_group(category: dict, other: dict) -> bool:
    """Whether `category` is the supercategory of `other`. Of two with one name it is the one without such a parent."""
    if other.get("supercategory") != category["name"]:
        return False
    return other["name"] != category["name"] or category.get("supercategory") != category["name"]


def _used(annotations: Iterable[dict], categories: dict) -> set[int | str]:
    """The categories with objects."""
    stated = (record.get("category_id") for record in annotations)
    different = {category for category in stated if isinstance(category, int | float | str)}
    found = {match_id(category, categories) for category in different}
    return {category for category in found if category is not None}


def _used_elsewhere(path: Path, name_of: dict[int | str, str], sources: Sources) -> set[int | str]:
    """The categories (id -> name) with objects in another split: a file beside this one, or of the same name."""
    above = path.parent.parent
    folders = sorted(above.iterdir()) if sources.is_folder(above) else []
    others = [*_json_files(path.parent, sources), *(folder / path.name for folder in folders)]
    used: set[int | str] = set()
    for other in others:
        if not sources.is_file(other) or other.resolve() == path.resolve():
            continue
        try:
            tree = read_json(other)
            categories = read_categories(read_records(tree, "categories", other), other)
            theirs = _used(read_records(tree, "annotations", other), categories)
        except UserError:
            continue  # not labels of this set, or a fault that its own split reports
        used |= {category for category in theirs if name_of.get(category) == categories[category]["name"]}
    return used


def match_id(value: Any, table: Mapping[int | str, Any]) -> int | str | None:
    """The key of a table that equals an id; None if there is none. The text "7" is 7 if no key is that text."""
    if type(value) is int and value in table:
        return value
    try:
        key = read_id(value)
    except ValueError:
        return None
    if key in table:
        return key
    other = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 19 else str(key)
    return other if other in table else None


def _read_images(records: list[dict], path: Path, log: FaultLog) -> tuple[dict, dict]:
    """(id -> record of each picture, id -> the first id of the same picture). Faults go to the log."""
    images: dict[int | str, dict] = {}
    first_id: dict[int | str, int | str] = {}
    id_of: dict[str, int | str] = {}  # by normalised path
    place_of: dict[int | str, str] = {}
    for record in records:
        name = record.get("file_name", "")
        fault = _image_fault(record)
        if fault is None:
            image_id, place = read_id(record["id"]), posixpath.normpath(name.replace("\\", "/"))
            if place_of.setdefault(image_id, place) != place:
                fault = f"the id is taken by {place_of[image_id]}"
        if fault is not None:
            log.add(path, None, f"image {record.get('id')!r}: {fault}", "malformed image", "picture dropped", name)
            continue
        first = first_id[image_id] = id_of.setdefault(place, image_id)
        if first not in images:
            images[first] = record
            continue
        sizes = [read_size(item.get("width"), item.get("height")) for item in (images[first], record)]
        if None not in sizes and sizes[0] != sizes[1]:
            found = f"{name!r} has the ids {first!r} and {image_id!r} and two sizes"
            raise UserError(f"{path}: {found}: {sizes[0]} and {sizes[1]}; expected one picture, or two file names")
        reason = f"image {image_id!r}: {name} is listed as image {first!r} as well; the objects of both are kept"
        log.add(path, None, reason, "listed twice", "noted", name)
    return images, first_id


def _image_fault(record: dict) -> str | None:
    """The reason why the entry of a picture cannot be used; None if it can."""
    name = record.get("file_name")
    try:
        read_id(record.get("id"))
    except ValueError as error:
        return f"id: {error}"
    if not isinstance(name, str) or not name or "\0" in name:
        return f"file_name {name!r}, expected a file name"
    for spelled in (name, name.replace("\\", "/")):
        if spelled.startswith("/") or ".." in spelled.split("/"):
            return f"file_name {name!r} leaves the dataset's folder"
    return None


def _add_annotation(record: dict, first_id: dict, label_of: dict, rows_of: dict) -> tuple[str, str] | None:
    """Add a row to those of its picture and return None, or return (reason, kind) of the fault."""
    image_id, category, box = record.get("image_id"), record.get("category_id"), record.get("bbox")
    image = match_id(image_id, first_id)
    if image is None:
        return f"image_id {image_id!r} is no image of the file", "label without picture"
    label = label_of.get(match_id(category, label_of))
    if label is None:
        return f"category_id {category!r} is no category of the file", "unknown class"
    if not isinstance(box, list) or len(box) != 4:
        return f"bbox {box!r}, expected four numbers", "malformed object"
    try:
        key = "bbox"
        x, y, width, height = map(read_number, box)
        key = "area"
        area = read_area(record.get(key))
        key = "ignore"
        difficult = read_flag(record.get(key))
        key = "iscrowd"
        crowd = read_flag(record.get(key))
    except ValueError as error:
        return f"{key}: {error}", "malformed object"
    rows = rows_of.setdefault(first_id[image], LabelRows())
    rows.add((x, y, x + width, y + height), label, difficult=difficult, crowd=crowd, area=area, line=None)
    return None
