"""What the locations of a dense detector say about given boxes, in float64 numpy and plain loops."""

import numpy as np


def read_reference(z, decoded, points, boxes, locations):
    """taps.logits_at_boxes box by box, location by location: z (A, K), decoded (A, 4), points (A, 2), boxes (N, 4)."""
    rows = []
    for box in boxes:
        weights = []
        for (x1, y1, x2, y2), (px, py) in zip(decoded, points):
            inside = box[0] < px < box[2] and box[1] < py < box[3]
            w, h = min(x2, box[2]) - max(x1, box[0]), min(y2, box[3]) - max(y1, box[1])
            overlap = max(w, 0) * max(h, 0)
            union = (x2 - x1) * (y2 - y1) + (box[2] - box[0]) * (box[3] - box[1]) - overlap
            weights.append(overlap / union if inside else 0.0)
        weights = np.array(weights)
        if weights.max() == 0:
            center = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
            rows.append(z[np.argmin(((points - center) ** 2).sum(1))])
            continue
        best = np.argsort(-weights, kind="stable")[:locations]
        rows.append((weights[best, None] * z[best]).sum(0) / weights[best].sum())
    return np.array(rows)
