"""Detection metrics by loops over one box at a time, in plain Python: slow, and sharing no code with metrics/.

A ground truth or detection is a dict: image, label, box (x1, y1, x2, y2); ground truth has crowd and difficult,
detections a score. Lists are in the order that breaks ties.
"""


def overlap(detection, truth, pixel=0.0):
    """IoU with widths x2 - x1 + pixel; intersection over the detection's area for a crowd."""
    a, b = detection["box"], truth["box"]
    width = min(a[2], b[2]) - max(a[0], b[0]) + pixel
    height = min(a[3], b[3]) - max(a[1], b[1]) + pixel
    if width <= 0 or height <= 0:
        return 0.0
    area = (a[2] - a[0] + pixel) * (a[3] - a[1] + pixel)
    other = (b[2] - b[0] + pixel) * (b[3] - b[1] + pixel)
    return width * height / (area if truth["crowd"] else area + other - width * height)


def by_score(detections):
    return sorted(detections, key=lambda d: (-d["score"], d["image"]))


def voc_outcomes(truths, detections, threshold, pixel=0.0):
    """One of "true", "false", "ignored" for each detection of ONE class, best first, with the number of objects."""
    outcomes, found = [], set()
    for detection in by_score(detections):
        best, best_overlap, in_crowd = None, 0.0, 0.0
        for row, truth in enumerate(truths):
            if truth["image"] != detection["image"]:
                continue
            value = overlap(detection, truth, pixel)
            if truth["crowd"]:
                in_crowd = max(in_crowd, value)
            elif value > best_overlap:
                best, best_overlap = row, value
        if best_overlap >= threshold:
            if truths[best]["difficult"]:
                outcomes.append("ignored")
            else:
                outcomes.append("false" if best in found else "true")
                found.add(best)
        else:
            outcomes.append("ignored" if in_crowd >= threshold else "false")
    return outcomes, sum(not (t["difficult"] or t["crowd"]) for t in truths)


def voc_ap(truths, detections, threshold, style, pixel=0.0):
    """AP of one class; None where there is nothing to measure."""
    outcomes, num_objects = voc_outcomes(truths, detections, threshold, pixel)
    if not num_objects:
        return None
    points, true, false = [], 0, 0
    for outcome in outcomes:
        true += outcome == "true"
        false += outcome == "false"
        if outcome != "ignored":
            points.append((true / num_objects, true / (true + false)))
    if style == "voc07":
        steps = [k * 0.1 for k in range(11)]
        return sum(max([p for r, p in points if r >= step], default=0.0) for step in steps) / 11
    area, before = 0.0, 0.0
    for r in sorted({r for r, _ in points}):
        area += (r - before) * max(p for other, p in points if other >= r)
        before = r
    return area


def greedy_outcomes(truths, detections, threshold):
    """COCO's rule for ONE class at one threshold, all areas; (score, outcome) for each detection, best first."""
    outcomes, used = [], set()
    for detection in by_score(detections):
        best, best_key = None, None
        for row, truth in enumerate(truths):
            value = overlap(detection, truth) if truth["image"] == detection["image"] else 0.0
            if value < threshold or (row in used and not truth["crowd"]):
                continue
            key = (not truth["crowd"], value, row)
            if best is None or key > best_key:
                best, best_key = row, key
        if best is None:
            outcomes.append((detection["score"], "false"))
        else:
            used.add(best)
            outcomes.append((detection["score"], "ignored" if truths[best]["crowd"] else "true"))
    return outcomes


def precision_recall_f1(truths, detections, iou_threshold, score_threshold):
    """Of one class. None where there is no object."""
    num_objects = sum(not t["crowd"] for t in truths)
    if not num_objects:
        return None
    kept = [d for d in detections if d["score"] >= score_threshold]
    outcomes = [outcome for _, outcome in greedy_outcomes(truths, kept, iou_threshold)]
    true, false = outcomes.count("true"), outcomes.count("false")
    precision = true / (true + false) if true + false else 0.0
    recall = true / num_objects
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


def confusion(truths, detections, num_classes, iou_threshold, score_threshold):
    """[predicted][true] counts, the background last; pairs are taken one by one by falling IoU."""
    matrix = [[0] * (num_classes + 1) for _ in range(num_classes + 1)]
    kept = sorted((d for d in detections if d["score"] >= score_threshold), key=lambda d: -d["score"])
    objects = [t for t in truths if not t["crowd"]]
    pairs = []
    for i, detection in enumerate(kept):
        for j, truth in enumerate(objects):
            value = overlap(detection, truth) if detection["image"] == truth["image"] else 0.0
            if value >= iou_threshold and value > 0:
                pairs.append((-value, i, j))
    free_detections, free_objects = set(range(len(kept))), set(range(len(objects)))
    for _, i, j in sorted(pairs):
        if i in free_detections and j in free_objects:
            free_detections.remove(i)
            free_objects.remove(j)
            matrix[kept[i]["label"]][objects[j]["label"]] += 1
    for j in free_objects:
        matrix[num_classes][objects[j]["label"]] += 1
    for i in free_detections:
        detection = kept[i]
        crowds = [
            t for t in truths if t["crowd"] and (t["image"], t["label"]) == (detection["image"], detection["label"])
        ]
        if not any(overlap(detection, t) >= iou_threshold for t in crowds):
            matrix[detection["label"]][num_classes] += 1
    return matrix
