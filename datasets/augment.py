"""Augmentation of whole batches on their device: mosaic, affine, flip, mixup, HSV. The loader only decodes.

    draw(...)            all random numbers, from one CPU generator: the same on every device
    mosaic_layout(...)   positions of four images on an endless canvas; a view is cut out of it
    affine_matrices(...) canvas -> view: zoom, rotation, shear, shift, flips, as one matrix for each image
    sample_mosaic(...)   pixels: one bilinear lookup through the inverse matrix, for any combination of steps
    mosaic_targets(...)  boxes: the same offsets, then move_boxes(...) by the same matrix, then drop_hidden(...)
    mixup(...), jitter_hsv(...)
    transform(...)       all of the above, with drawn parameters
    augment(...)         draw and transform: a training batch, without gradient
    draw_siamese(...)    one draw for all images, differentiable in the pixels: dataset distillation

Mosaic: Bochkovskiy et al., "YOLOv4", arXiv:2004.10934. Mixup: Zhang et al., arXiv:1710.09412. Ranges and thresholds
follow the public YOLO recipes. Differences from them:
- The partners of a mosaic are other images of the batch, so nothing is decoded twice.
- A mosaic has no outer edge; the recipes cut it at twice the image size.
- Mosaic, affine and flip resample once instead of up to three times.
- Mixup and HSV compute in float, without rounding to bytes between the steps.

Coordinates are continuous: pixel column i covers i..i+1 and its center is i + 1/2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from boxes import box_area, clip_boxes
from errors import expect
from structures import Targets

FILL = 114 / 255  # grey beside the images, as in letterbox
MIN_VISIBLE_FRACTION = 0.1  # an object is dropped if a smaller share of its moved box is inside the view,
MIN_SIDE_PX = 2.0  # or if a side is not longer than this,
MAX_ASPECT_RATIO = 100.0  # or if the box is at least this thin

PROBABILITIES = ("mosaic", "mixup", "flip_horizontal", "flip_vertical")
GEOMETRY = ("mosaic", "scale", "translate", "degrees", "shear", "flip_horizontal", "flip_vertical")
COLOUR = ("hue", "saturation", "value")


@torch.no_grad()
def augment(
    images: Tensor,
    targets: Targets,
    *,
    generator: torch.Generator,
    settings,
    content_xyxy: Tensor | None = None,
    groups: Tensor | None = None,
) -> tuple[Tensor, Targets]:
    """A batch of square images -> the augmented batch of the same shape, and its targets.

    Args:
        images: (B, 3, S, S) RGB, uint8 or float in [0, 1]; not changed.
        targets: boxes in pixels of the images, on any device. Ignored rows move like the others; they are kept while
            any part of them is in view. The order of rows may change.
        generator: on the CPU, for images on any device. The settings do not change how many numbers are drawn, so equal
            states give equal images for uint8 and float input, and switching one step off does not change the others.
        settings: an object with the fields of config.AugmentConfig. All zero: images / 255 and unchanged targets.
        content_xyxy: (B, 4) the part of each image that is not padding; None: all of it. Images of a mosaic meet at the
            edges of their content, without grey bars between them.
        groups: (B,) on the CPU: mosaic and mixup join images of one group only; None: any images. Labelled images are
            one group and unlabelled ones another, so each view is of one kind.
    Returns:
        images float32 (B, 3, S, S) in [0, 1]; targets, clipped to the images.
    """
    check_settings(settings)
    parameters = draw(len(images), generator=generator, settings=settings, groups=groups)
    images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    return transform(images, targets, parameters, settings=settings, content_xyxy=content_xyxy)


@torch.no_grad()
def augment_content(
    content_xyxy: Tensor, *, image_size: int, generator: torch.Generator, settings, groups: Tensor | None = None
) -> Tensor:
    """(B, 1, S, S) bool: where the images that `augment` returns have content instead of grey.

    Call it with the content_xyxy (B, 4), settings and groups of `augment`, and a generator in the same state: the masks
    move like the images. Content that mixup adds to an image's padding does not count.
    """
    x = torch.arange(image_size, device=content_xyxy.device) + 0.5
    x1, y1, x2, y2 = content_xyxy[:, :, None].unbind(1)  # (B, 1) each
    inside = ((x > y1) & (x < y2))[:, :, None] & ((x > x1) & (x < x2))[:, None, :]  # (B, S, S)
    masks = inside[:, None].float().expand(-1, 3, -1, -1)
    geometry = replace(settings, mixup=0.0, **dict.fromkeys(COLOUR, 0.0))
    none = Targets.empty(content_xyxy.device)
    moved, _ = augment(masks, none, generator=generator, settings=geometry, content_xyxy=content_xyxy, groups=groups)
    return moved[:, :1] > (1 + FILL) / 2


def draw_siamese(*, generator: torch.Generator, settings) -> Callable[[Tensor, Targets], tuple[Tensor, Targets]]:
    """One draw for any number of images: Differentiable Siamese Augmentation, arXiv:2102.08259.

    Returns a pure function of images (B, 3, S, S), float in [0, 1], and targets. It applies the same flips, zoom,
    shift, rotation, shear and colour to every image: those that `draw` gives for a batch of one. So real and synthetic
    images get the same, together or in parts. Differentiable in the images; float64 stays.
    UserError for mosaic and mixup above 0, which join images of a batch.
    """
    check_settings(settings)
    for name in ("mosaic", "mixup"):
        expect(not getattr(settings, name), f"augment.{name}", getattr(settings, name), "0: every picture on its own")
    one = draw(1, generator=generator, settings=settings)

    def apply(images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        return transform(images, targets, repeat_for_each(one, len(images)), settings=settings)

    return apply


def transform(
    images: Tensor, targets: Targets, parameters: "Parameters", *, settings, content_xyxy: Tensor | None = None
) -> tuple[Tensor, Targets]:
    """Apply drawn parameters: images float (B, 3, S, S) in [0, 1], targets as in `augment`. Differentiable in images.

    settings: steps whose settings are 0 are skipped; other values are not used.
    """
    _, _, height, width = images.shape
    if height != width:
        raise ValueError(f"images of {height} x {width}, expected squares")
    if any(getattr(settings, name) for name in GEOMETRY):
        matrices = affine_matrices(parameters, image_size=width)
        if parameters.use_mosaic.any():
            layout = mosaic_layout(parameters, content_xyxy, image_size=width)
            images, targets = sample_mosaic(images, layout, matrices), mosaic_targets(targets, layout)
        else:
            images = sample_affine(images, matrices @ centring_matrix(width))
            targets = replace(targets, boxes_xyxy=targets.boxes_xyxy - width / 2)
        moved = move_boxes(targets.boxes_xyxy, matrices.to(targets.boxes_xyxy.device)[targets.image])
        targets = drop_hidden(targets, moved, image_size=width)
    if parameters.mixup_weight.lt(1).any():
        images, targets = mixup(images, targets, parameters.mixup_partner, parameters.mixup_weight)
    if any(getattr(settings, name) for name in COLOUR):
        images = jitter_hsv(images, parameters.hue_shift, parameters.saturation_gain, parameters.value_gain)
    return images, targets


def check_settings(settings) -> None:
    """UserError for a probability outside 0..1 or a range that could turn an image inside out."""
    for name in PROBABILITIES:
        value = getattr(settings, name)
        expect(0 <= value <= 1, f"augment.{name}", value, "a probability 0..1")
    for name, limit in {"scale": 1, "saturation": 1, "value": 1, "hue": 0.5, "shear": 45}.items():
        value = getattr(settings, name)
        is_met = 0 <= value < limit or (value == limit and name in COLOUR)
        expect(is_met, f"augment.{name}", value, f"0 or more and below {limit}")
    for name in ("translate", "degrees"):
        value = getattr(settings, name)
        expect(0 <= value < math.inf, f"augment.{name}", value, "0 or more")


@dataclass(frozen=True)
class Parameters:
    """The random numbers for the B images of a batch, on the CPU.

    use_mosaic (B,) bool.
    neighbours (B, 4) int64: the image itself and three others of its group (repeated where it has fewer than 4).
    joint (B, 2): the point where they meet, in image sizes from the middle of the unmoved view, in -1/2..1/2.
    zoom (B,); shift (B, 2) in image sizes; rotation (B,) and shear (B, 2) in radians; flip (B, 2) bool, x and y.
    mixup_partner (B,) int64; mixup_weight (B,) of the image itself, 1 where nothing is mixed in.
    hue_shift (B,) in turns; saturation_gain (B,); value_gain (B,).
    """

    use_mosaic: Tensor
    neighbours: Tensor
    joint: Tensor
    zoom: Tensor
    shift: Tensor
    rotation: Tensor
    shear: Tensor
    flip: Tensor
    mixup_partner: Tensor
    mixup_weight: Tensor
    hue_shift: Tensor
    saturation_gain: Tensor
    value_gain: Tensor


def draw(count: int, *, generator: torch.Generator, settings, groups: Tensor | None = None) -> Parameters:
    """Parameters for `count` images. The number of draws depends only on `count`.

    groups: see augment. An image that is alone in its group has no partner: nothing is mixed in, and its mosaic shows
    it four times.
    """
    chance = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    spread = torch.rand(count, 11, generator=generator, dtype=torch.float64) * 2 - 1  # -1..1
    keys = torch.rand(count, count, generator=generator, dtype=torch.float64)
    mixing = torch.rand(count, 63, generator=generator, dtype=torch.float64)

    # Sorted, each row is the image itself, then those of its group in random order, then the others.
    is_partner = torch.ones(count, count, dtype=torch.bool) if groups is None else groups[:, None] == groups
    partners = is_partner.sum(1, keepdim=True)  # (B, 1), itself included
    order = torch.where(is_partner, keys, 1 + keys).fill_diagonal_(-1.0).argsort(dim=1)  # (B, B)
    # The median of 63 uniform numbers follows Beta(32, 32), the weight the public recipes draw.
    is_mixed = (chance[:, 1] < settings.mixup) & (partners[:, 0] > 1)
    weight = torch.where(is_mixed, mixing.median(dim=1).values, 1.0)
    return Parameters(
        use_mosaic=chance[:, 0] < settings.mosaic,
        neighbours=order.gather(1, torch.arange(4) % partners),
        joint=spread[:, 0:2] / 2,
        zoom=1 + spread[:, 2] * settings.scale,
        shift=spread[:, 3:5] * settings.translate,
        rotation=torch.deg2rad(spread[:, 5] * settings.degrees),
        shear=torch.deg2rad(spread[:, 6:8] * settings.shear),
        flip=torch.stack((chance[:, 2] < settings.flip_horizontal, chance[:, 3] < settings.flip_vertical), dim=1),
        mixup_partner=order.gather(1, partners - 1)[:, 0],
        mixup_weight=weight,
        hue_shift=spread[:, 8] * settings.hue,
        saturation_gain=1 + spread[:, 9] * settings.saturation,
        value_gain=1 + spread[:, 10] * settings.value,
    )


def repeat_for_each(parameters: Parameters, count: int) -> Parameters:
    """The parameters of one image, repeated for `count` images without partners."""
    repeated = {name: value.expand(count, *value.shape[1:]) for name, value in vars(parameters).items()}
    itself = torch.arange(count)
    return replace(Parameters(**repeated), neighbours=itself[:, None].expand(-1, 4), mixup_partner=itself)


def affine_matrices(parameters: Parameters, *, image_size: int) -> Tensor:
    """(B, 3, 3) float64 matrices: canvas point (x, y, 1) as a column, origin at the middle -> pixels of the view.

        M = flip . shift to S/2 (1 + 2 t) . shear . zoom . rotation

    Rotation by a > 0 turns x towards y (clockwise on the screen). Shear is [[1, tan a_x], [tan a_y, 1]].
    """
    p, size = parameters, image_size
    cos, sin = torch.cos(p.rotation) * p.zoom, torch.sin(p.rotation) * p.zoom
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), dim=-2)  # (B, 2, 2)
    tangent, one = torch.tan(p.shear), torch.ones_like(p.zoom)
    slant = torch.stack((one, tangent[:, 0], tangent[:, 1], one), dim=-1).view(-1, 2, 2)  # (B, 2, 2)
    sign = 1 - 2 * p.flip.double()  # (B, 2)
    linear = sign[:, :, None] * (slant @ turn)  # (B, 2, 2)
    offset = size / 2 + sign * p.shift * size  # a flip x' = S - x keeps the middle where it is
    matrices = torch.zeros(len(one), 3, 3, dtype=torch.float64)
    matrices[:, :2, :2], matrices[:, :2, 2], matrices[:, 2, 2] = linear, offset, 1
    return matrices


def centring_matrix(image_size: int) -> Tensor:
    """(3, 3) float64: pixels of an image -> the canvas, with the image's middle at the origin."""
    half = image_size / 2
    return torch.tensor([[1, 0, -half], [0, 1, -half], [0, 0, 1]], dtype=torch.float64)


@dataclass(frozen=True)
class MosaicLayout:
    """Four images around a joint, for each of B views: top left, top right, bottom left, bottom right.

    joint (B, 2): pixels on the canvas; +inf where a view has only the first image.
    sources (B, 4) int64: rows of the batch.
    offsets (B, 4, 2): the position of each image's pixel 0, 0 on the canvas.
    """

    joint: Tensor
    sources: Tensor
    offsets: Tensor


def mosaic_layout(parameters: Parameters, content_xyxy: Tensor | None, *, image_size: int) -> MosaicLayout:
    """Each image touches the joint with a corner of its content. A view without mosaic centres its own image."""
    size, sources = float(image_size), parameters.neighbours
    if content_xyxy is None:
        content_xyxy = torch.tensor([0.0, 0.0, size, size]).expand(len(sources), 4)
    # The touching corner: bottom right of the top left image, and so on.
    corner_x, corner_y = torch.tensor([2, 0, 2, 0]), torch.tensor([3, 3, 1, 1])
    content = content_xyxy.cpu().double()[sources]  # (B, 4, 4)
    rows = torch.arange(4)
    corners = torch.stack((content[:, rows, corner_x], content[:, rows, corner_y]), dim=-1)  # (B, 4, 2)
    joint = parameters.joint * size
    alone = ~parameters.use_mosaic[:, None]
    return MosaicLayout(
        joint.masked_fill(alone, math.inf),
        torch.where(alone, sources[:, :1], sources),
        (joint[:, None] - corners).masked_fill(alone[:, None], -size / 2),
    )


def sample_mosaic(images: Tensor, layout: MosaicLayout, matrices: Tensor) -> Tensor:
    """images float (B, 3, S, S) in [0, 1], matrices (B, 3, 3) canvas -> view: the views (B, 3, S, S), else grey.

    Each pixel of a view looks up one image of the batch. One grid_sample reads an atlas: all images below one another,
    each in a frame of grey pixels. Differentiable in `images`.
    """
    count, _, size, _ = images.shape
    slot = size + 2
    atlas = images.new_full((3, count, slot, slot), FILL)
    atlas[:, :, 1:-1, 1:-1] = images.transpose(0, 1)
    atlas = atlas.view(1, 3, count * slot, slot).expand(count, -1, -1, -1)

    x, y = _source_xy(torch.linalg.inv(matrices), size, images)
    joint = layout.joint.to(images, non_blocking=True)[:, :, None, None]  # (B, 2, 1, 1)
    is_right, is_below = x >= joint[:, 0], y >= joint[:, 1]
    offsets = layout.offsets.to(images, non_blocking=True)[..., None, None]  # (B, 4, 2, 1, 1)
    slots = (layout.sources * slot).to(images, non_blocking=True)[..., None, None]  # (B, 4, 1, 1) in the atlas
    u = _pick(is_right, is_below, [x - offsets[:, q, 0] for q in range(4)])
    # Clamped to the centers of the frame's pixels: farther points are grey, and no other slot is touched.
    v = _pick(is_right, is_below, [(y - offsets[:, q, 1]).clamp(-0.5, size + 0.5) + slots[:, q] for q in range(4)])
    grid = torch.empty(count, size, size, 2, dtype=images.dtype, device=images.device)
    grid[..., 0] = (u.clamp(-0.5, size + 0.5) + 1) * (2 / slot) - 1
    grid[..., 1] = (v + 1) * (2 / (count * slot)) - 1
    return F.grid_sample(atlas, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _source_xy(inverse: Tensor, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the view's pixel centers come from: x and y (B, S, S); without rotation and shear (B, 1, S) and (B, S, 1).

    The thin shapes make this usual case cheap: later operations broadcast late.
    """
    m = inverse.to(like, non_blocking=True)[:, :2, :, None, None]  # (B, 2, 3, 1, 1)
    column = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5).view(1, 1, size)
    row = column.view(1, size, 1)
    x, y = m[:, 0, 0] * column + m[:, 0, 2], m[:, 1, 1] * row + m[:, 1, 2]  # (B, 1, S), (B, S, 1)
    if inverse[:, 0, 1].any() or inverse[:, 1, 0].any():
        x, y = x + m[:, 0, 1] * row, y + m[:, 1, 0] * column  # (B, S, S)
    return x, y


def _pick(is_right: Tensor, is_below: Tensor, choices: list[Tensor]) -> Tensor:
    """Of choices for top left, top right, bottom left and bottom right, that of each pixel's quadrant."""
    top = torch.where(is_right, choices[1], choices[0])
    bottom = torch.where(is_right, choices[3], choices[2])
    return torch.where(is_below, bottom, top)


def sample_affine(images: Tensor, matrices: Tensor) -> Tensor:
    """images float (B, 3, S, S) in [0, 1] moved by matrices (B, 3, 3), pixels -> pixels; grey elsewhere.

    out(M p) = in(p), bilinear between pixel centers. Differentiable in `images`. For views without mosaic the values
    equal those of sample_mosaic, with less memory.
    """
    count, _, size, _ = images.shape
    x, y = _source_xy(torch.linalg.inv(matrices), size, images)
    grid = torch.empty(count, size, size, 2, dtype=images.dtype, device=images.device)
    grid[..., 0], grid[..., 1] = x * (2 / size) - 1, y * (2 / size) - 1
    # grid_sample can pad with zeros, but with no other constant.
    return F.grid_sample(images - FILL, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + FILL


def mosaic_targets(targets: Targets, layout: MosaicLayout) -> Targets:
    """The targets of all images in all views, in canvas coordinates. An object may appear in several views."""
    device = targets.image.device
    is_used = torch.ones_like(layout.sources, dtype=torch.bool)
    is_used[:, 1:] = layout.joint[:, :1].isfinite()  # (B, 4)
    sources = layout.sources.masked_fill(~is_used, -1).to(device)
    view, quadrant, row = (sources[:, :, None] == targets.image).nonzero().unbind(1)
    shown = targets[row]
    offset = layout.offsets.to(device)[view, quadrant].to(shown.boxes_xyxy).repeat(1, 2)
    return replace(shown, image=view, boxes_xyxy=shown.boxes_xyxy + offset)


def move_boxes(boxes_xyxy: Tensor, matrices: Tensor) -> Tensor:
    """boxes (N, 4), matrices (N, 3, 3) -> (N, 4): the smallest upright box around the four moved corners."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    corners = torch.stack((x1, x2, x2, x1, y1, y1, y2, y2), dim=1).view(-1, 2, 4)  # (N, 2, 4)
    matrices = matrices.to(boxes_xyxy.dtype)
    moved = matrices[:, :2, :2] @ corners + matrices[:, :2, 2:]  # (N, 2, 4)
    return torch.cat((moved.amin(2), moved.amax(2)), dim=1)


def drop_hidden(targets: Targets, moved_xyxy: Tensor, *, image_size: int) -> Targets:
    """Targets with boxes moved_xyxy (N, 4) clipped to the S x S view, without those that are mostly outside.

    Kept: at least MIN_VISIBLE_FRACTION of the moved box's area is inside, both sides are longer than MIN_SIDE_PX, and
    their ratio is below MAX_ASPECT_RATIO. An ignored row is kept while any part of it is inside.
    """
    clipped = clip_boxes(moved_xyxy, image_size, image_size)
    side = clipped[:, 2:] - clipped[:, :2]  # (N, 2)
    short, long = side.amin(1), side.amax(1)
    keep = box_area(clipped) >= MIN_VISIBLE_FRACTION * box_area(moved_xyxy)
    keep &= (short > MIN_SIDE_PX) & (long < MAX_ASPECT_RATIO * short)
    keep |= targets.ignore & (short > 0)
    return replace(targets, boxes_xyxy=clipped)[keep]


def mixup(images: Tensor, targets: Targets, partner: Tensor, weight: Tensor) -> tuple[Tensor, Targets]:
    """images[b] w_b + images[partner_b] (1 - w_b), with the objects of both. weight (B,): w; 1 adds no objects.

    Boxes, labels and class scores are not weighted: a half transparent object is still an object.
    """
    w = weight.to(images, non_blocking=True)[:, None, None, None]
    mixed = torch.lerp(images[partner.to(images.device, non_blocking=True)], images, w)
    guest = torch.where(weight < 1, partner, -1).to(targets.image.device)
    view, row = (guest[:, None] == targets.image).nonzero().unbind(1)
    guests = targets[row]
    class_scores = targets.class_scores
    if class_scores is not None:
        assert guests.class_scores is not None  # rows of the same targets
        class_scores = torch.cat((class_scores, guests.class_scores))
    joined = Targets(
        torch.cat((targets.boxes_xyxy, guests.boxes_xyxy)),
        torch.cat((targets.labels, guests.labels)),
        torch.cat((targets.image, view)),
        torch.cat((targets.ignore, guests.ignore)),
        class_scores,
    )
    return mixed, joined


def jitter_hsv(images: Tensor, hue_shift: Tensor, saturation_gain: Tensor, value_gain: Tensor) -> Tensor:
    """images float (B, 3, H, W) in [0, 1] with H + hue_shift, S * saturation_gain, V * value_gain; (B,) each.

    Hue is in turns and wraps; saturation and value stop at 1. This is the exact HSV of colorsys:

        V = max(R, G, B),  C = V - min(R, G, B),  S = C / V,  H in sixths of a turn from the largest channel
        out = V' (1 - S' (1 - w(H'))),  w_R = clamp(|H' - 3| - 1), w_G = clamp(2 - |H' - 2|), w_B = clamp(2 - |H' - 4|)

    with clamp to 0..1.
    """
    hue_shift, saturation_gain, value_gain = (
        p.to(images, non_blocking=True)[:, None, None] for p in (hue_shift, saturation_gain, value_gain)
    )
    red, green, blue = images.unbind(1)  # (B, H, W) each
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    reach = 1 / chroma.clamp(min=1e-8)  # grey has chroma 0, so its hue does not matter
    hue = torch.where(value == green, (blue - red).mul_(reach).add_(2), (red - green).mul_(reach).add_(4))
    hue = torch.where(value == red, (green - blue).mul_(reach), hue).add_(6 * hue_shift).remainder_(6)
    new_value = (value * value_gain).clamp_(max=1)
    # C' = V' S'. Not in place: the gradient of `reach` needs the old chroma.
    chroma = chroma.div(value.clamp_(min=1e-8)).mul_(saturation_gain).clamp_(max=1).mul_(new_value)
    floor = new_value - chroma
    channels = (
        (hue - 3).abs_().sub_(1).clamp_(0, 1),
        (hue - 2).abs_().neg_().add_(2).clamp_(0, 1),
        (hue - 4).abs_().neg_().add_(2).clamp_(0, 1),
    )
    return torch.stack([torch.addcmul(floor, chroma, w) for w in channels], dim=1)  # (B, 3, H, W)
