"""Detections drawn onto a picture, with Pillow alone."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.drawing.fonts import OWN, drawable, load_font
from structures import Detections

Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside


def draw_detections(
    image: Image.Image | np.ndarray, detections: Detections, names: Sequence[str], *, show_scores: bool = True
) -> Image.Image:
    """A copy of the picture, in RGB, with a box and a label ("name 0.87") for each detection.

    image: a Pillow picture, or (H, W, 3) uint8 RGB. detections: boxes in pixels of that picture; they are clipped to
    it, and those outside or not finite are left out. A label without a name is drawn as its number; fonts.drawable says
    what becomes of a name that Pillow's font has no letters for.
    Lines and letters grow with the picture, the colour is the class's (`class_color`), the best detection is on top
    and chooses its label's place first (`place_label`).
    """
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    picture = picture.copy() if picture is image else picture
    diagonal = math.hypot(*picture.size)
    line, letters = max(1, round(diagonal / 400)), max(9, round(diagonal / 60))
    draw = ImageDraw.Draw(picture)
    rows = [
        (rectangle, int(label), float(score))
        for box, score, label in detections.to("cpu")
        if (rectangle := _visible_rectangle(box.tolist(), picture.size)) is not None
    ]
    for (left, top, right, bottom), label, _ in reversed(rows):
        draw.rectangle((left, top, right - 1, bottom - 1), outline=class_color(label), width=line)
    placed: list[Rectangle] = []
    for rectangle, label, score in rows:
        name, path = drawable(names[label], label) if 0 <= label < len(names) else (str(label), OWN)
        text, font = _fit_text(f"{name} {score:.2f}" if show_scores else name, path, letters, picture.width)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        _, usual_top, _, usual_bottom = draw.textbbox((0, 0), "Ápg|", font=font)  # one height for all Latin labels
        top, bottom = min(top, usual_top), max(bottom, usual_bottom)
        margin = max(1, line // 2)
        size = (min(picture.width, right - left + 2 * margin), min(picture.height, bottom - top + 2 * margin))
        place = place_label(size, rectangle, placed, picture.size)
        placed.append(place)
        color = class_color(label)
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
        draw.text((place[0] + margin - left, place[1] + margin - top), text, font=font, fill=_text_color(color))
    return picture


def class_color(label: int) -> tuple[int, int, int]:
    """RGB 0..255 of a class: hues a golden angle apart, so that neighbouring classes differ, in three brightnesses."""
    hue = (label * 0.618034) % 1.0
    saturation, value = ((0.85, 1.0), (0.60, 0.95), (0.95, 0.75))[label // 8 % 3]
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def place_label(
    size: tuple[int, int], box: Rectangle, placed: Sequence[Rectangle], picture_size: tuple[int, int]
) -> Rectangle:
    """Where a label of size (width, height) goes: inside the picture, off the labels `placed` where that is possible.

    Tried in this order, each moved into the picture: above the box's top left corner, inside it, below the bottom
    left corner, inside it, the same at the right corners, beside the top corners, then down the box's left edge. The
    first place wins that covers no label and not most of the box itself, else the one that covers the least. A label
    larger than the picture starts at its edge.
    """
    width, height = size
    left, top, right, bottom = box
    places = [(x, y) for x in (left, right - width) for y in (top - height, top, bottom, bottom - height)]
    places += [(right, top), (left - width, top)]
    places += [(left, y) for y in range(top + height, bottom - height, height)]
    start = np.array(places).clip(max=np.subtract(picture_size, size)).clip(min=0)  # (P, 2)
    rectangles = np.concatenate((start, start + size), axis=1)  # (P, 4)
    covered = _overlaps(rectangles, np.array(placed).reshape(-1, 4)).sum(1)  # (P,) pixels
    of_box = _overlaps(rectangles, np.array([box]))[:, 0]
    covered += np.where(2 * of_box > (right - left) * (bottom - top), of_box, 0)
    return tuple(rectangles[covered.argmin()].tolist())


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixels that (P, 4) and (M, 4) rectangles share, (P, M)."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])  # (P, M, 2)
    return sides.clip(min=0).prod(-1)


def _visible_rectangle(box_xyxy: list[float], picture_size: tuple[int, int]) -> Rectangle | None:
    """Whole pixels of the part inside the picture, at least one; None where there is no such part."""
    if not all(map(math.isfinite, box_xyxy)):
        return None
    x1, y1, x2, y2 = box_xyxy
    width, height = picture_size
    if x2 < x1 or y2 < y1 or x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return None
    left, top = (min(max(0, math.floor(x1)), width - 1), min(max(0, math.floor(y1)), height - 1))
    return left, top, max(left + 1, min(width, math.ceil(x2))), max(top + 1, min(height, math.ceil(y2)))


def _fit_text(text: str, path: str, letters: int, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a size of a font in which it is at most `width` wide: smaller letters first, then fewer of them."""
    for size in range(letters, 7, -1):
        font = load_font(path, size)
        if font.getlength(text) <= width - 2:
            return text, font
    while len(text) > 1 and font.getlength(text + "...") > width - 2:
        text = text[:-1]
    return text + "...", font


def _text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black on light colours, white on dark ones (luma of ITU-R BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
