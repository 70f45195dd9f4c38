"""Denoising queries: noisy copies of the objects, from which the decoder learns to restore them.

DN-DETR (Li et al., arXiv:2203.01305) and, with negative copies, DINO (Zhang et al., arXiv:2203.03605). A query made
from an object is matched with it by construction, so the decoder learns boxes and classes without a search for matches.

A group has a positive and a negative copy of each object; the positive one learns the object, the negative one the
background. The groups do not see one another, and the queries of the encoder do not see them at all; they see those.

Boxes are cxcywh_norm: center x, center y, width and height as fractions of the image.

Differs from public code: the rows that pad images with fewer objects are hidden from the others, so that the losses of
an image do not depend on the batch; and with several processes the number of groups is that of each process. The losses
are a mean over the groups, so this changes their variance alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from rtdetr.matching import Matches

NUM_QUERIES = 100  # of each sign, over all groups; one group may have more
LABEL_NOISE = 0.25  # probability of a random class: half of the 0.5 that public code calls the label noise ratio
BOX_NOISE = 1.0  # a positive corner moves by less than this times half a side, a negative one by up to twice as much


@dataclass(frozen=True)
class NoisyObjects:
    """Queries made from the objects of B images, T = groups * 2 * P, P the most objects of an image.

    In each group come P positives, then P negatives; place p is the object number p of its image.

    labels (B, T) int64, boxes (B, T, 4): after the noise.
    is_real (B, T) bool: False where the image has fewer objects.
    is_hidden (B, T, T) bool: True where the row's query does not see the column's.
    matches: those of the real positives with the rows of the objects; its layer is 0.
    groups: how often each object is among the matches.
    """

    labels: Tensor
    boxes: Tensor
    is_real: Tensor
    is_hidden: Tensor
    matches: Matches
    groups: int

    def matches_of_layers(self, num_layers: int) -> Matches:
        """The matches, once for each layer."""
        image, _, query, row = (x.repeat(num_layers) for x in self.matches)
        layer = torch.arange(num_layers, device=row.device).repeat_interleave(len(self.matches.row))
        return Matches(image, layer, query, row)


def add_noise(
    boxes: Tensor, labels: Tensor, is_negative: Tensor, *, size: Tensor, sign: Tensor, flip: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy boxes (..., 4) and labels (...), a function of the draws.

        corner <- clamp(corner + s (u + [negative]) BOX_NOISE side / 2, 0, 1)        label <- r  where  f < LABEL_NOISE

    is_negative (...) bool. size u (..., 4) in [0, 1), sign s (..., 4) of -1 and 1, flip f (...) in [0, 1), other r
    (...) a random label. The corners of a negative box may change places; its width is then negative, and counts as 0.
    """
    half_side = torch.cat((boxes[..., 2:], boxes[..., 2:]), -1) / 2  # (..., 4): w, h, w, h
    shift = sign * (size + is_negative[..., None].to(size.dtype)) * BOX_NOISE * half_side
    corners = (cxcywh_to_xyxy(boxes) + shift).clamp(0, 1)
    return xyxy_to_cxcywh(corners), torch.where(flip < LABEL_NOISE, other, labels)


def draw_noise(shape: tuple[int, int], num_classes: int) -> dict[str, Tensor]:
    """The draws of add_noise, from torch's global CPU generator."""
    return dict(
        size=torch.rand(*shape, 4),
        sign=2 * torch.randint(2, (*shape, 4)) - 1,
        flip=torch.rand(shape),
        other=torch.randint(num_classes, shape),
    )


def make_noisy_objects(
    boxes: Tensor, labels: Tensor, image: Tensor, *, num_images: int, num_classes: int
) -> NoisyObjects:
    """The denoising queries of a batch: boxes (N, 4), labels (N,), image (N,) of its objects in any order.

    groups = max(1, NUM_QUERIES // P). Without objects there is one place, which is not real: the tensors that training
    needs are never empty. The draws use torch's global CPU generator on every device.
    """
    device = boxes.device
    counts = torch.bincount(image, minlength=num_images)  # (B,)
    most = max(int(counts.max()), 1)  # P
    groups = max(1, NUM_QUERIES // most)
    order = image.argsort(stable=True)
    row = torch.full((num_images, most), -1, device=device)
    place = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[image[order]]
    row[image[order], place] = order
    row = row.repeat(1, 2 * groups)  # (B, T)
    T = row.shape[1]
    is_real, number = row >= 0, torch.arange(T, device=device)
    group, is_negative = number // (2 * most), number // most % 2 == 1  # (T,) each
    placed = torch.cat((boxes, boxes.new_zeros(1, 4)))[row]  # (B, T, 4); row -1 is the last
    own = torch.cat((labels, labels.new_zeros(1)))[row]
    shape = (num_images, T)
    draws = {name: draw.to(device) for name, draw in draw_noise(shape, num_classes).items()}
    noisy, noisy_labels = add_noise(placed, own, is_negative.expand(shape), **draws)
    is_hidden = group[:, None] != group  # (T, T)
    is_hidden = is_hidden | ~is_real[:, None, :]  # (B, T, T)
    at_image, query = (is_real & ~is_negative).nonzero().unbind(1)
    matches = Matches(at_image, torch.zeros_like(query), query, row[at_image, query])
    return NoisyObjects(noisy_labels, noisy, is_real, is_hidden, matches, groups)
