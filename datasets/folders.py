"""List the files of a folder and its subfolders, by one rule for every reader and every command.

Links to files and to folders are followed. Each folder is visited once: by its own path if that lies below the start
folder, else by the first link to it. A link to a folder above is skipped, so no walk runs in circles. Also skipped are
files and folders that systems and programs put beside the data: hidden ones (`._x.jpg`, `.DS_Store`,
`.ipynb_checkpoints`), `__MACOSX` of macOS's archives, `@eaDir` of network drives.

A checkout or a copy without links (git on Windows, cloud storage) turns a link into a small text file with the link's
target. Such a file is followed or refused, never skipped.
"""

import heapq
import os
import unicodedata
from pathlib import Path

from errors import UserError

LEFT_OUT = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
MAX_TARGET_BYTES = 1024


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name does not belong to the data."""
    return name.startswith(".") or name in LEFT_OUT


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is, composed (NFC), and decomposed (NFD), as macOS writes the names of files."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))))


def find_label(folder: Path, stem: str, suffixes: tuple[str, ...] = (".txt",)) -> Path:
    """The label file of a picture, whichever spelling of the name it has; the first choice if there is none."""
    choices = [folder / f"{name}{suffix}" for name in spellings(stem) for suffix in suffixes]
    return choices[0] if len(choices) == 1 else next((path for path in choices if path.is_file()), choices[0])


def list_files(folder: str | Path, suffixes: tuple[str, ...], *, follow_texts: bool = False) -> list[Path]:
    """The files below a folder whose names end with one of `suffixes`, sorted by the parts of their paths.

    suffixes: in lower case; they match upper case too. A broken link with such a suffix is returned, so that the caller
    reports the missing file.
    follow_texts: follow a link that became a text file; its files have their own paths.
    UserError for a folder that cannot be read, a broken link without a suffix, and, without follow_texts, a link that
    became a text file: a reader that pairs files by their paths cannot follow it.
    """
    start = Path(folder).resolve()
    visited = {_identity(above) for above in start.parents}
    found: list[str] = []
    folders: list[str] = [str(folder)]
    links: list[tuple[list[str], str]] = []  # a heap: links wait until every folder proper has been visited
    while folders or links:
        path = folders.pop() if folders else heapq.heappop(links)[1]
        if (identity := _identity(path)) in visited:
            continue
        visited.add(identity)
        for entry in _entries(path):
            if is_left_out(entry.name):
                continue
            is_link = entry.is_symlink()
            if not is_link and entry.is_dir():
                folders.append(entry.path)
            elif is_link and os.path.isdir(entry.path):  # entry.is_dir raises for a link to itself
                heapq.heappush(links, (_parts(entry.path), entry.path))
            elif entry.name.lower().endswith(suffixes):
                is_file = os.path.isfile(entry.path) if is_link else entry.is_file()
                if is_file or (is_link and not os.path.exists(entry.path)):
                    found.append(entry.path)
            elif "." in entry.name:
                continue
            elif is_link and not os.path.exists(entry.path):
                raise UserError(f"{entry.path}: a link to {os.readlink(entry.path)}, where nothing is")
            elif (target := _target_of_text(entry)) is not None:
                if not follow_texts:
                    raise UserError(f"{entry.path}: a text file with the path of a folder, expected a link to {target}")
                heapq.heappush(links, (_parts(target), target))
    return [Path(path) for path in sorted(found, key=_parts)]


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files directly in a folder, by the rule of list_files, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.lower().endswith(suffixes) and path.is_file())
    return sorted(path for path in found if not is_left_out(path.name))


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None


def _target_of_text(entry: os.DirEntry) -> str | None:
    """The target folder of a link that became a text file; None for any other file."""
    if not entry.is_file() or not 0 < entry.stat().st_size <= MAX_TARGET_BYTES:
        return None
    try:
        text = Path(entry.path).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    if "/" not in text or "\0" in text or "\n" in text or text.startswith("/"):
        return None
    target = os.path.normpath(os.path.join(os.path.dirname(entry.path), text))
    return target if os.path.isdir(target) else None


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _parts(path: str) -> list[str]:
    return path.split(os.sep)
