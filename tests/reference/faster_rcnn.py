"""Faster R-CNN's mathematics one box at a time, in plain float64 numbers."""

import math

import numpy as np

from tests.reference.boxes import iou

BETA = 1 / 9


def encode(box, reference, weights):
    """Center shifts in units of the reference's size, and log-ratios of the sizes, each times its weight."""
    (x, y, w, h), (rx, ry, rw, rh) = center_form(box), center_form(reference)
    return [
        weights[0] * (x - rx) / rw,
        weights[1] * (y - ry) / rh,
        weights[2] * math.log(w / rw),
        weights[3] * math.log(h / rh),
    ]


def decode(delta, reference, weights):
    rx, ry, rw, rh = center_form(reference)
    x, y = rx + delta[0] / weights[0] * rw, ry + delta[1] / weights[1] * rh
    w = rw * math.exp(min(delta[2] / weights[2], math.log(62.5)))
    h = rh * math.exp(min(delta[3] / weights[3], math.log(62.5)))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def center_form(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]


def clip(box, height, width):
    return [min(max(c, 0.0), limit) for c, limit in zip(box, (width, height, width, height))]


def match(boxes, objects, ignored, positive_iou, negative_iou, every_object):
    """Row of the object, -1 background, -2 neither; by the rules of frcnn/matching.py, box by box."""
    overlaps = [[iou(box, o) for o in objects] for box in boxes]
    highest = [max((row[g] for row in overlaps), default=0.0) for g in range(len(objects))]
    matched = []
    for box, row in zip(boxes, overlaps):
        best = int(np.argmax(row)) if row else -1
        value = row[best] if row else 0.0
        is_best_of_some = every_object and any(row[g] == highest[g] and highest[g] > 0 for g in range(len(objects)))
        if row and (value >= positive_iou or is_best_of_some):
            matched.append(best)
        elif value >= negative_iou or any(covered(box, region) for region in ignored):
            matched.append(-2)
        else:
            matched.append(-1)
    return matched


def covered(box, region):
    """At least half of the box lies in the region, and some of it does."""
    width = min(box[2], region[2]) - max(box[0], region[0])
    height = min(box[3], region[3]) - max(box[1], region[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return width > 0 and height > 0 and width * height >= 0.5 * area


def smooth_l1(deltas, targets):
    total = 0.0
    for d in np.abs(np.asarray(deltas) - np.asarray(targets)).ravel():
        total += d * d / (2 * BETA) if d < BETA else d - BETA / 2
    return total


def binary_cross_entropy(logits, labels):
    return sum(np.logaddexp(0, z) - y * z for z, y in zip(logits, labels))


def cross_entropy(logits, labels):
    return sum(np.logaddexp.reduce(z) - z[y] for z, y in zip(logits, labels))


def suppress(boxes, scores, groups, threshold, limit):
    """Greedy NMS within groups: the rows that survive, best first (the first of equals), at most `limit`."""
    order = sorted(range(len(boxes)), key=lambda row: (-scores[row], row))
    kept = []
    for row in order:
        same = [k for k in kept if groups[k] == groups[row]]
        if all(iou(boxes[row], boxes[k], 0.0) <= threshold for k in same):
            kept.append(row)
    return kept[:limit]


def proposals(logits, deltas, anchors, counts, height, width, candidates, limit, min_score):
    """One image's: the best of each level, decoded, clipped, freed of slivers and low scores, suppressed by level."""
    boxes, scores, groups = [], [], []
    start = 0
    for level, count in enumerate(counts):
        rows = sorted(range(start, start + count), key=lambda row: -logits[row])[:candidates]
        for row in rows:
            box = clip(decode(deltas[row], anchors[row], (1, 1, 1, 1)), height, width)
            score = 1 / (1 + math.exp(-logits[row]))
            if box[2] - box[0] >= 1e-3 and box[3] - box[1] >= 1e-3 and score >= min_score:
                boxes.append(box)
                scores.append(logits[row])
                groups.append(level)
        start += count
    return [boxes[row] for row in suppress(boxes, scores, groups, 0.7, limit)]


def detections(class_logits, box_deltas, boxes, height, width, score_threshold, iou_threshold, limit):
    """One image's: (box, score, label) of every pair above the threshold that survives its own class."""
    found = []
    for logits, deltas, box in zip(class_logits, box_deltas, boxes):
        prob = np.exp(logits - np.logaddexp.reduce(logits))
        for k in range(1, len(prob)):
            decoded = clip(decode(deltas[k], box, (10, 10, 5, 5)), height, width)
            if prob[k] > score_threshold and min(decoded[2] - decoded[0], decoded[3] - decoded[1]) >= 1e-2:
                found.append((decoded, prob[k], k - 1))
    columns = list(zip(*found)) or [(), (), ()]
    return [found[row] for row in suppress(*columns, iou_threshold, limit)]
