"""A line of text in a strip above a picture, such as the mark of a run that is no measurement."""

import io
from pathlib import Path

from PIL import Image, ImageDraw

from engine.drawing.fonts import drawable, load_font
from engine.runtime.run_folder import write_bytes

LETTERS = 70  # of the line that fit the width of a picture
HEIGHTS = (10, 22)  # pixels: the smallest and the largest letters


def stamped(picture: Image.Image, text: str) -> Image.Image:
    """A copy with the text in white on red above it, cut where the picture is too narrow; without a text, the same."""
    if not text:
        return picture
    text, path = drawable(text)
    size = min(max(2 * picture.width // LETTERS, HEIGHTS[0]), HEIGHTS[1])
    font = load_font(path, size)
    sheet = Image.new("RGB", (picture.width, picture.height + 2 * size), "#b00020")
    ImageDraw.Draw(sheet).text((size // 2, size // 2), text, font=font, fill="white")
    sheet.paste(picture, (0, 2 * size))
    return sheet


def stamp_file(path: Path, text: str) -> None:
    """Put the text above the picture in a file, replaced as a whole. No such file, or no text: nothing changes."""
    if text and path.is_file():
        encoded = io.BytesIO()
        with Image.open(path) as picture:
            stamped(picture.convert("RGB"), text).save(encoded, picture.format, quality=90)
        write_bytes(path, encoded.getvalue())
