"""Evaluates a detector on a dataset with other classes: both are reduced to the classes they share.

datasets.class_names.map_classes decides which classes these are. The others are treated as follows:

    objects of another class        are removed; a detection on one is a false positive, as on the background
    objects of a near class         (a Van for the class car) become regions that absorb detections of the evaluated
                                    class, as COCO crowds do
    KITTI's DontCare                is such a region for every evaluated class
    detections of another class     are dropped
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from datasets.class_names import ClassMap, are_numbers, map_classes
from datasets.index import ANY_CLASS, DatasetIndex, Sample
from datasets.open import open_dataset, require_objects
from datasets.subset import keep_classes
from engine.evaluation.measuring import EvaluationResult, evaluate_model
from errors import counted, shortened
from structures import Detections, Detector

MOST_DETECTIONS = 30_000  # of all classes in an image, before the evaluated ones are selected


def on_common_classes(
    model: nn.Module, index: DatasetIndex, names: tuple[str, ...], given: dict[str, str | None] | None = None
) -> tuple[nn.Module, DatasetIndex, ClassMap | None]:
    """Reduce a model with class `names` and a dataset to their common classes; also return the ClassMap used.

    Model and dataset are returned unchanged if every class keeps its column. The ClassMap is None if no names were
    compared: the lists are equal, or the model has no names ("0", "1", ..., none of which the dataset has) and nothing
    is `given`, so that its classes are matched by column. given, UserError: as in map_classes.
    """
    is_unnamed = are_numbers(names) and not set(names) & set(index.names)
    if not given and (is_unnamed or names == tuple(index.names)):
        if names != tuple(index.names) and len(names) == len(index.names):
            print(f"the model's classes have no names, so the dataset's are used in order: {shortened(index.names)}")
        return model, index, None
    class_map = map_classes(index.names, names, given)
    if class_map.is_identity:
        return model, index, class_map
    return CommonClasses(model, class_map), map_index(index, class_map), class_map


def evaluate_on_dataset(
    model: nn.Module,
    names: tuple[str, ...],
    place: tuple[str, str, str],
    *,
    classes: tuple[str, ...] = (),
    own_classes: tuple[str, ...] = (),
    given: dict[str, str | None] | None = None,
    with_difficult: bool,
    **settings: Any,
) -> tuple[EvaluationResult, DatasetIndex]:
    """evaluate_model on the classes that a model (class `names`) shares with a dataset; also the dataset with these.

    place: format, root, split. classes: measure only these classes of the dataset; none: own_classes, to which the
    model's run was limited, if the dataset has them all. given: as in map_classes.
    with_difficult: as in datasets.open.require_objects, which raises UserError where no object is left.
    settings: arguments of evaluate_model.
    """
    index, title = open_dataset(*place), " ".join(place)
    if not classes and set(own_classes) <= set(index.names):
        classes = own_classes
    if classes:
        index = keep_classes(index, classes, title)
    model, index, class_map = on_common_classes(model, index, names, given)
    require_objects(index, title, place[1], with_difficult=with_difficult)
    result = evaluate_model(model, index, **settings)
    if index.faults:
        print(f"{counted(len(index.faults), 'fault')} in the labels or pictures, the first: {index.faults[0]}")
    return replace(result, class_map=class_map), index


class CommonClasses(nn.Module):
    """A detector that returns only the evaluated classes of a ClassMap, in their order."""

    def __init__(self, detector: nn.Module, class_map: ClassMap) -> None:
        super().__init__()
        self.detector = detector
        self.num_classes = len(class_map.evaluated)
        label_of = {column: label for label, column in enumerate(class_map.evaluated)}
        self.labels = torch.tensor([label_of.get(column, -1) for column in range(len(class_map.model_names))])

    def forward(self, images: Tensor) -> Any:
        return self.detector(images)

    def detect(
        self, output: Any, *, score_threshold: float, iou_threshold: float, max_detections: int
    ) -> list[Detections]:
        """The best max_detections among the evaluated classes; detections of other classes do not count."""
        detector = cast(Detector, self.detector)  # PyTorch types every submodule as Tensor | Module
        found = detector.detect(
            output, score_threshold=score_threshold, iou_threshold=iou_threshold, max_detections=MOST_DETECTIONS
        )
        return [self._choose(detections, max_detections) for detections in found]

    def _choose(self, found: Detections, max_detections: int) -> Detections:
        labels = self.labels.to(found.labels.device)[found.labels]
        keep = (labels >= 0).nonzero().squeeze(1)[:max_detections]  # best first
        return Detections(found.boxes_xyxy[keep], found.scores[keep], labels[keep])


def map_index(index: DatasetIndex, class_map: ClassMap) -> DatasetIndex:
    """The dataset with the evaluated classes only; pictures without objects of them stay.

    category_ids: the id of the first of several classes that became one.
    """
    evaluated = class_map.evaluated
    ids = index.category_ids
    if ids is not None:
        ids = tuple(ids[class_map.columns.index(column)] for column in evaluated)
    label_of = {column: label for label, column in enumerate(evaluated)}
    new_labels: list[tuple[int, ...]] = [() if column is None else (label_of[column],) for column in class_map.columns]
    near_labels = [tuple(label_of[column] for column in columns) for columns in class_map.near]
    samples = tuple(map_sample(sample, new_labels, near_labels) for sample in index.samples)
    return replace(index, names=class_map.names, samples=samples, category_ids=ids)


def map_sample(sample: Sample, new_labels: list[tuple[int, ...]], near_labels: list[tuple[int, ...]]) -> Sample:
    """One picture with mapped labels.

    new_labels: for each class of the dataset, the label that its objects get; empty if they are removed.
    near_labels: for each class of the dataset, the labels of the evaluated classes that it is near.
    """
    assert sample.crowd is not None  # Sample fills it in
    kept: list[int] = []
    labels: list[int] = []
    absorbs: list[bool] = []
    for row, label in enumerate(sample.labels.tolist()):
        become = (ANY_CLASS,) if label == ANY_CLASS else new_labels[label]
        near = () if label == ANY_CLASS else near_labels[label]
        kept += [row] * len((*become, *near))
        labels += [*become, *near]
        absorbs += [False] * len(become) + [True] * len(near)
    rows, is_near = np.array(kept, dtype=np.int64), np.array(absorbs, dtype=bool)
    return replace(
        sample,
        boxes_xyxy=sample.boxes_xyxy[rows],
        labels=np.array(labels, dtype=np.int64),
        ignore=sample.ignore[rows] | is_near,
        area=sample.area[rows],
        crowd=sample.crowd[rows] | is_near,
        class_scores=None,  # an evaluation uses labels only
    )
