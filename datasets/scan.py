"""The contents and the faults of a dataset in one table, before anything trains on it.

    python -m datasets.scan FORMAT ROOT SPLIT[,SPLIT...] [--classes A,B] [--decode] [--out FOLDER]
                            [--max-bad-fraction 0.01]

Opening a dataset checks every label row and every picture's header. `decode` also decodes every picture, which finds
truncated ones. Box sizes are COCO's: small below an area of 32 x 32 pixels, large from 96 x 96.
"""

import csv
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasets.images import read_image
from datasets.index import ANY_CLASS, NO_LABEL_FILE, DatasetIndex, Fault
from datasets.open import READERS, open_dataset
from datasets.overlap import find_overlap
from datasets.text_table import aligned, short_name
from errors import ArgumentParser, UserError, counted, expect, run_script, shortened

SMALL_AREA, LARGE_AREA = 32.0**2, 96.0**2  # pixels^2 (cocodataset.org, detection evaluation)
FEW = 3  # fewer bad pictures or objects never stop a run: one bad picture of ten is not a bad tenth of a set
SUGGESTED = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class ScanReport:
    """The result of `scan`.

    index: the dataset without the pictures that did not decode. Its faults include theirs.
    notes: lines of the table that compare the dataset with others.
    """

    index: DatasetIndex
    title: str
    decoded: bool
    notes: tuple[str, ...] = ()

    @property
    def dropped_pictures(self) -> int:
        return sum(fault.effect == "picture dropped" for fault in self.index.faults)

    @property
    def dropped_objects(self) -> int:
        return sum(fault.effect == "object dropped" for fault in self.index.faults)

    @property
    def bad_fraction(self) -> float:
        """The larger of two shares: dropped pictures among all pictures, dropped objects among all objects.

        Dropped duplicates, labels without a picture and noted faults do not count. The objects of a dropped picture
        cannot be counted.
        """
        return max(self._fractions())

    def _fractions(self) -> tuple[float, float]:
        objects = sum(map(len, self.index.samples))
        of_pictures = self.dropped_pictures / max(len(self.index) + self.dropped_pictures, 1)
        return of_pictures, self.dropped_objects / max(objects + self.dropped_objects, 1)

    def too_bad(self, max_bad_fraction: float) -> bool:
        """Whether one of the shares is above the limit and counts at least three (one for a limit of 0)."""
        few = FEW if max_bad_fraction > 0 else 1
        counts = (self.dropped_pictures, self.dropped_objects)
        return any(c >= few and fraction > max_bad_fraction for c, fraction in zip(counts, self._fractions()))

    def table(self) -> str:
        """The report as text, without a newline at its end. Ignored objects count only in their own column."""
        samples, names = self.index.samples, self.index.names
        picture = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
        labels = _join([sample.labels for sample in samples], np.int64)
        ignore = _join([sample.ignore for sample in samples], bool)
        area = _join([sample.area for sample in samples], np.float64)
        rows: list[tuple[str, ...]] = [("class", "pictures", "objects", "ignored", "small", "medium", "large")]
        groups = [(name, labels == label) for label, name in enumerate(names)]
        if (labels == ANY_CLASS).any():
            groups.append(("(of any class)", labels == ANY_CLASS))
        for name, chosen in [*groups, ("all", np.ones(len(labels), dtype=bool))]:
            learnt = chosen & ~ignore
            small, large = area[learnt] < SMALL_AREA, area[learnt] >= LARGE_AREA
            medium = learnt.sum() - small.sum() - large.sum()
            num_pictures = len(np.unique(picture[chosen]))
            counts = num_pictures, learnt.sum(), (chosen & ignore).sum(), small.sum(), medium, large.sum()
            rows.append((short_name(name), *(str(count) for count in counts)))
        empty = sum(len(sample) == 0 for sample in samples)
        missing = sum(fault.kind == NO_LABEL_FILE for fault in self.index.faults)
        without = f"{empty} without objects" + (f" ({missing} of them without a label file)" if missing else "")
        soft = ", soft labels" if samples and samples[0].class_scores is not None else ""
        lines = [
            self.title,
            f"{counted(len(samples), 'picture')}{_sizes(self.index)}, {without}, {counted(len(names), 'class')}{soft}; "
            + ("every picture decoded" if self.decoded else "headers read, pictures not decoded"),
            "",
            *aligned(rows),
            "",
            *_left_out_lines(self.index),
            *(line for note in self.notes for line in (note, "")),
            *self._fault_lines(),
            f"bad: {counted(self.dropped_pictures, 'picture')}, {counted(self.dropped_objects, 'object')} "
            f"({100 * self.bad_fraction:.2f} %)",
        ]
        return "\n".join(lines)

    def _fault_lines(self) -> list[str]:
        faults = self.index.faults
        if not faults:
            return ["nothing dropped, nothing noted"]
        counts = Counter((fault.effect, fault.kind) for fault in faults)
        first: dict[tuple[str, str], Fault] = {}
        for fault in faults:
            first.setdefault((fault.effect, fault.kind), fault)
        rows = [("count", "effect", "what", "first")]
        for key, count in sorted(counts.items()):
            fault = first[key]
            where = fault.path if fault.line is None else f"{fault.path}:{fault.line}"
            rows.append((str(count), *key, where))
        return [*aligned(rows, right=(0,)), ""]

    def write(self, folder: str | Path) -> None:
        """Write dataset_report.txt (the table) and dataset_report.csv (one row a fault) into a folder."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "dataset_report.txt").write_text(self.table() + "\n", encoding="utf-8")
            with open(folder / "dataset_report.csv", "w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(("effect", "kind", "path", "line", "picture", "reason"))
                for fault in self.index.faults:
                    rows.writerow((fault.effect, fault.kind, fault.path, fault.line, fault.picture, fault.reason))
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror or error}", exit_code=5) from None


def scan(
    index: DatasetIndex, decode: bool = False, *, title: str | None = None, workers: int | None = None
) -> ScanReport:
    """Report on an index. With `decode`, decode every picture in threads and leave out those that fail."""
    title = title or f"{index.format or 'dataset'}"
    if not decode:
        return ScanReport(index, title, decoded=False)
    kept, faults = [], list(index.faults)
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for sample, fault in zip(index.samples, pool.map(_decode_fault, index.samples)):
            if fault is None:
                kept.append(sample)
            else:
                faults.append(fault)
    return ScanReport(replace(index, samples=tuple(kept), faults=tuple(faults)), title, decoded=True)


def check(report: ScanReport, max_bad_fraction: float = 0.01, *, flag: str = "") -> None:
    """UserError if more than `max_bad_fraction` of the pictures or objects were dropped, and at least three.

    The message names the first one, and ends with the setting that accepts them: the `flag` of a command, if given, and
    the key of a config. UserError also for a max_bad_fraction outside 0..1.
    """
    expect(0 <= max_bad_fraction <= 1, flag or "max_bad_fraction", max_bad_fraction, "a number in 0..1")
    is_empty = report.dropped_pictures > 0 and not report.index.samples
    if is_empty or report.too_bad(max_bad_fraction):
        first = next(fault for fault in report.index.faults if fault.effect in ("picture dropped", "object dropped"))
        if is_empty:
            raise UserError(f"{report.title}: no picture of {report.dropped_pictures} can be used; first: {first}")
        enough = next(limit for limit in SUGGESTED if not report.too_bad(limit))
        setting = (f"{flag} {enough:g}, in a config " if flag else "") + f"data.max_bad_fraction={enough:g}"
        raise UserError(
            f"{report.title}: {counted(report.dropped_pictures, 'picture')} and "
            f"{counted(report.dropped_objects, 'object')} are bad ({100 * report.bad_fraction:.2f} %), "
            f"expected at most {100 * max_bad_fraction:g} %; first: {first}; to train without them: {setting}"
        )


def _decode_fault(sample) -> Fault | None:
    try:
        pixels = read_image(sample.image_path)
    except UserError as error:
        reason = str(error).removeprefix(f"{sample.image_path}: ")
    else:
        if pixels.shape == (sample.height, sample.width, 3):
            return None
        reason = f"decoded to {pixels.shape[1]} x {pixels.shape[0]}, expected {sample.width} x {sample.height}"
    name = sample.image_path.name
    return Fault(str(sample.image_path), None, reason, "unreadable picture", "picture dropped", name)


def _join(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])


def _left_out_lines(index: DatasetIndex) -> list[str]:
    """A line on the objects that `classes` left out, by class, and the pictures that became background."""
    counts = Counter(name for sample in index.samples for name in sample.left_out)
    if not counts:
        return []
    shown = shortened(f"{name} {count}" for name, count in counts.most_common())
    emptied = sum(not len(sample) and bool(sample.left_out) for sample in index.samples)
    background = f"{counted(emptied, 'picture')} without others, kept as background"
    return [f"left out: {counted(counts.total(), 'object')} of other classes ({shown}); {background}", ""]


def _sizes(index: DatasetIndex) -> str:
    if not index.samples:
        return ""
    widths, heights = [s.width for s in index.samples], [s.height for s in index.samples]
    low, high = f"{min(widths)} x {min(heights)}", f"{max(widths)} x {max(heights)}"
    return f" of {low}" if low == high else f" of {low} to {high}"


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        "python -m datasets.scan",
        __doc__,
        epilog="Example: python -m datasets.scan voc data/bccd trainval,test --decode\n"
        "Exit codes: 0 fit to train on, 2 a mistake in the arguments or too much bad data, "
        "5 a file that could not be written, 130 after Ctrl-C.",
    )
    parser.add_argument("format", choices=tuple(READERS), help="how the labels are stored")
    parser.add_argument("root", help="folder of the dataset (yolo: or its data.yaml)")
    parser.add_argument("split", help="a split, or several joined by commas: pictures in two of them are counted")
    parser.add_argument("--classes", help="class names joined by commas: use only these, in this order (all)")
    parser.add_argument("--decode", action="store_true", help="also decode every picture")
    parser.add_argument("--out", metavar="FOLDER", help="write dataset_report.txt and dataset_report.csv there")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="bad share of pictures or objects to allow (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    classes = tuple(arguments.classes.split(",")) if arguments.classes else ()
    before: dict[str, DatasetIndex] = {}
    splits = arguments.split.split(",")
    for split in splits:
        index = open_dataset(arguments.format, arguments.root, split, classes=classes)
        report = scan(index, decode=arguments.decode, title=f"{arguments.format} {arguments.root} {split}")
        overlaps = (find_overlap(index, other, (split, name)) for name, other in before.items())
        report = replace(report, notes=tuple(str(overlap) for overlap in overlaps))
        before[split] = index
        print(report.table())
        if arguments.out:
            report.write(Path(arguments.out) / split if len(splits) > 1 else arguments.out)
        check(report, arguments.max_bad_fraction, flag="--max-bad-fraction")
    return 0


if __name__ == "__main__":
    run_script(main)
