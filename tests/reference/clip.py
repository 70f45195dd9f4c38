"""CLIP's classification of boxes and its text tower in float64 numpy; shares no code with ours."""

import numpy as np

from tests.reference.vision_transformer import attention, layer_norm, resize_matrix


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def block(x, p, heads, is_visible=None, own_values_only=False):
    """x (N, C); p: the parameters of a block by name. own_values_only: each token attends to itself alone."""
    h = layer_norm(x, p["norm1.weight"], p["norm1.bias"], 1e-5)
    seen = np.eye(len(x), dtype=bool) if own_values_only else is_visible
    qkv, out = ("attention.qkv.weight", "attention.qkv.bias"), ("attention.out.weight", "attention.out.bias")
    x = x + attention(h, *(p[name] for name in qkv + out), heads, seen)
    h = layer_norm(x, p["norm2.weight"], p["norm2.bias"], 1e-5)
    h = quick_gelu(h @ p["mlp.expand.weight"].T + p["mlp.expand.bias"])
    return x + h @ p["mlp.contract.weight"].T + p["mlp.contract.bias"]


def parameters_of(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def image_tower(image, p, *, patch, heads, depth):
    """image (3, H, W), normalised; p: the tower's parameters -> (vector (D,), dense (h w, D), tokens of each block)."""
    height, width = image.shape[1] // patch, image.shape[2] // patch
    tokens = [p["class_token"]]
    for i in range(height):
        for j in range(width):
            cut = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append((p["patches.project.weight"] * cut).sum((1, 2, 3)))
    table = p["positions"][1:]
    side = int(len(table) ** 0.5)
    rows, columns = (resize_matrix(side, n, side / n, False) for n in (height, width))
    places = np.einsum("ia,jb,abc->ijc", rows, columns, table.reshape(side, side, -1)).reshape(height * width, -1)
    x = np.stack(tokens) + np.concatenate((p["positions"][:1], places))
    x = layer_norm(x, p["first_norm.weight"], p["first_norm.bias"], 1e-5)
    end = lambda tokens: layer_norm(tokens, p["last_norm.weight"], p["last_norm.bias"], 1e-5)
    maps = []
    for i in range(depth):
        parameters = parameters_of(p, f"blocks.{i}.")
        dense = end(block(x[1:], parameters, heads, own_values_only=True)) @ p["projection"]
        x = block(x, parameters, heads)
        maps.append(end(x[1:]))
    return end(x[0]) @ p["projection"], dense, maps


def text_tower(ids, p, *, heads, depth):
    """ids (77,) with padding -> (D,): all 77 columns are computed."""
    x = p["tokens.weight"][ids] + p["positions"]
    is_visible = np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    for i in range(depth):
        x = block(x, parameters_of(p, f"blocks.{i}."), heads, is_visible)
    end = list(ids).index(max(ids))
    return layer_norm(x[end], p["last_norm.weight"], p["last_norm.bias"], 1e-5) @ p["projection"]


def average_over_box(feature_map, box_xyxy, stride, pieces):
    """feature_map (C, h, w): the mean over pieces x pieces points at the centres of as many equal parts of the box."""
    x1, y1, x2, y2 = box_xyxy
    total = 0
    for i in range(pieces):
        for j in range(pieces):
            y, x = y1 + (i + 0.5) * (y2 - y1) / pieces, x1 + (j + 0.5) * (x2 - x1) / pieces
            total = total + feature_map[:, int(y // stride), int(x // stride)]
    return total / pieces**2


def scaled_cosines(vectors, directions, scale):
    unit = lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True))
    return scale * unit(vectors) @ unit(directions).T
