"""The pictures of the demo and how they are shown, without Streamlit."""

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from config import Config
from datasets.enhance import adjust_gamma
from datasets.images import decode_image, read_image
from datasets.open import open_dataset
from datasets.shapes import NAMES as SHAPES
from datasets.shapes import draw_picture
from engine.drawing.detections import draw_detections
from engine.drawing.fonts import drawable, load_font
from engine.drawing.predictions import spread
from engine.prediction.sources import find_pictures
from errors import UserError
from structures import Detections

MAX_MEGABYTES = 10  # of an uploaded file; .streamlit/config.toml has the same limit for the server
MAX_MEGAPIXELS = 24  # of an uploaded picture
WORKING_SIDE = 1280  # pixels: larger pictures are shrunk to this first
SHOWN_SIDE = 960  # pixels: the longer side of every picture on the page, which is 400 to 750 pixels wide there
LABELS = 1.3  # size of labels, as a multiple of predict.py's: 11 pixels where a picture is 400 wide
NUM_TEST_PICTURES = 8
MAX_FOLDER_PICTURES = 500
ONE_AT_A_TIME = threading.Lock()  # so that however many sessions there are, one of them decodes or detects
PHOTOS = Path(__file__).parents[2] / "docs" / "notebooks" / "photos"  # free of rights: its README.md has the terms

SHAPES_SIZE = 160  # pixels, like the demo's training pictures


class Picture(NamedTuple):
    """A picture of the page: pixels (H, W, 3) uint8 RGB, at most WORKING_SIDE a side; size (width, height) of its file.

    The size is what boxes that leave the page must fit to.
    """

    pixels: np.ndarray
    size: tuple[int, int]


def read_upload(data: bytes) -> Picture:
    """An uploaded file. UserError if it is too large or bad.

    Nothing is written to disk. The size in pixels is read from the header: a picture that is too large is not decoded.
    """
    if len(data) > MAX_MEGABYTES * 2**20:
        raise UserError(
            f"the uploaded file: {len(data) / 2**20:.1f} MB, expected a picture of at most {MAX_MEGABYTES} MB"
        )
    with ONE_AT_A_TIME:
        return shrink(decode_image(data, "the uploaded file", max_pixels=MAX_MEGAPIXELS * 1_000_000))


def shrink(picture: np.ndarray) -> Picture:
    """The picture, or a smaller copy whose longer side is WORKING_SIDE."""
    scale, (height, width) = WORKING_SIDE / max(picture.shape[:2]), picture.shape[:2]
    pixels = picture if scale >= 1 else np.asarray(resize(Image.fromarray(picture), scale))
    return Picture(pixels, (width, height))


def resize(picture: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BILINEAR)


def digest(picture: np.ndarray) -> str:
    """A hash of the pixels, the key of cached results."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


# ---------------------------------------------------------------- built-in pictures


def noisy(picture: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 30, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


class BuiltIn(NamedTuple):
    """source: the file of a photo; or the number of a drawn picture, and what is done to it.

    shows: names of classes.
    """

    shows: tuple[str, ...]
    source: str | tuple[int, Callable[[np.ndarray], np.ndarray]]


BUILT_IN: dict[str, BuiltIn] = {
    "shapes under a warm lamp": BuiltIn(SHAPES, (10, lambda p: (p * np.array([1.0, 0.75, 0.4])).astype(np.uint8))),
    "shapes in the dark": BuiltIn(SHAPES, (0, lambda picture: adjust_gamma(picture, 0.4))),
    "shapes in fog": BuiltIn(SHAPES, (2, lambda picture: (165 + 0.25 * picture).astype(np.uint8))),
    "shapes with noise": BuiltIn(SHAPES, (1, noisy)),
    "shapes": BuiltIn(SHAPES, (0, lambda picture: picture)),
    "more shapes": BuiltIn(SHAPES, (10, lambda picture: picture)),
    "photo: a pasture": BuiltIn(("person", "dog", "horse"), "pasture.jpg"),
    "photo: a dog": BuiltIn(("dog", "bicycle", "car", "truck"), "dog.jpg"),
    "photo: a cat": BuiltIn(("cat",), "cat.jpg"),
    "photo: a cup": BuiltIn(("cup", "spoon", "dining table"), "coffee.jpg"),
    "photo: a rocket": BuiltIn((), "rocket.jpg"),
}


def fitting_picture(names: Sequence[str]) -> str:
    """The built-in picture that shows the most of a model's classes, by name; the first of equals."""
    return max(BUILT_IN, key=lambda name: len(set(BUILT_IN[name].shows) & set(names)))


def built_in_picture(name: str) -> np.ndarray:
    """uint8 RGB (H, W, 3): a drawn picture of SHAPES_SIZE, with another seed than the training set's, or a photo."""
    source = BUILT_IN[name].source
    if isinstance(source, str):
        return read_image(PHOTOS / source)
    index, change = source
    picture, _, _ = draw_picture(2026, "test", index, SHAPES_SIZE)
    return change(picture)


def find_folder_pictures(folder: str) -> dict[str, Path]:
    """The first MAX_FOLDER_PICTURES pictures in a folder and below it, by name. UserError if there are none."""
    sources = find_pictures([folder])[:MAX_FOLDER_PICTURES]
    return {str(source.name) + source.path.suffix: source.path for source in sources}


def find_test_pictures(config: Config) -> dict[str, Path]:
    """Some pictures of a run's test split, by name. UserError if the dataset is missing."""
    data = config.data
    index = open_dataset(*data.test_place, classes=data.classes)
    return {Path(s.image_path).name: Path(s.image_path) for s in spread(index, NUM_TEST_PICTURES).samples}


# ---------------------------------------------------------------- showing pictures


def shown(picture: np.ndarray, side: int = SHOWN_SIDE) -> Image.Image:
    """The picture, with a longer side of `side` pixels."""
    return resize(Image.fromarray(picture), side / max(picture.shape[:2]))


def shown_with(picture: np.ndarray, found: Detections, names: Sequence[str], side: int = SHOWN_SIDE) -> Image.Image:
    """The same with detections; lines and letters do not depend on the picture's own size."""
    canvas = shown(picture, side)
    return draw_detections(canvas, scaled(found, picture, canvas.size), names, magnify=LABELS)


def scaled(found: Detections, picture: np.ndarray, size: tuple[int, int]) -> Detections:
    """The detections in a picture as they are in its copy of another size (width, height)."""
    height, width = picture.shape[:2]
    scale = torch.tensor([size[0] / width, size[1] / height]).repeat(2)
    return Detections(found.boxes_xyxy * scale, found.scores, found.labels)


def beside(left: Image.Image, right: Image.Image, titles: Sequence[str]) -> Image.Image:
    """Two pictures of one size beside each other, each under its title on white: what is handed on."""
    bar, gap = 40, 12
    sheet = Image.new("RGB", (2 * left.width + gap, left.height + bar), "white")
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.width + gap)):
        text, path = drawable(title)
        font = load_font(path, 24)
        while len(text) > 1 and font.getlength(text) > left.width - 8:
            text = text[:-1]
        ImageDraw.Draw(sheet).text((x + 4, 6), text, font=font, fill="black")
        sheet.paste(picture, (x, bar))
    return sheet


def as_jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()


def wipe(left: Image.Image, right: Image.Image, share: float) -> Image.Image:
    """Two pictures of one size in one: the first covers `share` of the width, up to a white line."""
    if left.size != right.size:
        raise ValueError(f"found sizes {left.size} and {right.size}, expected equal ones")
    edge = round(share * left.width)
    whole = right.copy()
    whole.paste(left.crop((0, 0, edge, left.height)), (0, 0))
    if 0 < edge < left.width:
        ImageDraw.Draw(whole).line((edge, 0, edge, left.height), fill="white", width=3)
    return whole
