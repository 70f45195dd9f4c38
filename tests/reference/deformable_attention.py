"""Multi-scale deformable attention point by point, in float64 numpy."""

import math

import numpy as np


def bilinear_reference(x: np.ndarray, u: float, v: float) -> np.ndarray:
    """x (H, W, D) at the fractions u of its width and v of its height; cells beyond the border are zeros -> (D,)."""
    height, width, depth = x.shape
    column, row = u * width - 0.5, v * height - 0.5  # centers of cells lie at whole numbers
    total = np.zeros(depth)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * x[i, j]
    return total


def deformable_attention_reference(value, level_sizes, points, attention_prob) -> np.ndarray:
    """(B, S, M, D), [(H, W)], (B, Q, M, L, P, 2), (B, Q, M, L, P) -> (B, Q, M, D)."""
    B, Q, M, _, P, _ = points.shape
    out = np.zeros((B, Q, M, value.shape[-1]))
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                start = 0
                for level, (height, width) in enumerate(level_sizes):
                    x = value[b, start : start + height * width, m].reshape(height, width, -1)
                    start += height * width
                    for p in range(P):
                        u, v = points[b, q, m, level, p]
                        out[b, q, m] += attention_prob[b, q, m, level, p] * bilinear_reference(x, u, v)
    return out
