"""predictions.jpg: pictures with their labels, and beside each the same picture with a model's detections (Pillow)."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from datasets.images import read_image
from datasets.index import DatasetIndex, Sample
from datasets.loader import Loader
from engine.drawing.detections import draw_tile
from engine.drawing.fonts import OWN, load_font
from engine.drawing.style import LETTERS
from structures import Detections, Detector

TILE = 400  # pixels of a picture
GAP, PAIR_GAP, HEADER = 6, 30, 30  # pixels: inside a pair, between pairs, and of the line that names the halves
SCORE_THRESHOLD = 0.25  # of the detections that are drawn


@torch.no_grad()
def prediction_sheet(
    model: nn.Module,
    index: DatasetIndex,
    *,
    image_size: int,
    device: torch.device,
    count: int,
    iou_threshold: float,
) -> Image.Image:
    """`count` pictures spread over the split, two to a line, each with its labels and with the model's detections."""
    detector = cast(Detector, model)  # PyTorch types every attribute of a module as Tensor | Module
    chosen = spread(index, count)
    tiles = []
    loader = Loader(chosen, image_size=image_size, batch_size=4, seed=0, shuffle=False)
    for batch in loader.epoch(0):
        output = model(batch.images.to(device).float() / 255)
        found = detector.detect(
            output, score_threshold=SCORE_THRESHOLD, iou_threshold=iou_threshold, max_detections=100
        )
        for row, detections in enumerate(found):
            sample = chosen.samples[int(batch.indices[row])]
            boxes = batch.unletterbox(row, detections.boxes_xyxy.float().cpu(), sample.width, sample.height)
            shown = Detections(boxes, detections.scores.float().cpu(), detections.labels.cpu())
            pixels = read_image(sample.image_path)
            tiles.append(draw_tile(pixels, labels_of(sample), index.names, TILE, show_scores=False))
            tiles.append(draw_tile(pixels, shown, index.names, TILE))
    return pair_sheet(tiles, ("labels", f"detections, score {SCORE_THRESHOLD:g} and above"))


def pair_sheet(tiles: Sequence[Image.Image], titles: tuple[str, str]) -> Image.Image:
    """Tiles left, right, left, right, ... of at most TILE x TILE -> two pairs to a line, under their titles."""
    lines = [tiles[start : start + 4] for start in range(0, len(tiles), 4)]
    lefts = [number * (TILE + GAP) + number // 2 * (PAIR_GAP - GAP) for number in range(len(lines[0]) if lines else 2)]
    heights = [max(tile.height for tile in line) + GAP for line in lines]
    sheet = Image.new("RGB", (lefts[-1] + TILE, HEADER + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, left in enumerate(lefts):
        draw.text((left, (HEADER - LETTERS) // 2), titles[number % 2], font=load_font(OWN, LETTERS), fill="black")
    top = HEADER
    for line, height in zip(lines, heights):
        for left, tile in zip(lefts, line):
            sheet.paste(tile, (left, top))
        top += height
    return sheet


def spread(index: DatasetIndex, count: int) -> DatasetIndex:
    """At most `count` pictures of an index, at equal distances from its first to its last."""
    rows = np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)
    return index.subset(sorted(set(rows.tolist())))


def labels_of(sample: Sample) -> Detections:
    """The labelled objects of a picture as detections with score 1, without ignored objects."""
    counts = ~sample.ignore
    boxes_xyxy = torch.from_numpy(sample.boxes_xyxy[counts]).float()
    return Detections(boxes_xyxy, torch.ones(len(boxes_xyxy)), torch.from_numpy(sample.labels[counts]))
