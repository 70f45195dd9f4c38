"""Draws feature maps: principal components as colors, attention as heat. Pillow and PyTorch only.

Colors: red, green and blue are the first three principal components of a map's vectors (teachers.dinov2.patch_pca).
Similar vectors have similar colors; the colors themselves have no meaning.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.drawing.fonts import drawable, load_font
from engine.drawing.style import LETTERS
from teachers.dinov2 import patch_pca

GAP = 4  # pixels between the cells of a grid
LINE = LETTERS + 6  # pixels: height of a line of text
TITLE_LINES = 2  # of a column's title
BAR = 180  # pixels: width of the bar that shows what the colors of heat mean


def attention_heat(class_attention: Tensor) -> Tensor:
    """The attention of a class token (B, heads, h, w) -> (B, h, w): the mean over heads, scaled per image to [0, 1].

    The smallest value of an image becomes 0 and the largest 1. Constant attention becomes 0.
    """
    mean = class_attention.float().mean(1)  # (B, h, w)
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


def heat_colors(heat: Tensor) -> Tensor:
    """(B, h, w) in [0, 1] -> RGB (B, 3, h, w): black at 0, red at 1/3, yellow at 2/3, white at 1."""
    return torch.stack([(3 * heat - channel).clamp(0, 1) for channel in range(3)], dim=1)


def common_colors(*maps: Tensor) -> list[Tensor]:
    """Maps (B, C, h, w) of one shape -> (B, 3, h, w) each, with common colors, so that the maps can be compared.

    Vectors are normalised, so that maps of different scale can be compared.
    """
    together = torch.cat([F.normalize(m.float(), dim=1) for m in maps])
    return list(patch_pca(together).chunk(len(maps)))


def to_pictures(colors: Tensor, size: int, *, smooth: bool = False) -> list[Image.Image]:
    """(B, 3, h, w) in [0, 1] -> B square images of `size` pixels; without `smooth` each value is a flat square."""
    pixels = (255 * colors.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (B, h, w, 3)
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return [Image.fromarray(p).resize((size, size), how) for p in pixels]


def overlay(pictures: Sequence[Image.Image], heat: Sequence[Image.Image], share: float = 0.6) -> list[Image.Image]:
    """Each picture in grey, blended with its heat; `share`: the weight of the heat."""
    return [Image.blend(p.convert("L").convert("RGB"), h, share) for p, h in zip(pictures, heat)]


def grid(columns: Mapping[str, Sequence[Image.Image]], heading: str = "") -> Image.Image:
    """Columns of square pictures of one size, each under its title, on white, below an optional heading.

    A title takes at most TITLE_LINES lines; a longer one ends in dots.
    """
    size = next(iter(columns.values()))[0].width
    num_rows = max(map(len, columns.values()))
    titles = {title: wrap(title, size, TITLE_LINES) for title in columns}
    top = LINE * (bool(heading) + max(len(lines) for lines, _ in titles.values()))
    sheet = Image.new("RGB", (len(columns) * (size + GAP), top + num_rows * (size + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    (heading, *_), font = wrap(heading, sheet.width, 1)
    draw.text((2, 2), heading, font=font, fill="black", stroke_width=0.5)
    for number, (title, pictures) in enumerate(columns.items()):
        left = number * (size + GAP)
        lines, font = titles[title]
        for line, text in enumerate(lines):  # the last line stands on the picture
            draw.text((left + 2, top - LINE * (len(lines) - line) + 2), text, font=font, fill="black")
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, top + row * (size + GAP)))
    return sheet


def heat_legend(text: str, width: int) -> Image.Image:
    """`text: low <bar of heat_colors> high` on white."""
    sheet = Image.new("RGB", (width, LINE + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    (before, *_), font = wrap(f"{text}: low", width - BAR - 60, 1)
    left = 2 + round(font.getlength(before)) + 8
    draw.text((2, 2), before, font=font, fill="black")
    bar = heat_colors(torch.linspace(0, 1, BAR)[None, None])  # (1, 3, 1, BAR)
    pixels = (255 * bar[0].expand(3, LETTERS, BAR)).round().to(torch.uint8).permute(1, 2, 0).numpy()
    sheet.paste(Image.fromarray(pixels), (left, 3))
    draw.rectangle((left, 3, left + BAR - 1, 2 + LETTERS), outline="black")
    draw.text((left + BAR + 8, 2), "high", font=font, fill="black")
    return sheet


def text_legend(text: str, width: int) -> Image.Image:
    """A text on white, in as many lines as it needs."""
    lines, font = wrap(text, width, 20)
    sheet = Image.new("RGB", (width, LINE * len(lines) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((2, LINE * number + 2), line, font=font, fill="black")
    return sheet


def wrap(text: str, width: int, limit: int) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The text in at most `limit` lines of `width` pixels, and its font; what does not fit ends in dots."""
    text, path = drawable(text)
    font = load_font(path, LETTERS)
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width - 4 or len(lines) == limit:
            lines[-1] = longer
        else:
            lines.append(word)
    return [cut(line, width - 4, font) for line in lines], font


def cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while len(line) > 1 and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def stack(sheets: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """The sheets below one another on white, `gap` pixels apart, as wide as the widest."""
    height = sum(sheet.height + gap for sheet in sheets) - gap
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), height), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + gap
    return whole
