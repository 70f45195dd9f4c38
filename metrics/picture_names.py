"""Find the picture of the ground truth that a name or an id of the detections means. What is unclear is refused.

A name is a path in any form: `a`, `a.jpg`, `test/a.jpg`, `C:\\set\\a.jpg`. It fits a picture if their last parts are
equal, up to a picture's suffix and Unicode composition. If it fits several pictures, the best is, in this order:

    the one whose whole name is equal
    the one that ends with the name, or that the name ends with (`test/a` and `imgs/test/a`), the longer the better
    the one with the same suffix

Two pictures that fit equally, and two names of one picture, are refused.
"""

import unicodedata
from collections.abc import Mapping, Sequence

from datasets.images import SUFFIXES
from errors import UserError

# Of picture names, also of formats that we do not read.
PICTURE_SUFFIXES = tuple({*SUFFIXES, ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".ppm"})

SplitName = tuple[tuple[str, ...], str]  # (folders and the bare name, the suffix of a picture in lower case or "")


def split_name(name: str) -> SplitName:
    parts = _parts(name)
    suffix = next((suffix for suffix in PICTURE_SUFFIXES if parts and parts[-1].lower().endswith(suffix)), "")
    if not suffix or parts[-1].lower() == suffix:
        return parts, ""
    return (*parts[:-1], parts[-1][: -len(suffix)]), suffix


def _parts(name: str) -> tuple[str, ...]:
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", ".."))


class PictureFinder:
    """Finds the row of a picture by its name or its id.

    names: for each picture its path below a folder, with or without a suffix; None for a picture without a name.
    row_of_id: id (a number or a text) -> row; None where the format has no ids.
    other_names: for each picture the name in its annotation file, tried for names that `names` does not have.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        row_of_id: Mapping[int | str, int] | None = None,
        other_names: Sequence[str | None] | None = None,
    ) -> None:
        self.names, self.has_ids, self.row_of_id = names, row_of_id is not None, row_of_id or {}
        self.other = None if other_names is None else PictureFinder(other_names)
        self.split = _without_common_folders([None if name is None else split_name(name) for name in names])
        self.of_bare_name: dict[str, list[int]] = {}
        for row, (parts, _) in enumerate(self.split):
            if parts:
                self.of_bare_name.setdefault(parts[-1], []).append(row)

    def find_names(self, used: Mapping[str, str]) -> dict[str, int]:
        """The row of each name. `used`: name -> the place (file, row) where it stands.

        If a name has no picture, all names are tried as ids written as text, then as names in the annotation files.
        UserError for a name without a picture, for a name that fits several, and for two names of one picture.
        """
        by_name = {name: self.find_name(name, where) for name, where in used.items()}
        rows = {name: row for name, row in by_name.items() if row is not None}
        unknown = next((name for name, row in by_name.items() if row is None), None)
        if unknown is not None:
            other = self._find_otherwise(used)
            if other is None or any(row != other[name] for name, row in rows.items()):
                also = ", nor has its id" if self.has_ids else ""
                if other is not None:
                    also = f", but one is called {next(iter(rows))!r}: expected names for all, or ids for all"
                raise UserError(f"{used[unknown]}: no image of the ground truth is called {unknown!r}{also}")
            rows = other
        first_name: dict[int, str] = {}
        for name, row in rows.items():
            first = first_name.setdefault(row, name)
            if split_name(first) != split_name(name):
                raise UserError(
                    f"{used[name]}: {name!r} and {first!r} both fit the image {self.names[row]!r} of the ground truth, "
                    "expected one name for each image"
                )
        return rows

    def _find_otherwise(self, used: Mapping[str, str]) -> dict[str, int] | None:
        """The row of each name, read as an id or as the name in an annotation file; None unless all have one."""
        of_text = self._row_of_text()
        if all(name in of_text for name in used):
            of_number = self._rows_of_number()
            for name in (n for n in used if n.isdecimal() and n not in self.of_bare_name):
                by_name = _only(of_number.get(int(name)))
                self._check_one(name, of_text[name], of_text[name] if by_name is None else by_name, used[name])
            return {name: of_text[name] for name in used}
        if self.other is None:
            return None
        stated = {name: self.other.find_name(name, where) for name, where in used.items()}
        rows = {name: row for name, row in stated.items() if row is not None}
        return rows if len(rows) == len(stated) else None

    def find_name(self, name: str, where: str) -> int | None:
        """The row of one name; None where no picture fits. UserError where several fit equally."""
        spellings = (split_name(name), (_parts(name), ""))  # `a.jpg` may be the name of a.jpg, or of a.jpg.png
        rows = {row for parts, _ in spellings if parts for row in self.of_bare_name.get(parts[-1], ())}
        ranks = {row: max(_rank(self.split[row], one) for one in spellings) for row in sorted(rows)}
        best = [row for row, rank in ranks.items() if rank == max(ranks.values())]
        if len(best) > 1:
            both = " and ".join(repr(self.names[row]) for row in best[:2])
            raise UserError(f"{where}: {name!r} fits {both} of the ground truth equally, expected its folder too")
        return best[0] if best else None

    def find_ids(self, used: Mapping[int | str, str]) -> dict[int | str, int]:
        """The row of each image id. `used`: id -> the place where it stands.

        If the ground truth does not have these ids: texts are names. If it has no ids: a number is a name of digits, 7
        is 000007.
        """
        if all(i in self.row_of_id for i in used):
            return {i: self.row_of_id[i] for i in used}
        texts = {i: where for i, where in used.items() if isinstance(i, str)}
        if len(texts) == len(used):
            by_name, of_text = self.find_names(texts), self._row_of_text()
            for text in texts if all(text in of_text for text in texts) else ():
                self._check_one(text, of_text[text], by_name[text], texts[text])
            return {i: by_name[i] for i in texts}
        of_number = self._rows_of_number()
        rows: dict[int | str, int] = {}
        for i, where in used.items():
            row = self.row_of_id.get(i) if self.has_ids else _only(of_number.get(i))
            if row is None:
                raise UserError(f"{where}: image_id: found {i!r}, expected one of the ground truth's")
            rows[i] = row
        return rows

    def names_like_ids(self, row_of_id: Mapping[int | str, int]) -> list[str]:
        """A line where all these ids are also names of digits, of other pictures; none else."""
        of_number = self._rows_of_number()
        found = [(i, self.names[row], _only(of_number.get(i))) for i, row in row_of_id.items()]
        named = [(i, own, self.names[row]) for i, own, row in found if row is not None]
        other = next(((i, own, name) for i, own, name in named if name != own), None)
        if other is None or len(named) < len(found):
            return []
        i, own, name = other
        return [f"image_id is read as an id of the ground truth: {i} is {own!r}, though {name!r} is there too"]

    def _row_of_text(self) -> dict[str, int]:
        return {str(i): row for i, row in self.row_of_id.items()}

    def _rows_of_number(self) -> dict[int | str, list[int]]:
        """Number -> the rows whose bare name is this number: 000007 is 7."""
        rows: dict[int | str, list[int]] = {}
        for row, (parts, _) in enumerate(self.split):
            if parts and parts[-1].isdecimal():
                rows.setdefault(int(parts[-1]), []).append(row)
        return rows

    def _check_one(self, text: str, by_id: int, by_name: int, where: str) -> None:
        if by_id != by_name:
            both = f"the image of this id, {self.names[by_id]!r}, and {self.names[by_name]!r}"
            raise UserError(f"{where}: {text!r} may be {both} of the ground truth, expected names of files")


def _without_common_folders(split: list[SplitName | None]) -> list[SplitName]:
    """The names below the folder of all pictures: `imgs/x/a` is x/a where all are in imgs. None has no parts."""
    folders = [parts[:-1] for parts, _ in filter(None, split)]
    common = _equal_parts(min(folders, default=()), max(folders, default=()))  # in order, the others are between them
    return [((), "") if name is None else (name[0][common:], name[1]) for name in split]


def _rank(picture: SplitName, name: SplitName) -> tuple[bool, bool, int, bool]:
    """How well a name fits: equal; one is the end of the other; number of equal parts from the end; same suffix."""
    (a, a_suffix), (b, b_suffix) = picture, name
    equal = _equal_parts(a[::-1], b[::-1])
    return a == b, 0 < equal == min(len(a), len(b)), equal, equal > 0 and a_suffix == b_suffix


def _equal_parts(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many parts two paths have in common at their start."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _only(rows: list[int] | None) -> int | None:
    return rows[0] if rows is not None and len(rows) == 1 else None
