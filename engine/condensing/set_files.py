"""A synthetic set on disk: a YOLO dataset, a manifest, and a sheet of all its pictures.

    images/train/*.png, labels/train/*.txt        the stored pictures
    images/train_decoded, labels/train_decoded    if a stored picture holds several: each of them, enlarged
    data.yaml                                     the class names of the source
    manifest.json                                 its source, its settings, and the time and memory it took
    set.png                                       the stored pictures with their boxes; steps/ has earlier states
    steps.csv                                     of learnt pixels: a row for each step

A row of steps.csv holds what the step measured before it moved the pixels, and how far it `moved` them. So the last
row's distance is that of the set one step earlier than the stored pictures, and before their rounding to 8 bits.

The folder appears whole or not at all: it is made under the name `<folder>.part`, which an unfinished set keeps.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoint import sync_folder
from datasets.convert import data_yaml, yolo_labels
from engine.drawing.detections import draw_tile
from engine.runtime import run_folder
from errors import DISK_EXIT_CODE, UserError
from structures import Detections

SHEET_PICTURES = 64  # at most, on set.png
TILE = 320  # pixels of a picture there
STORED, DECODED = "train", "train_decoded"


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: uint8 RGB (h, w, 3). boxes_xyxy (N, 4) in its pixels, labels (N,) int64."""

    pixels: np.ndarray
    boxes_xyxy: np.ndarray
    labels: np.ndarray


def to_picture(image: Tensor, boxes_xyxy: Tensor, labels: Tensor, content_xyxy: Tensor | None = None) -> Picture:
    """image (3, S, S), uint8 or float in [0, 1] -> a Picture, rounded and cut to content_xyxy (4,) if that is given.

    A loader letterboxes the cut picture to the same square again.
    """
    rgb = image if image.dtype == torch.uint8 else (image.detach() * 255).round().to(torch.uint8)
    boxes = boxes_xyxy.double()
    if content_xyxy is not None:
        x1, y1, x2, y2 = (int(v) for v in content_xyxy.round())
        rgb = rgb[:, y1:y2, x1:x2]
        corner, limit = boxes.new_tensor([x1, y1] * 2), boxes.new_tensor([x2 - x1, y2 - y1] * 2)
        boxes = (boxes - corner).clamp(min=0).minimum(limit)
    pixels = rgb.permute(1, 2, 0).contiguous().cpu().numpy()
    return Picture(pixels, boxes.cpu().numpy(), labels.cpu().numpy())


def part_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a set; None if there is no finished set."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'manifest.json'}: not readable: {error}") from None


def write_set(
    folder: Path, splits: Mapping[str, Sequence[Picture]], names: Sequence[str], manifest: dict[str, Any]
) -> None:
    """Fill `<folder>.part`, which may hold steps/, and rename it. UserError with exit code 5 if that fails."""
    part = part_folder(folder)
    try:
        part.mkdir(parents=True, exist_ok=True)
        for split, pictures in splits.items():
            write_split(part, split, pictures)
        entries = {split: f"images/{split}" for split in splits}
        run_folder.write_text(part / "data.yaml", data_yaml(entries, names))
        draw_set(splits[STORED], names).save(part / "set.png")
        run_folder.write_report(part / "manifest.json", manifest)
        for state in ("state.pt", "state.prev.pt", "settings.json"):
            (part / state).unlink(missing_ok=True)
        os.replace(part, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}", DISK_EXIT_CODE) from None


def write_split(part: Path, split: str, pictures: Sequence[Picture]) -> None:
    """Write images/<split>/000.png, labels/<split>/000.txt and so on, replacing these folders."""
    for kind in ("images", "labels"):
        shutil.rmtree(part / kind / split, ignore_errors=True)
        (part / kind / split).mkdir(parents=True)
    digits = max(3, len(str(len(pictures) - 1)))
    for number, picture in enumerate(pictures):
        height, width = picture.pixels.shape[:2]
        stem = f"{number:0{digits}}"
        Image.fromarray(picture.pixels).save(part / "images" / split / f"{stem}.png", compress_level=9)
        text = yolo_labels(picture.boxes_xyxy, picture.labels, width, height)
        (part / "labels" / split / f"{stem}.txt").write_text(text, encoding="utf-8", newline="")


def draw_set(pictures: Sequence[Picture], names: Sequence[str], *, columns: int = 4) -> Image.Image:
    """The first SHEET_PICTURES pictures with their boxes, each enlarged to a tile of the sheet."""
    tiles = []
    for picture in pictures[:SHEET_PICTURES]:
        boxes = torch.from_numpy(picture.boxes_xyxy).float()
        objects = Detections(boxes, torch.ones(len(boxes)), torch.from_numpy(picture.labels))
        how = Image.Resampling.NEAREST
        tiles.append(draw_tile(picture.pixels, objects, names, TILE, how=how, show_scores=False))
    return contact_sheet(tiles, columns)


def contact_sheet(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of at most TILE x TILE, row by row on white."""
    rows, gap = -(-len(tiles) // columns), 4
    sheet = Image.new("RGB", ((TILE + gap) * min(columns, len(tiles)), (TILE + gap) * rows), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (TILE + gap), i // columns * (TILE + gap)))
    return sheet
