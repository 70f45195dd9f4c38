"""The common result of the readers of ground truth, and the rules for class names and numbers in detections."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from datasets.values import are_corners, far_past, fit_as_corners
from errors import UserError, counted, shortened
from metrics.picture_names import PictureFinder
from metrics.tables import GroundTruth

Pixels = Literal["inclusive", "as taken", "continuous"]


@dataclass(frozen=True)
class Annotations:
    """Ground truth from files, and all that is needed to find the image and the class of a detection in it.

    pictures: the name of each image's picture: its path below the folder without the suffix, or COCO's file_name; None
        where a COCO file has no name.
    image_ids: COCO's id of each image; for other formats the same as `pictures`.
    finder: finds the row of an image by its name or its id.
    sizes: (width, height) of each image in pixels; None where the files do not give it.
    category_ids: the classes' COCO ids; None for other formats.
    number_labels: number in detections (as text) -> label. The number is a position in a list of names, or a COCO id.
        Several mappings where the files allow several; none where no list declares the names: the names are then the
        classes found in the files, and a number is a name.
    pixels: "inclusive" where boxes hold their first and last pixel (VOC XML); "as taken" where VOC evaluators read them
        so and others do not (text in pixels); else "continuous".
    notes: what was left out, a line each.
    is_listed: whether the caller gave the list of names, in which numbers are positions.
    """

    ground_truth: GroundTruth
    pictures: tuple[str | None, ...]
    image_ids: tuple[int | str, ...]
    finder: PictureFinder
    sizes: tuple[tuple[float, float] | None, ...]
    category_ids: tuple[int | str, ...] | None
    number_labels: tuple[Mapping[str, int], ...]
    pixels: Pixels
    notes: tuple[str, ...] = ()
    is_listed: bool = False


def edge_note(ground_truth: GroundTruth, sizes: Sequence[tuple[float, float] | None]) -> tuple[str, ...]:
    """A note on objects that pass the edge of their picture by more than a pixel, where its size is known."""
    limits, boxes = _sides(ground_truth.image, sizes), ground_truth.boxes_xyxy
    known = np.isfinite(limits).all(axis=1)
    is_past = known & ((boxes[:, :2] < -1) | (boxes[:, 2:] > limits + 1)).any(axis=1)
    if not is_past.any():
        return ()
    found = f"{int(is_past.sum())} of {len(boxes)} objects pass the edge of their picture"
    return (f"{found}; taken as they are, where training and the evaluation of a checkpoint cut them",)


def corner_note(columns: Sequence[Sequence[float] | np.ndarray] | np.ndarray, hint: str = "") -> tuple[str, ...]:
    """A note on boxes (N, 4) that are read as left, top, width, height, where all would be boxes as corners too."""
    values = np.array(columns, dtype=np.float64).reshape(-1, 4)
    if len(values) == 0 or (values[:, 2:] <= values[:, :2]).any():
        return ()
    return (f"boxes read as left, top, width, height; each would be one as left, top, right, bottom too{hint}",)


def refuse_corners(
    boxes_xyxy: np.ndarray,
    image: Sequence[int],
    sizes: Sequence[tuple[float, float] | None],
    where: Callable[[int], str],
    *,
    is_centered: bool,
) -> None:
    """UserError where boxes (N, 4) that were read as a point and a size are corners (datasets.values.are_corners).

    image: of each box. sizes: of each image; boxes in an image of unknown size are not judged.
    where: row -> its place in the file. is_centered: the point is the center, else the left top corner.
    """
    sides = _sides(image, sizes)
    is_far = far_past(boxes_xyxy, sides)
    fits = is_far & fit_as_corners(boxes_xyxy, sides, is_centered=is_centered)
    if are_corners(int(is_far.sum()), int(fits.sum()), len(boxes_xyxy)):
        first = where(int(fits.argmax()))
        expected = f"{'center' if is_centered else 'left, top'}, width and height: those far outside fit as corners"
        raise UserError(
            f"{first}: {int(is_far.sum())} of {len(fits)} boxes leave their image, this one first; expected {expected}"
        )


def _sides(image: Sequence[int] | np.ndarray, sizes: Sequence[tuple[float, float] | None]) -> np.ndarray:
    """(N, 2): width and height of the image of each box; infinite where unknown."""
    known = [(np.inf, np.inf) if size is None else size for size in sizes]
    return np.array(known, dtype=np.float64).reshape(-1, 2)[np.asarray(image, dtype=np.int64)]


def is_number(token: str) -> bool:
    """Whether a class is written as a number: 3, 03 or, from numpy, 3.0."""
    return re.fullmatch(r"[0-9]{1,9}(\.0*)?", token) is not None


def plain_number(token: str) -> str:
    """`03` and `3.0` become `3`; a name stays unchanged."""
    return str(int(float(token))) if is_number(token) else token


def find_labels(
    used: Mapping[str, str],
    names: Sequence[str],
    number_labels: Sequence[Mapping[str, int]],
    notes: list[str] | None = None,
    *,
    is_listed: bool = False,
) -> dict[str, int]:
    """The label of each class token. `used`: token -> the place where it stands first.

    A token is one of `names`, or a number in one of `number_labels`. If numbers can be names as well as positions, one
    rule is taken that fits all of them; beside tokens that are words it is the names. UserError if two rules fit and
    give different labels, and for a token that fits none. notes: gets a line on numbers that are not names.
    is_listed: the caller gave the list, so numbers without words beside them are positions in it where they can be.
    """
    by_name = {name: label for label, name in enumerate(names)}
    numbers = {token: plain_number(token) for token in used if is_number(token)}
    for token, place in used.items():
        if token not in numbers and token not in by_name:
            raise UserError(f"{place}: found class {token!r}, expected {_expected(token, names, number_labels)}")
    has_words = len(numbers) < len(used)
    as_names = [{token: by_name[token] for token in numbers}] if by_name.keys() >= numbers.keys() else []
    as_places = [
        {token: label_of[number] for token, number in numbers.items()}
        for label_of in number_labels
        if label_of.keys() >= set(numbers.values())
    ]
    if as_names and has_words:
        fitting = as_names
    elif is_listed and as_places and len(as_places) == len(number_labels):
        fitting = as_places
    else:
        fitting = as_names + as_places
    if not fitting:
        unknown = [t for t, n in numbers.items() if t not in by_name and not any(n in of for of in number_labels)]
        token = [*unknown, *numbers][0]
        raise UserError(f"{used[token]}: found class {token!r}, expected {_expected(token, names, number_labels)}")
    first, *others = fitting
    for other in others:
        for token in numbers:
            if first[token] != other[token]:
                both = f"{names[first[token]]!r} and {names[other[token]]!r}"
                raise UserError(
                    f"{used[token]}: class {token!r} may be {both}: expected the names of classes, or the list that "
                    "the numbers are places in: classes.txt beside the text files, or --names FILE"
                )
    if notes is not None and any(names[label] != number for number, label in first.items()):
        in_order = sorted(first, key=lambda number: int(plain_number(number)))
        notes.append(f"numbers of classes are read as {shortened(f'{n} = {names[first[n]]}' for n in in_order)}")
    return {token: by_name[token] for token in used if token not in first} | first


def places(names: Sequence[str], listed: Sequence[str] | None = None) -> dict[str, int]:
    """Position in `listed` (default: in `names`), as text -> label in `names`."""
    label = {name: k for k, name in enumerate(names)}
    return {str(k): label[name] for k, name in enumerate(listed or names) if name in label}


def _expected(token: str, names: Sequence[str], number_labels: Sequence[Mapping[str, int]]) -> str:
    shown = shortened(names)
    if not number_labels:
        return f"one of {shown}" + (" (for numbers, name the classes: --names FILE)" if is_number(token) else "")
    return f"one of {shown}, or the place in that list, 0..{max(map(len, number_labels)) - 1}"


def sorted_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    """The different classes: numbers by value, then names."""
    return tuple(sorted(set(tokens), key=lambda t: (0, int(t), t) if is_number(t) else (1, 0, t)))


def with_classes(ground_truth: GroundTruth, found: Mapping[str, str]) -> GroundTruth:
    """The ground truth, with the classes of the detections added. UserError where the two have none in common.

    found: class of the detections -> the place where it stands first.
    """
    old = ground_truth.names
    if old and found and not set(old) & found.keys():
        token = next(iter(found))
        raise UserError(
            f"{found[token]}: found class {token!r}, and none of the ground truth's, {shortened(old)}: expected "
            "the same classes on both sides (name them: --names FILE)"
        )
    names = sorted_tokens([*old, *found])
    moved = np.array([names.index(name) for name in old], dtype=np.int64)
    return replace(ground_truth, names=names, labels=moved[ground_truth.labels])


def usable_rows(
    boxes_xyxy: np.ndarray, columns: Sequence[Sequence], where: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) bool: the objects that datasets/ also keeps; and notes on the others.

    Kept are boxes with a width and a height, and the first of rows that are equal in the box and all `columns`.
    where: row -> its place in the file.
    """
    has_size = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
    keys = list(zip(map(tuple, boxes_xyxy.tolist()), *columns))
    first: dict[tuple, int] = {}
    is_first = np.array([first.setdefault(key, row) == row for row, key in enumerate(keys)], dtype=bool)
    notes = []
    for reason, is_out in (("zero-size box", ~has_size), ("equal to another in all", has_size & ~is_first)):
        if count := int(is_out.sum()):
            notes.append(f"{counted(count, 'object')} left out: {reason}, first: {where(int(is_out.argmax()))}")
    return has_size & is_first, tuple(notes)
