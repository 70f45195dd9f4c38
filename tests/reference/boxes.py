"""Box mathematics, one pair of plain numbers at a time, in float64."""

import math


def area(box):
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def intersection(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def iou(a, b, eps=1e-7):
    overlap = intersection(a, b)
    return overlap / (area(a) + area(b) - overlap + eps)


def ciou_alpha(a, b, eps=1e-7):
    """The weight alpha of the aspect term of CIoU (arXiv:1911.08287), and that term v."""
    (wa, ha), (wb, hb) = ((x[2] - x[0], x[3] - x[1] + eps) for x in (a, b))
    overlap = intersection(a, b)
    ratio = overlap / (wa * ha + wb * hb - overlap + eps)
    v = 4 / math.pi**2 * (math.atan(wa / ha) - math.atan(wb / hb)) ** 2
    return v / ((1 - ratio) + v + eps), v


def ciou(a, b, eps=1e-7, alpha=None):
    """IoU - rho^2 / c^2 - alpha v, eps as in the contract of boxes.paired_ciou; alpha by its formula or given."""
    (wa, ha), (wb, hb) = ((x[2] - x[0], x[3] - x[1] + eps) for x in (a, b))
    overlap = intersection(a, b)
    ratio = overlap / (wa * ha + wb * hb - overlap + eps)
    hull_w, hull_h = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    rho2 = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    own_alpha, v = ciou_alpha(a, b, eps)
    return ratio - rho2 / (hull_w**2 + hull_h**2 + eps) - (own_alpha if alpha is None else alpha) * v


def numeric_gradient(f, x, step=1e-6):
    """Central differences of a scalar function of a list of numbers."""
    gradient = []
    for i in range(len(x)):
        up, down = list(x), list(x)
        up[i] += step
        down[i] -= step
        gradient.append((f(up) - f(down)) / (2 * step))
    return gradient
