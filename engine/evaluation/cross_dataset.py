"""A detector on a dataset whose classes it was not trained for: both are brought to the classes they share.

class_names.map_classes says which those are. Of the dataset, objects of other classes are taken out. Where such a class
is near one that is evaluated (a Van and the class car), its objects stay as regions that absorb detections of it, as a
COCO crowd does; KITTI's DontCare, of no class, stays one for every class evaluated. Of the model's answers, those of
other classes are dropped. What lies on any other object that was taken out is a false alarm, as on the background.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets.class_names import ClassMap, map_classes
from datasets.index import ANY_CLASS, DatasetIndex, Sample
from structures import Detections

MOST_DETECTIONS = 30_000  # of all classes in a picture, before those of the evaluated ones are chosen


def on_common_classes(
    model: nn.Module, index: DatasetIndex, names: tuple[str, ...], given: dict[str, str | None] | None = None
) -> tuple[nn.Module, DatasetIndex, ClassMap | None]:
    """A model with class `names` and a dataset, brought to the classes both know, and what was done to get there.

    Both come back as they are where every class keeps its place; the ClassMap is None where no names were compared:
    equal lists, and a model whose names are not known ("0", "1", ...) with nothing `given` (as map_classes takes it),
    whose classes go by their place. Numbers that the dataset has as names too are names. UserError as map_classes
    raises it.
    """
    is_unnamed = names == tuple(map(str, range(len(names)))) and not set(names) & set(index.names)
    if not given and (is_unnamed or names == tuple(index.names)):
        if names != tuple(index.names) and len(names) == len(index.names):
            print(f"the model's classes have no names: taken for the dataset's by place, {', '.join(index.names)}")
        return model, index, None
    class_map = map_classes(index.names, names, given)
    if class_map.is_identity:
        return model, index, class_map
    return CommonClasses(model, class_map), map_index(index, class_map), class_map


class CommonClasses(nn.Module):
    """A detector that answers with the evaluated classes of a ClassMap only, in their order."""

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
        """The best max_detections of the evaluated classes: other classes take no places among them."""
        found = self.detector.detect(
            output, score_threshold=score_threshold, iou_threshold=iou_threshold, max_detections=MOST_DETECTIONS
        )
        return [self._choose(detections, max_detections) for detections in found]

    def _choose(self, found: Detections, max_detections: int) -> Detections:
        labels = self.labels.to(found.labels.device)[found.labels]
        keep = (labels >= 0).nonzero().squeeze(1)[:max_detections]  # they come best first
        return Detections(found.boxes_xyxy[keep], found.scores[keep], labels[keep])


def map_index(index: DatasetIndex, class_map: ClassMap) -> DatasetIndex:
    """The dataset with the evaluated classes alone; pictures without any of their objects stay.

    category_ids: where several classes became one, the id of the first.
    """
    evaluated = class_map.evaluated
    ids = index.category_ids
    if ids is not None:
        ids = tuple(ids[class_map.columns.index(column)] for column in evaluated)
    label_of = {column: label for label, column in enumerate(evaluated)}
    new_labels = [() if column is None else (label_of[column],) for column in class_map.columns]
    near_labels = [tuple(label_of[column] for column in columns) for columns in class_map.near]
    samples = tuple(map_sample(sample, new_labels, near_labels) for sample in index.samples)
    return replace(index, names=class_map.names, samples=samples, category_ids=ids)


def map_sample(sample: Sample, new_labels: list[tuple[int, ...]], near_labels: list[tuple[int, ...]]) -> Sample:
    """One picture; new_labels and near_labels: what an object of each class becomes, and is near to."""
    rows, labels, is_near = [], [], []
    for row, label in enumerate(sample.labels.tolist()):
        become = (ANY_CLASS,) if label == ANY_CLASS else new_labels[label]
        near = () if label == ANY_CLASS else near_labels[label]
        rows += [row] * len((*become, *near))
        labels += [*become, *near]
        is_near += [False] * len(become) + [True] * len(near)
    rows, is_near = np.array(rows, dtype=np.int64), np.array(is_near, dtype=bool)
    return replace(
        sample,
        boxes_xyxy=sample.boxes_xyxy[rows],
        labels=np.array(labels, dtype=np.int64),
        ignore=sample.ignore[rows] | is_near,
        area=sample.area[rows],
        crowd=sample.crowd[rows] | is_near,
        class_scores=None,  # an evaluation asks for labels alone
    )
