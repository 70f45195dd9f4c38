"""The training pictures of a dataset, as all methods of condense.py see them."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from boxes import clip_boxes
from config import DataConfig
from datasets.index import DatasetIndex
from datasets.loader import Batch, Loader
from datasets.open import open_dataset, require_objects
from datasets.scan import check, scan
from distill.condense import coresets
from engine.training.inputs import Inputs, digest_of_labels, labels_of
from engine.training.splits import DECODE_AT_MOST, take
from errors import UserError
from structures import Targets


def open_source(data: DataConfig) -> tuple[DatasetIndex, Inputs]:
    """The index of the training pictures, and the digest of their labels."""
    index = open_dataset(*data.train_place, classes=data.classes)
    return index, {labels_of(data.train_place, data): digest_of_labels(index)}


class RealPictures:
    """The training pictures of a dataset, letterboxed to squares of S pixels. Ignored objects are left out."""

    def __init__(self, data: DataConfig, image_size: int) -> None:
        place = data.train_place
        whole, self.inputs = open_source(data)
        index = take(whole, data.max_samples)
        report = scan(index, decode=len(index) <= DECODE_AT_MOST, title=" ".join(place))
        check(report, data.max_bad_fraction)
        require_objects(report.index, report.title, place[1], with_difficult=False)
        if any(sample.class_scores is not None for sample in report.index.samples):
            raise UserError(f"{' '.join(place[1:])}: found soft labels, expected a set of real pictures without them")
        self.index, self.image_size, self.place = report.index, image_size, place
        self.loader = Loader(self.index, image_size=image_size, batch_size=16, seed=0, shuffle=False, cache=data.cache)
        self.ignored = sum(int(sample.ignore.sum()) for sample in self.index.samples)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, rows: list[int]) -> Batch:
        """A batch of these rows, with boxes clipped to the square: rounding may put labels past the edge."""
        batch = self.loader.read(rows)
        t = batch.targets[~batch.targets.ignore]
        boxes_xyxy = clip_boxes(t.boxes_xyxy, self.image_size, self.image_size)
        return dataclasses.replace(batch, targets=Targets(boxes_xyxy, t.labels, t.image, t.ignore))

    def draw(self, count: int) -> Callable[[torch.Generator], tuple[Tensor, Targets]]:
        """A function: generator -> at most `count` different random images and their targets."""

        def batch(generator: torch.Generator) -> tuple[Tensor, Targets]:
            rows = coresets.random_rows(len(self), min(count, len(self)), generator=generator)
            found = self.read(rows.tolist())
            return found.images, found.targets

        return batch

    def class_counts(self) -> Tensor:
        """(N, K): number of objects of each class in each picture."""
        counts = torch.zeros(len(self), len(self.index.names), dtype=torch.int64)
        rows, labels = self.objects()
        return counts.index_put((rows, labels), torch.ones_like(rows), accumulate=True)

    def objects(self) -> tuple[Tensor, Tensor]:
        """For every object: row of its picture and label, both int64."""
        labels = [torch.from_numpy(sample.labels[~sample.ignore]) for sample in self.index.samples]
        return torch.cat([torch.full((len(own),), row) for row, own in enumerate(labels)]), torch.cat(labels)
