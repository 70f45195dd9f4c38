"""The assigners and losses of the YOLO heads, written with loops over images, objects and cells in float64 numpy."""

import math

import numpy as np

from tests.reference.boxes import ciou, iou


def sigmoid(z):
    return 1 / (1 + np.exp(-z)) if z >= 0 else np.exp(z) / (1 + np.exp(z))


def softplus(z):
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def cross_entropy(logit, target):
    """-t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)), from -log sigmoid(z) = softplus(-z)."""
    return target * softplus(-logit) + (1 - target) * softplus(logit)


def log_softmax(z):
    return z - np.logaddexp.reduce(z)


def contains(box, x, y):
    return box[0] < x < box[2] and box[1] < y < box[3]


# ---------------------------------------------------------------------------------------------- anchor-free heads


def cell_centers(grid_sizes):
    return np.array([(x + 0.5, y + 0.5) for h, w in grid_sizes for y in range(h) for x in range(w)])


def decode(logits, point, stride):
    """(4, R) logits -> a box in pixels."""
    left, top, right, bottom = ((np.exp(log_softmax(z)) * np.arange(len(z))).sum() for z in logits)
    x, y = point
    return np.array([x - left, y - top, x + right, y + bottom]) * stride


def reach(box, shortest):
    """Where an object looks for candidates: each side at least `shortest`, about the middle of the box."""
    x1, y1, x2, y2 = box
    if x2 - x1 < shortest:
        x1, x2 = (x1 + x2 - shortest) / 2, (x1 + x2 + shortest) / 2
    if y2 - y1 < shortest:
        y1, y2 = (y1 + y2 - shortest) / 2, (y1 + y2 + shortest) / 2
    return x1, y1, x2, y2


def task_aligned(
    scores, boxes, centers, gt_boxes, gt_labels, topk=10, alpha=0.5, beta=6.0, eps=1e-9, shortest=16.0
):  # fmt: skip
    """One image: scores (A, K), boxes (A, 4), centers (A, 2) pixels -> object of each location or -1, target score."""
    A, G = len(boxes), len(gt_boxes)
    overlap, metric, chosen = np.zeros((G, A)), np.zeros((G, A)), np.zeros((G, A), dtype=bool)
    for g in range(G):
        if gt_boxes[g][2] <= gt_boxes[g][0] or gt_boxes[g][3] <= gt_boxes[g][1]:
            continue
        for a in range(A):
            if contains(reach(gt_boxes[g], shortest), *centers[a]):
                overlap[g, a] = max(ciou(gt_boxes[g], boxes[a]), 0.0)
                metric[g, a] = scores[a, gt_labels[g]] ** alpha * overlap[g, a] ** beta
        best = sorted(range(A), key=lambda a: (-metric[g, a], a))[:topk]
        for a in best:
            chosen[g, a] = metric[g, a] > 0
    owner = np.full(A, -1)
    for a in range(A):
        claims = np.flatnonzero(chosen[:, a])
        if len(claims) == 1:
            owner[a] = claims[0]
        elif len(claims) > 1:
            owner[a] = int(np.argmax(overlap[:, a]))
    target = np.zeros(A)
    for g in range(G):
        mine = np.flatnonzero(owner == g)
        if len(mine):
            target[mine] = metric[g, mine] * overlap[g, mine].max() / (metric[g, mine].max() + eps)
    return owner, target


def focal_distribution(logits, distance):
    """DFL (arXiv:2006.04388, eq. 6) of one edge: logits (R,), distance in bins."""
    distance = min(max(distance, 0.0), len(logits) - 1 - 0.01)
    low = int(distance)
    log_p = log_softmax(logits)
    return -(low + 1 - distance) * log_p[low] - (distance - low) * log_p[low + 1]


def yolov8(
    box_logits, class_logits, points, strides, gt_boxes, gt_labels, gt_image, gt_ignore, gt_scores=None,
    gains=(7.5, 0.5, 1.5),
):  # fmt: skip
    """(B, A, 4, R), (B, A, K) -> the terms box, cls, dfl; the row of each location's object (B, A); target scores.

    gt_scores: the share of each class in an object, (N, K).
    """
    B, A, K = class_logits.shape
    owners, targets = np.full((B, A), -1), np.zeros((B, A))
    is_ignored = np.zeros((B, A), dtype=bool)
    predicted = np.zeros((B, A, 4))
    for b in range(B):
        predicted[b] = [decode(box_logits[b, a], points[a], strides[a]) for a in range(A)]
        scores = np.vectorize(sigmoid, otypes=[float])(class_logits[b])
        rows = [n for n in range(len(gt_boxes)) if gt_image[n] == b and not gt_ignore[n]]
        centers = points * np.asarray(strides)[:, None]
        owner, targets[b] = task_aligned(scores, predicted[b], centers, gt_boxes[rows], gt_labels[rows])
        for a in range(A):
            owners[b, a] = rows[owner[a]] if owner[a] >= 0 else -1
            for n in range(len(gt_boxes)):
                if gt_image[n] == b and gt_ignore[n] and owner[a] < 0 and contains(gt_boxes[n], *centers[a]):
                    is_ignored[b, a] = True
    total = max(targets.sum(), 1.0)
    box = cls = dfl = 0.0
    for b in range(B):
        for a in range(A):
            n = owners[b, a]
            for k in range(K):
                share = 0.0 if n < 0 else float(gt_labels[n] == k) if gt_scores is None else gt_scores[n, k]
                t = targets[b, a] * share
                cls += 0.0 if is_ignored[b, a] else cross_entropy(class_logits[b, a, k], t)
            if n >= 0:
                box += targets[b, a] * (1 - ciou(predicted[b, a] / strides[a], gt_boxes[n] / strides[a]))
                x1, y1, x2, y2 = gt_boxes[n] / strides[a]
                x, y = points[a]
                edges = [x - x1, y - y1, x2 - x, y2 - y]
                dfl += targets[b, a] * np.mean([focal_distribution(box_logits[b, a, e], edges[e]) for e in range(4)])
    terms = {name: gain * value / total for name, gain, value in zip(("box", "cls", "dfl"), gains, (box, cls, dfl))}
    return terms, owners, targets


# ---------------------------------------------------------------------------------------------- anchor heads


def object_cells(box, grid, stride):
    """The cells (y, x) an object asks for, by role 0..4: own, left, above, right, below; box in pixels."""
    h, w = grid
    cx, cy = (box[0] + box[2]) / 2 / stride, (box[1] + box[3]) / 2 / stride
    if box[2] <= box[0] or box[3] <= box[1] or not (0 <= cx <= w and 0 <= cy <= h):
        return {}
    x, y = min(math.floor(cx), w - 1), min(math.floor(cy), h - 1)
    cells = {0: (y, x)}
    if cx - x < 0.5 and x > 0:
        cells[1] = (y, x - 1)
    if cy - y < 0.5 and y > 0:
        cells[2] = (y - 1, x)
    if 0.5 < cx - x < 1 and x < w - 1:
        cells[3] = (y, x + 1)
    if 0.5 < cy - y < 1 and y < h - 1:
        cells[4] = (y + 1, x)
    return cells


def anchor_matches(boxes, anchors, grid, stride, threshold=4.0):
    """One level: [(row, anchor, y, x)], sorted by role of the cell, anchor, row; boxes, anchors (n, 2) in pixels."""
    found = []
    for n, box in enumerate(boxes):
        bw, bh = box[2] - box[0], box[3] - box[1]
        for role, cell in object_cells(box, grid, stride).items():
            for a, (aw, ah) in enumerate(anchors):
                if max(bw / aw, aw / bw, bh / ah, ah / bh) < threshold:
                    found.append(((role, a, n), (n, a, *cell)))
    return [match for _, match in sorted(found)]


def all_anchor_matches(anchors, grids, strides, gt_boxes, gt_image, gt_ignore):
    """Of all levels, in order: [(row, image, location, level, anchor, y, x)]."""
    found, start = [], 0
    for level, ((h, w), stride) in enumerate(zip(grids, strides)):
        for n, a, y, x in anchor_matches(gt_boxes, anchors[level], (h, w), stride):
            if not gt_ignore[n]:
                found.append((n, gt_image[n], start + (a * h + y) * w + x, level, a, y, x))
        start += len(anchors[level]) * h * w
    return found


def decode_anchor(logits, anchor, y, x, stride):
    """4 logits at a cell -> a box in pixels."""
    sx, sy, sw, sh = (sigmoid(z) for z in logits)
    px, py = (x + 2 * sx - 0.5) * stride, (y + 2 * sy - 0.5) * stride
    pw, ph = (4 * s * s * size for s, size in zip((sw, sh), anchor))
    return px - pw / 2, py - ph / 2, px + pw / 2, py + ph / 2


def simota(predicted, obj_logits, class_logits, own, places, gt_boxes, gt_labels, topk=10, weight=3.0):
    """One image: C candidates, predicted (C, 4), logits (C,), (C, K), their objects and places (C,) -> owner or -1."""
    G, C, K = len(gt_boxes), len(predicted), class_logits.shape[1]
    cost, chosen, owner = np.zeros((G, C)), np.zeros((G, C), dtype=bool), np.full(C, -1)
    for g in range(G):
        overlaps = [iou(gt_boxes[g], box) for box in predicted]
        for c in range(C):
            for k in range(K):
                q = math.sqrt(sigmoid(class_logits[c, k]) * sigmoid(obj_logits[c]))
                cost[g, c] -= math.log(q if k == gt_labels[g] else 1 - q)
            cost[g, c] -= weight * math.log(max(overlaps[c], 1e-8))
        count = max(1, int(sum(sorted(overlaps)[-topk:])))
        cheapest = sorted(range(C), key=lambda c: (cost[g, c], own[c] != g, c))
        chosen[g, cheapest[:count]] = True
    for c in range(C):
        claimants = {g for g in range(G) for d in range(C) if chosen[g, d] and places[d] == places[c]}
        if chosen[:, c].any():
            owner[c] = np.argmin(cost[:, c]) if len(claimants) > 1 else claimants.pop()
    return owner


def yolov7_matches(
    box_logits, obj_logits, class_logits, grids, strides, anchors, gt_boxes, gt_labels, gt_image, gt_ignore
):  # fmt: skip
    """As all_anchor_matches, of which each object takes those that are cheapest by the predictions."""
    matches, kept = all_anchor_matches(anchors, grids, strides, gt_boxes, gt_image, gt_ignore), {}
    has_area = [x1 < x2 and y1 < y2 for x1, y1, x2, y2 in gt_boxes]
    for b in range(len(box_logits)):
        mine = [i for i, match in enumerate(matches) if match[1] == b]
        rows = [n for n in range(len(gt_boxes)) if gt_image[n] == b and not gt_ignore[n] and has_area[n]]
        places = [matches[i][2] for i in mine]
        predicted = [
            decode_anchor(box_logits[b, place], anchors[level][a], y, x, strides[level])
            for _, _, place, level, a, y, x in (matches[i] for i in mine)
        ]
        own, logits = [rows.index(matches[i][0]) for i in mine], (obj_logits[b, places], class_logits[b, places])
        owners = simota(predicted, *logits, own, places, gt_boxes[rows], gt_labels[rows])
        kept |= {i: (rows[owner], *matches[i][1:]) for i, owner in zip(mine, owners) if owner >= 0}
    return [kept[i] for i in sorted(kept)]


def anchor_terms(
    box_logits, obj_logits, class_logits, grids, strides, anchors, gt_boxes, gt_labels, gt_image, gt_ignore,
    gt_scores=None, *, matches, gains=(0.05, 1.0, 0.5), balance=(4.0, 1.0, 0.4),
):  # fmt: skip
    """(B, A, 4), (B, A), (B, A, K), matches -> terms box, obj, cls; matches as a list of (row, image, location)."""
    B, _, K = class_logits.shape
    box = obj = cls = 0.0
    start = 0
    for level, ((h, w), stride) in enumerate(zip(grids, strides)):
        count = len(anchors[level]) * h * w
        target = np.zeros((B, count))
        box_terms, cls_terms = [], []
        for n, b, location, _, a, y, x in (match for match in matches if match[3] == level):
            predicted = decode_anchor(box_logits[b, location], anchors[level][a], y, x, stride)
            value = ciou([side / stride for side in predicted], gt_boxes[n] / stride)
            box_terms.append(1 - value)
            target[b, location - start] = max(value, 0.0)
            logits = class_logits[b, location]
            shares = np.arange(K) == gt_labels[n] if gt_scores is None else gt_scores[n]
            cls_terms += [cross_entropy(logits[k], float(shares[k])) for k in range(K)]
        taken = {(b, location) for _, b, location, *_ in matches}
        total = 0.0
        for b in range(B):
            for i in range(count):
                x, y = (i % w + 0.5) * stride, (i // w % h + 0.5) * stride
                rows = [n for n in range(len(gt_boxes)) if gt_image[n] == b and gt_ignore[n]]
                if (b, start + i) in taken or not any(contains(gt_boxes[n], x, y) for n in rows):
                    total += cross_entropy(obj_logits[b, start + i], target[b, i])
        obj += balance[level] * total / (B * count)
        box += np.mean(box_terms) if box_terms else 0.0
        cls += np.mean(cls_terms) if cls_terms else 0.0
        start += count
    return dict(zip(("box", "obj", "cls"), np.multiply(gains, (box, obj, cls)))), [match[:3] for match in matches]


def yolov5(*inputs, **options):
    """anchor_terms of all matches; inputs as there."""
    grids, strides, anchors, gt_boxes, _, gt_image, gt_ignore = inputs[3:10]
    matches = all_anchor_matches(anchors, grids, strides, gt_boxes, gt_image, gt_ignore)
    return anchor_terms(*inputs, matches=matches, **options)


def yolov7(*inputs, **options):
    """anchor_terms of yolov7_matches; inputs as there."""
    return anchor_terms(*inputs, matches=yolov7_matches(*inputs[:10]), **options)


# ---------------------------------------------------------------------------------------------- scenes to compare on


def random_objects(rng, num_images, count, size, num_classes, ignored=0.0):
    """Boxes (N, 4) inside 0..size, labels, image rows, ignore flags; images in any order, sides from 3 pixels."""
    sides = rng.uniform(3, 0.7 * size, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (size - sides)
    boxes = np.concatenate((corner, corner + sides), axis=1)
    return (
        boxes,
        rng.integers(num_classes, size=count),
        rng.integers(num_images, size=count),
        rng.random(count) < ignored,
    )
