"""Ground truth and detections from folders of text files; see metrics.files."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from datasets.folders import is_left_out, list_files
from datasets.images import SUFFIXES, read_size
from datasets.text_lines import read_lines, read_names
from datasets.values import NORM_TOLERANCE, are_fractions, are_normalised, box_fault, read_number
from errors import UserError, counted
from metrics.annotations import (
    Annotations,
    Pixels,
    corner_note,
    find_labels,
    is_number,
    places,
    plain_number,
    refuse_corners,
    sorted_tokens,
    usable_rows,
    with_classes,
)
from metrics.picture_names import PictureFinder
from metrics.tables import DetectionTable, GroundTruth

TextBoxes = Literal["xyxy", "xywh", "cxcywhn"]
TEXT_BOXES = ("xyxy", "xywh", "cxcywhn")
CLASS_LIST = "classes.txt"
ORDER_HINT = "text is read as `class score box`; --score-last takes the last column; "
MOST_NORM = 2.0  # a detection may leave its picture; larger numbers are pixels


@dataclass
class Rows:
    """Boxes of files as parallel lists.

    token: the class as written.
    where: file:line.
    columns: for text files, the numbers behind the class as written.
    """

    image: list[int] = field(default_factory=list)
    token: list[str] = field(default_factory=list)
    box: list[tuple[float, ...]] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    columns: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def used(self) -> dict[str, str]:
        """Class as written -> the place where it stands first."""
        return dict(zip(reversed(self.token), reversed(self.where)))

    def labels(self, label_of: Mapping[str, int]) -> np.ndarray:
        return np.array([label_of[token] for token in self.token], dtype=np.int64)

    def ground_truth(
        self, label_of: Mapping[str, int], num_images: int, names: Sequence[str]
    ) -> tuple[GroundTruth, tuple[str, ...]]:
        """The usable objects, and notes on the others."""
        boxes = np.array(self.box, dtype=np.float64).reshape(-1, 4)
        flags = self.difficult or [False] * len(boxes)
        kept, notes = usable_rows(boxes, (self.image, self.token, flags), lambda row: self.where[row])
        columns = np.array(self.image, dtype=np.int64), boxes, self.labels(label_of), np.array(flags, dtype=bool)
        image, boxes, labels, difficult = (column[kept] for column in columns)
        return GroundTruth(image, boxes, labels, num_images, tuple(names), difficult=difficult), notes


def read_text_ground_truth(
    folder: Path, names: Sequence[str] | None, text_boxes: TextBoxes, images: str | Path | None
) -> Annotations:
    """Read ground truth from a folder of text files. names, text_boxes, images: see files.read_ground_truth."""
    listed = class_list(folder)
    path_of = named_below(folder, text_paths(folder))
    sizes: dict[str, tuple[float, float]] = {}
    alone: list[Path] = []
    if images is not None:
        sizes = picture_sizes(Path(images))
        path_of, alone = by_picture(path_of, tuple(sizes))
    pictures = tuple(sorted(path_of.keys() | sizes.keys()))
    rows = Rows()
    for image, picture in enumerate(pictures):
        if picture in path_of:
            read_text_rows(rows, path_of[picture], image, sizes.get(picture), text_boxes, names=names or listed or ())
    all_sizes = tuple(sizes.get(picture) for picture in pictures)
    check_boxes(rows, text_boxes, "--ground-truth-boxes", all_sizes)
    is_yolo = text_boxes == "cxcywhn"  # the format in which a class is a position in the list of names
    declared = listed if names is None else tuple(names)
    number_labels: tuple[Mapping[str, int], ...] = ()
    if declared is None:
        rows.token = [plain_number(token) for token in rows.token]
        declared = sorted_tokens(rows.token)
        label_of = {name: label for label, name in enumerate(declared)}
    else:
        number_labels = (places(declared),)
        has_places = listed is not None or is_yolo
        if has_places:  # the tokens are names from here on
            name_numbers(rows, listed or declared)
        label_of = find_labels(rows.used, declared, () if has_places else number_labels, is_listed=names is not None)
    ground_truth, notes = rows.ground_truth(label_of, len(pictures), declared)
    if text_boxes == "xywh":
        notes += corner_note(rows.columns, " (--ground-truth-boxes xyxy)")
    if alone:  # left out in training too: the pictures themselves are fine
        notes += (f"{counted(len(alone), 'text file')} without a picture left out, first: {alone[0]}",)
    pixels: Pixels = "continuous" if is_yolo else "as taken"
    finder = PictureFinder(pictures)
    is_listed = names is not None
    return Annotations(
        ground_truth, pictures, pictures, finder, all_sizes, None, number_labels, pixels, notes, is_listed
    )


def read_text_detections(
    folder: Path, annotations: Annotations, text_boxes: TextBoxes, score_last: bool, notes: list[str] | None = None
) -> tuple[GroundTruth, DetectionTable]:
    """Read detections from a folder of text files: see files.read_detections."""
    paths, listed = text_paths(folder), class_list(folder)
    if not paths and any(not is_left_out(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder}: found no .txt files, expected one per image")
    ground_truth = annotations.ground_truth
    names = named_below(folder, paths)
    image_of = annotations.finder.find_names({name: str(path) for name, path in names.items()})
    rows, score_at, class_names = Rows(), -1 if score_last else 0, listed or ground_truth.names
    for name, path in names.items():
        image = image_of[name]
        read_text_rows(rows, path, image, annotations.sizes[image], text_boxes, score_at=score_at, names=class_names)
    check_boxes(rows, text_boxes, "--detection-boxes", annotations.sizes)
    check_order(rows, text_boxes, score_last)
    are_numbers = not annotations.number_labels and all(map(is_number, ground_truth.names))
    if listed is not None and not are_numbers:  # else the numbers of both sides are names
        name_numbers(rows, listed)
    if not annotations.number_labels:
        rows.token = [plain_number(token) for token in rows.token]
        ground_truth = with_classes(ground_truth, rows.used)
    number_labels = annotations.number_labels if listed is None else ()
    label_of = find_labels(
        rows.used, ground_truth.names, number_labels, notes, is_listed=listed is None and annotations.is_listed
    )
    if notes is not None and text_boxes == "xywh":
        values = np.array(rows.columns, dtype=np.float64).reshape(-1, 5)
        notes += corner_note(np.delete(values, score_at, axis=1), " (--detection-boxes xyxy)")
    boxes = np.array(rows.box, dtype=np.float64).reshape(-1, 4)
    image_column, scores = np.array(rows.image, dtype=np.int64), np.array(rows.score, dtype=np.float64)
    return ground_truth, DetectionTable(image_column, boxes, scores, rows.labels(label_of))


def by_picture(path_of: dict[str, Path], pictures: tuple[str, ...]) -> tuple[dict[str, Path], list[Path]]:
    """Return (picture -> its text file, the text files without a picture). path_of: name of a text file -> file."""
    finder = PictureFinder(pictures)
    alone = [path for name, path in path_of.items() if finder.find_name(name, str(path)) is None]
    row_of = finder.find_names({name: str(path) for name, path in path_of.items() if path not in alone})
    return {pictures[row]: path_of[name] for name, row in row_of.items()}, alone


def text_paths(folder: Path) -> list[Path]:
    return [path for path in list_files(folder, (".txt",)) if path.name != CLASS_LIST]


def refuse_beside(folder: Path, xml_paths: Sequence[Path]) -> None:
    """UserError for a text file with boxes that belongs to none of the XML files: half of the set would be left out."""
    stems = {path.stem for path in xml_paths}
    for path in (path for path in text_paths(folder) if path.stem not in stems):
        words: list[str] = []
        with contextlib.suppress(UserError):  # notes may have any encoding
            words = next((line.split() for _, line in read_lines(path)), [])
        if len(words) >= 5 and all(map(_is_text_number, words[-4:])):
            found = f"boxes of a picture without an XML file, beside {len(xml_paths)} VOC XML files"
            raise UserError(f"{path}: {found}; expected one format in {folder}")


def named_below(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
    """Path below the folder without the suffix -> file. UserError for two files of one name (a.txt, a.TXT)."""
    named: dict[str, Path] = {}
    for path in paths:
        other = named.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
        if other != path:
            raise UserError(f"{path}: named as {other.name} is, expected one file for each image")
    return named


def class_list(folder: Path) -> tuple[str, ...] | None:
    """The names in classes.txt, in the folder or below it. UserError where several such files differ."""
    paths = [path for path in list_files(folder, (".txt",)) if path.name == CLASS_LIST]
    lists = {read_names(path): path for path in paths}
    if len(lists) > 1:
        raise UserError(f"{' and '.join(map(str, lists.values()))}: two lists of classes, expected one")
    return next(iter(lists), None)


def name_numbers(rows: Rows, listed: Sequence[str]) -> None:
    """Replace each class number, a position in `listed`, by the name there. UserError for a number beyond the list."""
    for row, token in enumerate(rows.token):
        if is_number(token):
            place = int(plain_number(token))
            if place >= len(listed):
                expected = f"0..{len(listed) - 1}, a place in the list of names"
                raise UserError(f"{rows.where[row]}: found class {token!r}, expected {expected}")
            rows.token[row] = listed[place]


def read_text_rows(
    rows: Rows,
    path: Path,
    image: int,
    size: tuple[float, float] | None,
    text_boxes: TextBoxes,
    *,
    names: Sequence[str],
    score_at: int | None = None,
) -> None:
    """Append the rows of one file. score_at: position of the score in the numbers, 0 or -1; None for ground truth."""
    expected = {None: "class and 4 numbers", 0: "class, score and 4 numbers", -1: "class, 4 numbers and score"}
    count = 4 if score_at is None else 5
    for number, line in read_lines(path):
        words, where = line.split(), f"{path}:{number}"
        name, texts = words[:-count], words[-count:]
        token = " ".join(name)
        is_class = len(name) == 1 or token in names or not any(map(_is_text_number, name))  # a name may have spaces
        if not name or not is_class:
            raise UserError(f"{where}: found {counted(len(words), 'column')}, expected {expected[score_at]}")
        values = list(read_numbers(texts, where))
        rows.columns.append(tuple(values))
        if score_at is not None:
            rows.score.append(check_score(values.pop(score_at), where, ORDER_HINT))
        if text_boxes == "cxcywhn":
            if size is None:
                raise UserError(f"{where}: boxes are fractions of an image of unknown size: name the folder of images")
            is_far = any(not 1 - MOST_NORM <= value <= MOST_NORM for value in values)
            if is_far or (score_at is None and not are_normalised(values, *size)):
                raise UserError(f"{where}: not normalised: {' '.join(texts)}, expected fractions of the picture, 0..1")
        rows.image.append(image)
        rows.token.append(token)
        rows.box.append(_corners(values, text_boxes, size))
        rows.where.append(where)


def _corners(values: Sequence[float], text_boxes: TextBoxes, size: tuple[float, float] | None) -> tuple[float, ...]:
    """The corners xyxy of a box in pixels. size: of the picture, which fractions need."""
    a, b, c, d = values
    if text_boxes == "xyxy":
        return a, b, c, d
    if text_boxes == "xywh":
        return a, b, a + c, b + d
    assert size is not None
    width, height = size
    return (a - c / 2) * width, (b - d / 2) * height, (a + c / 2) * width, (b + d / 2) * height


def check_score(score: float, where: str, hint: str = "") -> float:
    """The score. UserError, with the hint in its parentheses, for a score outside 0..1."""
    if not 0 <= score <= 1:
        raise UserError(f"{where}: score: found {score:.9g}, expected 0 to 1 ({hint}percents are to be divided by 100)")
    return score


def check_boxes(rows: Rows, text_boxes: TextBoxes, option: str, sizes: Sequence[tuple[float, float] | None]) -> None:
    """UserError for fractions in a format of pixels, a box turned inside out, and corners read as a point and a size.

    sizes: (width, height) of each image, None where unknown.
    """
    values = np.array([columns[-4:] for columns in rows.columns]).reshape(-1, 4)
    if text_boxes != "cxcywhn" and are_fractions(values):
        also = ", for text of predict.py also --score-last" if option == "--detection-boxes" else ""
        raise UserError(
            f"{rows.where[0]}: all boxes lie in 0..1, expected pixels (for fractions: {option} cxcywhn{also})"
        )
    for box, where in zip(rows.box, rows.where):
        fault = box_fault(*box)
        if fault is not None and fault[1] != "zero-size box":
            raise UserError(f"{where}: {fault[0]}, expected left <= right and top <= bottom ({option} is {text_boxes})")
    if text_boxes != "xyxy":
        boxes = np.array(rows.box, dtype=np.float64).reshape(-1, 4)
        refuse_corners(boxes, rows.image, sizes, lambda n: rows.where[n], is_centered=text_boxes == "cxcywhn")


def check_order(rows: Rows, text_boxes: TextBoxes, score_last: bool) -> None:
    """UserError where the boxes (fractions) lie in their pictures only with the score at the other end of the row."""
    if text_boxes != "cxcywhn" or not rows.columns:
        return

    def stick_out(values: np.ndarray) -> np.ndarray:
        low, high = values[:, :2] - values[:, 2:] / 2, values[:, :2] + values[:, 2:] / 2
        return np.any((low < -NORM_TOLERANCE) | (high > 1 + NORM_TOLERANCE), axis=1)

    columns = np.array(rows.columns)
    read, other = (columns[:, :4], columns[:, 1:]) if score_last else (columns[:, 1:], columns[:, :4])
    if stick_out(read).any() and not stick_out(other).any():
        where = rows.where[int(stick_out(read).argmax())]
        found, hint = ("class box score", "without") if score_last else ("class score box", "with")
        raise UserError(f"{where}: read as `{found}`, the box leaves its picture: expected it {hint} --score-last")


def read_numbers(texts: Sequence[str | None], where: str) -> tuple[float, ...]:
    try:
        return tuple(read_number(text) for text in texts)
    except ValueError:
        raise UserError(f"{where}: found {' '.join(map(str, texts))!r}, expected finite numbers") from None


def _is_text_number(word: str) -> bool:
    try:
        return math.isfinite(read_number(word))
    except ValueError:
        return False


def picture_sizes(folder: Path) -> dict[str, tuple[float, float]]:
    """Path of a picture below the folder -> width and height of the upright picture, from its header."""
    paths = list_files(folder, SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder}: found no pictures, expected the folder of images")
    return {path.relative_to(folder).as_posix(): read_size(path) for path in paths}
