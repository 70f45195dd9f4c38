"""Fit a picture of any size into a square, and move boxes there and back.

A picture of width w and height h is scaled by s = S / max(w, h), centred in an S x S square and surrounded by grey 114
(the value of the public YOLO code). A box corner moves by x' = s x + p_x, y' = s y + p_y.

The shorter side becomes floor(s * side) whole pixels that show exactly the source region floor(s * side) / s. So pixels
and boxes have the same s to sub-pixel precision, and less than one letterboxed pixel of the far edge is cut off. (The
common way, rounding the side and stretching the picture to it, misplaces the far edge by up to 1/2 pixel.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PADDING_VALUE = 114


def letterbox_geometry(width: int, height: int, image_size: int) -> tuple[float, int, int, int, int]:
    """(scale s, pad_x, pad_y, width, height), the last two in whole pixels of the picture inside the square.

    A side that would vanish becomes one pixel.
    """
    scale = image_size / max(width, height)
    # 1e-6: s * side may miss a whole number by rounding, as in 3 * (320 / 3)
    fitted_width = max(1, int(width * scale + 1e-6))
    fitted_height = max(1, int(height * scale + 1e-6))
    return scale, (image_size - fitted_width) // 2, (image_size - fitted_height) // 2, fitted_width, fitted_height


def letterbox(picture: np.ndarray, image_size: int) -> tuple[np.ndarray, float, tuple[int, int, int, int]]:
    """uint8 RGB (h, w, 3) -> uint8 (S, S, 3), scale s, and the corners (p_x, p_y, right, bottom) of the picture in it.

    Shrinking averages over the area of each new pixel, so fine patterns do not alias: Pillow's bilinear filter widens
    with the step, and large steps first reduce by whole boxes. Enlarging is bilinear.
    """
    height, width = picture.shape[:2]
    scale, pad_x, pad_y, fitted_width, fitted_height = letterbox_geometry(width, height, image_size)
    square = np.full((image_size, image_size, 3), PADDING_VALUE, dtype=np.uint8)
    if (fitted_width, fitted_height) != (width, height):
        region = (0, 0, min(fitted_width / scale, width), min(fitted_height / scale, height))
        resized = Image.fromarray(picture).resize(
            (fitted_width, fitted_height), Image.Resampling.BILINEAR, box=region, reducing_gap=3.0
        )
        picture = np.asarray(resized)
    square[pad_y : pad_y + fitted_height, pad_x : pad_x + fitted_width] = picture
    return square, scale, (pad_x, pad_y, pad_x + fitted_width, pad_y + fitted_height)


def letterbox_boxes(boxes_xyxy: Tensor, scale: float | Tensor, pad: Tensor | Sequence[float]) -> Tensor:
    """(N, 4) pixels of the picture -> (N, 4) pixels of the square; pad is (p_x, p_y)."""
    offset = torch.as_tensor(pad, dtype=boxes_xyxy.dtype, device=boxes_xyxy.device).repeat(2)  # (4,)
    return boxes_xyxy * scale + offset


def unletterbox(
    boxes_xyxy: Tensor, scale: float | Tensor, pad: Tensor | Sequence[float], width: int, height: int
) -> Tensor:
    """(N, 4) pixels of the square -> (N, 4) pixels of the picture, clipped to it: the inverse of letterbox_boxes."""
    offset = torch.as_tensor(pad, dtype=boxes_xyxy.dtype, device=boxes_xyxy.device).repeat(2)  # (4,)
    boxes = (boxes_xyxy - offset) / scale
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
