"""Mosaics of crops: real objects with their surroundings, side by side in one image.

    in_turn         orders objects so that rare classes come as often as common ones
    crop_window     a square around an object
    crop            the window as a tile, with all objects that are visible in it
    pack_crops      grid x grid tiles -> an image and its boxes

Images are uint8 (3, H, W); boxes are xyxy in pixels of the image they are in.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import box_area, paired_intersection

MIN_VISIBLE_FRACTION, MIN_SIDE_PX = 0.1, 2.0  # below, an object at the edge of a crop loses its label, as in training


def in_turn(labels: Tensor, *, generator: torch.Generator) -> Tensor:
    """The rows of labels (N,), one of each class in turn, each class in a random order: a permutation, (N,) int64.

    A class that has run out is skipped in the following turns.
    """
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    turn = torch.zeros(len(labels), dtype=torch.int64)
    for label in shuffled.unique():
        turn[shuffled == label] = torch.arange(int((shuffled == label).sum()))
    return order[turn.argsort(stable=True)]


def crop_window(box_xyxy: Tensor, content_xyxy: Tensor, cell: int) -> tuple[int, int, int, int]:
    """A square of whole pixels around the center of a box: left, top, right, bottom.

    Its side is the larger of `cell` and 1.2 times the longer side of the box, but at most what the content holds. The
    square is moved into the content.
    """
    low, high = content_xyxy[:2].ceil().long(), content_xyxy[2:].floor().long()
    side = max(cell, int((1.2 * (box_xyxy[2:] - box_xyxy[:2]).max()).ceil()))
    side = min(side, int((high - low).min()))
    corner = ((box_xyxy[:2] + box_xyxy[2:] - side) / 2).round().long()
    left, top = torch.maximum(torch.minimum(corner, high - side), low).tolist()
    return left, top, left + side, top + side


def crop(
    image: Tensor, boxes_xyxy: Tensor, labels: Tensor, window: tuple[int, int, int, int], cell: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The window as a tile of cell x cell pixels, with the boxes (clipped to it) and labels of its visible objects.

    An object is visible if at least MIN_VISIBLE_FRACTION of its box is inside and no side is below MIN_SIDE_PX.
    """
    left, top, right, bottom = window
    tile = image[None, :, top:bottom, left:right].float()
    if right - left != cell:
        tile = F.interpolate(tile, size=(cell, cell), mode="bilinear", align_corners=False, antialias=True)
    frame = boxes_xyxy.new_tensor(window)
    visible = paired_intersection(boxes_xyxy, frame) / box_area(boxes_xyxy).clamp(min=1e-9)
    scale = cell / (right - left)
    corner = frame[:2].repeat(2)
    inside = (torch.maximum(boxes_xyxy, corner).minimum(frame[2:].repeat(2)) - corner) * scale  # (N, 4)
    is_kept = (visible >= MIN_VISIBLE_FRACTION) & ((inside[:, 2:] - inside[:, :2]) >= MIN_SIDE_PX).all(1)
    return tile[0].round().clamp(0, 255).to(torch.uint8), inside[is_kept], labels[is_kept]


def pack_crops(tiles: Sequence[tuple[Tensor, Tensor, Tensor]], grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """grid x grid crops, row by row -> one image (3, S, S), boxes_xyxy (N, 4), labels (N,); S = grid * cell."""
    if len(tiles) != grid**2:
        raise ValueError(f"{len(tiles)} crops, expected {grid} x {grid}")
    cell = tiles[0][0].shape[-1]
    rows = [torch.cat([tile for tile, _, _ in tiles[r * grid : (r + 1) * grid]], dim=2) for r in range(grid)]
    boxes = [
        b + b.new_tensor([x * cell, y * cell] * 2) for i, (_, b, _) in enumerate(tiles) for y, x in [divmod(i, grid)]
    ]
    return torch.cat(rows, dim=1), torch.cat(boxes), torch.cat([labels for _, _, labels in tiles])
