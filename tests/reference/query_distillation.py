"""Losses of the queries of a DETR in float64 numpy, query by query; imports neither torch nor the project."""

import numpy as np


def log_pair(z):
    """Logarithms of sigmoid(z) and 1 - sigmoid(z)."""
    return np.array([-np.logaddexp(0, -z), -np.logaddexp(0, z)])


def giou(a, b):
    """Of two boxes, each center x, center y, width, height: IoU less the share of the hull that neither covers."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    sides = []
    for center_a, size_a, center_b, size_b in ((ax, aw, bx, bw), (ay, ah, by, bh)):
        starts, ends = (center_a - size_a / 2, center_b - size_b / 2), (center_a + size_a / 2, center_b + size_b / 2)
        sides.append((max(0.0, min(ends) - max(starts)), max(ends) - min(starts)))
    common, hull = sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]
    union = aw * ah + bw * bh - common
    return common / union - (hull - union) / hull


def query_agreement(s_logits, t_logits, s_boxes, t_boxes, class_weight=1.0, l1_weight=5.0, giou_weight=2.0, repeats=1):
    total, weights = 0.0, 0.0
    for place in np.ndindex(s_logits.shape[:-1]):
        pairs = [(log_pair(s), log_pair(t)) for s, t in zip(s_logits[place], t_logits[place])]
        classes = sum(np.sum(np.exp(of_t) * (of_t - of_s)) for of_s, of_t in pairs)
        distance = sum(abs(s - t) for s, t in zip(s_boxes[place], t_boxes[place]))
        apart = 1 - giou(s_boxes[place], t_boxes[place])
        weight = max(np.exp(of_t[0]) for _, of_t in pairs) / repeats
        total += weight * (class_weight * classes + l1_weight * distance + giou_weight * apart)
        weights += weight
    return total / max(weights, 1.0)
