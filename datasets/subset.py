"""Limit an index to some of the dataset's classes."""

from dataclasses import replace

import numpy as np

from datasets.index import ANY_CLASS, DatasetIndex, Sample
from errors import expect, shortened


def keep_classes(index: DatasetIndex, classes: tuple[str, ...], title: str) -> DatasetIndex:
    """The index with only these classes, in this order.

    Objects of other classes are removed (Sample.left_out has their names): they become background, not ignored regions.
    All pictures stay, also those without an object of these classes. Regions of ANY_CLASS stay. The shares of soft
    labels are normalised over the kept classes. In VOC and KITTI each object has a class name; one that the set's list
    lacks is another class too, and no fault.
    UserError, which begins with `title`, for a name that the index does not have and for a name given twice.
    """
    for name in classes:
        expect(name in index.names, f"{title}: classes", repr(name), f"some of {shortened(index.names)}")
        expect(classes.count(name) == 1, f"{title}: classes", f"{name!r} twice", "each name once")
    columns = [index.names.index(name) for name in classes]
    new_label = np.full(len(index.names) + 1, len(classes), dtype=np.int64)  # the last row is for ANY_CLASS = -1
    new_label[columns], new_label[ANY_CLASS] = range(len(classes)), ANY_CLASS
    samples = tuple(_keep(sample, new_label, columns, index.names) for sample in index.samples)
    faults = index.faults
    if index.format in ("voc", "kitti"):
        faults = tuple(
            replace(fault, effect="left out") if _is_of_other_class(fault.kind, fault.effect) else fault
            for fault in faults
        )
    ids = index.category_ids
    ids = None if ids is None else tuple(ids[column] for column in columns)
    return replace(index, names=tuple(classes), samples=samples, faults=faults, category_ids=ids)


def _is_of_other_class(kind: str, effect: str) -> bool:
    return kind == "unknown class" and effect == "object dropped"


def _keep(sample: Sample, new_label: np.ndarray, columns: list[int], names: tuple[str, ...]) -> Sample:
    """Keep the objects of the chosen classes. columns: the positions of these classes among all."""
    labels = new_label[sample.labels]
    is_kept = labels < len(columns)
    if is_kept.all() and sample.class_scores is None:
        return replace(sample, labels=labels)
    scores = sample.class_scores
    if scores is not None:
        scores = scores[is_kept][:, columns]
        total = scores.sum(axis=1, keepdims=True)
        whole = np.eye(len(columns))[labels[is_kept]]  # used where the kept shares are all 0
        scores = np.divide(scores, total, out=whole, where=total > 0)
    return replace(
        sample,
        boxes_xyxy=sample.boxes_xyxy[is_kept],
        labels=labels[is_kept],
        ignore=sample.ignore[is_kept],
        area=sample.area[is_kept],
        crowd=sample.crowd[is_kept],
        class_scores=scores,
        left_out=tuple(names[label] for label in sample.labels[~is_kept]),
    )
