"""Ground truth and detections from COCO JSON files; see metrics.files."""

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.coco import match_id, read_categories, read_json, without_root
from datasets.rows import FaultLog
from datasets.values import are_fractions, read_area, read_flag, read_id, read_number, read_size, short
from datasets.voc import CLASSES as VOC_CLASSES
from errors import UserError, counted
from metrics.annotations import (
    Annotations,
    corner_note,
    find_labels,
    places,
    plain_number,
    refuse_corners,
    usable_rows,
    with_classes,
)
from metrics.picture_names import PictureFinder
from metrics.tables import DetectionTable, GroundTruth
from metrics.text_files import check_score

Ids = tuple[int | str, ...]


def read_coco(path: Path) -> Annotations:
    """Read ground truth from a COCO JSON file. UserError, with the place in the file, for an invalid value."""
    tree = read_json(path)
    if not isinstance(tree, dict) or not all(isinstance(tree.get(k), list) for k in ("images", "categories")):
        raise UserError(f"{path}: found no lists 'images' and 'categories', expected COCO ground truth")
    rows = tree.get("annotations", [])
    if not isinstance(rows, list):
        raise UserError(f"{path}: annotations: found {short(rows)}, expected a list")
    where = _places(path, "annotations")
    for entries, place in ((rows, where), *((tree[k], _places(path, k)) for k in ("images", "categories"))):
        _check_objects(entries, place)
    log = FaultLog()
    categories = without_root(read_categories(tree["categories"], path), rows, None, path, log)
    category_ids, names = tuple(categories), tuple(entry["name"] for entry in categories.values())
    images, row_of_id = _merge_images(path, *_entries(path, tree, "images"))
    label_of = {category: label for label, category in enumerate(categories)}
    image = [_look_up(row, "image_id", row_of_id, where, n) for n, row in enumerate(rows)]
    labels = [_look_up(row, "category_id", label_of, where, n) for n, row in enumerate(rows)]
    xywh = _read_boxes(rows, where)
    crowd, ignore = (
        np.array([_read(read_flag, row, key, where, n) for n, row in enumerate(rows)], dtype=bool)
        for key in ("iscrowd", "ignore")
    )
    boxes, box_area = _corners(xywh)
    stated_area = [_read(read_area, row, "area", where, n) for n, row in enumerate(rows)]
    area = np.array([own if a is None else a for a, own in zip(stated_area, box_area.tolist())], dtype=np.float64)
    sizes = tuple(read_size(entry.get("width"), entry.get("height")) for entry in images.values())
    refuse_corners(boxes, image, sizes, where, is_centered=False)
    kept, notes = usable_rows(boxes, (image, labels, crowd.tolist(), ignore.tolist(), area.tolist()), where)
    ground_truth = GroundTruth(
        np.array(image, dtype=np.int64)[kept],
        boxes[kept],
        np.array(labels, dtype=np.int64)[kept],
        len(images),
        names,
        crowd[kept],
        (ignore & ~crowd)[kept],
        area[kept],
        box_area[kept],
    )
    pictures, image_ids = tuple(_text(entry, "file_name") for entry in images.values()), tuple(images)
    finder = PictureFinder(pictures, row_of_id)
    number_labels = [places(names), {str(category): label for category, label in label_of.items()}]
    if set(names) <= set(VOC_CLASSES):
        number_labels.append(places(names, VOC_CLASSES))  # VOC's own order, where the file has another
    notes += (*(fault.reason for fault in log.faults), *corner_note(xywh))
    return Annotations(
        ground_truth, pictures, image_ids, finder, sizes, category_ids, tuple(number_labels), "continuous", notes
    )


def _merge_images(path: Path, entries: list[dict], ids: Ids) -> tuple[dict[int | str, dict], dict[int | str, int]]:
    """(id -> entry of each picture, id -> its row). A file with several ids is one picture."""
    images: dict[int | str, dict] = {}
    row_of_id: dict[int | str, int] = {}
    first_of: dict[str | int, int | str] = {}
    for i, entry in zip(ids, entries):
        name = _text(entry, "file_name")
        place = i if name is None else posixpath.normpath(name.replace("\\", "/"))
        first = first_of.setdefault(place, i)
        if first not in images:
            row_of_id[i], images[i] = len(images), entry
            continue
        sizes = [read_size(one.get("width"), one.get("height")) for one in (images[first], entry)]
        if None not in sizes and sizes[0] != sizes[1]:
            found = f"{name!r} has the ids {first!r} and {i!r} and two sizes: {sizes[0]} and {sizes[1]}"
            raise UserError(f"{path}: {found}; expected one picture, or two file names")
        row_of_id[i] = row_of_id[first]
    return images, row_of_id


def read_coco_detections(
    path: Path, annotations: Annotations, notes: list[str] | None = None
) -> tuple[GroundTruth, DetectionTable]:
    """Read detections from COCO results, a list, or from COCO labels with scores: see files.read_detections."""
    tree = read_json(path)
    rows, kind = tree, "results"
    own_pictures: dict[int | str, str | None] = {}
    own_names: dict[int | str, str] = {}
    if isinstance(tree, dict) and isinstance(tree.get("annotations"), list):
        rows, kind = tree["annotations"], "annotations"
        if isinstance(tree.get("images"), list) and isinstance(tree.get("categories"), list):
            # the file has a numbering of its own, so images and classes are joined by their names
            images, image_ids = _entries(path, tree, "images")
            own_pictures = {i: _text(entry, "file_name") for i, entry in zip(image_ids, images)}
            own_names = {i: entry["name"] for i, entry in read_categories(tree["categories"], path).items()}
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {short(tree)}, expected a list of COCO results")
    where = _places(path, kind)
    _check_objects(rows, where)
    image = _find_images(rows, own_pictures, annotations, where, notes)
    ground_truth, labels = _find_labels(rows, own_names, annotations, where, notes)
    xywh = _read_boxes(rows, where)
    boxes, box_area = _corners(xywh)
    refuse_corners(boxes, image, annotations.sizes, where, is_centered=False)
    scores = [_read(read_number, row, "score", where, n) for n, row in enumerate(rows)]
    for n, score in enumerate(scores):
        if not 0 <= score <= 1:
            check_score(score, where(n))
    is_first = _first_of_picture([row.get("image_id") for row in rows], image, labels, xywh, scores)
    if notes is not None:
        notes += corner_note(xywh)
        if not is_first.all():
            found = f"{counted(int((~is_first).sum()), 'detection')} left out: equal to one of the same picture"
            notes.append(f"{found} under another image_id, first: {where(int(is_first.argmin()))}")
    image_column, label_column = np.array(image, dtype=np.int64), np.array(labels, dtype=np.int64)
    columns = image_column, boxes, np.array(scores, dtype=np.float64), label_column, box_area
    return ground_truth, DetectionTable(*(column[is_first] for column in columns))


def _first_of_picture(ids: list, image: list[int], labels: list[int], xywh: np.ndarray, scores: list) -> np.ndarray:
    """(N,) bool: all but the detections that a picture has twice because the ground truth lists it under two ids."""
    id_of_image: dict[int, Any] = {}
    if all(id_of_image.setdefault(row, i) == i for row, i in zip(image, ids)):
        return np.ones(len(ids), dtype=bool)
    id_of: dict[tuple, Any] = {}  # of the first such detection
    rows = zip(image, labels, map(tuple, xywh.tolist()), scores)
    return np.array([id_of.setdefault(row, i) == i for row, i in zip(rows, ids)], dtype=bool)


def _find_images(
    rows: list[dict], own: Mapping, annotations: Annotations, where: Callable[[int], str], notes: list[str] | None
) -> list[int]:
    """The image of each row: by its file_name, by the file_name of its entry in the same file, or by its image_id.

    notes: gets a line where ids could be names of files too.
    """
    names = [_text(row, "file_name") for row in rows]
    keys: list[Any] = [None] * len(rows)
    if None in names:
        keys = [_id(row, "image_id", where, n) for n, row in enumerate(rows)]
        if own:
            _refuse_unknown(keys, own, where, "image_id", "images")
        names = [own.get(key) if name is None else name for name, key in zip(names, keys)]
    if all(name is None for name in names):
        row_of_id = annotations.finder.find_ids(_first(keys, where))
        if notes is not None:
            notes += annotations.finder.names_like_ids(row_of_id)
        return [row_of_id[key] for key in keys]
    if None in names:
        raise UserError(f"{where(names.index(None))}: no file_name, which other rows have, expected all or none")
    row_of_name = annotations.finder.find_names(_first(names, where))
    return [row_of_name[name] for name in names if name is not None]


def _find_labels(
    rows: list[dict],
    own: Mapping,
    annotations: Annotations,
    where: Callable[[int], str],
    notes: list[str] | None,
) -> tuple[GroundTruth, list[int]]:
    """The ground truth, and the class of each row. Where no list declares names, classes of the rows alone are added.

    The class is given by category_name, by the name of the row's category in the same file, or by category_id. If all
    names equal the ids of their rows, the model had no names: they are read as numbers in text are.
    """
    ground_truth = annotations.ground_truth
    texts = [_text(row, "category_name") for row in rows]
    keys = [
        _id(row, "category_id", where, n) if text is None else None for n, (row, text) in enumerate(zip(rows, texts))
    ]
    if own:
        _refuse_unknown(keys, own, where, "category_id", "categories")
        texts = [own[key] if text is None else text for text, key in zip(texts, keys)]
        keys = [None] * len(rows)
    if not annotations.number_labels:
        tokens = [plain_number(str(key) if text is None else text) for text, key in zip(texts, keys)]
        ground_truth = with_classes(ground_truth, _first(tokens, where))
        return ground_truth, [ground_truth.names.index(token) for token in tokens]
    is_unnamed = all(text == str(row.get("category_id")) for text, row in zip(texts, rows))  # as predict.py writes it
    number_labels = annotations.number_labels if is_unnamed else ()
    of_text = find_labels(
        _first(texts, where), ground_truth.names, number_labels, notes, is_listed=annotations.is_listed
    )
    of_id = _labels_of_ids(_first(keys, where), annotations, notes)
    return ground_truth, [of_id[key] if text is None else of_text[text] for text, key in zip(texts, keys)]


def _labels_of_ids(used: dict[Any, str], annotations: Annotations, notes: list[str] | None) -> dict[Any, int]:
    """The label of each category_id. `used`: id -> the place where it stands first.

    An id is COCO's; if the ground truth has none, a number is a position in its list of names and a text is a name.
    """
    ids, number_labels = annotations.category_ids, annotations.number_labels
    if ids is not None:
        of_id = {i: label for label, i in enumerate(ids)}
        if used.keys() <= of_id.keys():
            return of_id
        for key, place in used.items():
            if key not in of_id and not isinstance(key, str):
                raise UserError(f"{place}: category_id: found {key!r}, expected one of the ground truth's")
        number_labels = ({str(i): label for i, label in of_id.items()},)
    tokens = {str(key): place for key, place in used.items()}
    of_token = find_labels(tokens, annotations.ground_truth.names, number_labels, notes)
    return {key: of_token[str(key)] for key in used}


def _entries(path: Path, tree: dict, kind: str) -> tuple[list[dict], Ids]:
    """The images or categories in the order of their ids, and the ids."""
    where, entries = _places(path, kind), tree[kind]
    _check_objects(entries, where)
    ids = [_id(entry, "id", where, n) for n, entry in enumerate(entries)]
    first: dict[int | str, dict] = {}
    for i, entry in zip(ids, entries):
        if first.setdefault(i, entry).get("file_name") != entry.get("file_name"):
            raise UserError(f"{path}: {kind}: id {i!r} is given to two pictures")
    if len({type(i) for i in ids}) > 1:
        raise UserError(f"{path}: {kind}: found numbers and text as ids, expected one kind")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [entries[row] for row in order], tuple(ids[row] for row in order)


def _places(path: Path, kind: str) -> Callable[[int], str]:
    return lambda row: f"{path}: {kind}[{row}]"


def _check_objects(rows: list, where: Callable[[int], str]) -> None:
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where(n)}: found {short(row)}, expected an object")


def _refuse_unknown(keys: Sequence, own: Mapping, where: Callable[[int], str], key: str, kind: str) -> None:
    for n, value in enumerate(keys):
        if value is not None and value not in own:
            raise UserError(f"{where(n)}: {key}: found {value!r}, expected one of the file's {kind}")


def _first(values: Sequence, where: Callable[[int], str]) -> dict[Any, str]:
    """Value -> the place where it stands first, without None."""
    first: dict[Any, int] = {}
    for n, value in enumerate(values):
        first.setdefault(value, n)
    return {value: where(n) for value, n in first.items() if value is not None}


def _text(entry: dict, key: str) -> str | None:
    value = entry.get(key)
    return value if isinstance(value, str) and value else None


def _id(row: dict, key: str, where: Callable[[int], str], n: int) -> int | str:
    return _read(read_id, row, key, where, n)


def _look_up(row: dict, key: str, table: Mapping[int | str, int], where: Callable[[int], str], n: int) -> int:
    value = match_id(row.get(key), table)
    if value is None:
        raise UserError(f"{where(n)}: {key}: found {short(row.get(key))}, expected one of the ids in the file")
    return table[value]


def _read(read: Callable[[Any], Any], row: dict, key: str, where: Callable[[int], str], n: int) -> Any:
    try:
        return read(row.get(key))
    except ValueError as error:
        raise UserError(f"{where(n)}: {key}: {error}") from None


def _read_boxes(rows: list[dict], where: Callable[[int], str]) -> np.ndarray:
    """(N, 4) left, top, width, height."""
    boxes: list[Any] = [row.get("bbox") for row in rows]
    for n, box in enumerate(boxes):
        if not isinstance(box, list) or len(box) != 4:
            raise UserError(f"{where(n)}: bbox: found {short(box)}, expected 4 numbers")
    for n, box in enumerate(boxes):
        try:
            boxes[n] = [read_number(value) for value in box]
        except ValueError:
            raise UserError(f"{where(n)}: bbox: found {short(box)}, expected 4 numbers") from None
    xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    if are_fractions(xywh):
        raise UserError(f"{where(0)}: bbox: found {boxes[0]}, and all boxes lie in 0..1, expected pixels")
    is_inverted = (xywh[:, 2:] < 0).any(axis=1)
    if is_inverted.any():
        n = int(is_inverted.argmax())
        found = f"{where(n)}: bbox: found {boxes[n]}, a box turned inside out"
        raise UserError(f"{found}: expected x, y, width, height with sides of 0 or more")
    return xywh


def _corners(xywh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) left, top, width, height -> corners (N, 4) and area (N,), by pycocotools' order of operations."""
    return np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1), xywh[:, 2] * xywh[:, 3]


def write_coco_detections(
    path: str | Path,
    detections: DetectionTable,
    image_ids: Sequence[int | str],
    category_ids: Sequence[int | str] | None = None,
    *,
    file_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write COCO results JSON for read_detections: image_id, category_id, bbox (x, y, width, height), score.

    file_names: of the images, written beside image_id; read_detections then goes by them.
    names: of the classes, written beside category_id, likewise.
    """
    x1, y1, x2, y2 = detections.boxes_xyxy.T
    columns = (detections.image, detections.labels, x1, y1, x2 - x1, y2 - y1, detections.scores)
    results = []
    for image, label, x, y, width, height, score in zip(*(column.tolist() for column in columns)):
        row = {"image_id": image_ids[image]}
        if file_names:
            row["file_name"] = file_names[image]
        row["category_id"] = category_ids[label] if category_ids else label
        if names:
            row["category_name"] = names[label]
        results.append(row | {"bbox": [x, y, width, height], "score": score})
    try:
        Path(path).write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from None
