"""Which picture of the ground truth a name or an id of the detections means: found, or refused; never a guess.

A name is a path as somebody wrote it: `a`, `a.jpg`, `test/a.jpg`, `C:\\set\\a.jpg`. Two names mean one picture where
their last parts are equal, up to the suffix of a picture and the way Unicode composes its letters. If several pictures
have that last part, the one that is called so in full is meant; else the one whose folders are the end of the other's
(`test/a` and `imgs/test/a`), the longer the better; else the one with the same suffix. Two that fit equally, and two
names that lead to one picture, are refused.
"""

import unicodedata
from collections.abc import Mapping, Sequence

from datasets.images import SUFFIXES
from errors import UserError

SUFFIXES_MET = tuple(
    {*SUFFIXES, ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".ppm"}
)  # in names, readable or not


def split_name(name: str) -> tuple[tuple[str, ...], str]:
    """(folders and the bare name, the suffix of a picture in lower case or "")."""
    parts = _parts(name)
    suffix = next((suffix for suffix in SUFFIXES_MET if parts and parts[-1].lower().endswith(suffix)), "")
    if not suffix or parts[-1].lower() == suffix:
        return parts, ""
    return (*parts[:-1], parts[-1][: -len(suffix)]), suffix


def _parts(name: str) -> tuple[str, ...]:
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return tuple(part for part in parts if part not in ("", ".", ".."))


class PictureFinder:
    """Finds the row of a picture by its name, or by its id.

    names: of each picture, its path below a folder, with or without a suffix; None where it has none.
    row_of_id: the row that an id means, a number or a text; None where the format has no ids.
    other_names: of each picture, the name that its annotation file states; what `names` does not have may be there.
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
        for row, found in enumerate(self.split):
            if found is not None and found[0]:
                self.of_bare_name.setdefault(found[0][-1], []).append(row)

    def find_names(self, used: Mapping[str, str]) -> dict[str, int]:
        """The row of each name; `used` says where each was met.

        Where no picture is called so, all of them may be ids, written as text, or names that the annotations state.
        UserError for a name without a picture, for one that several fit, and for two names of one picture.
        """
        rows = {name: self.find_name(name, where) for name, where in used.items()}
        unknown = next((name for name, row in rows.items() if row is None), None)
        if unknown is not None:
            other = self._find_otherwise(used)
            if other is None or any(row not in (None, other[name]) for name, row in rows.items()):
                also = ", nor has its id" if self.has_ids else ""
                if other is not None:
                    named = next(name for name, row in rows.items() if row is not None)
                    also = f", but one is called {named!r}: expected names for all, or ids for all"
                raise UserError(f"{used[unknown]}: no image of the ground truth is called {unknown!r}{also}")
            rows = other
        taken: dict[int, str] = {}
        for name, row in rows.items():
            other = taken.setdefault(row, name)
            if split_name(other) != split_name(name):
                raise UserError(
                    f"{used[name]}: {name!r} and {other!r} both fit the image {self.names[row]!r} of the ground truth, "
                    "expected one name for each image"
                )
        return rows

    def _find_otherwise(self, used: Mapping[str, str]) -> dict[str, int] | None:
        """The row of each by its id, written as text, or by the name that an annotation states; None for not all."""
        of_text = self._row_of_text()
        if all(name in of_text for name in used):
            of_number = self._rows_of_number()
            for name in (n for n in used if n.isdecimal() and n not in self.of_bare_name):
                other = _only(of_number.get(int(name)))
                self._check_one(name, of_text[name], of_text[name] if other is None else other, used[name])
            return {name: of_text[name] for name in used}
        rows = {} if self.other is None else {name: self.other.find_name(name, where) for name, where in used.items()}
        return None if self.other is None or None in rows.values() else rows

    def find_name(self, name: str, where: str) -> int | None:
        """The row of one name; None where no picture is called so. UserError where several fit equally."""
        asked = (split_name(name), (_parts(name), ""))  # `a.jpg` of a.jpg, or of a.jpg.png
        rows = {row for parts, _ in asked if parts for row in self.of_bare_name.get(parts[-1], ())}
        ranks = {row: max(_rank(self.split[row], one) for one in asked) for row in sorted(rows)}
        best = [row for row, rank in ranks.items() if rank == max(ranks.values())]
        if len(best) > 1:
            both = " and ".join(repr(self.names[row]) for row in best[:2])
            raise UserError(f"{where}: {name!r} fits {both} of the ground truth alike, expected the folder in the name")
        return best[0] if best else None

    def find_ids(self, used: Mapping[int | str, str]) -> dict[int | str, int]:
        """The row of each image id. An id that is text, in a ground truth without such ids, is a name.

        Where the ground truth has no ids, a number is a name of digits: 7 is 000007.
        """
        if all(i in self.row_of_id for i in used):
            return {i: self.row_of_id[i] for i in used}
        if all(isinstance(i, str) for i in used):
            rows, of_text = self.find_names(used), self._row_of_text()
            for i in used if all(i in of_text for i in used) else ():
                self._check_one(i, of_text[i], rows[i], used[i])
            return rows
        of_number = self._rows_of_number()
        rows = {i: self.row_of_id.get(i) if self.has_ids else _only(of_number.get(i)) for i in used}
        unknown = next((i for i, row in rows.items() if row is None), None)
        if unknown is not None:
            raise UserError(f"{used[unknown]}: image_id: found {unknown!r}, expected one of the ground truth's")
        return rows

    def _row_of_text(self) -> dict[str, int]:
        return {str(i): row for i, row in self.row_of_id.items()}

    def _rows_of_number(self) -> dict[int | str, list[int]]:
        """The rows whose bare names are digits, by their number: 000007 is 7."""
        rows: dict[int | str, list[int]] = {}
        for row, found in enumerate(self.split):
            if found is not None and found[0] and found[0][-1].isdecimal():
                rows.setdefault(int(found[0][-1]), []).append(row)
        return rows

    def _check_one(self, text: str, by_id: int, by_name: int, where: str) -> None:
        if by_id != by_name:
            both = f"the image of this id, {self.names[by_id]!r}, and {self.names[by_name]!r}"
            raise UserError(f"{where}: {text!r} may be {both} of the ground truth, expected names of files")


def _without_common_folders(split: list[tuple[tuple[str, ...], str] | None]) -> list:
    """The names below the folder that holds all of them: `imgs/x/a` is x/a where every picture lies in imgs."""
    folders = [parts[:-1] for parts, _ in filter(None, split)]
    low, high = min(folders, default=()), max(folders, default=())
    common = next((n for n, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return [found and (found[0][common:], found[1]) for found in split]


def _rank(known: tuple[tuple[str, ...], str], asked: tuple[tuple[str, ...], str]) -> tuple[bool, bool, int, bool]:
    """How well a name fits: wholly equal; one the end of the other; how many parts from the end; the same suffix."""
    (a, a_suffix), (b, b_suffix) = known, asked
    equal = next((n for n, (x, y) in enumerate(zip(reversed(a), reversed(b))) if x != y), min(len(a), len(b)))
    return a == b, 0 < equal == min(len(a), len(b)), equal, equal > 0 and a_suffix == b_suffix


def _only(rows: list[int] | None) -> int | None:
    return rows[0] if rows is not None and len(rows) == 1 else None
