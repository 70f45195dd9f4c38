"""What a folder of pictures holds: the format of its labels, its splits and its classes, as the readers find them.

A split is taken by its name (`train`, `valid`, `test2017`, `2007/trainval`). One pile of pictures is divided by
datasets.split, which writes lists beside the pictures and keeps near-duplicates on one side.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from datasets.folders import files_in, is_left_out, list_files
from datasets.images import SUFFIXES
from datasets.index import DatasetIndex
from datasets.open import open_dataset
from datasets.overlap import find_overlap
from datasets.split import split_dataset
from datasets.yolo_txt import find_yaml, holds_labels, list_pictures
from errors import UserError, shortened
from yaml_files import read_yaml

TEST_SHARE = 0.2  # of a set that is not divided yet
OWN = "own_"  # begins the names of lists that divide a split which has a name already
ROLES = {  # what a split is for, by its name without a year
    "trainval": ("trainval",),
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True, eq=False)
class FoundSet:
    """A set that can be trained on. `root`, `train` and `test` are those of config.DataConfig.

    written: the lists that were made to divide it. notes: what else a reader of the config should know.
    """

    format: str
    root: Path
    train: str
    test: str
    train_index: DatasetIndex
    test_index: DatasetIndex
    written: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def look(folder: Path) -> FoundSet | None:
    """The set in a folder, or in its only folder; None for pictures without any labels.

    UserError for a folder without pictures, and for labels that no reader can use, with each reader's reason.
    """
    if not folder.is_dir():
        found = "a file, expected the folder of a set" if folder.is_file() else "no such folder"
        raise UserError(f"argument --data: {folder}: {found}")
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not is_left_out(path.name)]
    roots = [folder, *inner] if len(inner) == 1 else [folder]
    reasons: list[str] = []
    for root in roots:
        formats = formats_in(root)
        for format in formats:
            try:
                opened = open_set(format, root)
            except UserError as error:
                reasons.append(f"as {format}: {error}")
                continue
            unread = " and ".join(other for other in formats if other != format)
            note = f"labels that look like {unread} lie there, too; they are not read"
            return replace(opened, notes=(*opened.notes, note) if unread else opened.notes)
    if reasons:
        raise UserError(f"argument --data: {folder}: no labels that can be read; {'; '.join(dict.fromkeys(reasons))}")
    if not list_files(folder, SUFFIXES):
        raise UserError(f"argument --data: {folder}: found no picture ({', '.join(SUFFIXES)})")
    return None


def formats_in(root: Path) -> list[str]:
    """The formats whose files are there, the one that is easiest to be sure of first."""
    folders = [root, *(path for path in sorted(root.iterdir()) if path.is_dir() and not is_left_out(path.name))]
    formats = []
    if yaml_splits(root):
        formats.append("yolo")
    if any(files_in(folder, (".json",)) for folder in folders):
        formats.append("coco")
    if list_files(root, (".xml",)):
        formats.append("voc")
    if any((base / "label_2").is_dir() for base in (root, root / "training")):
        formats.append("kitti")
    elif "yolo" not in formats and any(map(holds_labels, list_files(root, (".txt",)))):
        formats.append("yolo")
    return formats


def open_set(format: str, root: Path) -> FoundSet:
    """Its splits, made by datasets.split where it is one pile (also under two names). UserError where unusable."""
    names = [name for name in split_names(format, root) if role_of(name) is not None]
    absent = absent_splits(root, names) if format == "yolo" else []
    names = [name for name in names if name not in absent]
    missing = (f"no pictures where its yaml file has {' and '.join(absent)}",) if absent else ()
    refused: UserError | None = None
    for train, test in choices(names):
        try:
            found = open_pair(format, root, train, test)
            overlap = find_overlap(found.test_index, found.train_index, (test, train))
            if overlap.is_whole and all(pair.is_file for pair in overlap.shared):
                continue  # one pile under two names, as in the set that tutorials begin with
            unused = [name for name in names if name not in (test, *train.split("+"))]
            note = f"not used: {shortened(unused)}"
            return replace(found, notes=(*missing, note) if unused else missing)
        except UserError as error:  # a test split without labels, as COCO's
            refused = error
    if refused is not None:
        raise refused
    trains = [name for name in names if str(role_of(name)).startswith("train")]
    pile, prefix = ([*trains, *names][0], OWN) if names else (one_pile(format, root), "")
    place = root / f"{prefix}split.yaml" if format == "yolo" else root
    if format == "yolo" and place.is_file():  # divided by an earlier call
        return open_pair(format, place, f"{prefix}train", f"{prefix}test")
    fractions = {"train": 1 - TEST_SHARE, "test": TEST_SHARE}
    _, written = split_dataset(format, root, pile, fractions, prefix=prefix)
    year = pile[: pile.rfind("/") + 1]
    found = open_pair(format, place, f"{year}{prefix}train", f"{year}{prefix}test")
    note = f"the set was one pile ({pile}); datasets.split divided it, near-duplicates on one side"
    return replace(found, written=tuple(written), notes=(*missing, note, *found.notes))


def open_pair(format: str, root: Path, train: str, test: str) -> FoundSet:
    """UserError where one of the splits has no object."""
    indexes = open_dataset(format, root, train), open_dataset(format, root, test)
    return FoundSet(format, root, train, test, *indexes)


def split_names(format: str, root: Path) -> list[str]:
    """Names that the reader of a format may take as splits, sorted; some may be none."""
    folders = [path for path in (root, root / "images", root / "training") if path.is_dir()]
    inner = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    if format == "yolo":
        return yaml_splits(root) or sorted(inner | {path.stem for path in files_in(root, (".txt",))})
    if format == "kitti":
        lists = {path.stem for base in (root, root / "training") for path in files_in(base / "ImageSets", (".txt",))}
        return sorted(lists) or ["train", "val"]  # read_kitti makes these up
    if format == "coco":
        return sorted({path.stem.removeprefix("instances_") for path in coco_files(root)} | inner)
    years = [path for base in (root, root / "VOCdevkit") for path in sorted(base.glob("VOC[0-9]*"))]
    names = {f"{year.name[3:]}/{name}" for year in years for name in voc_lists(year)} | voc_lists(root)
    annotations = (root / name for name in ("Annotations", "annotations"))
    return sorted(names | inner | {path.name for folder in annotations for path in folder.glob("*") if path.is_dir()})


def voc_lists(folder: Path) -> set[str]:
    tables = [path for place in (folder, folder / "data") for path in files_in(place, (".csv",))]
    lists = files_in(folder / "ImageSets" / "Main", (".txt",))
    return {path.stem.removesuffix("_labels") for path in (*tables, *lists)}


def coco_files(root: Path) -> list[Path]:
    return [path for folder in (root, root / "annotations") for path in files_in(folder, (".json",))]


def yaml_splits(root: Path) -> list[str]:
    """The splits that a data.yaml names; none without such a file. UserError for one that cannot be read."""
    path = find_yaml(root)
    tree = read_yaml(path, as_text=True) if path is not None else None
    if not isinstance(tree, dict) or not ("names" in tree or "nc" in tree):
        return []
    return [key for key, value in tree.items() if role_of(key) is not None and value]


def absent_splits(root: Path, names: list[str]) -> list[str]:
    """The splits among `names` whose pictures are missing; [] if the training pictures are missing too.

    Exporters write train, val and test into data.yaml, whatever they export.
    """
    if not any(str(role_of(name)).startswith("train") for name in names) or not yaml_splits(root):
        return []
    absent = []
    for name in names:
        try:
            list_pictures(root, name)
        except UserError:
            absent.append(name)
    return [] if any(str(role_of(name)).startswith("train") for name in absent) else absent


def one_pile(format: str, root: Path) -> str:
    """The name under which a reader takes the whole set. UserError for a COCO set of several files."""
    if format != "coco":
        lists: set[str] = set()
        if format == "voc":
            lists = voc_lists(root)
        elif format == "kitti":
            lists = set(split_names(format, root))
        return lists.pop() if len(lists) == 1 else "all"
    files = coco_files(root)
    if len(files) != 1:
        found = shortened(path.name for path in files) or "no JSON file"
        raise UserError(f"{root}: found {found}; expected one, or instances_train.json and instances_val.json")
    return files[0].stem.removeprefix("instances_")


def role_of(name: str) -> str | None:
    """trainval, train, val or test; None for a name that says nothing."""
    plain = re.sub(r"[-_]?\d{4}$", "", name.rpartition("/")[2].lower().removeprefix(OWN))
    return next((role for role, words in ROLES.items() if plain in words), None)


def choices(names: list[str]) -> list[tuple[str, str]]:
    """(training, test) of the splits of a set, the pair to try first at the front; none where one of both is missing.

    With a `test`, `trainval` or else `train` is trained on; without, `train` is, and measured on `val`. Of several
    years of VOC all are trained on, of other sets the last.
    """
    pairs = []
    for prefix in ("", OWN):
        of_role: dict[str, list[str]] = {role: [] for role in ROLES}
        for name in names:
            if name.startswith(OWN) == bool(prefix):
                of_role[str(role_of(name))].append(name)
        for tests, trains in (
            (of_role["test"], of_role["trainval"] or of_role["train"]),
            (of_role["val"], of_role["train"]),
        ):
            if tests and trains:
                pairs.append(("+".join(trains) if "/" in trains[0] else trains[-1], tests[-1]))
    return pairs
