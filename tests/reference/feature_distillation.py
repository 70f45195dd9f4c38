"""Feature, mask and relation losses in float64 numpy, term by term; imports neither torch nor the project."""

import numpy as np


def cosine_distance(s_map, t_map):
    total = pixels = 0
    for b, y, x in np.ndindex(s_map.shape[0], *s_map.shape[2:]):
        s, t = s_map[b, :, y, x], t_map[b, :, y, x]
        cosine = s @ t / np.sqrt((s @ s) * (t @ t)) if s.any() and t.any() else float(not s.any() and not t.any())
        total, pixels = total + 1 - cosine, pixels + 1
    return total / max(pixels, 1)


def channel_correlation(s_map, t_map):
    total = 0.0
    for c in range(s_map.shape[1]):
        s, t = s_map[:, c].ravel(), t_map[:, c].ravel()
        s_varies, t_varies = (len(v) > 0 and v.std() > 1e-5 * np.sqrt(np.mean(v**2)) for v in (s, t))
        if s_varies and t_varies:
            total += 1 - np.corrcoef(s, t)[0, 1]
        elif s_varies or t_varies:
            total += 0.5
    return total / max(s_map.shape[1], 1)


def attention_transfer(s_map, t_map, power=2.0):
    total = 0.0
    for s, t in zip(s_map, t_map):
        a_s, a_t = (np.sum(np.abs(m) ** power, axis=0).ravel() for m in (s, t))
        if len(a_s):
            total += 1 - a_s @ a_t / np.sqrt((a_s @ a_s) * (a_t @ a_t))
    return total / max(len(s_map), 1)


def score_weighted_l2(s_map, t_map, weight):
    total = weights = 0.0
    for b, y, x in np.ndindex(*weight.shape):
        total += weight[b, y, x] * np.sum((s_map[b, :, y, x] - t_map[b, :, y, x]) ** 2)
        weights += weight[b, y, x]
    return total / (s_map.shape[1] * weights + 1e-9)


def masked_mse(s_map, t_map, mask):
    total = marked = 0.0
    for b, y, x in np.ndindex(s_map.shape[0], *s_map.shape[2:]):
        total += mask[b, 0, y, x] * np.sum((s_map[b, :, y, x] - t_map[b, :, y, x]) ** 2)
        marked += mask[b, 0, y, x]
    return total / (2 * max(marked, 1))


def decoupled_mse(s_map, t_map, foreground, foreground_weight=1.0, background_weight=4.0):
    loss = 0.0
    for weight, region in ((foreground_weight, foreground.astype(float)), (background_weight, 1.0 - foreground)):
        elements = total = 0.0
        for b, c, y, x in np.ndindex(*s_map.shape):
            elements += region[b, 0, y, x]
            total += region[b, 0, y, x] * (s_map[b, c, y, x] - t_map[b, c, y, x]) ** 2
        loss += weight * total / (2 * max(elements, 1))
    return loss


def softmax(z):
    return np.exp(z - np.logaddexp.reduce(z))


def attentions(image_map, temperature):
    """(C, H, W) -> A^S (H, W), A^C (C,)."""
    c, h, w = image_map.shape
    spatial = softmax(np.mean(np.abs(image_map), axis=0).ravel() / temperature).reshape(h, w) * h * w
    return spatial, softmax(np.mean(np.abs(image_map), axis=(1, 2)) / temperature) * c


def fgd_focal(s_map, t_map, foreground, temperature=0.5, foreground_weight=1e-3, background_weight=5e-4):
    total = 0.0
    for b in range(len(s_map)):
        if s_map[b].size == 0:
            continue
        spatial, channel = attentions(t_map[b], temperature)
        background = np.count_nonzero(foreground[b, 0] == 0)
        for c, y, x in np.ndindex(*s_map.shape[1:]):
            near = foreground[b, 0, y, x]
            weight = foreground_weight * near if near > 0 else background_weight / background
            total += weight * spatial[y, x] * channel[c] * (t_map[b, c, y, x] - s_map[b, c, y, x]) ** 2
    return total / max(len(s_map), 1)


def fgd_attention(s_map, t_map, temperature=0.5):
    total = 0.0
    for s, t in zip(s_map, t_map):
        if s.size:
            total += sum(
                np.sum(np.abs(a_t - a_s)) for a_s, a_t in zip(attentions(s, temperature), attentions(t, temperature))
            )
    return total / max(len(s_map), 1)


def global_context(feature_map, key, key_bias, first, first_bias, norm, norm_bias, second, second_bias, eps=1e-5):
    """R(f) of every image; key (C,), first (D, C), norm and norm_bias (D,), second (C, D)."""
    out = np.empty_like(feature_map)
    for b, image_map in enumerate(feature_map):
        pixels = image_map.reshape(len(image_map), -1)  # (C, HW)
        context = pixels @ softmax(key @ pixels + key_bias)
        hidden = first @ context + first_bias
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + eps) * norm + norm_bias
        out[b] = image_map + (second @ np.maximum(hidden, 0) + second_bias)[:, None, None]
    return out


def fgd_global(s_map, t_map, s_context, t_context):
    return np.sum((t_context(t_map) - s_context(s_map)) ** 2) / max(len(s_map), 1)


def convolve3x3(image_map, weight, bias):
    """(C, H, W), (D, C, 3, 3), (D,) -> (D, H, W), zeros around."""
    _, h, w = image_map.shape
    padded = np.pad(image_map, ((0, 0), (1, 1), (1, 1)))
    out = np.empty((len(weight), h, w))
    for d, y, x in np.ndindex(*out.shape):
        out[d, y, x] = np.sum(weight[d] * padded[:, y : y + 3, x : x + 3]) + bias[d]
    return out


def masked_generation(s_map, t_map, keep, generate):
    """generate: (C, H, W) -> (C, H, W)."""
    total = sum(np.sum((t - generate(s * m)) ** 2) for s, t, m in zip(s_map, t_map, keep) if s.size)
    return total / max(len(s_map), 1)


def location_similarity(s_map, t_map, nodes=16):
    def cosines(image_map):
        _, h, w = image_map.shape
        rows, columns = min(h, nodes), min(w, nodes)
        vectors = []
        for i, j in np.ndindex(rows, columns):  # a cell reaches from floor of its start to ceil of its end
            y0, y1 = i * h // rows, -(-(i + 1) * h // rows)
            x0, x1 = j * w // columns, -(-(j + 1) * w // columns)
            vectors.append(image_map[:, y0:y1, x0:x1].mean((1, 2)))
        return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in vectors] for a in vectors])

    values = [np.mean((cosines(s) - cosines(t)) ** 2) for s, t in zip(s_map, t_map) if s.size]
    return np.mean(values) if values else 0.0


def instance_distance(s_features, t_features, image):
    pairs = [(i, j) for i in range(len(image)) for j in range(i) if image[i] == image[j]]
    distances = []
    for features in (s_features, t_features):
        d = np.array([np.sqrt(np.sum((features[i] - features[j]) ** 2)) for i, j in pairs])
        distances.append(d / d.mean() if d.any() else d)
    x = np.abs(distances[0] - distances[1])
    return np.sum(np.where(x < 1, x**2 / 2, x - 0.5)) / max(len(pairs), 1)


def pool_boxes(feature_map, boxes, image, image_size, size):
    _, c, h, w = feature_map.shape
    out = np.empty((len(boxes), c, size, size))
    for n, i, j in np.ndindex(len(boxes), size, size):
        x1, y1, x2, y2 = boxes[n]
        x = np.clip((x1 + (x2 - x1) * (j + 0.5) / size) * w / image_size[1] - 0.5, 0, w - 1)
        y = np.clip((y1 + (y2 - y1) * (i + 0.5) / size) * h / image_size[0] - 0.5, 0, h - 1)
        value = np.zeros(c)
        for v, u in np.ndindex(h, w):  # a tent of width 1 around every pixel
            value += max(0, 1 - abs(v - y)) * max(0, 1 - abs(u - x)) * feature_map[image[n], :, v, u]
        out[n, :, i, j] = value
    return out


def box_pixels(box, grid_size, image_size):
    """Pixels (H, W) bool of one box, clipped to the image."""
    (h, w), (height, width) = grid_size, image_size
    x1, x2 = np.clip(box[[0, 2]], 0, width)
    y1, y2 = np.clip(box[[1, 3]], 0, height)
    if x2 <= x1 or y2 <= y1:
        return np.zeros(grid_size, bool)
    columns = [x for x in range(w) if x1 <= (x + 0.5) * width / w < x2] or [int((x1 + x2) / 2 * w / width)]
    rows = [y for y in range(h) if y1 <= (y + 0.5) * height / h < y2] or [int((y1 + y2) / 2 * h / height)]
    inside = np.zeros(grid_size, bool)
    inside[np.ix_(rows, columns)] = True
    return inside


def box_mask(boxes, image, ignore, batch_size, grid_size, image_size):
    out = np.zeros((batch_size, 1, *grid_size), bool)
    for box, b, skip in zip(boxes, image, ignore):
        if not skip:
            out[b, 0] |= box_pixels(box, grid_size, image_size)
    return out


def box_density(boxes, image, ignore, batch_size, grid_size, image_size):
    out = np.zeros((batch_size, 1, *grid_size))
    for box, b, skip in zip(boxes, image, ignore):
        inside = box_pixels(box, grid_size, image_size)
        if not skip and inside.any():
            out[b, 0] = np.where(inside, np.maximum(out[b, 0], 1 / inside.sum()), out[b, 0])
    return out


def anchor_mask(boxes, image, ignore, batch_size, grid_size, image_size, anchor_sizes, psi=0.5):
    (h, w), (height, width) = grid_size, image_size
    out = np.zeros((batch_size, 1, h, w), bool)
    for (x1, y1, x2, y2), b, skip in zip(boxes, image, ignore):
        if skip or x2 <= x1 or y2 <= y1:
            continue
        iou = np.zeros((len(anchor_sizes), h, w))
        for a, y, x in np.ndindex(*iou.shape):
            aw, ah = anchor_sizes[a]
            cx, cy = (x + 0.5) * width / w, (y + 0.5) * height / h
            overlap_x = max(0, min(x2, cx + aw / 2) - max(x1, cx - aw / 2))
            overlap_y = max(0, min(y2, cy + ah / 2) - max(y1, cy - ah / 2))
            inter = overlap_x * overlap_y
            iou[a, y, x] = inter / (aw * ah + (x2 - x1) * (y2 - y1) - inter)
        out[b, 0] |= (iou > psi * iou.max()).any(0)
    return out
