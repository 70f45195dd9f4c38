"""The pictures of comparison.png: test pictures on which the models differ, with what each model found.

A picture counts by how differently the models see it: for each object, whether some find it and others miss it, and how
many false detections the models have. An object is found by a detection of its class with an IoU of 0.5 or more.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

import checkpoint
from boxes import box_iou
from config import Config
from datasets import open_dataset
from datasets.images import read_image
from engine.comparison.table import Result
from engine.drawing.detections import draw_tile
from engine.drawing.predictions import labels_of, spread
from engine.prediction.predictor import Predictor
from engine.runtime import run_folder
from errors import counted
from structures import Detections, DetectionSettings

PICTURES = 4  # lines
COLUMNS = 4  # the labels, and at most three rows
CANDIDATES = 48  # test pictures that the models are tried on
BATCH = 8
SCORE_THRESHOLD = 0.3  # of the detections that are counted and drawn
IOU_THRESHOLD = 0.5  # of a found object
TILE = 400  # pixels of a picture


@dataclass(frozen=True)
class Pictures:
    """columns: title -> one (drawn picture, caption) per line. num_candidates: pictures they were chosen from."""

    columns: dict[str, list[tuple[Image.Image, str]]]
    num_candidates: int

    @property
    def num_lines(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def heading(self) -> str:
        which = " on which the models differ most" if len(self.columns) > 2 else ""
        of_all = f"{self.num_lines} of {self.num_candidates} test pictures{which}"
        return f"{of_all}: labels, and detections with a score of {SCORE_THRESHOLD:g} and above"


def compare_pictures(config: Config, results: list[Result]) -> Pictures | None:
    """The pictures on which the first finished seeds of these rows differ most; None if no test picture has objects."""
    index = open_dataset(*config.data.test_place, classes=config.data.classes)
    with_objects = [number for number, sample in enumerate(index.samples) if len(labels_of(sample))]
    if not with_objects:
        return None
    candidates = spread(index.subset(with_objects), CANDIDATES)
    labels = [labels_of(sample) for sample in candidates.samples]
    paths = [sample.image_path for sample in candidates.samples]
    found = {result.name: detect(result, paths) for result in results}
    outcomes = {name: [Outcome.of(d, truth) for d, truth in zip(rows, labels)] for name, rows in found.items()}
    scores = [disagreement([rows[number] for rows in outcomes.values()]) for number in range(len(labels))]
    chosen = sorted(range(len(labels)), key=lambda number: -scores[number])[:PICTURES]  # equal ones in their order
    pixels = {number: read_image(paths[number]) for number in chosen}
    names = index.names
    columns = {
        "labels": [
            (draw_tile(pixels[n], labels[n], names, TILE, show_scores=False), counted(len(labels[n]), "object"))
            for n in chosen
        ]
    }
    for name, rows in found.items():
        columns[name] = [
            (draw_tile(pixels[n], rows[n], names, TILE, show_scores=False), outcomes[name][n].caption) for n in chosen
        ]
    return Pictures(columns, len(labels))


@torch.no_grad()
def detect(result: Result, paths: list) -> list[Detections]:
    """The detections of a row's first finished seed in each picture, from SCORE_THRESHOLD on."""
    folder = run_folder.RunFolder(result.row.folder(result.seeds[0]))
    model, info = checkpoint.load_model(folder.last)
    detection = DetectionSettings(SCORE_THRESHOLD, info.evaluation.detection.iou_threshold)
    predictor = Predictor(model, image_size=info.image_size, detection=detection)
    batches = (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))
    return [found for batch in batches for found in predictor([read_image(path) for path in batch])]


@dataclass(frozen=True)
class Outcome:
    """A model on one picture. is_found (G,) bool: of the labelled objects. num_false: detections that find none."""

    is_found: np.ndarray
    num_false: int

    @classmethod
    def of(cls, detections: Detections, truth: Detections) -> "Outcome":
        """Detections in the order of their scores each take the object of their class with the highest IoU left."""
        overlap = box_iou(detections.boxes_xyxy.double().cpu(), truth.boxes_xyxy.double())  # (N, G)
        overlap[detections.labels.cpu()[:, None] != truth.labels[None]] = 0
        is_found = np.zeros(len(truth.labels), dtype=bool)
        num_false = 0
        for row in detections.scores.cpu().argsort(descending=True, stable=True).tolist():
            left = np.where(is_found, 0.0, overlap[row].numpy())
            if left.max(initial=0.0) >= IOU_THRESHOLD:
                is_found[left.argmax()] = True
            else:
                num_false += 1
        return cls(is_found, num_false)

    @property
    def caption(self) -> str:
        return f"{self.is_found.sum()} of {len(self.is_found)} found, {self.num_false} false"


def disagreement(outcomes: list[Outcome]) -> float:
    """Objects that some models find and others miss, and the range of the numbers of false detections; 0 for one model.

    sum_g 4 p_g (1 - p_g) + max_m false_m - min_m false_m          p_g: the share of models that find object g
    """
    share = np.mean([outcome.is_found for outcome in outcomes], axis=0)  # (G,)
    num_false = [outcome.num_false for outcome in outcomes]
    return float((4 * share * (1 - share)).sum()) + max(num_false) - min(num_false)
