"""Pictures put together from real objects, without any optimisation: a mosaic of crops, and a canvas of pasted objects.

The canvas follows Al Khatib et al., "OD3: Optimization-free Dataset Distillation for Object Detection",
arXiv:2506.01942: real objects, each with a little of what is around it, are pasted where there is room, and those that
a trained detector, the observer, cannot see are taken away again, with their pixels.

    cut_out         an object and its context as a rectangle of pixels
    place           where rectangles go: up to `attempts` random places each, one is taken where little is covered
    render          background and rectangles, in their order -> a picture and its boxes
    is_seen         which objects the observer finds; drop_unseen takes the others away
    compose         all of the above, in rounds

Deliberate differences: the background is a real picture without its detail (smooth_background), so that no object in it
goes without a label; every draw comes from one generator; candidates are taken class by class in turn (in_turn), where
the original takes them as they come and pastes mostly what is common.

Pictures are uint8 (3, H, W); boxes are xyxy in pixels of the picture they are in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import box_area, box_iou, paired_intersection
from structures import Detections

MIN_VISIBLE_FRACTION, MIN_SIDE_PX = 0.1, 2.0  # of an object at the edge of a crop, to keep its label; as in training


@dataclass(frozen=True)
class CanvasSettings:
    """A canvas. Defaults are those of OD3, its context of 10 px on a canvas of 484 x 578 as a share of the side, but
    for class_agnostic, which is true there: an object under one of another class would keep its label.

    max_overlap: share of a rectangle that may lie on what is taken already. context: pixels around the smallest object,
    as a share of the picture's side; the largest has none. min_iou: of an object with the observer's nearest detection.
    class_agnostic: the detection may be of another class. min_area: share of the canvas that stays covered, whatever
    the observer sees. rounds: the candidates come in this many parts, and the observer looks after each; 0: all at
    once, and nobody looks. score_threshold: of the observer's detections.
    """

    max_overlap: float = 0.6
    attempts: int = 40
    context: float = 0.019
    min_iou: float = 0.25
    class_agnostic: bool = False
    min_area: float = 0.2
    rounds: int = 10
    score_threshold: float = 0.05


@dataclass(frozen=True, eq=False)
class Cutout:
    """pixels: uint8 (3, h, w). box_xyxy (4,): the object within them. label: its class."""

    pixels: Tensor
    box_xyxy: Tensor
    label: int


@dataclass(frozen=True, eq=False)
class Placement:
    """A cutout with its top left corner at column `left`, row `top` of the canvas."""

    cutout: Cutout
    left: int
    top: int

    @property
    def area(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas."""
        height, width = self.cutout.pixels.shape[1:]
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def context_margins(areas: Tensor, margin: float) -> Tensor:
    """Pixels of context around each of N objects (N,), from `margin` for the smallest to 0 for the largest.

    r_i = margin (1 - (a_i - a_min) / (a_max - a_min))
    """
    if not len(areas):
        return areas
    span = (areas.max() - areas.min()).clamp(min=1e-9)
    return margin * (1 - (areas - areas.min()) / span)


def cut_out(picture: Tensor, box_xyxy: Tensor, label: int, *, margin: float, content_xyxy: Tensor) -> Cutout:
    """The whole pixels that a box widened by `margin` touches.

    content_xyxy (4,): the picture without its padding, which a cutout stays within.
    """
    low = torch.maximum((box_xyxy[:2] - margin).floor(), content_xyxy[:2].ceil()).long()
    high = torch.minimum((box_xyxy[2:] + margin).ceil(), content_xyxy[2:].floor()).long()
    pixels = picture[:, low[1] : high[1], low[0] : high[0]].clone()
    limit = (high - low).repeat(2).to(box_xyxy)
    box = (box_xyxy - low.repeat(2)).clamp(min=0).minimum(limit)
    return Cutout(pixels, box, int(label))


def in_turn(labels: Tensor, *, generator: torch.Generator) -> Tensor:
    """The rows of labels (N,) in an order that takes one of each class in turn, each class in a random order.

    A class that has run out is left out of the turns that follow. (N,) int64, a permutation.
    """
    order = torch.randperm(len(labels), generator=generator)
    kinds = labels[order]
    turn = torch.zeros(len(labels), dtype=torch.int64)
    for kind in kinds.unique():
        turn[kinds == kind] = torch.arange(int((kinds == kind).sum()))
    return order[turn.argsort(stable=True)]


def smooth_background(picture: Tensor, content_xyxy: Tensor, *, cells: int = 4) -> Tensor:
    """uint8 (3, S, S) -> the same size: means over cells x cells parts of its content, and smooth between them."""
    x1, y1, x2, y2 = (int(v) for v in content_xyxy.round())
    content = picture[None, :, y1:y2, x1:x2].float()
    means = F.adaptive_avg_pool2d(content, cells)  # (1, 3, cells, cells)
    smooth = F.interpolate(means, size=picture.shape[1:], mode="bicubic", align_corners=False)
    return smooth[0].round().clamp(0, 255).to(torch.uint8)


def place(
    cutouts: Sequence[Cutout],
    placed: Sequence[Placement],
    *,
    size: int,
    generator: torch.Generator,
    attempts: int,
    max_overlap: float,
) -> list[Placement]:
    """`placed`, and those of the cutouts for which one of `attempts` random places is free enough, in their order.

    A place is free enough where at most max_overlap of the cutout's pixels lie on those of others. What is larger than
    the canvas is left out.
    """
    is_taken = covered(placed, size)
    found = list(placed)
    for cutout in cutouts:
        height, width = cutout.pixels.shape[1:]
        places = torch.rand(attempts, 2, generator=generator, dtype=torch.float64)
        if not 0 < width <= size or not 0 < height <= size:
            continue
        for x, y in places.tolist():
            candidate = Placement(cutout, int(x * (size - width + 1)), int(y * (size - height + 1)))
            if is_taken[candidate.area].sum() <= max_overlap * height * width:
                is_taken[candidate.area] = True
                found.append(candidate)
                break
    return found


def covered(placed: Sequence[Placement], size: int) -> Tensor:
    """(S, S) bool: where the canvas is covered."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    for placement in placed:
        mask[placement.area] = True
    return mask


def render(background: Tensor, placed: Sequence[Placement]) -> tuple[Tensor, Tensor, Tensor]:
    """The picture (3, S, S) uint8, boxes_xyxy (N, 4) and labels (N,) int64; what comes later lies above."""
    picture = background.clone()
    for placement in placed:
        picture[:, placement.area[0], placement.area[1]] = placement.cutout.pixels
    corners = torch.tensor([[p.left, p.top, p.left, p.top] for p in placed], dtype=torch.float32).view(-1, 4)
    boxes = torch.stack([p.cutout.box_xyxy.float() for p in placed]) if placed else torch.zeros(0, 4)
    return picture, boxes + corners, torch.tensor([p.cutout.label for p in placed], dtype=torch.int64)


def is_seen(boxes_xyxy: Tensor, labels: Tensor, found: Detections, *, min_iou: float, class_agnostic: bool) -> Tensor:
    """(N,) bool: objects that some detection overlaps by an IoU above min_iou."""
    iou = box_iou(boxes_xyxy, found.boxes_xyxy.to(boxes_xyxy))  # (N, M)
    if not class_agnostic:
        iou = iou * (labels[:, None] == found.labels[None])
    return (iou > min_iou).any(1)


def drop_unseen(placed: Sequence[Placement], seen: Tensor, *, min_area: float, size: int) -> list[Placement]:
    """Without those not seen, the lowest first, for as long as more than min_area of the canvas stays covered."""
    count = torch.zeros(size, size, dtype=torch.int64)  # placements over each pixel
    for placement in placed:
        count[placement.area] += 1
    left = int((count > 0).sum())
    kept = []
    for placement, was_seen in zip(placed, seen.tolist(), strict=True):
        alone = int((count[placement.area] == 1).sum())  # pixels that nothing else covers
        if was_seen or left - alone <= min_area * size**2:
            kept.append(placement)
        else:
            count[placement.area] -= 1
            left -= alone
    return kept


def compose(
    background: Tensor,
    cutouts: Sequence[Cutout],
    *,
    observe: Callable[[Tensor], Detections] | None,
    generator: torch.Generator,
    settings: CanvasSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """A canvas on the background (3, S, S), of the cutouts in their order: picture, boxes_xyxy (N, 4), labels (N,).

    observe: picture -> what the observer finds in it, its own score threshold applied; None where rounds is 0.
    """
    size, placed = background.shape[-1], []
    parts = max(1, settings.rounds)
    for number in range(parts):
        part = cutouts[len(cutouts) * number // parts : len(cutouts) * (number + 1) // parts]
        placed = place(
            part,
            placed,
            size=size,
            generator=generator,
            attempts=settings.attempts,
            max_overlap=settings.max_overlap,
        )
        if settings.rounds and placed:
            picture, boxes, labels = render(background, placed)
            seen = is_seen(
                boxes, labels, observe(picture), min_iou=settings.min_iou, class_agnostic=settings.class_agnostic
            )
            placed = drop_unseen(placed, seen, min_area=settings.min_area, size=size)
    return render(background, placed)


def crop_window(box_xyxy: Tensor, content_xyxy: Tensor, cell: int) -> tuple[int, int, int, int]:
    """A square of whole pixels around the middle of a box: left, top, right, bottom.

    Its side is `cell`, or 1.2 times the longer side of the box where that is more, but never more than the content
    holds; the square is moved into the content.
    """
    low, high = content_xyxy[:2].ceil().long(), content_xyxy[2:].floor().long()
    side = max(cell, int((1.2 * (box_xyxy[2:] - box_xyxy[:2]).max()).ceil()))
    side = min(side, int((high - low).min()))
    corner = ((box_xyxy[:2] + box_xyxy[2:] - side) / 2).round().long()
    left, top = torch.maximum(torch.minimum(corner, high - side), low).tolist()
    return left, top, left + side, top + side


def crop(
    picture: Tensor, boxes_xyxy: Tensor, labels: Tensor, window: tuple[int, int, int, int], cell: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The window as a tile of cell x cell pixels, with the objects that can be seen in it, clipped to it.

    An object keeps its label where at least MIN_VISIBLE_FRACTION of its box is inside and no side is below MIN_SIDE_PX.
    """
    left, top, right, bottom = window
    tile = picture[None, :, top:bottom, left:right].float()
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
    """grid x grid crops, row by row -> one picture (3, S, S), boxes_xyxy (N, 4), labels (N,); S = grid * cell."""
    if len(tiles) != grid**2:
        raise ValueError(f"{len(tiles)} crops, expected {grid} x {grid}")
    cell = tiles[0][0].shape[-1]
    rows = [torch.cat([tile for tile, _, _ in tiles[r * grid : (r + 1) * grid]], dim=2) for r in range(grid)]
    boxes = [
        b + b.new_tensor([x * cell, y * cell] * 2) for i, (_, b, _) in enumerate(tiles) for y, x in [divmod(i, grid)]
    ]
    return torch.cat(rows, dim=1), torch.cat(boxes), torch.cat([labels for _, _, labels in tiles])
