"""Draws feature maps: principal components as colors, attention as heat. Pillow and PyTorch only.

Colors: red, green and blue are the first three principal components of a map's vectors (teachers.dinov2.patch_pca).
Similar vectors have similar colors; the colors themselves have no meaning.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from engine.drawing.fonts import drawable, load_font
from teachers.dinov2 import patch_pca

GAP = 4  # pixels between the cells of a grid
TITLE_HEIGHT = 18  # pixels


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
    """Columns of square pictures of one size, each under its title, on white, below an optional heading."""
    size = next(iter(columns.values()))[0].width
    num_rows = max(map(len, columns.values()))
    top = TITLE_HEIGHT * (2 if heading else 1)
    sheet = Image.new("RGB", (len(columns) * (size + GAP), top + num_rows * (size + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    heading, path = drawable(heading)
    draw.text((GAP, 2), heading, font=load_font(path, 12), fill="black")
    for number, (title, pictures) in enumerate(columns.items()):
        left = number * (size + GAP)
        title, path = drawable(title)
        font = load_font(path, 12)
        while len(title) > 1 and font.getlength(title) > size:
            title = title[:-1]
        draw.text((left + 2, top - TITLE_HEIGHT + 2), title, font=font, fill="black")
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, top + row * (size + GAP)))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """The sheets below one another on white, as wide as the widest."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole
