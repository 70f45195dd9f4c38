"""What every reader of ground truth returns, and how class names and numbers of detections are understood."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from errors import UserError
from metrics.picture_names import PictureFinder
from metrics.tables import GroundTruth


@dataclass(frozen=True)
class Annotations:
    """Ground truth read from files, and what detections need to find their image and class in it.

    pictures: of each image the name of its picture: its path below the folder without the suffix, or COCO's file_name;
        None where a COCO file gives none.
    image_ids: of each image COCO's id; for other formats the same as `pictures`.
    finder: finds the row of an image by its name or its id.
    sizes: (width, height) of each image in pixels, None where the files do not say.
    category_ids: the classes' COCO ids, None for other formats.
    readings: what class numbers in detections may mean, number (as text) -> label: places in a list of names, or COCO's
        ids. Two where the files allow two; none where the names were not declared but are what the files happened to
        hold (numbers then stand for themselves).
    pixels: "inclusive" where the format holds first and last pixels (VOC XML); "as taken" where it is taken so by VOC
        evaluators and not by others (text in pixels); else "continuous".
    notes: what was left out, a line each.
    """

    ground_truth: GroundTruth
    pictures: tuple[str | None, ...]
    image_ids: tuple[int | str, ...]
    finder: PictureFinder
    sizes: tuple[tuple[float, float] | None, ...]
    category_ids: tuple[int | str, ...] | None
    readings: tuple[Mapping[str, int], ...]
    pixels: Literal["inclusive", "as taken", "continuous"]
    notes: tuple[str, ...] = ()


def is_number(token: str) -> bool:
    """Whether a class is written as a number: 3, 03 or, as numpy writes it, 3.0."""
    return re.fullmatch(r"[0-9]{1,9}(\.0*)?", token) is not None


def plain_number(token: str) -> str:
    """`03` and `3.0` are `3`; a name stays as it is."""
    return str(int(float(token))) if is_number(token) else token


def find_labels(used: Mapping[str, str], names: Sequence[str], readings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The label of each class token; `used` says where each was met first.

    A token is one of `names`, or a number as one of `readings` has it. Numbers that are names as well as places are
    taken as the one that all of them can be, names where words stand beside them. UserError where both are possible
    and differ, and for a token that is neither.
    """
    by_name = {name: label for label, name in enumerate(names)}
    numbers = [token for token in used if is_number(token)]
    word = next((token for token in used if not is_number(token) and token not in by_name), None)
    if word is not None:
        raise UserError(f"{used[word]}: found class {word!r}, expected {_expected(word, names, readings)}")
    choices = [{token: by_name[token] for token in numbers if token in by_name}]
    if len(numbers) == len(used) or len(choices[0]) < len(numbers):
        choices += [
            {t: reading[plain_number(t)] for t in numbers if plain_number(t) in reading} for reading in readings
        ]
    choices = [choice for choice in choices if len(choice) == len(numbers)]
    if not choices:
        unknown = (t for t in numbers if t not in by_name and not any(plain_number(t) in r for r in readings))
        token = next(unknown, numbers[0])
        raise UserError(f"{used[token]}: found class {token!r}, expected {_expected(token, names, readings)}")
    first = choices[0]
    other = next((choice for choice in choices if choice != first), first)
    token = next((token for token in numbers if first[token] != other[token]), None)
    if token is not None:
        both = f"{names[first[token]]!r} and {names[other[token]]!r}"
        raise UserError(
            f"{used[token]}: class {token!r} may be {both}: expected the names of classes, or the list that "
            "the numbers are places in: classes.txt beside the text files, or --names FILE"
        )
    return {token: by_name[token] for token in used if token not in first} | first


def places(names: Sequence[str], listed: Sequence[str] | None = None) -> dict[str, int]:
    """What numbers mean that are places in `listed` (default: in `names`): number -> label in `names`."""
    label = {name: k for k, name in enumerate(names)}
    return {str(k): label[name] for k, name in enumerate(listed or names) if name in label}


def _expected(token: str, names: Sequence[str], readings: Sequence[Mapping[str, int]]) -> str:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if not readings:
        return f"one of {shown}{' (for numbers, name the classes: --names FILE)' * is_number(token)}"
    return f"one of {shown}, or the place in that list, 0..{max(len(reading) for reading in readings) - 1}"


def sorted_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    """The different classes: numbers by value, then names."""
    return tuple(sorted(set(tokens), key=lambda t: (0, int(t), t) if is_number(t) else (1, 0, t)))


def with_classes(ground_truth: GroundTruth, found: Mapping[str, str]) -> GroundTruth:
    """The same with the classes that only the detections have. UserError where the two have none in common.

    found: each class of the detections, and where it is met first.
    """
    old = ground_truth.names
    if old and found and not set(old) & found.keys():
        token = next(iter(found))
        raise UserError(
            f"{found[token]}: found class {token!r}, and none of the ground truth's, {', '.join(old[:20])}: expected "
            "the same classes on both sides (name them: --names FILE)"
        )
    names = sorted_tokens([*old, *found])
    moved = np.array([names.index(name) for name in old], dtype=np.int64)
    return replace(ground_truth, names=names, labels=moved[ground_truth.labels])


def usable_rows(
    boxes_xyxy: np.ndarray, columns: Sequence[Sequence], where: Callable[[int], str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) bool: the objects that datasets/ keeps as well; and a note on the others.

    Those are boxes with a width and a height, and of rows that are equal in all the first. columns: what else rows are
    compared by.
    """
    has_size = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
    keys = list(zip(map(tuple, boxes_xyxy.tolist()), *columns))
    first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1)))
    is_first = np.array([first[key] == row for row, key in enumerate(keys)], dtype=bool)
    notes = []
    for reason, is_out in (("zero-size box", ~has_size), ("equal to another in all", has_size & ~is_first)):
        if count := int(is_out.sum()):
            rows = f"{count} object{'s' * (count > 1)} left out"
            notes.append(f"{rows}: {reason}, first: {where(int(is_out.argmax()))}")
    return has_size & is_first, tuple(notes)
