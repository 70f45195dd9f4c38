"""Losses of logits, edges and box classes in float64 numpy, term by term; imports neither torch nor the project."""

import numpy as np


def log_softmax(z):
    return z - np.logaddexp.reduce(z)


def kl(log_p, log_q):
    """KL(p || q) of two distributions given by their logarithms."""
    return np.sum(np.exp(log_p) * (log_p - log_q))


def log_pair(z):
    """Logarithms of sigmoid(z) and 1 - sigmoid(z)."""
    return np.array([-np.logaddexp(0, -z), -np.logaddexp(0, z)])


def sigmoid(z):
    return np.exp(log_pair(z)[0])


def mean_of(values, weight):
    weight = [1.0] * len(values) if weight is None else weight
    return sum(w * v for w, v in zip(weight, values)) / max(sum(weight), 1.0)


def softmax_kl(s_logits, t_logits, weight=None, temperature=1.0):
    columns = s_logits.shape[-1]
    pairs = zip(s_logits.reshape(-1, columns), t_logits.reshape(-1, columns))
    rows = [kl(log_softmax(t / temperature), log_softmax(s / temperature)) for s, t in pairs]
    return temperature**2 * mean_of(rows, None if weight is None else weight.ravel())


def decoupled_kl(s_logits, t_logits, labels, weight=None, target_weight=1.0, other_weight=0.25, temperature=1.0):
    rows = []
    for s, t, label in zip(s_logits / temperature, t_logits / temperature, labels):
        rest = [k for k in range(len(s)) if k != label]
        if not rest:
            rows.append(0.0)
            continue
        binary = [
            np.array([z[label], np.logaddexp.reduce(z[rest])]) - np.logaddexp.reduce(z)  # log p_y, log(1 - p_y)
            for z in (t, s)
        ]
        rows.append(target_weight * kl(*binary) + other_weight * kl(log_softmax(t[rest]), log_softmax(s[rest])))
    return temperature**2 * mean_of(rows, weight)


def correlation_distance(s, t):
    """1 - Pearson's r; 1/2 where only one varies, 0 where none does."""
    s_varies, t_varies = (len(v) > 0 and v.std() > 1e-5 * np.sqrt(np.mean(v**2)) for v in (s, t))
    if s_varies and t_varies:
        a, b = (s - s.mean()) / s.std(), (t - t.mean()) / t.std()
        return 1 - np.mean(a * b)
    return 0.5 if s_varies or t_varies else 0.0


def probability_correlation(s_prob, t_prob):
    return sum(correlation_distance(s, t) for s, t in zip(s_prob, t_prob)) / max(len(s_prob), 1)


def prediction_correlation(s_logits, t_logits, class_weight=1.0, sample_weight=1.0, temperature=1.0):
    if s_logits.size == 0:
        return 0.0
    s, t = (np.exp(np.array([log_softmax(row / temperature) for row in z])) for z in (s_logits, t_logits))
    over_classes, over_samples = probability_correlation(s, t), probability_correlation(s.T, t.T)
    return temperature**2 * (class_weight * over_classes + sample_weight * over_samples)


def quality_focal(s_logits, t_logits, beta=1.0, weight=None, normaliser=None):
    columns = s_logits.shape[-1]
    total = expected = 0.0
    weights = np.ones(s_logits.shape[:-1]).ravel() if weight is None else weight.ravel()
    for s_row, t_row, w in zip(s_logits.reshape(-1, columns), t_logits.reshape(-1, columns), weights):
        for s, t in zip(s_row, t_row):
            cross_entropy = -np.sum(np.exp(log_pair(t)) * log_pair(s))
            total += w * abs(sigmoid(s) - sigmoid(t)) ** beta * cross_entropy
        expected += sigmoid(t_row.max())
    return total / max(expected if normaliser is None else float(normaliser), 1.0)


def objectness_scaled(
    s_box_logits, t_box_logits, s_objectness_logits, t_objectness_logits, s_class_logits, t_class_logits,
    objectness_weight=1.0, class_weight=1.0, box_weight=1.0,
):  # fmt: skip
    objectness = scaled = expected = 0.0
    for n in np.ndindex(*s_objectness_logits.shape):
        objectness += kl(log_pair(t_objectness_logits[n]), log_pair(s_objectness_logits[n]))
        classes = sum(kl(log_pair(t), log_pair(s)) for s, t in zip(s_class_logits[n], t_class_logits[n]))
        box = np.sum((2 * sigmoid(t_box_logits[n]) - 2 * sigmoid(s_box_logits[n])) ** 2)
        o = sigmoid(t_objectness_logits[n])
        scaled += o * (class_weight * classes + box_weight * box)
        expected += o
    return objectness_weight * objectness / max(s_objectness_logits.size, 1) + scaled / max(expected, 1.0)


def localization_kl(s_logits, t_logits, weight, normaliser=None, temperature=10.0):
    total = 0.0
    for n in np.ndindex(*weight.shape):
        for s, t in zip(s_logits[n], t_logits[n]):  # the four edges
            total += weight[n] / 4 * kl(log_softmax(t / temperature), log_softmax(s / temperature))
    return temperature**2 * total / max(weight.sum() if normaliser is None else float(normaliser), 1.0)


def diou(a, b):
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = lambda c: max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0)
    union = area(a) + area(b) - width * height
    apart = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    diagonal = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    return (width * height / union if union else 0.0) - (apart / diagonal if diagonal else 0.0)


def valuable_region(boxes_xyxy, gt_index, gt_boxes, gt_image, is_ignored=None, gamma=0.25):
    region = np.zeros(gt_index.shape, dtype=bool)
    for g, (gt, image) in enumerate(zip(gt_boxes, gt_image)):
        overlaps = [diou(box, gt) for box in boxes_xyxy[image]]
        positives = [x for x, index in zip(overlaps, gt_index[image]) if index == g]
        if not positives:
            continue
        least = gamma * max(0.0, float(np.mean(positives)))
        for a, x in enumerate(overlaps):
            if x > 0 and x >= least and gt_index[image, a] < 0:
                region[image, a] = is_ignored is None or not is_ignored[image, a]
    return region


def log_odds(logits, head):
    """(N, K) of a sigmoid head, (N, 1 + K) of a softmax head with the background first -> (N, K)."""
    if head == "sigmoid":
        return logits
    out = np.zeros((len(logits), logits.shape[1] - 1))
    for n, row in enumerate(logits):
        for k in range(1, len(row)):
            out[n, k - 1] = row[k] - np.logaddexp.reduce(np.delete(row, k))
    return out


def box_class_kl(
    s_logits, t_logits, s_head="sigmoid", t_head="sigmoid", classes=None, weight=None, temperature=1.0
):  # fmt: skip
    s_odds, t_odds = log_odds(s_logits, s_head) / temperature, log_odds(t_logits, t_head) / temperature
    columns = [(k, k) for k in range(s_odds.shape[1])] if classes is None else list(zip(*(c.tolist() for c in classes)))
    rows = [sum(kl(log_pair(t[j]), log_pair(s[i])) for i, j in columns) for s, t in zip(s_odds, t_odds)]
    return temperature**2 * mean_of(rows, weight)


def like_teacher(s_map, t_map):
    """Each channel of (B, C, H, W) at the teacher's mean and standard deviation over B, H and W."""
    out = np.empty_like(s_map)
    for c in range(s_map.shape[1] if s_map.size else 0):
        s, t = s_map[:, c], t_map[:, c]
        varies = s.std() > 1e-5 * np.sqrt(np.mean(s**2))
        out[:, c] = (s - s.mean()) / s.std() * t.std() + t.mean() if varies else t.mean()
    return out


def tail(feature_map, weight3, bias3, weight1, bias1):
    """3x3 convolution with zeros around, SiLU, 1x1 convolution: (B, C, H, W) -> (B, C_out, H, W)."""
    b, _, h, w = feature_map.shape
    padded = np.pad(feature_map, ((0, 0), (0, 0), (1, 1), (1, 1)))
    hidden = np.empty((b, len(weight3), h, w))
    for i, d, y, x in np.ndindex(*hidden.shape):
        z = np.sum(weight3[d] * padded[i, :, y : y + 3, x : x + 3]) + bias3[d]
        hidden[i, d, y, x] = z * sigmoid(z)
    return np.einsum("dc,bchw->bdhw", weight1, hidden) + bias1[None, :, None, None]


def rows_of(feature_map):
    """(B, C, H, W) -> (B * H * W, C), image by image, row by row."""
    b, c, h, w = feature_map.shape
    return np.array([feature_map[i, :, y, x] for i, y, x in np.ndindex(b, h, w)]).reshape(b * h * w, c)


def crosskd_classes(s_map, t_map, t_tail, normaliser=None, beta=1.0, rescale=True):
    """t_tail: (B, C, H, W) -> (B, K, H, W)."""
    cross = t_tail(like_teacher(s_map, t_map) if rescale else s_map)
    return quality_focal(rows_of(cross), rows_of(t_tail(t_map)), beta=beta, normaliser=normaliser)


def crosskd_edges(s_map, t_map, t_tail, weight, normaliser=None, temperature=1.0, rescale=True):
    """t_tail: (B, C, H, W) -> (B, 4 R, H, W)."""
    cross = rows_of(t_tail(like_teacher(s_map, t_map) if rescale else s_map))
    own = rows_of(t_tail(t_map))
    bins = cross.shape[1] // 4
    cross, own = cross.reshape(len(cross), 4, bins), own.reshape(len(own), 4, bins)
    return localization_kl(cross, own, weight.ravel(), normaliser, temperature)
