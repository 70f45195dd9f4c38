"""Ground truth and detections from COCO JSON files; see metrics.files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from errors import UserError
from metrics.annotations import Annotations, read_text, size_of
from metrics.tables import DetectionTable, GroundTruth


def read_coco(path: Path) -> Annotations:
    tree = _read_json(path)
    if not isinstance(tree, dict) or not all(isinstance(tree.get(k), list) for k in ("images", "categories")):
        raise UserError(f"{path}: found no lists 'images' and 'categories', expected COCO ground truth")
    annotations = tree.get("annotations", [])
    image_ids, stems, sizes, category_ids, names = _coco_images_and_categories(path, tree)
    image_row, label = {i: row for row, i in enumerate(image_ids)}, {i: k for k, i in enumerate(category_ids)}
    try:
        image = [image_row[a["image_id"]] for a in annotations]
        labels = [label[a["category_id"]] for a in annotations]
        xywh = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        area = np.array([a.get("area", math.nan) for a in annotations], dtype=np.float64)
        crowd = [bool(a.get("iscrowd", 0)) for a in annotations]
        ignore = [bool(a.get("ignore", 0)) for a in annotations]
        if len(xywh) != len(annotations) or not np.isfinite(xywh).all():
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        _blame_coco_row(path, "annotations", annotations, image_row, label, ("bbox",))
    boxes, box_area = _corners(xywh)
    ground_truth = GroundTruth(
        image,
        boxes,
        labels,
        len(image_ids),
        names,
        crowd=crowd,
        difficult=np.array(ignore, dtype=bool) & ~np.array(crowd, dtype=bool),
        area=np.where(np.isnan(area), box_area, area),
        box_area=box_area,
    )
    return Annotations(ground_truth, image_ids, stems, sizes, category_ids, True, False)


def _coco_images_and_categories(path: Path, tree: dict):
    """image ids (rising), stems, sizes, category ids (rising), names."""
    for kind in ("images", "categories"):
        for row, entry in enumerate(tree[kind]):
            if not isinstance(entry, dict) or not _is_id(entry.get("id")):
                raise UserError(f"{path}: {kind}[{row}]: found {_short(entry)}, expected an object with an 'id'")
        ids = [entry["id"] for entry in tree[kind]]
        if len(set(ids)) != len(ids):
            twice = next(i for n, i in enumerate(ids) if i in ids[:n])
            raise UserError(f"{path}: {kind}: id {twice!r} is given twice")
        if len({type(i) for i in ids}) > 1:
            raise UserError(f"{path}: {kind}: found numbers and text as ids, expected one kind")
    images = sorted(tree["images"], key=lambda entry: entry["id"])
    categories = sorted(tree["categories"], key=lambda entry: entry["id"])
    names = tuple(str(entry.get("name", entry["id"])) for entry in categories)
    if len(set(names)) != len(names):
        raise UserError(f"{path}: categories: two have the same name, expected each class once")
    stems = tuple(Path(str(entry.get("file_name", entry["id"]))).stem for entry in images)
    sizes = tuple(size_of(entry.get("width"), entry.get("height")) for entry in images)
    return tuple(entry["id"] for entry in images), stems, sizes, tuple(entry["id"] for entry in categories), names


def read_coco_detections(path: Path, annotations: Annotations) -> DetectionTable:
    tree = _read_json(path)
    names = annotations.ground_truth.names
    image_row = {stem: row for row, stem in enumerate(annotations.stems)}
    image_row |= {i: row for row, i in enumerate(annotations.image_ids)}
    label: dict[Any, int] = {name: k for k, name in enumerate(names)}
    label |= {i: k for k, i in enumerate(annotations.category_ids or range(len(names)))}
    rows, kind = tree, "results"
    if isinstance(tree, dict) and isinstance(tree.get("annotations"), list):
        rows, kind = tree["annotations"], "annotations"
        if isinstance(tree.get("images"), list) and isinstance(tree.get("categories"), list):
            # Ids of another numbering: images meet by the stem of their file, classes by name.
            image_ids, stems, _, category_ids, own_names = _coco_images_and_categories(path, tree)
            image_row = {i: image_row[stem] for i, stem in zip(image_ids, stems) if stem in image_row}
            label = {i: label[name] for i, name in zip(category_ids, own_names) if name in label}
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {_short(tree)}, expected a list of COCO results")
    try:
        image = [image_row[r["image_id"]] for r in rows]
        labels = [label[r["category_id"]] for r in rows]
        xywh = np.array([r["bbox"] for r in rows], dtype=np.float64).reshape(-1, 4)
        scores = np.array([r["score"] for r in rows], dtype=np.float64)
        if len(xywh) != len(rows) or not np.isfinite(xywh).all() or not np.isfinite(scores).all():
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        _blame_coco_row(path, kind, rows, image_row, label, ("bbox", "score"))
    boxes, box_area = _corners(xywh)
    return DetectionTable(image, boxes, scores, labels, box_area)


def _blame_coco_row(path: Path, kind: str, rows: list, image_row: dict, label: dict, numbers: tuple) -> NoReturn:
    """Find the first bad row, which the fast path met, and say what is wrong with it."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    for n, row in enumerate(rows):
        where = f"{path}: {kind}[{n}]"
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {_short(row)}, expected an object with image_id, category_id, bbox")
        for key, known in (("image_id", image_row), ("category_id", label)):
            if not _is_id(row.get(key)) or row[key] not in known:
                raise UserError(f"{where}: {key}: found {_short(row.get(key))}, expected one of the ground truth's")
        for key in numbers:
            value = row.get(key)
            values = value if key == "bbox" and isinstance(value, list) else [value]
            if len(values) != (4 if key == "bbox" else 1) or not all(map(is_number, values)):
                expected = "4 numbers" if key == "bbox" else "a number"
                raise UserError(f"{where}: {key}: found {_short(value)}, expected {expected}")
        if not is_number(row.get("area", 0)):
            raise UserError(f"{where}: area: found {_short(row['area'])}, expected a number")
    raise UserError(f"{path}: {kind}: found values of mixed types, expected COCO rows")


def _corners(xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) left, top, width, height -> corners (N, 4) and area (N,), computed as pycocotools does."""
    return np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1), xywh[:, 2] * xywh[:, 3]


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _read_json(path: Path) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{path}: found {constant}, expected finite numbers")

    try:
        return json.loads(read_text(path), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: {type(error).__name__}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_coco_detections(
    path: str | Path,
    detections: DetectionTable,
    image_ids: Sequence[int | str],
    category_ids: Sequence[int] | None = None,
) -> None:
    """COCO results JSON, read back by read_detections: image_id, category_id, bbox x, y, width, height, score."""
    x1, y1, x2, y2 = detections.boxes_xyxy.T
    columns = (detections.image, detections.labels, x1, y1, x2 - x1, y2 - y1, detections.scores)
    results = [
        {
            "image_id": image_ids[image],
            "category_id": category_ids[label] if category_ids else label,
            "bbox": [x, y, width, height],
            "score": score,
        }
        for image, label, x, y, width, height, score in zip(*(column.tolist() for column in columns))
    ]
    try:
        Path(path).write_text(json.dumps(results))
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from None
