"""Where to imitate: masks (B, 1, H, W) over the grid of a map, from the objects of a batch or from a dense head.

`grid_size` is (H, W) of the map, `image_size` (height, width) of the batch's images in pixels; the center of pixel
(y, x) of the map lies at ((y + 1/2) * height / H, (x + 1/2) * width / W). Rows of Targets marked `ignore`, and boxes
without area, take no part: their pixels count as background, since imitation there claims nothing about a label.
Nothing here carries a gradient. No objects give a mask of zeros.

Fine-grained feature imitation (FGFI, Wang et al., arXiv:1906.03609) is defined by anchors: `anchor_mask`. For a head
without anchors there are two replacements, neither of them the published method: the locations that its own assigner
made positive (`positive_masks`), and the pixels inside the boxes (`box_mask`).
"""

import torch
from torch import Tensor

from boxes import box_area, clip_boxes
from structures import Targets


@torch.no_grad()
def box_mask(targets: Targets, *, batch_size: int, grid_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """True at pixels whose center lies in a box: (B, 1, H, W) bool.

    x1 <= center < x2, and the same in y. A box that holds no pixel center in x (or y) takes the column (or row) of
    pixels that its own center falls into, so that no object is lost on a coarse map. Boxes are clipped to the image.
    """
    inside, image = raster_boxes(targets, grid_size, image_size)  # (N, H, W)
    return max_over_objects(inside, image, batch_size) > 0


@torch.no_grad()
def box_density(
    targets: Targets, *, batch_size: int, grid_size: tuple[int, int], image_size: tuple[int, int]
) -> Tensor:
    """1 / area of the box that a pixel lies in, 0 outside all boxes: (B, 1, H, W) float32.

    The foreground scale of FGD (arXiv:2111.11837): every object weighs 1 in total, however large it is; where boxes
    overlap, the smaller one counts. The area is the number of pixels that box_mask gives the box.
    """
    inside, image = raster_boxes(targets, grid_size, image_size)  # (N, H, W)
    area = inside.sum((1, 2), keepdim=True).clamp(min=1)  # (N, 1, 1)
    return max_over_objects(inside / area, image, batch_size)


@torch.no_grad()
def anchor_mask(
    targets: Targets,
    *,
    batch_size: int,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    anchor_sizes: Tensor,
    psi: float = 0.5,
) -> Tensor:
    """True near objects, as FGFI publishes it (arXiv:1906.03609, sec. 3.1): (B, 1, H, W) bool.

        mask_p = OR_g [ max_a IoU(anchor_pa, g) > psi * max_{qa} IoU(anchor_qa, g) ]

    Each object g sets its own threshold, psi times the best overlap that any anchor of this map has with it, so that
    every object marks some pixels, whatever its size. psi = 0 marks every pixel with an overlapping anchor; psi = 1
    marks none.

    Args:
        anchor_sizes: (n, 2) width, height in pixels of the image, from a detector or from make_anchor_sizes. All n
            stand at the center of every pixel, also where they cross the border.
    """
    boxes, image = targets.boxes_xyxy.float(), targets.image
    x, y = pixel_centers(grid_size, image_size, boxes.device)  # (W,), (H,)
    best = boxes.new_zeros(len(boxes), *grid_size)  # (N, H, W), IoU with the best anchor of each pixel
    for width, height in anchor_sizes.tolist():
        overlap_x = overlap_1d(x, width, boxes[:, 0], boxes[:, 2])  # (N, W)
        overlap_y = overlap_1d(y, height, boxes[:, 1], boxes[:, 3])  # (N, H)
        intersection = overlap_y[:, :, None] * overlap_x[:, None, :]  # (N, H, W)
        union = width * height + box_area(boxes)[:, None, None] - intersection
        best = torch.maximum(best, intersection / union)
    threshold = psi * best.amax((1, 2), keepdim=True) if best.numel() else best
    marked = (best > threshold) & targets.is_learnt[:, None, None]
    return max_over_objects(marked, image, batch_size) > 0


def make_anchor_sizes(sizes: list[float], ratios: list[float]) -> Tensor:
    """Width and height of an anchor for each size (in pixels) and each ratio height / width: (n, 2).

    width * height = size^2. Ratios change fastest.
    """
    return torch.tensor([(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in ratios])


@torch.no_grad()
def positive_masks(
    is_positive: Tensor, *, grid_sizes: list[tuple[int, int]], anchors_per_pixel: int = 1
) -> list[Tensor]:
    """True at the locations that learn an object, one mask (B, 1, H, W) bool per level.

    is_positive: (B, A) bool, from the student's assigner, ordered as in level_maps. A pixel is True where any of its
    anchors is positive.
    """
    return [level.any(1, keepdim=True) for level in level_maps(is_positive, grid_sizes, anchors_per_pixel)]


@torch.no_grad()
def location_scores(t_class_logits: Tensor, t_objectness_logits: Tensor | None = None) -> Tensor:
    """A dense teacher's confidence that a location holds an object of its best class: (B, A, K) -> (B, A) float32.

        score_n = max_k sigmoid(class logit_nk),  times sigmoid(objectness logit_n) where the head has objectness

    t_objectness_logits: (B, A), of a head that has them (YOLOv5, YOLOv7). Its class logits assume that the location
    holds an object, and mean nothing on the background. K = 0 gives 0.
    """
    best = t_class_logits.float().amax(-1) if t_class_logits.shape[-1] else t_class_logits.new_full((1, 1), -torch.inf)
    scores = best.sigmoid().expand(t_class_logits.shape[:2])  # (B, A)
    return scores if t_objectness_logits is None else scores * t_objectness_logits.float().sigmoid()


@torch.no_grad()
def score_maps(
    t_class_logits: Tensor,
    *,
    grid_sizes: list[tuple[int, int]],
    anchors_per_pixel: int = 1,
    t_objectness_logits: Tensor | None = None,
) -> list[Tensor]:
    """location_scores as one map (B, H, W) per level; of several anchors of a pixel, the best one counts.

    t_class_logits: (B, A, K), t_objectness_logits: (B, A) or None, both ordered as in level_maps.
    """
    scores = location_scores(t_class_logits, t_objectness_logits)
    return [level.amax(1) for level in level_maps(scores, grid_sizes, anchors_per_pixel)]


def level_maps(values: Tensor, grid_sizes: list[tuple[int, int]], anchors_per_pixel: int = 1) -> list[Tensor]:
    """(B, A) -> (B, n, H, W) per level: location = start of the level + (anchor * H + y) * W + x.

    Raises ValueError where A is not the sum of n * H * W.
    """
    counts = [anchors_per_pixel * h * w for h, w in grid_sizes]
    if values.dim() != 2 or values.shape[1] != sum(counts):
        raise ValueError(f"values {tuple(values.shape)} must be (B, {sum(counts)}), the locations of {grid_sizes}")
    levels = values.split(counts, dim=1)
    return [level.unflatten(1, (anchors_per_pixel, h, w)) for level, (h, w) in zip(levels, grid_sizes)]


def pixel_centers(
    grid_size: tuple[int, int], image_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """x (W,) and y (H,) of the pixel centers of a map, in pixels of the image."""
    (h, w), (height, width) = grid_size, image_size
    x = (torch.arange(w, device=device) + 0.5) * (width / max(w, 1))
    return x, (torch.arange(h, device=device) + 0.5) * (height / max(h, 1))


def raster_boxes(targets: Targets, grid_size: tuple[int, int], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The pixels of each object as box_mask defines them, (N, H, W) bool, and the image of each (N,).

    An object that is not learnt has no pixels.
    """
    boxes = clip_boxes(targets.boxes_xyxy.float(), *image_size)
    x, y = pixel_centers(grid_size, image_size, boxes.device)
    in_x = covered_1d(x, image_size[1] / max(grid_size[1], 1), boxes[:, 0], boxes[:, 2])  # (N, W)
    in_y = covered_1d(y, image_size[0] / max(grid_size[0], 1), boxes[:, 1], boxes[:, 3])  # (N, H)
    has_pixels = targets.is_learnt & (box_area(boxes) > 0)  # an object outside the image has none
    return in_y[:, :, None] & in_x[:, None, :] & has_pixels[:, None, None], targets.image  # (N, H, W)


def covered_1d(centers: Tensor, step: float, low: Tensor, high: Tensor) -> Tensor:
    """centers (M,), low and high (N,) -> (N, M): the cells with their center in low..high, or the one at its middle."""
    inside = (low[:, None] <= centers) & (centers < high[:, None])
    middle = (low + high)[:, None] / 2
    holds_middle = (centers - step / 2 <= middle) & (middle < centers + step / 2)
    return inside | (holds_middle & ~inside.any(1, keepdim=True))


def overlap_1d(centers: Tensor, size: float, low: Tensor, high: Tensor) -> Tensor:
    """Length of the overlap between spans of length `size` around centers (M,) and low..high (N,): (N, M)."""
    right = torch.minimum(centers + size / 2, high[:, None])
    left = torch.maximum(centers - size / 2, low[:, None])
    return (right - left).clamp(min=0)


def max_over_objects(values: Tensor, image: Tensor, batch_size: int) -> Tensor:
    """values >= 0 (N, H, W) and the image (N,) of each -> the largest per pixel and image, (B, 1, H, W) float32."""
    n, h, w = values.shape
    result = torch.zeros(batch_size, h * w, device=values.device)
    rows = image[:, None].expand(n, h * w)
    return result.scatter_reduce(0, rows, values.flatten(1).float(), "amax").view(batch_size, 1, h, w)
