"""Enhance an image before detection: noise, colour of the light, contrast, sharpness.

Functions of uint8 RGB images (H, W, 3), H, W >= 1, that return a new image of the same shape and type. They work on the
stored (gamma-encoded) values, not on linear light. `enhance` applies them in one order.

    denoise              bilateral filter: Tomasi & Manduchi, "Bilateral Filtering for Gray and Color Images", ICCV 1998
    balance_grey_world   Buchsbaum, "A spatial processor model for object colour perception", 1980
    balance_white_patch  Land & McCann, "Lightness and Retinex Theory", 1971
    equalize_locally     CLAHE: Zuiderveld, "Contrast Limited Adaptive Histogram Equalization", Graphics Gems IV, 1994
    adjust_gamma         power law
    sharpen              unsharp masking

Deliberate differences: the bilateral filter measures colour distance in RGB, not in CIELAB. White patch takes a high
percentile instead of the maximum, so that a few hot pixels do not decide. CLAHE extends only the sides that do not
divide into tiles (OpenCV, if one side does not divide, extends the other one too).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
NUM_LEVELS = 256


@dataclass(frozen=True)
class Enhancement:
    """The steps of `enhance`. None skips a step; a number is the argument of the step's function."""

    denoise: float | None = None  # sigma_color
    grey_world: float | None = None  # strength
    white_patch: float | None = None  # strength
    clahe: float | None = None  # clip_limit
    gamma: float | None = None
    sharpen: float | None = None  # amount


def enhance(image: np.ndarray, steps: Enhancement) -> np.ndarray:
    """Apply the steps: noise first, because later steps amplify it, then colour, contrast, brightness, sharpness."""
    if steps.denoise is not None:
        image = denoise(image, sigma_color=steps.denoise)
    if steps.grey_world is not None:
        image = balance_grey_world(image, strength=steps.grey_world)
    if steps.white_patch is not None:
        image = balance_white_patch(image, strength=steps.white_patch)
    if steps.clahe is not None:
        image = equalize_locally(image, clip_limit=steps.clahe)
    if steps.gamma is not None:
        image = adjust_gamma(image, steps.gamma)
    if steps.sharpen is not None:
        image = sharpen(image, amount=steps.sharpen)
    return image.copy()


# ---------------------------------------------------------------- noise


def denoise(image: np.ndarray, *, sigma_color: float, sigma_space: float = 1.5) -> np.ndarray:
    """Bilateral filter: each pixel becomes a weighted mean of the neighbours that are near and similar in colour.

        y_p  = sum_q w_pq x_q / sum_q w_pq
        w_pq = exp(-|p - q|^2 / (2 sigma_space^2) - |x_p - x_q|^2 / (2 sigma_color^2))

    over the pixels q of the image with |p - q| <= ceil(2 sigma_space). x_p is the colour in levels 0..255, so an edge
    of many sigma_color stays sharp. ValueError if a sigma is not above 0.
    """
    if not (sigma_color > 0 and sigma_space > 0):
        raise ValueError(f"found sigma_color {sigma_color} and sigma_space {sigma_space}, expected numbers above 0")
    radius = math.ceil(2 * sigma_space)
    x = torch.from_numpy(image).permute(2, 0, 1).float()  # (3, H, W)
    height, width = image.shape[:2]
    total, weights = x.clone(), torch.ones(height, width)  # q = p has weight 1
    # w_pq = w_qp, so half of the offsets are enough: each is used at both of its ends.
    offsets = [(dy, dx) for dy in range(radius + 1) for dx in range(-radius, radius + 1) if (dy, dx) > (0, 0)]
    for dy, dx in offsets:
        if dy * dy + dx * dx > radius * radius or dy >= height or abs(dx) >= width:
            continue
        p = (slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        q = (slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        x_p, x_q = x[:, *p], x[:, *q]  # (3, h, w)
        exponent = (x_p - x_q).square_().sum(0).mul_(-1 / (2 * sigma_color**2))
        w = exponent.sub_((dy * dy + dx * dx) / (2 * sigma_space**2)).exp_()  # (h, w)
        total[:, *p] += w * x_q
        total[:, *q] += w * x_p
        weights[p] += w
        weights[q] += w
    return _to_image(total / weights)


# ---------------------------------------------------------------- colour of the light


def balance_grey_world(image: np.ndarray, *, strength: float = 1.0) -> np.ndarray:
    """Gains that make the image grey on average: assumes that the mean of all surfaces is grey.

        y_c = (m / m_c)^strength x_c,    m_c = mean_p x_pc,    m = (m_R + m_G + m_B) / 3

    strength 0 changes nothing. A channel that is 0 everywhere stays 0.
    """
    return _scale_channels(image, image.reshape(-1, 3).mean(0, dtype=np.float64), None, strength)


def balance_white_patch(image: np.ndarray, *, strength: float = 1.0, percentile: float = 99.0) -> np.ndarray:
    """Gains that make the brightest part of each channel white: assumes that the lightest surface is white.

        y_c = (255 / q_c)^strength x_c,    q_c = the percentile of x_pc over p

    strength 0 changes nothing. A channel whose percentile is 0 stays unchanged.
    """
    return _scale_channels(image, np.percentile(image.reshape(-1, 3), percentile, axis=0), 255.0, strength)


def _scale_channels(image: np.ndarray, levels: np.ndarray, target: float | None, strength: float) -> np.ndarray:
    """y_c = (target / level_c)^strength x_c. target None: the mean of the levels."""
    target = levels.mean() if target is None else target
    gains = np.divide(target, levels, out=np.ones(3), where=levels > 0) ** strength  # (3,)
    table = np.arange(NUM_LEVELS)[:, None] * gains  # (256, 3)
    table = np.rint(table.clip(0, 255)).astype(np.uint8)
    return np.stack([table[:, c][image[..., c]] for c in range(3)], axis=-1)


# ---------------------------------------------------------------- contrast and brightness


def equalize_locally(image: np.ndarray, *, clip_limit: float = 2.0, tiles: int = 8) -> np.ndarray:
    """CLAHE of the luma. The colour differences stay.

        y_c = x_c + equalize_plane(Y) - Y,    Y = round(0.299 R + 0.587 G + 0.114 B)

    This replaces Y of YCbCr (ITU-R BT.601, full range) and converts back, with one rounding instead of three.
    """
    luma = np.rint(image @ np.array(LUMA, dtype=np.float32)).astype(np.uint8)  # (H, W)
    change = equalize_plane(luma, clip_limit=clip_limit, tiles=tiles).astype(np.int16) - luma
    return (image + change[..., None]).clip(0, 255).astype(np.uint8)


def equalize_plane(plane: np.ndarray, *, clip_limit: float, tiles: int) -> np.ndarray:
    """CLAHE of uint8 (H, W): histogram equalization with limited slope in tiles x tiles tiles, blended between them.

    A tile of n pixels with the histogram h_v, v = 0..255, has the limit l = max(1, floor(clip_limit n / 256)):

        g_v  = min(h_v, l) + floor(e / 256) + r_v,    e = sum_v max(h_v - l, 0)
        T(v) = round(255 / n sum_{u <= v} g_u)

    r_v spreads the remaining m = e mod 256 counts, one each, over the levels 0, s, 2 s, ... with s = floor(256 / m).
    A pixel is looked up in the T of the four tiles whose centers are around it, and the four values are interpolated
    bilinearly; beyond the outermost centers the nearest tiles count. For the histograms, an image that does not divide
    into tiles is reflected beyond its right and lower edges (without repeating the edge).

    ValueError if clip_limit is not above 0 or tiles is below 1.
    """
    if not clip_limit > 0 or tiles < 1:
        raise ValueError(f"found clip_limit {clip_limit} and {tiles} tiles, expected numbers above 0")
    height, width = plane.shape
    padded = np.pad(plane, ((0, -height % tiles), (0, -width % tiles)), mode="reflect")
    tables = _tile_tables(padded, clip_limit, tiles)  # (tiles, tiles, 256) float32
    y1, y2, share_y = _tile_neighbours(height, padded.shape[0] // tiles, tiles)
    x1, x2, share_x = _tile_neighbours(width, padded.shape[1] // tiles, tiles)
    y1, y2, share_y = y1[:, None], y2[:, None], share_y[:, None]
    upper = tables[y1, x1, plane] * (1 - share_x) + tables[y1, x2, plane] * share_x  # (H, W)
    lower = tables[y2, x1, plane] * (1 - share_x) + tables[y2, x2, plane] * share_x
    return np.rint(upper * (1 - share_y) + lower * share_y).astype(np.uint8)


def _tile_tables(padded: np.ndarray, clip_limit: float, tiles: int) -> np.ndarray:
    """T of every tile, (tiles, tiles, 256) float32 of whole numbers."""
    height, width = padded.shape[0] // tiles, padded.shape[1] // tiles
    area = height * width
    blocks = padded.reshape(tiles, height, tiles, width).swapaxes(1, 2).reshape(tiles * tiles, area)
    rows = NUM_LEVELS * np.arange(tiles * tiles)[:, None]
    histograms = np.bincount((blocks + rows).ravel(), minlength=NUM_LEVELS * tiles * tiles).reshape(-1, NUM_LEVELS)
    limit = max(1, math.floor(clip_limit * area / NUM_LEVELS))
    clipped = np.minimum(histograms, limit)
    whole, rest = np.divmod(area - clipped.sum(1), NUM_LEVELS)  # (tiles^2,) each
    step = np.maximum(1, NUM_LEVELS // np.maximum(1, rest))[:, None]
    levels = np.arange(NUM_LEVELS)
    clipped += whole[:, None] + ((levels % step == 0) & (levels // step < rest[:, None]))
    tables = np.rint(clipped.cumsum(1) * (np.float32(255) / np.float32(area)))
    return tables.clip(0, 255).astype(np.float32).reshape(tiles, tiles, NUM_LEVELS)


def _tile_neighbours(length: int, tile: int, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every pixel of an axis: the tiles with the nearest centers before and behind it, and the second's share."""
    centers = np.float32(0.5)  # of the tiles, in tiles
    position = np.arange(length, dtype=np.float32) * np.float32(1 / tile) - centers  # 0 is the first tile's center
    before = np.floor(position).astype(np.int64)
    share = position - before.astype(np.float32)
    return before.clip(0, tiles - 1), (before + 1).clip(0, tiles - 1), share


def adjust_gamma(image: np.ndarray, gamma: float) -> np.ndarray:
    """y = 255 (x / 255)^(1 / gamma). Above 1 brightens, below 1 darkens; black and white stay.

    ValueError if gamma is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"found gamma {gamma}, expected a number above 0")
    table = np.rint(255 * (np.arange(NUM_LEVELS) / 255) ** (1 / gamma)).astype(np.uint8)
    return table[image]


# ---------------------------------------------------------------- sharpness


def sharpen(image: np.ndarray, *, amount: float, sigma: float = 1.5) -> np.ndarray:
    """Unsharp masking: y = x + amount (x - G_sigma * x), G a Gaussian cut off at ceil(3 sigma), edges repeated.

    amount 0 changes nothing. ValueError if sigma is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"found sigma {sigma}, expected a number above 0")
    x = torch.from_numpy(image).permute(2, 0, 1).float()  # (3, H, W)
    return _to_image(x + amount * (x - _blur(x, sigma)))


def _blur(x: Tensor, sigma: float) -> Tensor:
    """(3, H, W) -> (3, H, W)."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    taps = taps / taps.sum()
    for axis, (bottom, right) in ((1, (radius, 0)), (2, (0, radius))):
        padded = F.pad(x[None], (right, right, bottom, bottom), mode="replicate")[0]
        # a sum of shifted copies is 10 times as fast on a CPU as conv2d with one channel
        x = sum(tap * padded.narrow(axis, k, x.shape[axis]) for k, tap in enumerate(taps.tolist()))
    return x


def _to_image(x: Tensor) -> np.ndarray:
    """(3, H, W) levels -> uint8 (H, W, 3), contiguous."""
    return x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
