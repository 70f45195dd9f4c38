"""Few labelled pictures and many without labels: which pictures keep their labels, and pictures without any.

    draw_per_class(index, 10, seed)           rows of the pictures that keep their labels: ten for each class
    open_pictures("voc", root, split, names)  a split of which nothing but the pictures is read
    without_labels(index)                     the pictures of an index, their labels forgotten
    join(labelled, unlabelled)                one index of both

A picture without labels is a Sample with is_labelled False. It has no objects, unless a teacher found some.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from datasets.coco import find_folder, find_image, find_json, read_json, read_records
from datasets.folders import files_in, list_files
from datasets.images import SUFFIXES, find_picture, read_size
from datasets.index import DatasetIndex, Sample
from datasets.rows import FaultLog
from datasets.text_lines import read_lines
from datasets.yolo_txt import list_pictures
from errors import UserError, shortened
from random_streams import Stream, seeded_generator

Listed = Iterable[tuple[str, Path | None]]  # the name of each picture, and its file if there is one


def draw_per_class(index: DatasetIndex, count: int, seed: int) -> list[int]:
    """Rows of `count` pictures for each class, K * count in all, ascending: a function of the index and the seed.

    The pictures are put in a random order. The classes choose one after another, the one in the fewest pictures first,
    ties in the order of `names`. Each takes the first `count` pictures that show it and that no class before it took;
    ignored objects do not count. So each class is in at least `count` pictures, a frequent one in more. UserError for a
    class that finds fewer.
    """
    order = torch.randperm(len(index), generator=seeded_generator(Stream.LABELLED, seed)).tolist()
    shown = [set(sample.labels[~sample.ignore].tolist()) for sample in index.samples]
    total = [sum(label in labels for labels in shown) for label in range(len(index.names))]
    drawn: set[int] = set()
    for label in sorted(range(len(index.names)), key=lambda label: (total[label], label)):
        rows = [row for row in order if row not in drawn and label in shown[row]][:count]
        if len(rows) < count:
            raise UserError(
                f"key 'data.per_class': found {count}, expected at most {len(rows)}: no more of {len(index)} pictures "
                f"show a {index.names[label]} ({total[label]}, without those drawn for rarer classes)"
            )
        drawn.update(rows)
    return sorted(drawn)


def without_labels(index: DatasetIndex) -> DatasetIndex:
    """The pictures of an index as ones without labels: its boxes are forgotten, its faults belong to the whole."""
    samples = (unlabelled_sample(s.image_path, s.image_id, s.width, s.height) for s in index.samples)
    return DatasetIndex(index.names, tuple(samples), (), index.category_ids, index.format)


def unlabelled_sample(image_path: Path, image_id: int | str, width: int, height: int) -> Sample:
    none = np.zeros(0)
    boxes, labels, ignore = np.zeros((0, 4)), none.astype(np.int64), none.astype(bool)
    return Sample(image_path, image_id, width, height, boxes, labels, ignore, none, is_labelled=False)


def join(labelled: DatasetIndex, unlabelled: DatasetIndex) -> DatasetIndex:
    """One index: the labelled pictures, then the others. Where labels are soft, boxes of others are one class each."""
    samples = unlabelled.samples
    if labelled.samples and labelled.samples[0].class_scores is not None:
        one_hot = np.eye(len(labelled.names))
        samples = tuple(replace(sample, class_scores=one_hot[sample.labels]) for sample in samples)
    return replace(labelled, samples=(*labelled.samples, *samples), faults=(*labelled.faults, *unlabelled.faults))


def open_pictures(format: str | None, root: str | Path, split: str | None, names: tuple[str, ...]) -> DatasetIndex:
    """The pictures of a split, or of a folder, without labels: no label is opened, and none need be there.

    format, root, split: as of open_dataset. What lists a split's pictures is read: in VOC ImageSets/Main/<split>.txt
        (with JPEGImages or images), in KITTI ImageSets/<split>.txt (with image_2), in YOLO the yaml file or the list or
        folder that it names, in COCO `images` of the JSON file. format or split None: every picture below the folder.
    names: the K classes, of which teachers may find objects.
    UserError for a root or split that cannot be used or has no picture.
    """
    root, log = Path(root), FaultLog()
    source = f"{root}: split {split!r}" if format and split else str(root)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder, expected pictures")
    if format is None or split is None:
        listed: Listed = ((str(path.relative_to(root)), path) for path in list_files(root, SUFFIXES))
    elif format not in LISTS:
        raise UserError(f"format {format!r} lists no pictures without labels, expected one of {', '.join(LISTS)}")
    else:
        listed = LISTS[format](root, split, log)
    samples: dict[str, Sample] = {}
    for name, path in listed:
        if path is None:
            log.add(root, None, f"no picture {name}", "no such picture", "left out", name)
            continue
        try:
            width, height = read_size(path)
        except UserError as error:
            log.add_error(path, error, "unreadable picture", "picture dropped", path.name)
            continue
        samples.setdefault(os.path.abspath(path), unlabelled_sample(path, name, width, height))
    if not samples:
        first = f"; first fault: {log.faults[0]}" if log.faults else ""
        raise UserError(f"{source} has no usable picture{first}")
    return DatasetIndex(names, tuple(samples.values()), tuple(log.faults), None, format or "pictures")


def voc_pictures(root: Path, split: str, log: FaultLog) -> Listed:
    """The pictures in the lists of a VOC set; those of its folder for `all`."""
    for part in split.split("+"):
        year, slash, name = part.rpartition("/")
        bases = (root, root / "VOCdevkit") if slash else (root,)
        choices = [base / folder for base in bases for folder in ((year, f"VOC{year}") if slash else (".",))]
        folder = next((choice for choice in choices if choice.is_dir()), choices[0])
        pictures = next((path for path in (folder / "JPEGImages", folder / "images") if path.is_dir()), None)
        if pictures is None:
            raise UserError(f"{folder}: no folder JPEGImages or images, expected a VOC dataset")
        lists = folder / "ImageSets" / "Main"
        if name == "all":
            yield from ((path.stem, path) for path in list_files(pictures, SUFFIXES))
        elif not (lists / f"{name}.txt").is_file():
            others = shortened(path.stem for path in files_in(lists, (".txt",))) or "none"
            raise UserError(f"{lists}: no list {name!r}, found {others} (`all` takes every picture)")
        else:
            yield from named_pictures(lists / f"{name}.txt", pictures)


def kitti_pictures(root: Path, split: str, log: FaultLog) -> Listed:
    """The frames in a list of a KITTI set; those of its folder for `all` without a list."""
    base = next((folder for folder in (root / "training", root) if (folder / "image_2").is_dir()), None)
    if base is None:
        raise UserError(f"{root}: no folder image_2, expected a KITTI dataset")
    choices = [folder / "ImageSets" / f"{split}.txt" for folder in dict.fromkeys((root, base))]
    source = next((path for path in choices if path.is_file()), None)
    if source is None and split != "all":
        raise UserError(f"{choices[0]}: no such list, expected the pictures of split {split!r} (`all` takes every one)")
    if source is None:
        return [(path.stem, path) for path in list_files(base / "image_2", SUFFIXES)]
    return named_pictures(source, base / "image_2")


def named_pictures(source: Path, folder: Path) -> Listed:
    """The lines of a list, with or without a suffix, and their pictures in a folder."""
    for number, line in read_lines(source):
        path = PurePosixPath(line.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{source}:{number}: {line!r} leaves the dataset's folder")
        is_file = path.suffix.lower() in SUFFIXES and (folder / path).is_file()
        yield line, folder / path if is_file else find_picture(folder, line)


def yolo_pictures(root: Path, split: str, log: FaultLog) -> Listed:
    paths, found = list_pictures(root, split)
    log.faults += found.faults
    return [(path.stem, path) for path in paths]


def coco_pictures(root: Path, split: str, log: FaultLog) -> Listed:
    """The pictures in the JSON file of a split."""
    json_path = find_json(root, split)
    records = read_records(read_json(json_path), "images", json_path)
    folder = find_folder(root, split, json_path, records)
    for record in records:
        name = str(record.get("file_name", ""))
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise UserError(f"{json_path}: file_name {name!r} leaves the dataset's folder")
        yield name, find_image(folder, name) if name else None


LISTS = {
    "voc": voc_pictures,
    "coco": coco_pictures,
    "yolo": yolo_pictures,
    "kitti": kitti_pictures,
    "shapes": yolo_pictures,
}
