"""Draws detections onto a picture, with Pillow only."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.drawing.fonts import OWN, drawable, load_font
from engine.drawing.style import LETTERS, PALETTE
from structures import Detections

Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside


def draw_detections(
    image: Image.Image | np.ndarray,
    detections: Detections,
    names: Sequence[str],
    *,
    show_scores: bool = True,
    magnify: float = 1.0,
) -> Image.Image:
    """A copy of the picture, in RGB, with a box and a label ("name 0.87") for each detection.

    image: a Pillow image, or (H, W, 3) uint8 RGB.
    detections: boxes in pixels of the picture. They are clipped to it; boxes outside or not finite are left out. A
        class without a name is drawn as its number. fonts.drawable handles names that Pillow's font lacks letters for.

    Lines and letters grow with the picture, times `magnify`: for one that is shown smaller than it is. Each class has
    its colour (`class_color`). The best detection is drawn on top, and its label is placed first (`place_label`).
    """
    picture = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    picture = picture.copy() if picture is image else picture
    diagonal = math.hypot(*picture.size)
    line, letters = max(1, round(magnify * diagonal / 400)), max(9, round(magnify * diagonal / 60))
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
        text_left, text_top, text_right, text_bottom = draw.textbbox((0, 0), text, font=font)
        _, usual_top, _, usual_bottom = draw.textbbox((0, 0), "Ápg|", font=font)  # one height for all Latin labels
        text_top, text_bottom = min(text_top, usual_top), max(text_bottom, usual_bottom)
        margin = max(1, line // 2)
        width = min(picture.width, text_right - text_left + 2 * margin)
        height = min(picture.height, text_bottom - text_top + 2 * margin)
        size = (int(width), int(height))
        place = place_label(size, rectangle, placed, picture.size)
        placed.append(place)
        color = class_color(label)
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
        start = (place[0] + margin - text_left, place[1] + margin - text_top)
        draw.text(start, text, font=font, fill=text_color(color))
    return picture


def draw_tile(
    pixels: np.ndarray,
    detections: Detections,
    names: Sequence[str],
    side: int,
    *,
    how: Image.Resampling = Image.Resampling.BILINEAR,
    show_scores: bool = True,
) -> Image.Image:
    """As draw_detections, after the picture (H, W, 3) is resized to `side` pixels: with the letters of a sheet."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    picture = Image.fromarray(pixels).resize(size, how)
    shown = Detections(detections.boxes_xyxy * scale, detections.scores, detections.labels)
    magnify = 60 * LETTERS / math.hypot(*size)
    return draw_detections(picture, shown, names, show_scores=show_scores, magnify=magnify)


def class_color(label: int) -> tuple[int, int, int]:
    """RGB 0..255 of a class.

    The first classes have the colors of engine/drawing/style.py, the others hues a golden angle apart, so that
    consecutive classes differ, at three brightnesses.
    """
    if label < len(PALETTE):
        red, green, blue = bytes.fromhex(PALETTE[label][1:])
        return red, green, blue
    hue = (label * 0.618034) % 1.0
    saturation, value = ((0.85, 1.0), (0.60, 0.95), (0.95, 0.75))[label // 8 % 3]
    rgb = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def place_label(
    size: tuple[int, int], box: Rectangle, placed: Sequence[Rectangle], picture_size: tuple[int, int]
) -> Rectangle:
    """Choose where a label of size (width, height) goes, inside the picture and off the labels already placed.

    Candidates, in this order, each moved into the picture: above and inside the box's top left corner, inside and below
    its bottom left corner, the same at the right corners, beside the top corners, then down the left edge. The first
    candidate wins that covers no label and at most half of the box, else the one that covers the fewest pixels. A label
    larger than the picture starts at the picture's edge.
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
    left, top, right, bottom = rectangles[covered.argmin()].tolist()
    return left, top, right, bottom


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersections of (P, 4) and (M, 4) rectangles in pixels, (P, M)."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])  # (P, M, 2)
    return sides.clip(min=0).prod(-1)


def _visible_rectangle(box_xyxy: list[float], picture_size: tuple[int, int]) -> Rectangle | None:
    """The part of a box inside the picture in whole pixels, at least one; None if it is empty."""
    if not all(map(math.isfinite, box_xyxy)):
        return None
    x1, y1, x2, y2 = box_xyxy
    width, height = picture_size
    if x2 < x1 or y2 < y1 or x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return None
    left, top = (min(max(0, math.floor(x1)), width - 1), min(max(0, math.floor(y1)), height - 1))
    return left, top, max(left + 1, min(width, math.ceil(x2))), max(top + 1, min(height, math.ceil(y2)))


def _fit_text(text: str, path: str, letters: int, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text, and a font in which it is at most `width` wide: first try smaller letters, then shorten the text."""
    for size in range(letters, 7, -1):
        font = load_font(path, size)
        if font.getlength(text) <= width - 2:
            return text, font
    while len(text) > 1 and font.getlength(text + "...") > width - 2:
        text = text[:-1]
    return text + "...", font


def text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black on light colours, white on dark ones (luma of ITU-R BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
