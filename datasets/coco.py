"""COCO JSON: one file a split, boxes as x, y, width, height in 0-based continuous pixels.

Category ids may have gaps: labels are their ranks in id order, and DatasetIndex.category_ids leads back. Ids may
exceed 32 bits. `iscrowd` objects are `crowd`; objects with `ignore` (written for VOC's difficult) are `ignore`. The
area is the file's (of the mask), where it is there. Masks are skipped before parsing: they are most of a file's bytes.

Lin et al., "Microsoft COCO: Common Objects in Context", arXiv:1405.0312. Keypoints, captions and stuff are not read.
"""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from datasets.index import DatasetIndex
from datasets.rows import FaultLog, LabelRows, make_sample, read_frame
from errors import UserError

MAX_JSON_BYTES = 4 << 30


def read_coco(root: str | Path, split: str, names: tuple[str, ...] | None = None) -> DatasetIndex:
    """A split of a folder in COCO's layout.

    The labels: annotations/instances_<split>.json, or <split>.json or instances_<split>.json there or in root. The
    pictures: images/<split>, <split>, images or root, the first that holds the first picture of the file.
    `names` must be the file's own; they are only checked. UserError for files that are not there or not COCO's.
    """
    root = Path(root)
    folders = (root / "annotations", root)
    choices = [folder / f"{start}{split}.json" for folder in folders for start in ("instances_", "")]
    json_path = next((path for path in choices if path.is_file()), None)
    if json_path is None:
        raise UserError(f"{choices[0]}: no such file, expected the labels of split {split!r}")
    tree = read_json(json_path)
    pictures = [root / "images" / split, root / split, root / "images", root]
    first = next((record.get("file_name") for record in _records(tree, "images", json_path)), None)
    folder = next((p for p in pictures if isinstance(first, str) and (p / first).is_file()), None)
    if folder is None:
        folder = next(p for p in pictures if p.is_dir() or p == root)
    index = index_coco(tree, json_path, folder)
    if names is not None and tuple(names) != index.names:
        raise UserError(f"{json_path}: classes {', '.join(index.names)}; expected {', '.join(names)}")
    return index


def read_json(path: Path) -> Any:
    """Plain values of a JSON file, with masks left empty. NaN, Infinity and deep nesting are UserErrors."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: more than {MAX_JSON_BYTES} bytes, expected COCO labels")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None

    def refuse(constant: str) -> None:
        raise UserError(f"{path}: {constant} in the file, expected finite numbers")

    try:
        # No quote or brace, so it ends with the mask; no NaN or Infinity, so they are still refused. A quote inside a
        # string is escaped, and no match.
        data = re.sub(rb'(?<!\\)"segmentation"\s*:\s*\[[^"{}NaI]*\]', b'"segmentation":[]', data)
        return json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply, expected COCO labels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{path}: not valid JSON: {error}") from None


def index_coco(tree: Any, json_path: Path, folder: Path) -> DatasetIndex:
    """The index of parsed COCO labels whose pictures lie in `folder`."""
    log = FaultLog()
    names, category_ids = _read_categories(_records(tree, "categories", json_path), json_path)
    label_of = {category: label for label, category in enumerate(category_ids)}
    images: dict[int | str, dict] = {}
    for record in _records(tree, "images", json_path):
        fault = _image_fault(record, images)
        if fault is None:
            images[record["id"]] = record
        else:
            name = record.get("file_name", "")
            log.add(json_path, None, f"image {record.get('id')!r}: {fault}", "malformed image", "picture dropped", name)

    rows_of: dict[int | str, LabelRows] = {}
    for record in _records(tree, "annotations", json_path):
        fault = _annotation_fault(record, images, label_of)
        if fault is not None:
            reason, kind = fault
            picture = record.get("image_id", "")
            log.add(json_path, None, f"annotation {record.get('id')!r}: {reason}", kind, "object dropped", picture)
            continue
        x, y, width, height = record["bbox"]
        rows_of.setdefault(record["image_id"], LabelRows()).add(
            (x, y, x + width, y + height),
            label_of[record["category_id"]],
            difficult=record.get("ignore", 0) == 1,
            crowd=record.get("iscrowd", 0) == 1,
            area=record.get("area"),
            line=None,
        )

    samples = []
    for image_id, record in images.items():
        image_path = folder / record["file_name"]
        if not image_path.is_file():
            log.add(image_path, None, "no such file", "label without picture", "picture dropped", record["file_name"])
            continue
        stated = (record["width"], record["height"]) if "width" in record and "height" in record else None
        frame = read_frame(image_path, log, stated=stated, label_path=json_path)
        if frame is not None:
            rows = rows_of.get(image_id) or LabelRows()
            samples.append(
                make_sample(rows, frame, log, image_path=image_path, image_id=image_id, label_path=json_path)
            )
    return DatasetIndex(names, tuple(samples), tuple(log.faults), category_ids, "coco")


def _records(tree: Any, key: str, path: Path) -> list[dict]:
    records = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: no list of objects under {key!r}, expected COCO labels")
    return records


def _read_categories(records: list[dict], path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids in id order. A class list with a fault is a fault of everything: always a UserError."""
    if not records:
        raise UserError(f"{path}: no categories, expected at least one class")
    for record in records:
        if not isinstance(record.get("name"), str) or not _is_int(record.get("id")):
            raise UserError(f"{path}: category {record!r}, expected an integer id and a name")
    ordered = sorted(records, key=lambda record: record["id"])
    ids, names = tuple(record["id"] for record in ordered), tuple(record["name"] for record in ordered)
    if len(set(ids)) < len(ids) or len(set(names)) < len(names):
        twice = next(item for column in (ids, names) for item in column if column.count(item) > 1)
        raise UserError(f"{path}: category {twice!r} stands there twice")
    return names, ids


def _image_fault(record: dict, images: dict) -> str | None:
    image_id, name = record.get("id"), record.get("file_name")
    if not _is_int(image_id) and not isinstance(image_id, str):
        return f"id {image_id!r}, expected an integer"
    if image_id in images:
        return f"the id is taken by {images[image_id]['file_name']}"
    if not isinstance(name, str) or not name or "\0" in name:
        return f"file_name {name!r}, expected a file name"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return f"file_name {name!r} leaves the dataset's folder"
    for key in ("width", "height"):
        if key in record and not _is_int(record[key]):
            return f"{key} {record[key]!r}, expected an integer"
    return None


def _annotation_fault(record: dict, images: dict, label_of: dict) -> tuple[str, str] | None:
    """(reason, kind) of an annotation that cannot be used."""
    image_id, category, box = record.get("image_id"), record.get("category_id"), record.get("bbox")
    if not isinstance(image_id, int | str) or image_id not in images:
        return f"image_id {image_id!r} is no image of the file", "label without picture"
    if not _is_int(category) or category not in label_of:
        return f"category_id {category!r} is no category of the file", "unknown class"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox {box!r}, expected four numbers", "malformed object"
    if not (record.get("area") is None or _is_number(record["area"])):
        return f"area {record['area']!r}, expected a number", "malformed object"
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_int(value)
