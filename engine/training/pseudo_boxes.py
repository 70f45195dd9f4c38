"""Pseudo boxes: a teacher's detections on pictures without labels, from which the student learns as from labels.

The teacher sees each picture once, before the training: letterboxed at the teacher's own size, without augmentation.
Its detections become objects, ignored regions or nothing:

    score >= threshold of the class            an object
    ignore_above <= score < threshold          ignored: neither learnt as an object nor as background
    below, and classes that the dataset lacks  nothing

The threshold is one number, with other numbers for some classes if they are given. Or it is chosen for each class so
that a picture has boxes_per_object times as many pseudo boxes of the class as a labelled picture has objects
(score_of_rank); ignored_per_object times as many of the next best detections are then ignored. So a class that the
teacher finds with low scores is not lost. The idea is that of Chen et al., "Label Matching Semi-Supervised Object
Detection", arXiv:2206.06608, who choose anew during the training, and divide what is above the threshold. It needs
labelled pictures that are a fair sample: with data.per_class, rare classes are too frequent among them.

The detections are kept in <runs>/pseudo_boxes/<fingerprint>.npz, so all rows and seeds of a study share them. Other
thresholds need no other file.
"""

import hashlib
import os
import socket
import zipfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

import checkpoint
import models
from config import Config, PseudoBoxConfig
from datasets.class_names import join_classes
from datasets.index import DatasetIndex
from datasets.loader import Loader
from datasets.text_table import aligned
from engine.evaluation.cross_dataset import MOST_DETECTIONS
from engine.evaluation.measuring import detect_all
from engine.training.teaching import load_frozen
from errors import DISK_EXIT_CODE, UserError, counted, expect, naming, shortened
from metrics.matching import position_in_run
from metrics.tables import DetectionTable
from structures import DenseDetector, DetectionSettings
from teachers.output_cache import fingerprint_of
from weights import file_of_run

LOWEST_SCORE = 0.01  # detections are kept from here on, for every choice of thresholds
BATCH = 32  # pictures of one forward pass
COLUMNS = ("image", "boxes_xyxy", "scores", "labels")


@dataclass(frozen=True, eq=False)
class PseudoBoxes:
    """The pseudo boxes of M detections. names: the dataset's classes.

    detections: image is a row of the pictures without labels, labels are the dataset's classes.
    thresholds (K,): from this score on a detection of the class is an object. ignore_above (K,): from this one on it is
        ignored.
    """

    teacher: str
    image_size: int
    iou_threshold: float
    names: tuple[str, ...]
    detections: DetectionTable
    thresholds: np.ndarray
    ignore_above: np.ndarray
    pictures: int

    @property
    def is_object(self) -> np.ndarray:
        """(M,) bool."""
        return self.detections.scores >= self.thresholds[self.detections.labels]

    @property
    def is_ignored(self) -> np.ndarray:
        """(M,) bool."""
        return (self.detections.scores >= self.ignore_above[self.detections.labels]) & ~self.is_object

    def index(self, pictures: DatasetIndex) -> DatasetIndex:
        """The pictures without labels, with these boxes."""
        kept = np.flatnonzero(self.is_object | self.is_ignored)
        kept = kept[np.argsort(self.detections.image[kept], kind="stable")]
        found, is_object = self.detections[kept], self.is_object[kept]
        first = np.searchsorted(found.image, np.arange(len(pictures) + 1))
        samples = []
        for sample, start, end in zip(pictures.samples, first[:-1], first[1:]):
            boxes, labels, area = found.boxes_xyxy[start:end], found.labels[start:end], found.box_area[start:end]
            none = np.zeros(end - start, dtype=bool)
            ignore = ~is_object[start:end]
            samples.append(replace(sample, boxes_xyxy=boxes, labels=labels, ignore=ignore, area=area, crowd=none))
        return replace(pictures, samples=tuple(samples))

    def to_tree(self) -> dict:
        """Plain values for report.json."""
        counts = {
            name: {
                "threshold": finite_or_none(self.thresholds[label]),
                "ignore_above": finite_or_none(self.ignore_above[label]),
                "objects": int((self.is_object & (self.detections.labels == label)).sum()),
                "ignored": int((self.is_ignored & (self.detections.labels == label)).sum()),
            }
            for label, name in enumerate(self.names)
        }
        return {
            "teacher": self.teacher,
            "image_size": self.image_size,
            "iou_threshold": self.iou_threshold,
            "pictures": self.pictures,
            "classes": counts,
        }

    def __str__(self) -> str:
        tree = self.to_tree()
        rows = [("class", "threshold", "ignored from", "objects", "ignored")]
        for name, c in tree["classes"].items():
            scores = ["-" if c[key] is None else f"{c[key]:.3f}" for key in ("threshold", "ignore_above")]
            rows.append((name, *scores, str(c["objects"]), str(c["ignored"])))
        head = (
            f"pseudo boxes of teacher {self.teacher!r} at {self.image_size} px in {counted(self.pictures, 'picture')}, "
        )
        head += f"suppressed above IoU {self.iou_threshold:g}"
        lines = [head, *aligned(rows)]
        if not self.is_object.any():
            best = f"{self.detections.scores.max():.3f}" if len(self.detections) else "none"
            found = f"warning: teacher {self.teacher!r} finds no object, its best score: {best}"
            lines.append(f"{found}; the student learns these pictures as background; lower the thresholds")
        return "\n".join(lines)


def finite_or_none(score: float) -> float | None:
    """A score as JSON has it; None for infinity: no detection is that good."""
    return float(score) if np.isfinite(score) else None


@dataclass(frozen=True)
class PseudoTeacher:
    """The frozen teacher of pseudo boxes.

    label_of: for each of its classes the dataset's, or -1. image_size: in pixels.
    detection: of its own classes. max_detections: of the dataset's classes, the best of them in each picture.
    """

    name: str
    model: nn.Module
    label_of: np.ndarray
    image_size: int
    detection: DetectionSettings
    max_detections: int


def open_pseudo_teacher(
    config: Config, class_names: tuple[str, ...], given: dict[str, nn.Module], say: Callable[[str], None]
) -> PseudoTeacher | None:
    """The teacher that config.data.unlabelled.pseudo names; None where it names none.

    class_names: the dataset's classes. given: teachers by name, instead of their weights. The teacher's classes are
    joined to the dataset's as those of the terms are (join_classes). UserError without a class in common.
    """
    if (settings := config.pseudo_boxes) is None:
        return None
    for name in settings.class_thresholds:
        key, expected = "key 'data.unlabelled.pseudo.class_thresholds'", f"some of {shortened(class_names)}"
        expect(name in class_names, key, repr(name), expected)
    number = [teacher.name for teacher in config.teachers].index(settings.teacher)
    teacher = config.teachers[number]
    model, t_names = load_frozen(teacher, f"teachers.{number}", class_names, given, None)
    if hasattr(model, "requested_outputs"):
        cast(DenseDetector, model).requested_outputs = None  # it is a copy
    with naming(f"key 'data.unlabelled.pseudo.teacher': teacher {teacher.name!r}", ValueError):
        columns, t_columns = join_classes(class_names, t_names, aliases=teacher.class_aliases)
    label_of = np.full(len(t_names), -1)
    label_of[t_columns.numpy()] = columns.numpy()
    missing = [name for label, name in enumerate(class_names) if label not in label_of]
    if missing:
        say(f"pseudo boxes: teacher {teacher.name!r} has no class {shortened(missing)}")
    published = models.published_detection(teacher.arch)
    iou_threshold = published.iou_threshold if settings.iou_threshold is None else settings.iou_threshold
    # Detections of classes that the dataset lacks do not take the places of others.
    most = MOST_DETECTIONS if (label_of < 0).any() else published.max_detections
    detection = DetectionSettings(LOWEST_SCORE, iou_threshold, most)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from PyTorch's stubs
    size = pseudo_image_size(config, given)
    return PseudoTeacher(teacher.name, model, label_of, size, detection, published.max_detections)


def make_pseudo_boxes(
    teacher: PseudoTeacher, settings: PseudoBoxConfig, found: DetectionTable, pictures: int, labelled: DatasetIndex
) -> PseudoBoxes:
    """The pseudo boxes of `pictures` pictures without labels, from the teacher's detections in them (detect_once).

    labelled: the pictures that the run trains on with their labels; their objects may choose the thresholds.
    """
    labels = teacher.label_of[found.labels]
    found = best_of_pictures(replace(found[labels >= 0], labels=labels[labels >= 0]), teacher.max_detections)
    thresholds, ignore_above = choose_thresholds(settings, found, pictures, labelled)
    return PseudoBoxes(
        teacher=teacher.name,
        image_size=teacher.image_size,
        iou_threshold=teacher.detection.iou_threshold,
        names=labelled.names,
        detections=found,
        thresholds=thresholds,
        ignore_above=ignore_above,
        pictures=pictures,
    )


def best_of_pictures(found: DetectionTable, count: int) -> DetectionTable:
    """The rows of the `count` detections with the highest scores of each picture, in their order."""
    order = np.lexsort((-found.scores, found.image))
    return found[np.sort(order[position_in_run(found.image[order]) < count])]


def pseudo_image_size(config: Config, given_names: Collection[str] = ()) -> int:
    """The side in pixels of the images that the pseudo boxes are made at.

    given_names: names of teachers whose modules are given. One that is trained in place sees the student's size.
    """
    pseudo = config.pseudo_boxes
    assert pseudo is not None
    teacher = config.teacher_named(pseudo.teacher)
    if size := pseudo.image_size or teacher.image_size:
        return size
    if teacher.weights is None or teacher.name in given_names or teacher.is_random:
        return config.image_size
    file = file_of_run(teacher.weights)
    if not file.is_file():
        return config.image_size
    return checkpoint.load_model(file, teacher.arch)[1].image_size


def choose_thresholds(
    settings: PseudoBoxConfig, found: DetectionTable, pictures: int, labelled: DatasetIndex
) -> tuple[np.ndarray, np.ndarray]:
    """(K,), (K,): the scores from which a detection of each class is an object, and from which it is ignored.

    found: the detections in `pictures` pictures. labelled: gives the number of objects in a picture.
    """
    names = labelled.names
    thresholds, ignore_above = np.full(len(names), settings.threshold), np.full(len(names), settings.ignore_above)
    if settings.boxes_per_object is not None:
        labels = np.concatenate([sample.labels[~sample.ignore] for sample in labelled.samples])
        expected = np.bincount(labels, minlength=len(names)) / len(labelled) * pictures  # objects of each class
        thresholds = score_of_rank(found, settings.boxes_per_object * expected)
        if settings.ignored_per_object is not None:
            ignore_above = score_of_rank(found, (settings.boxes_per_object + settings.ignored_per_object) * expected)
    for name, value in settings.class_thresholds.items():
        thresholds[names.index(name)] = value
    return thresholds, ignore_above


def score_of_rank(found: DetectionTable, ranks: np.ndarray) -> np.ndarray:
    """(K,): for each class the score of its n-th best detection, with n = ranks[k] rounded.

    So n detections have at least that score (more only with equal scores). LOWEST_SCORE where there are fewer than n,
    and infinity, which no score reaches, for n = 0.
    """
    scores = np.full(len(ranks), LOWEST_SCORE)
    for label, rank in enumerate(np.round(ranks).astype(int)):
        own = np.sort(found.scores[found.labels == label])[::-1]
        if rank == 0:
            scores[label] = np.inf
        elif rank <= len(own):
            scores[label] = own[rank - 1]
    return scores


def detect_once(
    model: nn.Module,
    pictures: DatasetIndex,
    image_size: int,
    detection: DetectionSettings,
    *,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
    workers: int = 0,
    keep: bool = True,
) -> DetectionTable:
    """The detections of a frozen teacher in pictures, in its classes: from the file in `folder`, or computed now.

    The file is named by the weights, the size, the thresholds and the bytes of the pictures: frames without compression
    have one size, and often the names of other frames. A file that cannot be read is made again, and `say` says so.
    keep: whether to write it. workers: processes that decode.
    """
    digest = hashlib.sha256(fingerprint_of(model, image_size=image_size, **asdict(detection)).encode())
    for sample in pictures.samples:
        digest.update(hashlib.blake2b(sample.image_path.read_bytes()).digest())
    path = folder / f"{digest.hexdigest()[:32]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                return DetectionTable(*(file[name] for name in COLUMNS))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            say(f"{path}: damaged, made again ({error})")
    say(f"pseudo boxes: a teacher looks at {counted(len(pictures), 'picture')}, at {image_size} px")
    loader = Loader(pictures, image_size=image_size, batch_size=BATCH, seed=0, shuffle=False, workers=workers)
    found, _ = detect_all(model.to(device), loader, detection, device)
    if keep:
        write_detections(path, found)
    return found


def write_detections(path: Path, found: DetectionTable) -> None:
    """Write the file whole or not at all. UserError with exit code 5 if that cannot be done."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez_compressed(file, **{name: getattr(found, name) for name in COLUMNS})
        os.replace(partial, path)
    except OSError as error:
        checkpoint.discard(partial)
        raise UserError(f"{path}: {error.strerror or error}", DISK_EXIT_CODE) from None
