"""What every reader of ground truth returns, and the little that the readers share."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from metrics.tables import GroundTruth


@dataclass(frozen=True)
class Annotations:
    """Ground truth read from files, and what detections need to find their image and class in it.

    image_ids: for each image the id that detections name it by: COCO's, else the file's stem. stems: the stems.
    sizes: (width, height) of each image in pixels, None where the files do not say.
    category_ids: the classes' COCO ids, None for other formats.
    names_are_closed: the list of names was declared; otherwise it is what the files happened to hold.
    inclusive_pixels: the files of this format hold first and last pixels (VOC XML), or are usually taken so (text in
        pixels, as public VOC evaluators do).
    """

    ground_truth: GroundTruth
    image_ids: tuple[int | str, ...]
    stems: tuple[str, ...]
    sizes: tuple[tuple[float, float] | None, ...]
    category_ids: tuple[int | str, ...] | None
    names_are_closed: bool
    inclusive_pixels: bool


def size_of(width: Any, height: Any) -> tuple[float, float] | None:
    try:
        size = float(width), float(height)
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 and math.isfinite(sum(size)) else None


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
