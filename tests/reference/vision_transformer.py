"""The parts of a vision transformer in float64 numpy, token by token, tap by tap; shares no code with ours."""

import math

import numpy as np


def layer_norm(x, weight, bias, eps):
    """x (..., C): every token to mean 0 and variance 1, then weight and bias."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * weight + bias


def gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return x * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))), otypes=[float])(x)


def attention_probabilities(x, w_qkv, b_qkv, heads, is_visible=None):
    """x (N, C) -> (heads, N, N); w_qkv (3 C, C) has the rows of q, of k, of v."""
    channels = x.shape[1]
    depth = channels // heads
    all_p = np.zeros((heads, len(x), len(x)))
    for h in range(heads):
        rows = slice(h * depth, (h + 1) * depth)
        q = x @ w_qkv[:channels][rows].T + b_qkv[:channels][rows]
        k = x @ w_qkv[channels : 2 * channels][rows].T + b_qkv[channels : 2 * channels][rows]
        for i in range(len(x)):
            logits = np.array([q[i] @ k[j] / math.sqrt(depth) for j in range(len(x))])
            seen = np.ones(len(x), bool) if is_visible is None else is_visible[i]
            weights = np.where(seen, np.exp(logits - logits[seen].max()), 0)
            all_p[h, i] = weights / weights.sum()
    return all_p


def attention(x, w_qkv, b_qkv, w_out, b_out, heads, is_visible=None):
    """x (N, C) -> (N, C)."""
    channels = x.shape[1]
    v = x @ w_qkv[2 * channels :].T + b_qkv[2 * channels :]
    probabilities = attention_probabilities(x, w_qkv, b_qkv, heads, is_visible)
    mixed = [p @ v_h for p, v_h in zip(probabilities, np.split(v, heads, axis=1))]
    return np.concatenate(mixed, axis=1) @ w_out.T + b_out


def cubic(distance, a):
    """Keys' cubic convolution kernel, support 2."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resize_matrix(length, new_length, step, antialias):
    """(new_length, length): cubic interpolation at the centers (i + 1/2) * step - 1/2; border values repeat.

    antialias: the kernel (a = -1/2) is `step` times as wide where step > 1, cut at the border and normalised.
    """
    matrix = np.zeros((new_length, length))
    for i in range(new_length):
        center = (i + 0.5) * step - 0.5
        if antialias:
            width = max(step, 1.0)
            for j in range(length):
                matrix[i, j] = cubic((j - center) / width, -0.5)
            matrix[i] /= matrix[i].sum()
        else:
            for j in range(math.floor(center) - 1, math.floor(center) + 3):
                matrix[i, min(max(j, 0), length - 1)] += cubic(j - center, -0.75)
    return matrix


def resize_positions(table, grid, offset=0.0, antialias=False):
    """table (G, G, C) -> (h, w, C), rows first, then columns."""
    side = len(table)
    rows, columns = (resize_matrix(side, n, side / (n + offset), antialias) for n in grid)
    return np.einsum("ia,jb,abc->ijc", rows, columns, table)


def principal_components(rows, count):
    """rows (N, C) -> centered coordinates (N, count) along the right singular vectors, largest first; signs free."""
    centered = rows - rows.mean(0)
    _, _, vectors = np.linalg.svd(centered, full_matrices=False)
    return centered @ vectors[:count].T
