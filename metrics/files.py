"""Ground truth and detections from files in the usual formats, for evaluation without a model.

Ground truth                                   Detections
    COCO JSON (images, annotations,                COCO results JSON: a list of image_id, category_id, bbox (x, y,
        categories)                                    width, height), score; or a COCO JSON with scores
    a folder of Pascal VOC XML files               a folder of text files, one per image: `class score box` (or
    a folder of text files, one per image:             `class box score`); an image without a file has none
        `class box`

Folders are read with their subfolders by the rules of datasets/ (datasets.folders); flags, numbers and boxes too
(datasets.values). A value without a meaning is a UserError with its file and line: a flag that is neither yes nor no,
a score outside 0..1, a box turned inside out. Objects whose box has no width or no height, and repeated objects, are
left out and noted, as in training. A picture with several ids is one picture, and a category that only groups others
is no class (datasets.coco).

The image of a detection is found by its name (metrics.picture_names): the name of the text file, or `file_name` of the
JSON row, which predict.py writes. Rows without it have image_id.

Text boxes are xyxy (corners) or xywh (left, top, width, height) in pixels, or cxcywhn (center and size as fractions of
the image).

The class of a JSON row is its `category_name`, else its category_id, COCO's own or a position. In text it is a name or
a number. A number is a position 0.. in classes.txt beside the text files, which predict.py writes; without that file,
in the names of the ground truth. Those names are the given list, else

    COCO    the categories by rising id; also the 20 VOC names, if they include all categories
    VOC     classes.txt; else the 20 VOC names in alphabetical order, if they include all classes; else the sorted names
    text    classes.txt in the folder; else the sorted classes in the files, where a number is a name

A number that may be two classes is refused: a name of digits and a position, positions in two lists, a position and
COCO's id. --names and classes.txt choose the list, and numbers are then positions in it. A number is also refused where
no list is known.

Coordinates are taken as written. The caller decides whether they are continuous or inclusive pixels
(tables.inclusive_to_continuous); annotations.Annotations.pixels is the usual choice for the format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets import text_lines
from datasets.folders import list_files
from datasets.values import are_fractions, box_fault, read_flag
from datasets.voc import CLASSES
from datasets.voc_xml import Object, read_annotation
from datasets.yolo_txt import yaml_names
from errors import UserError, expect
from metrics.annotations import Annotations, find_labels, places
from metrics.coco_files import read_coco, read_coco_detections
from metrics.picture_names import PictureFinder
from metrics.tables import DetectionTable, GroundTruth
from metrics.text_files import (
    CLASS_LIST,
    Rows,
    TextBoxes,
    named_below,
    read_numbers,
    read_text_detections,
    read_text_ground_truth,
    refuse_beside,
    text_paths,
)
from yaml_files import read_mapping


def read_ground_truth(
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    text_boxes: TextBoxes | None = None,
    images: str | Path | None = None,
) -> Annotations:
    """Ground truth of a COCO JSON file, a folder of VOC XML files or a folder of text files.

    UserError for text_boxes and images beside JSON or XML, which have one form of boxes and state their pictures.

    Args:
        names: the class names, for VOC and text; for COCO the list in which numbers in text detections are positions.
        text_boxes: the form of boxes in text files; None: xywh.
        images: the folder of the pictures; gives sizes (for cxcywhn) and the images that have no text file.
    """
    path = Path(path)
    of_text = {"--ground-truth-boxes": text_boxes, "--images": images}
    if path.is_dir():
        if xml_paths := list_files(path, (".xml",)):
            _refuse_given(path, "VOC XML", of_text)
            refuse_beside(path, xml_paths)
            return _read_voc(path, xml_paths, names)
        if text_paths(path):
            return read_text_ground_truth(path, names, text_boxes or "xywh", images)
        raise UserError(f"{path}: found neither .xml nor .txt files, expected annotations")
    _refuse_given(path, "JSON", of_text)
    annotations = read_coco(path)
    if names is None:
        return annotations
    number_labels = (places(annotations.ground_truth.names, names),)
    return replace(annotations, number_labels=number_labels, is_listed=True)


def read_detections(
    path: str | Path,
    annotations: Annotations,
    *,
    text_boxes: TextBoxes | None = None,
    score_last: bool = False,
    notes: list[str] | None = None,
) -> tuple[GroundTruth, DetectionTable]:
    """The ground truth to compare with, and the detections of a COCO JSON file or a folder of text files.

    The ground truth is that of `annotations`. If no list declares its names, classes that only the detections have are
    added. text_boxes: the form of boxes in text files; None: xyxy. notes: gets a line on class numbers, whose order
    only the user can check. UserError for an image or class that the ground truth does not have, or that may be two,
    and for text_boxes and score_last beside JSON, whose boxes have one form.
    """
    path = Path(path)
    if path.is_dir():
        return read_text_detections(path, annotations, text_boxes or "xyxy", score_last, notes)
    _refuse_given(path, "JSON", {"--detection-boxes": text_boxes, "--score-last": score_last or None})
    return read_coco_detections(path, annotations, notes)


def _refuse_given(path: Path, kind: str, flags: Mapping[str, object]) -> None:
    """UserError for a flag about text files (with a value) beside a file of another kind, which would not read it."""
    for flag, value in flags.items():
        expect(value is None, flag, f"{value} for {path}, which is {kind}", "none: it is for text files")


def read_names(path: str | Path) -> tuple[str, ...]:
    """Class names: one a line, or the `names` of a YAML file (a list, or numbers 0.. to names; `nc` alone numbers)."""
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return text_lines.read_names(path)
    return yaml_names(read_mapping(path, "the key names", as_text=True), path)


def _read_voc(folder: Path, paths: Sequence[Path], names: Sequence[str] | None) -> Annotations:
    """Read ground truth from XML files. names: of the classes; None: see the head of this file."""
    rows, sizes, stated = Rows(), [], []
    for image, path in enumerate(paths):
        annotation = read_annotation(path)
        sizes.append(annotation.size)
        stated.append(annotation.filename or None)
        for item in annotation.objects:
            _add_object(rows, item, image, f"{path}:{item.line}")
    if are_fractions(np.array(rows.box).reshape(-1, 4)):
        raise UserError(f"{rows.where[0]}: all boxes lie in 0..1, expected pixels")
    found, is_given = tuple(sorted(set(rows.token))), names is not None
    class_list = next((p for p in (folder / CLASS_LIST, folder.parent / CLASS_LIST) if p.is_file()), None)
    if names is None and class_list is not None:
        names = text_lines.read_names(class_list)
    if names is None and set(found) <= set(CLASSES):
        names = tuple(CLASSES)
        number_labels = [places(names), places(names, found)]  # a number may be a position in either
    else:
        names = found if names is None else tuple(names)
        number_labels = [places(names)]
    ground_truth, notes = rows.ground_truth(find_labels(rows.used, names, ()), len(paths), names)
    pictures = tuple(named_below(folder, paths))
    finder = PictureFinder(pictures, other_names=stated)
    mappings = tuple(number_labels)
    return Annotations(
        ground_truth, pictures, pictures, finder, tuple(sizes), None, mappings, "inclusive", notes, is_given
    )


def _add_object(rows: Rows, item: Object, image: int, where: str) -> None:
    """Append an object of an XML file. UserError if its name, box or difficult flag cannot be read."""
    if not item.name:
        raise UserError(f"{where}: object without a name")
    corners = read_numbers([item.fields.get(key) for key in ("xmin", "ymin", "xmax", "ymax")], where)
    fault = box_fault(*corners)
    if fault is not None and fault[1] != "zero-size box":
        raise UserError(f"{where}: {fault[0]}, expected xmin < xmax and ymin < ymax")
    try:
        rows.difficult.append(read_flag(item.fields.get("difficult")))
    except ValueError as error:
        raise UserError(f"{where}: difficult: {error}") from None
    rows.image.append(image)
    rows.token.append(item.name)
    rows.box.append(corners)
    rows.where.append(where)
