"""The index of a split, kept in a file: a second start reads neither labels nor the headers of pictures again.

Sources     what a reading looked at: each file with its size and times of change, each missing file, each listed folder
KeptIndex   an index in a file, which counts only while all of this, the settings and the readers' code are the same
KeptSets    the files of a folder, and the indexes to keep there

Whatever differs, and a file that is damaged, means that the set is read as if there were no kept index. Faults are kept
with the index.

The file is data that can run nothing: the length of its head (8 bytes), the head (JSON), the columns of COLUMNS, one
after the other as in memory, and a SHA-256 of all that.

A change is seen by the size and two times, that of the contents and that of the file's entry. The first can be set, and
copies and archives set it to the original's; the second cannot (Windows has none, but the time when a file was made).
As a file system's clock has steps, an index whose contents changed less than RECENT_NS before they were read is not
kept.
"""

import hashlib
import itertools
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from datasets.index import DatasetIndex, Fault, Sample

FORMAT = 1
RECENT_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT) has steps of two seconds
MISSING, NO_FILE = -1, -2  # instead of a size
DIGEST_BYTES = 32
# name: (type, values in a row). Truth values come last, so that all others lie at multiples of 8 bytes.
OBJECT_COLUMNS = {"boxes_xyxy": ("f8", 4), "labels": ("i8", 1), "area": ("f8", 1)}
OBJECT_COLUMNS |= {"ignore": ("?", 1), "crowd": ("?", 1)}
# A source has its State; a picture has its source, width, height and number of objects.
COLUMNS = {"sources": ("i8", 3), "pictures": ("i8", 4)} | OBJECT_COLUMNS
State = tuple[int, int, int]  # bytes, and when the contents and the entry of a file changed last (nanoseconds)


def state_of(path: str) -> State:
    """The state of a file. Instead of bytes NO_FILE for a folder, MISSING for nothing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return MISSING, 0, 0
    size = found.st_size if stat.S_ISREG(found.st_mode) else NO_FILE
    return size, found.st_mtime_ns, found.st_ctime_ns


class Sources:
    """The files and folders that a reading looked at, each as it was at the first look, before it was read."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self._began_ns = time.time_ns()

    def is_file(self, path: str | Path) -> bool:
        """As os.path.isfile. The reading depends on this file from now on, or on there being none."""
        return self._look_at(str(path))[0] >= 0

    def is_folder(self, path: str | Path) -> bool:
        """As os.path.isdir. The reading depends from now on on the names in this folder, or on there being none."""
        return self._look_at(str(path))[0] == NO_FILE

    def _look_at(self, path: str) -> State:
        state = self.states.get(path)
        if state is None:
            state = self.states[path] = state_of(path)
        return state

    def are_settled(self) -> bool:
        """Whether another change would change a time as well."""
        return max((changed for _, changed, _ in self.states.values()), default=0) < self._began_ns - RECENT_NS


class KeptIndex:
    """The index of one split, in a file of `folder` that `settings` name: plain values, all arguments of the reader.

    sources: a reader that finds no kept index notes there what it looks at.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.sources = Sources()
        self._settings = json.dumps([FORMAT, settings])
        self.path = folder / f"{hashlib.sha256(self._settings.encode()).hexdigest()[:32]}.index"

    def read(self) -> DatasetIndex | None:
        """The kept index; None if there is none that counts."""
        try:
            data = np.fromfile(self.path, np.uint8)
        except OSError:
            return None
        body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        if hashlib.sha256(body.data).digest() != digest.tobytes():
            return None
        start = 8 + int(body[:8].view(np.int64)[0])
        head = json.loads(body[8:start].tobytes())
        if (head["settings"], head["code"]) != (self._settings, code_version()):
            return None
        columns = {}
        for name, (kind, width) in COLUMNS.items():
            end = start + head["rows"][name] * width * np.dtype(kind).itemsize
            column = body[start:end].view(kind)
            columns[name], start = column.reshape(-1, width) if width > 1 else column, end
        states = zip(head["paths"], columns["sources"].tolist())
        if any(state_of(path) != tuple(state) for path, state in states):
            return None
        return _unpack(head, columns)

    def can_keep(self, index: DatasetIndex) -> bool:
        """Whether an index that was read from `sources` can be kept."""
        return self.sources.are_settled() and all(sample.class_scores is None for sample in index.samples)

    def parts(self, index: DatasetIndex) -> Iterator[bytes | memoryview]:
        """The bytes of the file, column by column, for their memory."""
        row_of = {path: row for row, path in enumerate(self.sources.states)}
        samples, num_objects = index.samples, sum(map(len, index.samples))
        head = {
            "settings": self._settings,
            "code": code_version(),
            "rows": {"sources": len(row_of), "pictures": len(samples)} | dict.fromkeys(OBJECT_COLUMNS, num_objects),
            "paths": list(row_of),
            "names": index.names,
            "category_ids": index.category_ids,
            "format": index.format,
            "label_source": index.label_source,
            "image_ids": [sample.image_id for sample in samples],
            "faults": [asdict(fault) for fault in index.faults],
        }
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for part in itertools.chain(parts, self._columns(index, row_of)):
            digest.update(part)
            yield part
        yield digest.digest()

    def _columns(self, index: DatasetIndex, row_of: dict[str, int]) -> Iterator[memoryview]:
        for name, (kind, _) in COLUMNS.items():
            if name == "sources":
                column = np.array(list(self.sources.states.values()), kind)
            elif name == "pictures":
                column = np.array([(row_of[str(s.image_path)], s.width, s.height, len(s)) for s in index.samples], kind)
            else:
                column = np.concatenate([getattr(sample, name) for sample in index.samples])
            yield column.reshape(-1).view(np.uint8).data


class KeptSets:
    """The kept indexes in a folder. Nothing is written there before the caller writes what `new_files` gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read_now: list[tuple[KeptIndex, DatasetIndex]] = []

    def open(self, settings: dict[str, Any], read: Callable[[Sources], DatasetIndex]) -> DatasetIndex:
        """The index that is kept for these settings, else that of `read`."""
        kept = KeptIndex(self.folder, settings)
        index = kept.read()
        if index is None:
            index = read(kept.sources)
            self._read_now.append((kept, index))
        return index

    def new_files(self) -> Iterator[tuple[Path, Iterator[bytes | memoryview]]]:
        """The file, and its bytes in parts, of each index that was not kept until now and can be."""
        for kept, index in self._read_now:
            if kept.can_keep(index):
                yield kept.path, kept.parts(index)


def _unpack(head: dict[str, Any], columns: dict[str, np.ndarray]) -> DatasetIndex:
    samples, start = [], 0
    for image_id, (source, width, height, count) in zip(head["image_ids"], columns["pictures"].tolist()):
        rows = slice(start, start + count)
        boxes, labels, area, ignore, crowd = (columns[name][rows] for name in OBJECT_COLUMNS)
        path = Path(head["paths"][source])
        samples.append(Sample(path, image_id, width, height, boxes, labels, ignore, area, crowd))
        start += count
    ids = head["category_ids"]
    return DatasetIndex(
        tuple(head["names"]),
        tuple(samples),
        tuple(Fault(**fault) for fault in head["faults"]),
        None if ids is None else tuple(ids),
        head["format"],
        head["label_source"],
    )


@cache
def code_version() -> str:
    """A hash of the code that reads sets, so that no index outlives a change of it."""
    digest = hashlib.sha256(f"{np.__version__} {PIL.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
