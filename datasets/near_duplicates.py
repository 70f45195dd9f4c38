"""Group pictures that show nearly the same: copies, sizes and qualities of one picture, frames of one video.

Two pictures are near-duplicates if their difference hashes differ in at most DISTANCE of 64 bits (dHash: the picture in
grey at 9 x 8 pixels, one bit for each neighbour to the right that is darker; N. Krawetz, "Kind of Like That",
hackerfactor.com, 2013), or by their names: Roboflow calls its versions of a.jpg a_jpg.rf.<hash>.jpg. Near-duplicates of
near-duplicates are in the same group, so a slow video is one group.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from datasets.images import read_image
from errors import UserError

DISTANCE = 4  # bits; unrelated photographs differ in 32 on average
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


def group_near_duplicates(paths: Sequence[Path], *, pattern: str | None = None) -> np.ndarray:
    """(N,) int64: the group of each picture. Groups are numbered from 0 in the order of their first pictures.

    pattern: a regular expression. Pictures in whose names it matches the same text (in its first group, if it has one)
    are in one group too: `(.*)_[0-9]+` joins the frames of a clip. A picture that does not decode is compared only by
    its name.
    """
    parent = list(range(len(paths)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(row: int, other: int) -> None:
        low, high = sorted((root(row), root(other)))
        parent[high] = low

    first: dict[tuple, int] = {}
    for row, path in enumerate(paths):
        for key in _name_keys(path, pattern):
            join(row, first.setdefault(key, row))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(difference_hash, paths))
    rows = np.array([row for row, value in enumerate(hashes) if value is not None], dtype=np.int64)
    values = np.array([value for value in hashes if value is not None], dtype=np.uint64)
    for place, row in enumerate(rows.tolist()):
        near = np.flatnonzero(count_bits(values[place + 1 :] ^ values[place]) <= DISTANCE)
        for other in rows[place + 1 + near].tolist():
            join(row, other)
    _, groups = np.unique([root(row) for row in range(len(paths))], return_inverse=True)
    return groups.astype(np.int64)


def difference_hash(path: Path) -> int | None:
    """The 64-bit hash of the upright picture; None where it does not decode."""
    try:
        with Image.open(path) as picture:
            if picture.format == "JPEG":
                picture.draft("L", (144, 128))  # it is decoded at a fraction of its size
                upright = ImageOps.exif_transpose(picture)
            else:
                upright = Image.fromarray(read_image(path))
            small = upright.convert("L").resize((9, 8), Image.Resampling.BOX)
    except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    grey = np.asarray(small)  # (8, 9)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def count_bits(values: np.ndarray) -> np.ndarray:
    """uint64 (N,) -> the number of ones in each."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(values)
    return _BITS[np.ascontiguousarray(values).view(np.uint16).reshape(-1, 4)].sum(axis=1)


def _name_keys(path: Path, pattern: str | None) -> list[tuple]:
    """Keys made of a picture's name. Pictures that share a key are near-duplicates."""
    keys: list[tuple] = []
    version = re.match(r"(.+)\.rf\.[0-9A-Za-z]+$", path.stem)
    if version is not None:
        keys.append(("roboflow", version[1]))
    match = re.search(pattern, path.name) if pattern else None
    if match is not None:
        keys.append(("pattern", match[1] if match.re.groups else match[0]))
    return keys
