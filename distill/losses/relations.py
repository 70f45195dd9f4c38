"""Relational distillation: not the features themselves, but how they relate to one another.

Two relations with published results on detectors: between the locations of a map (structured knowledge distillation,
tested on detection, segmentation and depth), and between the objects of an image (general instance distillation, which
takes RetinaNet R50 from 36.2 to 39.1 AP with all its terms). Neither needs equal widths: a relation of C_s-vectors is
compared with one of C_t-vectors. The correlation between the channels of two maps is features.channel_correlation.

Computed in float32 for half-precision inputs, in float64 for float64. The teacher is detached. A loss is 0 where there
is nothing to relate.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.features import as_map_pair, unit_vectors
from distill.losses.keywords import by_keyword
from layers.over_processes import joint_mean, sum_over_processes
from layers.precision import compute_dtype


@by_keyword
def location_similarity(*, s_map: Tensor, t_map: Tensor, nodes: int = 16) -> Tensor:
    """Pairwise similarity of the locations of each image (SKD).

    Liu et al., "Structured Knowledge Distillation for Dense Prediction", arXiv:1903.04197, pair-wise distillation.

        L = 1 / (B P^2) * sum_b sum_{ij} (a^s_bij - a^t_bij)^2,    a_ij = cos(f_i, f_j)

    f_i are the P nodes of a map: the averages of its pixels over a grid of at most nodes x nodes cells. Every node is
    related to every other. Invariant to the length of the feature vectors, and to any rotation of the channels. Costs
    P^2 cosines per image: 65 536 at the default.

    Args:
        s_map (B, C_s, H, W), t_map (B, C_t, H, W).
        nodes: side of the grid; a map with fewer rows or columns keeps its own.
    Returns:
        scalar (). A node of zeros has similarity 0 with all.
    """
    s_map, t_map = as_map_pair(s_map, t_map, same_width=False)
    if s_map.numel() == 0 or t_map.numel() == 0:
        return joint_mean(s_map.sum(), 0)
    grid = (min(s_map.shape[2], nodes), min(s_map.shape[3], nodes))
    with torch.autocast(s_map.device.type, enabled=False):
        s_cosines, t_cosines = (node_cosines(F.adaptive_avg_pool2d(m, grid)) for m in (s_map, t_map))  # (B, P, P)
        return joint_mean((s_cosines - t_cosines).square().mean(), len(s_map))


@by_keyword
def instance_distance(*, s_features: Tensor, t_features: Tensor, image: Tensor) -> Tensor:
    """Pairwise distances between the objects of an image, each in units of the mean distance (GID).

    Dai et al., "General Instance Distillation for Object Detection", arXiv:2103.02340, the relation-based term, after
    the distance-wise loss of Park et al., "Relational Knowledge Distillation", arXiv:1904.05068.

        L = 1 / |X| * sum_{(i,j) in X} h(d^s_ij / m^s - d^t_ij / m^t)
        d_ij = |f_i - f_j|,    m = 1 / |X| sum_X d_ij,    h(x) = x^2 / 2 for |x| < 1, else |x| - 1/2

    X holds the pairs of two rows of the same image. Invariant to the scale, shift and rotation of the features.

    Args:
        s_features (N, ...), t_features (N, ...): each model's features of N boxes, from pool_boxes. Flattened here.
        image: (N,) int64, the image of the batch that each row belongs to.
    Returns:
        scalar (); 0 where no image has two rows.
    Differs from the papers: the mean over pairs, not the sum; rows of different images are not related; the caller
    chooses the boxes, usually the labelled ones (GID selects those where teacher and student disagree most).
    """
    if len(s_features) != len(t_features) or image.shape != (len(s_features),):
        raise ValueError(f"{len(s_features)} student rows, {len(t_features)} teacher rows, image {tuple(image.shape)}")
    dtype = compute_dtype(s_features)
    related = (image[:, None] == image[None, :]).triu(1)  # every pair once; (N, N)
    count = sum_over_processes(related.sum()).clamp(min=1)
    with torch.autocast(s_features.device.type, enabled=False):
        scaled = []
        for features in (s_features, t_features.detach()):
            distances = distance_matrix(features.to(dtype).flatten(1), image) * related  # (N, N)
            total = sum_over_processes(distances.sum())
            scaled.append(distances * (count / torch.where(total > 0, total, 1)))
        s_scaled, t_scaled = scaled
        return sum_over_processes(F.smooth_l1_loss(s_scaled, t_scaled, reduction="sum")) / count


def pool_boxes(
    feature_map: Tensor, *, boxes_xyxy: Tensor, image: Tensor, image_size: tuple[int, int], size: int = 7
) -> Tensor:
    """The features of a map inside boxes, on a grid of size x size points per box: (N, C, size, size).

    RoIAlign (Mask R-CNN, arXiv:1703.06870) with one bilinear sample at the center of each cell. A sample beyond the
    centers of the border pixels takes the value of the border pixel.

    Args:
        feature_map: (B, C, H, W). Gradient flows.
        boxes_xyxy: (N, 4), pixels of the image.
        image: (N,) int64, the image of the batch that each box is in.
        image_size: (height, width) of the batch's images in pixels.
    """
    (_, c, h, w), (height, width) = feature_map.shape, image_size
    boxes = boxes_xyxy.detach().to(compute_dtype(feature_map))
    step = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size  # (size,)
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * step  # (N, size), pixels of the image
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * step
    x = (x * (w / width) - 0.5).clamp(0, w - 1)  # in units of the map, where the center of pixel 0 is 0
    y = (y * (h / height) - 0.5).clamp(0, h - 1)
    x0, y0 = x.floor().long(), y.floor().long()
    x1, y1 = (x0 + 1).clamp(max=w - 1), (y0 + 1).clamp(max=h - 1)
    right, down = (x - x0)[:, None, :], (y - y0)[:, :, None]  # (N, 1, size), (N, size, 1)
    rows = feature_map.permute(0, 2, 3, 1).reshape(-1, c).to(boxes.dtype)  # (B*H*W, C)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return (image[:, None, None] * h + row[:, :, None]) * w + column[:, None, :]  # (N, size, size)

    index = torch.stack([at(y0, x0), at(y0, x1), at(y1, x0), at(y1, x1)], dim=-1)  # (N, size, size, 4)
    corners = [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]
    weight = torch.stack(corners, dim=-1)
    # One sparse weighted sum: neither it nor its gradient makes four copies of the features.
    pooled = F.embedding_bag(index.flatten(0, 2), rows, mode="sum", per_sample_weights=weight.flatten(0, 2))
    return pooled.view(len(boxes), size, size, c).permute(0, 3, 1, 2)


def node_cosines(nodes: Tensor) -> Tensor:
    """(B, C, h, w) -> cosines of all pairs of locations (B, P, P), P = h * w."""
    units = unit_vectors(nodes, dim=1).flatten(2)  # (B, C, P)
    return units.transpose(1, 2) @ units


def distance_matrix(rows: Tensor, image: Tensor) -> Tensor:
    """(N, D) -> Euclidean distances (N, N) of the rows of each image, 0 elsewhere, with gradient 0 between equal rows.

    Computed from products, |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, which is ten times as fast as from differences. The mean
    is subtracted first, so that a large common offset does not cost digits. What rounding leaves of equal rows is set
    to 0.
    """
    if len(rows) == 0:
        return rows @ rows.T
    distances = rows.new_zeros(len(rows), len(rows))
    for number in image.unique().tolist():
        (own,) = (image == number).nonzero(as_tuple=True)
        centred = rows[own] - rows[own].detach().mean(0)
        products = centred @ centred.T
        length = products.diagonal()
        square = length[:, None] + length - 2 * products
        differ = square > 64 * torch.finfo(rows.dtype).eps * (length[:, None] + length)
        block = torch.where(differ, square, 1).sqrt() * differ
        distances = distances.index_put((own[:, None], own), block)
    return distances
