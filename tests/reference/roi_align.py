"""RoIAlign one number at a time, in float64: the four neighbours of each sample point, by the text of the paper.

The places of the samples, and what counts as outside, are those of the public detectors (aligned=False).
"""

import math

import numpy as np


def bilinear(pixels, y, x):
    """The value at (y, x) of one map (C, H, W), linearly between its four neighbours; 0 more than a pixel outside."""
    C, H, W = pixels.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return np.zeros(C)
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * pixels[:, top, left] + dx * pixels[:, top, right]
    lower = (1 - dx) * pixels[:, bottom, left] + dx * pixels[:, bottom, right]
    return (1 - dy) * upper + dy * lower


def roi_align(pixels, box, stride, bins, samples):
    """One box on one map (C, H, W) -> (C, bins, bins)."""
    x1, y1, x2, y2 = (float(corner) / stride for corner in box)
    height, width = max(y2 - y1, 1.0) / bins, max(x2 - x1, 1.0) / bins
    pooled = np.zeros((len(pixels), bins, bins))
    for i in range(bins):
        for j in range(bins):
            for a in range(samples):
                for b in range(samples):
                    y = y1 + (i + (a + 0.5) / samples) * height
                    x = x1 + (j + (b + 0.5) / samples) * width
                    pooled[:, i, j] += bilinear(pixels, y, x) / samples**2
    return pooled


def level_of(box, finest=2, coarsest=5):
    """FPN, eq. 1, by trying: level k holds the square roots of areas from 112 2^(k-3) up to twice that."""
    side = math.sqrt((float(box[2]) - float(box[0])) * (float(box[3]) - float(box[1])))
    for k in range(finest, coarsest):
        if side < 112 * 2.0 ** (k - 2) * (1 - 1e-6):
            return k
    return coarsest
