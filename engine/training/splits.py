"""The pictures of a run: opened, checked, divided into those to train on, to choose by and to measure on.

open_indexes(config)        the splits as their labels list them; no picture is decoded
kept_sets(config)           what earlier runs kept of COCO sets, which are long to open; keep_indexes writes it
scan_splits(config, ...)    checks the pictures, reports those that two splits share, holds out a part
with_unlabelled(...)        adds the pictures without labels, with their pseudo boxes
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, DataConfig
from datasets.index import DatasetIndex
from datasets.kept_index import KeptSets
from datasets.open import open_dataset, require_objects
from datasets.overlap import Overlap, find_overlap
from datasets.rows import FaultLog
from datasets.scan import ScanReport, check, scan
from datasets.unlabelled import draw_per_class, join, open_pictures, without_labels
from engine.runtime import claims, run_folder
from engine.runtime.processes import Processes
from engine.training.checks import check_data
from engine.training.pseudo_boxes import PseudoBoxes, PseudoTeacher, detect_once, make_pseudo_boxes
from errors import UserError, counted

DECODE_AT_MOST = 20_000  # a split of more pictures is not decoded before training: only the headers are read


@dataclass(frozen=True)
class Splits:
    """The pictures of a run.

    train: the labelled ones, then those without labels. holdout: a part of the labelled training pictures that is
    never trained on, or None. pseudo: the boxes that a teacher made for those without labels.
    """

    names: tuple[str, ...]
    train: DatasetIndex
    holdout: DatasetIndex | None
    test: DatasetIndex
    reports: dict[str, ScanReport]
    overlaps: tuple[Overlap, ...] = ()  # pictures that the test split and the held-out part share with those trained on
    unlabelled: int = 0  # pictures without labels in `train`
    pseudo: PseudoBoxes | None = None

    @property
    def labelled(self) -> int:
        """The number of labelled pictures in `train`."""
        return len(self.train) - self.unlabelled

    def describe(self) -> str:
        """ "360 pictures", or "60 labelled and 300 unlabelled pictures"."""
        if not self.unlabelled:
            return counted(len(self.train), "picture")
        return f"{self.labelled} labelled and {self.unlabelled} unlabelled pictures"


def kept_sets(config: Config) -> KeptSets:
    """The indexes that the runs in one folder share."""
    return KeptSets(Path(config.runs) / "opened_sets")


def keep_indexes(kept: KeptSets) -> None:
    """Write those that are new. UserError with exit code 5 if that cannot be done."""
    for path, parts in kept.new_files():
        with contextlib.suppress(claims.Claimed), claims.take(path):  # another run may be writing the same
            run_folder.make_folder(path.parent)
            run_folder.write_bytes(path, parts)


def open_indexes(config: Config, kept: KeptSets | None = None) -> dict[str, DatasetIndex]:
    """The splits as their labels list them: "whole", "train" (the labelled pictures of the whole), "test", and
    "unlabelled" where there are pictures without labels.

    data.max_samples chooses by the dataset and its keys alone: runs of several seeds train on the same pictures.
    data.per_class draws others for each seed, unless data.draw_seed is given. No picture is decoded.
    kept: where what is read is noted, for keep_indexes.
    """
    data, kept = config.data, kept or kept_sets(config)
    check_data(data)
    test = open_dataset(*data.test_place, classes=data.classes, kept=kept)
    whole, train = open_labelled(config, test.names, kept)
    if train.names != test.names:
        root = data.train_root or data.root
        found = f"{root}: the classes of {data.train!r} are {', '.join(train.names)}"
        raise UserError(f"{found}; expected those of {data.test!r} in {data.root}: {', '.join(test.names)}")
    indexes = {"whole": whole, "train": train, "test": test}
    return indexes if data.unlabelled is None else indexes | {"unlabelled": open_unlabelled(data, whole, train)}


def open_labelled(
    config: Config, names: tuple[str, ...] = (), kept: KeptSets | None = None
) -> tuple[DatasetIndex, DatasetIndex]:
    """The training split, and the pictures of it whose labels are used.

    names: the classes where data.train is None. kept: as of open_indexes.
    """
    data = config.data
    if data.train is None:
        none = DatasetIndex(names, (), format=data.format)
        return none, none
    whole = open_dataset(*data.train_place, classes=data.classes, kept=kept or kept_sets(config))
    if not data.per_class:
        return whole, take(whole, data.max_samples)
    seed = config.seed if data.draw_seed is None else data.draw_seed
    return whole, choose(whole, draw_per_class(whole, data.per_class, seed))


def open_unlabelled(data: DataConfig, whole: DatasetIndex, train: DatasetIndex) -> DatasetIndex:
    """The pictures without labels: the rest of the training split, and those of data.unlabelled's own split or folder.

    A picture in both counts once (by its path). Labelled pictures, held out or not, are dropped: by their path, or as
    links and copies with the same bytes, which are faults of the report.
    """
    settings = data.unlabelled
    assert settings is not None
    parts = []
    place_of = lambda sample: os.path.abspath(sample.image_path)
    labelled = set(map(place_of, train.samples))
    if settings.rest:
        rest = [row for row, sample in enumerate(whole.samples) if place_of(sample) not in labelled]
        if not rest:
            raise UserError("key 'data.unlabelled.rest': every picture of data.train is labelled, expected fewer")
        parts.append(without_labels(whole.subset(rest)))
    if settings.split is not None or settings.root is not None:
        format = None if settings.split is None else settings.format or data.format
        parts.append(open_pictures(format, settings.root or data.root, settings.split, whole.names))
    samples = {place_of(sample): sample for part in parts for sample in part.samples}
    kept = tuple(sample for place, sample in samples.items() if place not in labelled)
    if not kept:
        raise UserError("key 'data.unlabelled': all of its pictures are labelled, expected others")
    faults = tuple(fault for part in parts for fault in part.faults)
    index = dataclasses.replace(parts[-1], samples=kept, faults=faults)
    return take(without_copies(index, train), settings.max_samples)


def without_copies(unlabelled: DatasetIndex, labelled: DatasetIndex) -> DatasetIndex:
    """Drop the pictures without labels that are copies of labelled ones; each becomes a fault of the report."""
    shared = {pair.path: pair for pair in find_overlap(unlabelled, labelled, ("unlabelled", "train")).shared}
    kept = tuple(sample for sample in unlabelled.samples if sample.image_path not in shared)
    if not kept:
        example = next(iter(shared.values()))
        found = f"such as {example.path} and {example.others[0]}"
        raise UserError(f"key 'data.unlabelled': all of its pictures are copies of labelled ones, {found}")
    log = FaultLog()
    for path, (_, others, is_file) in shared.items():
        reason = f"it has the {'file' if is_file else 'bytes'} of the labelled picture {others[0]}"
        log.add(path, None, reason, "copy of a labelled picture", "duplicate dropped", path.name)
    return dataclasses.replace(unlabelled, samples=kept, faults=(*unlabelled.faults, *log.faults))


def scan_splits(config: Config, indexes: dict[str, DatasetIndex], say: Callable[[str], None] = print) -> Splits:
    """Check the pictures, report those that two splits share, and hold out a part, the same for every seed."""
    data, test = config.data, indexes["test"]
    shared = find_overlap(test, indexes["whole"], ("test", "train"))
    refuse_overlap(shared, data)
    reports: dict[str, ScanReport] = {}
    overlaps: list[Overlap] = []
    train = indexes["train"]
    if "unlabelled" in indexes:
        reports["unlabelled"] = scan_pictures(indexes["unlabelled"], "pictures without labels", data, say)
    if data.train is not None:
        reports["train"] = scan_pictures(train, " ".join(data.train_place), data, say)
        train = reports["train"].index
        require_objects(train, reports["train"].title, data.train_place[1], with_difficult=False)
        overlaps.append(shared.within(train))
    if "unlabelled" in indexes:
        overlaps.append(find_overlap(test, reports["unlabelled"].index, ("test", "unlabelled")))
        refuse_overlap(overlaps[-1], data)
    reports["test"] = scan_pictures(test, " ".join(data.test_place), data, say, notes=tuple(map(str, overlaps)))
    test, with_difficult = reports["test"].index, config.evaluation.counts_difficult
    require_objects(test, reports["test"].title, data.test_place[1], with_difficult=with_difficult)
    splits = Splits(train.names, train, None, test, reports, tuple(overlaps))
    return hold_out(splits, config, say) if data.holdout_fraction else splits


def scan_pictures(
    index: DatasetIndex, title: str, data: DataConfig, say: Callable[[str], None], notes: tuple[str, ...] = ()
) -> ScanReport:
    """The report on a split, which is printed. UserError if more of it is bad than data.max_bad_fraction."""
    report = scan(index, decode=len(index) <= DECODE_AT_MOST, title=title)
    report = dataclasses.replace(report, notes=notes)
    say(report.table() + "\n")
    check(report, data.max_bad_fraction)
    return report


def hold_out(splits: Splits, config: Config, say: Callable[[str], None]) -> Splits:
    """The splits with a random share of the training pictures held out, the same ones for every seed."""
    train, fraction = splits.train, config.data.holdout_fraction
    held = round(fraction * len(train))
    if not 0 < held < len(train):
        raise UserError(f"key 'data.holdout_fraction': {fraction} of {len(train)} pictures is {held}, expected some")
    order = np.random.default_rng(0).permutation(len(train))
    kept, holdout = (train.subset(np.sort(rows).tolist()) for rows in (order[held:], order[:held]))
    overlap = find_overlap(holdout, kept, ("the held-out part", "train"))
    if overlap.shared:
        say(f"{overlap}\n")
    # Without an object every epoch has the same score, and the first is the best.
    title = f"key 'data.holdout_fraction': {fraction} of {len(train)} pictures leaves a part"
    require_objects(kept, title, config.data.train_place[1], with_difficult=False)
    require_objects(holdout, title, config.data.train_place[1], with_difficult=config.evaluation.counts_difficult)
    return dataclasses.replace(splits, train=kept, holdout=holdout, overlaps=(*splits.overlaps, overlap))


def with_unlabelled(
    config: Config,
    splits: Splits,
    teacher: PseudoTeacher | None,
    processes: Processes,
    say: Callable[[str], None],
    *,
    keep: bool = True,
) -> Splits:
    """The splits with the pictures without labels among those to train on, and their pseudo boxes by the teacher.

    keep: whether the teacher's detections are written to <runs>/pseudo_boxes.
    """
    if "unlabelled" not in splits.reports:
        return splits
    index, pseudo = splits.reports["unlabelled"].index, None
    settings = config.pseudo_boxes
    if teacher is not None and settings is not None:
        made = None
        if processes.is_first:
            found = detect_once(
                teacher.model,
                index,
                teacher.image_size,
                teacher.detection,
                folder=Path(config.runs) / "pseudo_boxes",
                device=processes.device,
                say=say,
                workers=config.data.workers,
                keep=keep,
            )
            made = make_pseudo_boxes(teacher, settings, found, len(index), splits.train)
        pseudo = processes.from_first(made)
        index = pseudo.index(index)
        say(f"{pseudo}\n")
    return dataclasses.replace(splits, train=join(splits.train, index), unlabelled=len(index), pseudo=pseudo)


def refuse_overlap(overlap: Overlap, data: DataConfig) -> None:
    """UserError where every test picture is one of the training split, unless the config allows it."""
    if overlap.is_whole and not data.allow_overlap:
        raise UserError(
            f"data.test {data.test!r} has no picture of its own: {overlap}; expected others, which `python -m "
            f"datasets.split` makes of one split, or data.allow_overlap=true to measure what is remembered"
        )


def count_training_pictures(config: Config) -> int:
    """The number of pictures that a run trains on, without decoding them."""
    whole, train = open_labelled(config)
    indexes = {"train": train}
    if config.data.unlabelled is not None:
        indexes["unlabelled"] = open_unlabelled(config.data, whole, train)
    return count_pictures(indexes, config.data)


def count_pictures(indexes: dict[str, DatasetIndex], data: DataConfig) -> int:
    """The same, of open_indexes."""
    labelled = len(indexes["train"])
    return labelled - round(data.holdout_fraction * labelled) + len(indexes.get("unlabelled", ()))


def take(index: DatasetIndex, at_most: int) -> DatasetIndex:
    """At most this many random pictures in their order, always the same, with their faults; all for 0 or less."""
    if not 0 < at_most < len(index):
        return index
    return choose(index, np.sort(np.random.default_rng(0).permutation(len(index))[:at_most]).tolist())


def choose(index: DatasetIndex, rows: list[int]) -> DatasetIndex:
    """The pictures in these rows of an index, with their faults."""
    taken = index.subset(rows)
    pictures = {"", *(sample.image_path.name for sample in taken.samples)}  # "": a fault of a whole file
    return dataclasses.replace(taken, faults=tuple(fault for fault in index.faults if fault.picture in pictures))
