"""Find pictures that two splits share: a test on training pictures measures memory.

Two pictures are the same if they are one file (the same path, or links to it) or have the same bytes. Files are
compared by inode and size. Bytes are read only if sizes are equal: first the head of the file, then all of it.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from datasets.index import DatasetIndex

HEAD = 4096  # bytes that differ in most pairs of files of one size


class Shared(NamedTuple):
    """A picture of the first split, the same pictures in the second, and whether they are one file."""

    path: Path
    others: tuple[Path, ...]
    is_file: bool


@dataclass(frozen=True)
class Overlap:
    """The pictures of a first split that are also in a second one, in the order of the first.

    names: of the two splits. The first is the one to measure on. count: number of pictures in the first.
    """

    names: tuple[str, str]
    count: int
    shared: tuple[Shared, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all pictures of the first split are shared."""
        return len(self.shared) == self.count > 0

    def within(self, second: DatasetIndex) -> "Overlap":
        """The overlap if only these pictures of the second split are used."""
        used = {sample.image_path for sample in second.samples}
        return replace(self, shared=tuple(pair for pair in self.shared if not used.isdisjoint(pair.others)))

    def __str__(self) -> str:
        first, second = self.names
        if not self.shared:
            return f"{first} and {second} share no picture"
        files = sum(pair.is_file for pair in self.shared)
        counts = ((files, "the same file"), (len(self.shared) - files, "the same bytes"))
        how = ", ".join(f"{count} {what}" for count, what in counts if count)
        example, (other, *_), _ = self.shared[0]
        which = f"such as {example}" + (f" and {other}" if other != example else "")
        return f"{len(self.shared)} of {self.count} pictures of {first} are also in {second} ({how}), {which}"


def find_overlap(first: DatasetIndex, second: DatasetIndex, names: tuple[str, str]) -> Overlap:
    """The pictures that `first` shares with `second`. A picture that cannot be read is never shared."""
    paths = [sample.image_path for sample in first.samples]
    files, others = _Files(paths), _Files([sample.image_path for sample in second.samples])
    shared = []
    for path in paths:
        same_file = others.by_file.get(files.key.get(path), [])
        same = same_file or others.with_bytes_of(path, files)
        if same:
            shared.append(Shared(path, tuple(same), bool(same_file)))
    return Overlap(names, len(paths), tuple(shared))


class _Files:
    """Paths by file, by size, and by content."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.key: dict[Path, tuple] = {}  # equal for all names of one file
        self.size: dict[Path, int] = {}
        self.by_file: dict[tuple | None, list[Path]] = defaultdict(list)
        by_size: dict[tuple, list[Path]] = defaultdict(list)
        for path in paths:
            try:
                found = os.stat(path)
            except OSError:
                continue
            # Some file systems have no inodes.
            self.key[path] = (found.st_dev, found.st_ino) if found.st_ino else (os.path.realpath(path),)
            self.size[path] = found.st_size
            self.by_file[self.key[path]].append(path)
            by_size[(found.st_size,)].append(path)
        self._groups = by_size  # (size,), (size, head hash) and (size, head hash, hash of all) -> paths
        self._split: set[tuple] = set()

    def with_bytes_of(self, path: Path, files: "_Files") -> list[Path]:
        """The paths here with the same bytes as `path`, which is one of `files`."""
        key: tuple = (files.size.get(path, -1),)
        for limit in (HEAD, -1):
            group = self._groups.get(key, ())
            if not group:
                return []
            if key not in self._split:
                self._split.add(key)
                for other in group:
                    self._groups[*key, _digest(other, limit)].append(other)
            digest = _digest(path, limit)
            if digest is None:
                return []
            key = *key, digest
        return self._groups.get(key, [])


def _digest(path: Path, limit: int) -> bytes | None:
    """A hash of the first `limit` bytes (-1: of all); None where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read(limit), digest_size=16).digest()
    except OSError:
        return None
