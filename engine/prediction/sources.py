"""Finds the inputs of predict.py (pictures, folders, patterns, video files, webcams) and names their outputs."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.folders import is_left_out, list_files
from datasets.images import SUFFIXES, UNREAD
from engine.prediction import video
from errors import UserError

WEBCAM = re.compile(r"webcam(?::(\d+))?")


@dataclass(frozen=True)
class Source:
    """A file or a webcam.

    name: its path below the output folder, without a suffix.
    is_named: whether it was given by its own name, not found in a folder or by a pattern.
    camera: the number of a webcam.
    """

    path: Path
    name: Path
    is_named: bool = True
    camera: int | None = None

    @property
    def is_video(self) -> bool:
        return self.camera is not None or self.path.suffix.lower() in video.SUFFIXES


def find_pictures(sources: Sequence[str]) -> list[Source]:
    """The same as find_sources, for pictures only."""
    found: dict[Path, Source] = {}
    for source in sources:
        _add_files(found, source, (*SUFFIXES, *UNREAD), f"holds no picture ({', '.join(SUFFIXES)})")
    return _with_own_names(found)


def find_sources(sources: Sequence[str]) -> list[Source]:
    """The pictures and videos of files, folders (with subfolders) and patterns, each once, in the order given.

    A folder that a pattern matches counts as one that is given. Folders and patterns yield files with the suffix of a
    picture or a video, including picture formats that cannot be read: reading them later gives an error with their
    name. A file given by name is always taken, as a picture unless it has a video's suffix. `webcam` and `webcam:1` are
    cameras unless a file has that name. Sources with the same output name get different ones: `a`, `a-2`.
    """
    found: dict[Path, Source] = {}
    for source in sources:
        camera = WEBCAM.fullmatch(source)
        if camera and not Path(source).exists():
            number = int(camera[1] or 0)
            path = Path(f"webcam:{number}")
            found.setdefault(path, Source(path, Path(f"webcam-{number}"), camera=number))
        else:
            fault = f"holds no picture ({', '.join(SUFFIXES)}) and no video ({', '.join(video.SUFFIXES)})"
            _add_files(found, source, (*SUFFIXES, *UNREAD, *video.SUFFIXES), fault)
    return _with_own_names(found)


def _add_files(found: dict[Path, Source], source: str, suffixes: tuple[str, ...], fault: str) -> None:
    """Add the files that one argument stands for to `found`, by resolved path."""
    path = Path(source)
    if path.is_dir():
        pairs = _in_folder(path, suffixes)
    elif path.exists():
        pairs = [(path, Path(path.name))]
    elif glob.has_magic(source):
        pairs = _by_pattern(source, suffixes)
    else:
        raise UserError(f"{source}: no such file or folder, expected pictures or videos")
    if all(p.suffix.lower() in UNREAD for p, _ in pairs) and not path.is_file():
        unread = f"; {len(pairs)} in formats that are not read, the first {pairs[0][0]}" if pairs else ""
        raise UserError(f"{source}: {fault}{unread}")
    is_named = path.exists() and not path.is_dir()
    for path, name in pairs:
        found.setdefault(path.resolve(), Source(path, name.with_suffix(""), is_named))


def _by_pattern(source: str, suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """As _in_folder, for the files that a pattern matches, and those of the folders that it matches, each once."""
    given, walked, pairs = {*Path(source).parts}, set(), []
    for path in map(Path, sorted(glob.glob(source, recursive=True))):
        if any(is_left_out(part) for part in path.parts if part not in given | {".."}):
            continue
        if not path.is_dir():
            pairs += [(path, Path(path.name))] if path.name.lower().endswith(suffixes) else []
        elif path.resolve() not in walked:  # else the pattern runs in a circle of links
            walked.add(path.resolve())
            pairs += [(inner, path.name / name) for inner, name in _in_folder(path, suffixes)]
    return pairs


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """The files of a folder with its subfolders, and their paths below it."""
    files = list_files(folder, suffixes, follow_texts=True)
    return [(p, p.relative_to(folder) if p.is_relative_to(folder) else Path(p.name)) for p in files]


def _with_own_names(found: dict[Path, Source]) -> list[Source]:
    taken = {Path("classes")}  # labels/classes.txt is the list of classes
    sources = []
    for source in found.values():
        unique, number = source.name, 1
        while unique in taken:
            number += 1
            unique = source.name.with_name(f"{source.name.name}-{number}")
        taken.add(unique)
        sources.append(Source(source.path, unique, source.is_named, source.camera))
    return sources
