"""Ground truth and detections from the files people have, for evaluation without a model.

Ground truth                                   Detections
    COCO JSON (images, annotations,                COCO results JSON: a list of image_id, category_id, bbox (x, y,
        categories)                                    width, height), score; or a COCO JSON with scores
    a folder of Pascal VOC XML files               a folder of text files, one per image: `class score box` (or
    a folder of text files, one per image:             `class box score`); an image without a file has none
        `class box`

Text boxes are xyxy (corners), xywh (left, top, width, height), both in pixels, or cxcywhn (center and size as a
fraction of the image). A class is a name or a number: a place 0.. in the list of names, which is, in this order of
preference, the list given; the COCO categories by rising id; for VOC the 20 VOC names in alphabetical order, where
all classes are among those, else the sorted names; for text, `classes.txt` in the folder, else the sorted classes
met, each number standing for itself.

Coordinates are taken as written. Whether they are continuous or inclusive pixels is for the caller to know
(tables.inclusive_to_continuous); annotations.Annotations.inclusive_pixels says what is usual for the format.
"""

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from errors import UserError
from metrics.annotations import Annotations, read_text, size_of
from metrics.coco_files import read_coco, read_coco_detections
from metrics.tables import DetectionTable, GroundTruth
from yaml_files import read_yaml

VOC_NAMES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor".split()
)
TextBoxes = Literal["xyxy", "xywh", "cxcywhn"]
TEXT_BOXES = ("xyxy", "xywh", "cxcywhn")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


@dataclass
class Rows:
    """Boxes as a file holds them: parallel lists, the class as written; one `where` (file:line) per row."""

    image: list[int] = field(default_factory=list)
    token: list[str] = field(default_factory=list)
    box: list[tuple[float, ...]] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    where: list[str] = field(default_factory=list)


def read_ground_truth(
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    text_boxes: TextBoxes = "xywh",
    images: str | Path | None = None,
) -> Annotations:
    """Ground truth of a COCO JSON file, a folder of VOC XML files or a folder of text files.

    Args:
        names: the class names, for VOC and text.
        text_boxes: how text files hold boxes.
        images: the folder of the pictures: gives sizes (for cxcywhn) and the images that have no text file.
    """
    path = Path(path)
    if path.is_dir():
        if any(path.glob("*.xml")):
            return _read_voc(path, names)
        if any(path.glob("*.txt")):
            return _read_text_ground_truth(path, names, text_boxes, images)
        raise UserError(f"{path}: found neither .xml nor .txt files, expected annotations")
    return read_coco(path)


def read_detections(
    path: str | Path,
    annotations: Annotations,
    *,
    text_boxes: TextBoxes = "xyxy",
    score_last: bool = False,
) -> tuple[GroundTruth, DetectionTable]:
    """Detections of a COCO JSON file or a folder of text files, and the ground truth they are to be held against.

    The ground truth is that of `annotations`, except that classes met only in the detections are added to names that
    were not declared. UserError for an image or class that the ground truth does not have.
    """
    path = Path(path)
    if path.is_dir():
        return _read_text_detections(path, annotations, text_boxes, score_last)
    return annotations.ground_truth, read_coco_detections(path, annotations)


def read_names(path: str | Path) -> tuple[str, ...]:
    """Class names: one a line, or the `names` of a YAML file (a list, or numbers 0.. to names)."""
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        tree = read_yaml(path, as_text=True)
        names = tree.get("names") if isinstance(tree, dict) else None
        if isinstance(names, dict) and sorted(names, key=str) == sorted(map(str, range(len(names)))):
            names = [names[str(i)] for i in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: found no list under the key 'names', expected class names")
    else:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"{path}: found {len(names)} names, {len(set(names))} different, expected each class once")
    return tuple(names)


# ------------------------------------------------------------------------------------------------------ Pascal VOC XML


class _PlainTree(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, and with it every entity an XML file could define."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("found a DOCTYPE, expected plain VOC XML")


def _read_voc(folder: Path, names: Sequence[str] | None) -> Annotations:
    paths = sorted(folder.glob("*.xml"))
    rows, sizes = Rows(), []
    for image, path in enumerate(paths):
        try:
            root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_PlainTree()))
        except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
            raise UserError(f"{path}: not a VOC annotation: {error}") from None
        sizes.append(size_of(root.findtext("size/width"), root.findtext("size/height")))
        for n, node in enumerate(root.iter("object")):
            where = f"{path}: object {n}"
            corners = tuple(node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
            rows.image.append(image)
            rows.token.append((node.findtext("name") or "").strip())
            rows.box.append(_numbers(corners, where))
            rows.difficult.append((node.findtext("difficult") or "0").strip() not in ("0", ""))
            rows.where.append(where)
    if names is None:
        found = set(rows.token)
        names = VOC_NAMES if found <= set(VOC_NAMES) else tuple(sorted(found))
    stems = tuple(path.stem for path in paths)
    return _annotations(rows, stems, tuple(sizes), names, names_are_closed=True, inclusive_pixels=True)


# ---------------------------------------------------------------------------------------------------------- text files


def _read_text_ground_truth(
    folder: Path, names: Sequence[str] | None, text_boxes: TextBoxes, images: str | Path | None
) -> Annotations:
    paths = {path.stem: path for path in _text_paths(folder)}
    pictures = _picture_sizes(Path(images)) if images is not None else {}
    stems = tuple(sorted(paths.keys() | pictures.keys()))
    sizes = tuple(pictures.get(stem) for stem in stems)
    rows = Rows()
    for image, stem in enumerate(stems):
        if stem in paths:
            _read_text_rows(rows, paths[stem], image, sizes[image], text_boxes, None)
    if names is None and (folder / "classes.txt").is_file():
        names = read_names(folder / "classes.txt")
    is_closed = names is not None
    names = names if is_closed else _sorted_tokens(rows.token)
    inclusive = text_boxes != "cxcywhn"
    return _annotations(rows, stems, sizes, names, names_are_closed=is_closed, inclusive_pixels=inclusive)


def _read_text_detections(
    folder: Path, annotations: Annotations, text_boxes: TextBoxes, score_last: bool
) -> tuple[GroundTruth, DetectionTable]:
    image_row = {stem: row for row, stem in enumerate(annotations.stems)}
    image_row |= {str(i): row for row, i in enumerate(annotations.image_ids)}
    rows = Rows()
    paths = _text_paths(folder)
    if not paths and any(folder.iterdir()):
        raise UserError(f"{folder}: found no .txt files, expected one per image")
    for path in paths:
        if path.stem not in image_row:
            raise UserError(f"{path}: no image of the ground truth is called {path.stem!r}")
        image = image_row[path.stem]
        _read_text_rows(rows, path, image, annotations.sizes[image], text_boxes, -1 if score_last else 1)
    ground_truth = annotations.ground_truth
    if not annotations.names_are_closed:
        old = ground_truth.names
        names = _sorted_tokens([*old, *rows.token])
        moved = np.array([names.index(name) for name in old], dtype=np.int64)
        ground_truth = replace(ground_truth, names=names, labels=moved[ground_truth.labels])
    labels = _labels(rows, ground_truth.names)
    return ground_truth, DetectionTable(rows.image, np.array(rows.box).reshape(-1, 4), rows.score, labels)


def _text_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.txt") if path.name != "classes.txt")


def _read_text_rows(
    rows: Rows, path: Path, image: int, size: tuple[float, float] | None, text_boxes: TextBoxes, score_at: int | None
) -> None:
    """Append the rows of one file; score_at: the column of the score, None for ground truth."""
    expected = {None: "class and 4 numbers", 1: "class, score and 4 numbers", -1: "class, 4 numbers and score"}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        columns = line.split()
        if not columns:
            continue
        where = f"{path}:{number}"
        if len(columns) != (5 if score_at is None else 6):
            raise UserError(f"{where}: found {len(columns)} columns, expected {expected[score_at]}")
        if score_at is not None:
            rows.score += _numbers((columns.pop(score_at),), where)
        a, b, c, d = _numbers(tuple(columns[1:]), where)
        if text_boxes == "cxcywhn":
            if size is None:
                raise UserError(f"{where}: boxes are fractions of an image of unknown size: name the folder of images")
            width, height = size
            a, b, c, d = (a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height
        elif text_boxes == "xywh":
            c, d = a + c, b + d
        rows.image.append(image)
        rows.token.append(str(int(columns[0])) if columns[0].isdecimal() else columns[0])
        rows.box.append((a, b, c, d))
        rows.where.append(where)


def _picture_sizes(folder: Path) -> dict[str, tuple[float, float]]:
    """stem -> width and height of the upright picture (EXIF applied), from the headers."""
    from PIL import Image, UnidentifiedImageError

    sizes = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            try:
                with Image.open(path) as picture:
                    turned = picture.getexif().get(0x0112, 1) >= 5  # the orientations that swap the sides
                    sizes[path.stem] = picture.size[::-1] if turned else picture.size
            except (UnidentifiedImageError, OSError) as error:
                raise UserError(f"{path}: not a picture: {error}") from None
    if not sizes:
        raise UserError(f"{folder}: found no pictures, expected the folder of images")
    return sizes


# ------------------------------------------------------------------------------------------------------------- shared


def _annotations(rows: Rows, stems, sizes, names, *, names_are_closed: bool, inclusive_pixels: bool) -> Annotations:
    ground_truth = GroundTruth(
        rows.image,
        np.array(rows.box, dtype=np.float64).reshape(-1, 4),
        _labels(rows, tuple(names)),
        len(stems),
        tuple(names),
        difficult=rows.difficult or None,
    )
    return Annotations(ground_truth, stems, stems, sizes, None, names_are_closed, inclusive_pixels)


def _labels(rows: Rows, names: tuple[str, ...]) -> np.ndarray:
    """Class tokens -> labels: a name, or else a place in the names."""
    label = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    for token, where in zip(rows.token, rows.where):
        if token not in label:
            raise UserError(f"{where}: found class {token!r}, expected a name or number 0..{len(names) - 1} of {names}")
    return np.array([label[token] for token in rows.token], dtype=np.int64)


def _sorted_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """The different classes: numbers by value, then names."""
    return tuple(sorted(set(tokens), key=lambda t: (0, int(t), t) if t.isdecimal() else (1, 0, t)))


def _numbers(texts: Sequence[str | None], where: str) -> tuple[float, ...]:
    try:
        values = tuple(float(text) for text in texts)
    except (TypeError, ValueError):
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where}: found {' '.join(map(str, texts))!r}, expected finite numbers")
    return values
