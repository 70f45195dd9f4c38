"""Make disjoint splits of one set of pictures. Near-duplicates stay in the same split.

    python -m datasets.split FORMAT ROOT [SPLIT] --test 0.2 [--val 0.1] [--seed 0] [--prefix NAME_] [--group REGEX]

SPLIT is the split to divide. Default: `all` of a VOC or KITTI set or a YOLO set without a yaml file, `train` of a
data.yaml, the only JSON file of a COCO set. The command writes lists beside the pictures; the readers find them by the
names train, val and test, with the prefix in front. Pictures and labels stay in place, and no file is overwritten:

    voc     ImageSets/Main/<name>.txt
    kitti   ImageSets/<name>.txt
    coco    annotations/instances_<name>.json, with file names relative to ROOT
    yolo    <name>.txt and <prefix>split.yaml, which is the ROOT of the new splits

Groups of near-duplicates (datasets/near_duplicates.py) are never divided. In every split each class has about its share
of pictures: the class with the fewest remaining pictures is distributed first, and each of its groups goes to the split
that lacks most of the class (iterative stratification, Sechidis et al., "On the Stratification of Multi-Label Data",
ECML PKDD 2011). The same pictures, fractions and seed give the same splits.
"""

import argparse
import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.coco import find_json, match_id
from datasets.folders import files_in
from datasets.index import DatasetIndex, Sample
from datasets.near_duplicates import DISTANCE, group_near_duplicates
from datasets.open import READERS, open_dataset
from datasets.text_table import aligned, short_name
from datasets.values import read_id
from datasets.voc import find_part
from datasets.yolo_txt import find_yaml
from errors import ArgumentParser, UserError, counted, expect, run_script, shortened
from yaml_files import dump_yaml, read_yaml

KEPT_YAML_KEYS = ("kpt_shape", "flip_idx", "task")  # they describe the rows of label files


@dataclass(frozen=True, eq=False)
class Division:
    """The splits of an index.

    rows: name of a split -> rows of index.samples. groups (N,): the group of near-duplicates of each sample.
    """

    index: DatasetIndex
    rows: dict[str, list[int]]
    groups: np.ndarray

    def table(self) -> str:
        """A table of the pictures in each split, in all and with each class, as numbers and shares."""
        total = class_pictures(self.index)
        lines = [["", *self.rows]]
        lines.append(["pictures", *(f"{len(rows)} ({len(rows) / len(self.index):.0%})" for rows in self.rows.values())])
        for label, name in enumerate(self.index.names):
            count = total[:, label].sum()
            cells = (int(total[rows, label].sum()) for rows in self.rows.values())
            lines.append([short_name(name), *(f"{cell} ({cell / count:.0%})" if count else "0" for cell in cells)])
        text = aligned(lines, right=())
        sizes = np.bincount(self.groups)
        shared = sizes[sizes > 1]
        groups = (
            f"{counted(len(shared), 'group')} of near-duplicates, {shared.sum()} pictures, the largest of {sizes.max()}"
        )
        return "\n".join(
            [*text, f"{groups}; each group is in one split" if len(shared) else "no near-duplicates found"]
        )


def divide(index: DatasetIndex, groups: np.ndarray, fractions: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Name of a split -> its rows, ascending.

    fractions: name of a split -> its share; their sum is 1. groups (N,): rows of one group stay together.
    """
    names = list(fractions)
    share = np.array([fractions[name] for name in names])
    numbers, inverse = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(numbers), len(index.names) + 1))  # pictures with each class, and all pictures
    np.add.at(counts, inverse, np.c_[class_pictures(index), np.ones(len(index))])
    lacking = share[:, None] * counts.sum(0)  # (S, K + 1): what each split still has to get
    chosen = np.full(len(numbers), -1)
    order = np.random.default_rng(seed).permutation(len(numbers))
    order = order[np.argsort(-counts[order, -1], kind="stable")]  # large groups first, small ones fill the gaps
    for _ in range(counts.shape[1]):
        left = counts[chosen < 0].sum(0)
        left[-1] = left[-1] if not left[:-1].any() else np.inf  # pictures without objects come last
        column = int(np.where(left > 0, left, np.inf).argmin())
        for group in order[(chosen[order] < 0) & (counts[order, column] > 0)]:
            has_room = lacking[:, -1] >= counts[group, -1] / 2
            usable = np.flatnonzero(has_room if has_room.any() else share > 0)
            best = max(usable.tolist(), key=lambda split: (lacking[split, column], lacking[split, -1], -split))
            chosen[group] = best
            lacking[best] -= counts[group]
    of_row = chosen[inverse]
    return {name: np.flatnonzero(of_row == split).tolist() for split, name in enumerate(names)}


def class_pictures(index: DatasetIndex) -> np.ndarray:
    """(N, K) bool: whether each picture has objects of each class."""
    found = np.zeros((len(index), len(index.names)), dtype=bool)
    for row, sample in enumerate(index.samples):
        found[row, sample.labels[sample.labels >= 0]] = True
    return found


def split_dataset(
    format: str,
    root: str | Path,
    split: str | None,
    fractions: dict[str, float],
    *,
    seed: int = 0,
    prefix: str = "",
    pattern: str | None = None,
) -> tuple[Division, list[Path]]:
    """Divide a split and write the lists: see the head of this file. Returns the division and the written files.

    UserError, with nothing written, if a list already exists or a split would have no picture.
    """
    root, format = Path(root), "yolo" if format == "shapes" else format
    split = split or default_split(format, root)
    expect("+" not in split, f"split {split!r}", "several", "one: each has lists of its own")
    index = open_dataset(format, root, split)
    groups = group_near_duplicates([sample.image_path for sample in index.samples], pattern=pattern)
    rows = divide(index, groups, fractions, seed)
    empty = [name for name, found in rows.items() if not found]
    if empty:
        found = f"{counted(len(index), 'picture')} in {counted(len(np.unique(groups)), 'group')} of near-duplicates"
        raise UserError(f"{root}: {found} leave none for {', '.join(empty)}, expected more pictures or a larger share")
    division = Division(index, {prefix + name: found for name, found in rows.items()}, groups)
    samples = {name: [index.samples[row] for row in found] for name, found in division.rows.items()}
    texts, year = WRITERS[format](root, split, samples, index, prefix)
    place = next((path for path in texts if path.suffix == ".yaml"), root)  # the root to read them from
    refuse_old(format, place, texts, [year + name for name in samples])
    written: list[Path] = []
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x", encoding="utf-8", newline="") as file:
                written.append(path)
                file.write(text)
        for name, expected in samples.items():
            read_back(format, place, year + name, index.names, expected)
    except (OSError, UserError) as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error.filename or root}: {error.strerror or error}", exit_code=5) from None
    return division, written


def refuse_old(format: str, root: Path, texts: Iterable[Path], names: Iterable[str]) -> None:
    """UserError if one of the files exists, or if a new list would change the meaning of an existing split's name."""
    advice = "--prefix NAME_ gives other names"
    there = [str(path) for path in texts if path.exists()]
    if there:
        raise UserError(f"{shortened(there)}: there already, expected new files; {advice}")
    for name in names if format in ("voc", "coco") or root.suffix != ".yaml" else ():
        if format == "kitti":  # without lists, read_kitti makes up train and val
            continue
        try:
            count = len(open_dataset(format, root, name, needs_objects=False))
        except UserError:
            continue
        raise UserError(
            f"{root}: split {name!r} is there already ({counted(count, 'picture')}), expected a new name; {advice}"
        )


def read_back(format: str, root: Path, name: str, names: tuple[str, ...], expected: Sequence[Sample]) -> None:
    """UserError unless the reader finds these classes, pictures and objects under the new name."""
    found = open_dataset(format, root, name, needs_objects=False)
    a, b = ({os.path.realpath(s.image_path): len(s) for s in samples} for samples in (found.samples, expected))
    if a != b or found.names != names:
        raise UserError(
            f"{root}: the new split {name!r} is read as {counted(len(a), 'picture')}, expected {len(b)}: not written"
        )


def default_split(format: str, root: Path) -> str:
    """The split to divide if the user names none: see the head of this file."""
    if format == "coco":
        files = [path for folder in (root / "annotations", root) for path in files_in(folder, (".json",))]
        if len(files) != 1:
            found = shortened(path.name for path in files) or "no JSON file"
            raise UserError(f"{root}: found {found}; expected one, or the name of a split after the root")
        return files[0].stem.removeprefix("instances_")
    return "train" if format == "yolo" and find_yaml(root) is not None else "all"


Samples = dict[str, list[Sample]]
Texts = tuple[dict[Path, str], str]  # file -> its text; and the prefix of the splits' names for the reader (VOC's year)


def voc_lists(root: Path, split: str, samples: Samples, index: DatasetIndex, prefix: str) -> Texts:
    folder = find_part(root, split).folder / "ImageSets" / "Main"
    year, slash, _ = split.rpartition("/")
    return {folder / f"{name}.txt": _lines(s.image_id for s in found) for name, found in samples.items()}, year + slash


def kitti_lists(root: Path, split: str, samples: Samples, index: DatasetIndex, prefix: str) -> Texts:
    folder = root / "ImageSets"
    return {folder / f"{name}.txt": _lines(s.image_id for s in found) for name, found in samples.items()}, ""


def yolo_lists(root: Path, split: str, samples: Samples, index: DatasetIndex, prefix: str) -> Texts:
    """Lists of paths relative to their folder, and the yaml file. Other trainers need paths that begin with ./."""
    yaml_path, folder, tree = find_yaml(root), root, {}
    if yaml_path is not None:
        tree = read_yaml(yaml_path)
        folder = yaml_path.parent / (tree.get("path") or ".")
    texts = {}
    for name, found in samples.items():
        paths = (Path(os.path.relpath(s.image_path, folder)).as_posix() for s in found)
        texts[folder / f"{name}.txt"] = _lines(path if path.startswith("../") else f"./{path}" for path in paths)
    keys = {name.removeprefix(prefix): f"{name}.txt" for name in samples}
    keys = {"train": keys["train"], "val": keys.get("val", keys["test"]), "test": keys["test"]}
    keys |= {name: f"{name}.txt" for name in samples}
    kept = {key: tree[key] for key in KEPT_YAML_KEYS if key in tree}
    rest = {"nc": len(index.names), "names": dict(enumerate(index.names))} | kept
    return texts | {folder / f"{prefix}split.yaml": dump_yaml(keys | rest)}, ""


def coco_files(root: Path, split: str, samples: Samples, index: DatasetIndex, prefix: str) -> Texts:
    """For each split a copy of the label file with only its images and their annotations, including masks."""
    json_path = find_json(root, split)
    tree = json.loads(json_path.read_text(encoding="utf-8-sig"))
    split_of = {sample.image_path: name for name, found in samples.items() for sample in found}
    names = [os.path.normpath(str(record.get("file_name")).replace("\\", "/")) for record in tree["images"]]
    listed = set(names)
    folder = next(
        folder
        for folder in next(iter(split_of)).parents
        if all(path.is_relative_to(folder) and str(path.relative_to(folder)) in listed for path in split_of)
    )
    texts = {}
    records: dict[str, list[dict]] = {name: [] for name in samples}
    split_of_id: dict[int | str, str | None] = {}
    for record, file_name in zip(tree["images"], names):
        name = split_of.get(folder / file_name)
        with contextlib.suppress(ValueError):  # a picture that cannot be used
            split_of_id.setdefault(read_id(record.get("id")), name)
        if name is not None:
            relative = (folder / file_name).relative_to(root).as_posix()
            records[name].append(record | {"file_name": relative})
    found = (match_id(row.get("image_id"), split_of_id) for row in tree["annotations"])
    splits = [None if image_id is None else split_of_id[image_id] for image_id in found]
    for name in samples:
        annotations = [row for row, split in zip(tree["annotations"], splits) if split == name]
        part = tree | {"images": records[name], "annotations": annotations}
        texts[root / "annotations" / f"instances_{name}.json"] = json.dumps(part, allow_nan=False) + "\n"
    return texts, ""


def _lines(items: Iterable[int | str]) -> str:
    return "".join(f"{item}\n" for item in items)


WRITERS = {"voc": voc_lists, "coco": coco_files, "yolo": yolo_lists, "kitti": kitti_lists}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "python -m datasets.split",
        __doc__,
        epilog="Example: python -m datasets.split voc data/bccd all --test 0.2 --val 0.1\n"
        "Exit codes: 0 written, 2 a mistake in the arguments or the data, 5 a file that could not be written, "
        "130 after Ctrl-C.",
    )
    parser.add_argument("format", choices=tuple(READERS), help="how the labels are stored")
    parser.add_argument("root", help="folder of the dataset (yolo: or its data.yaml)")
    parser.add_argument("split", nargs="?", help="the split to divide (default: all; `train` of a data.yaml)")
    parser.add_argument(
        "--test", type=float, required=True, metavar="FRACTION", help="share of the pictures in the test split"
    )
    parser.add_argument(
        "--val", type=float, default=0.0, metavar="FRACTION", help="share of the pictures in the val split (none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random order (%(default)s)")
    parser.add_argument("--prefix", default="", help="prefix of the names train, val and test (none)")
    parser.add_argument(
        "--group", metavar="REGEX", help="keep names with the same matched text in one split, e.g. (.*)_[0-9]+"
    )
    arguments = parser.parse_args(argv)
    val, test = arguments.val, arguments.test
    if not (0 < test < 1 and 0 <= val < 1 and val + test < 1):
        raise UserError(f"--test {test:g} --val {val:g}: expected fractions above 0, below 1 in sum")
    expect(arguments.seed >= 0, "--seed", arguments.seed, "0 or more")
    is_met = all(character.isalnum() or character in "_-." for character in arguments.prefix)
    expect(is_met, "--prefix", repr(arguments.prefix), "letters, digits, _, - and .")
    try:
        re.compile(arguments.group or "")
    except re.error as error:
        raise UserError(f"--group: {arguments.group!r} is no regular expression: {error}") from None
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    val, test = arguments.val, arguments.test
    fractions = {"train": 1 - val - test} | ({"val": val} if val else {}) | {"test": test}
    division, written = split_dataset(
        arguments.format,
        arguments.root,
        arguments.split,
        fractions,
        seed=arguments.seed,
        prefix=arguments.prefix,
        pattern=arguments.group,
    )
    print(division.table())
    dropped = sum(fault.effect in ("picture dropped", "left out") for fault in division.index.faults)
    if dropped:
        print(f"pictures or labels that cannot be used, in no split: {dropped} (python -m datasets.scan names them)")
    rule = f"difference hashes with at most {DISTANCE} of 64 bits different, or one picture's names by Roboflow"
    print(f"near-duplicates: {rule}")
    print("written: " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    run_script(main)
