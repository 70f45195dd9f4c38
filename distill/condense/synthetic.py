"""The learnt set of dataset distillation: images with learnt pixels, and fixed boxes and labels.

    stored (N, 3, S, S) ── decode ── images (N r c, 3, S, S) that a detector is trained on

Multi-formation (Kim et al., arXiv:2205.14959, sec. 4): a stored image is a grid of r rows and c columns of tiles. Each
tile, enlarged with its boxes, is an image of its own. With 1 x 1, a stored image is one image.

Differs from the paper, whose images fill their squares: a letterboxed image has grey padding, and a tile holds its
content alone, shrunk to the cell in each direction where it is larger, never enlarged. Decoding puts the content back
in its place on grey. 4 x 3 images of 160 x 120 pixels fill tiles of 53 x 40, twelve to a square, without padding.
Shrinking (with antialias) and enlarging are bicubic: of the filters in Pillow and torch this loses least (BCCD at
160 px, 12 tiles: 36.9 dB, against 34.9 dB of the mean and bilinear).
"""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structures import Targets

PADDING = 114 / 255  # the grey of a loader's padding

SMALLEST_RMS = 1e-30  # an image without gradient stays unchanged

Formation = tuple[int, int]  # r rows, c columns
Area = tuple[int, int, int, int]  # x1, y1, x2, y2, whole pixels


class SyntheticSet:
    """N stored images, and the objects of the P = N r c images that they decode to.

    pixels: (N, 3, S, S) float32 or float64 in [0, 1], a leaf that requires grad; PixelOptimizer changes it in place.
    targets: fixed; boxes in pixels of the decoded images, `image` in 0..P - 1. An image may have no objects.
    formation: r, c.
    content_xyxy: (P, 4) int64, the content of each decoded image; the rest is grey.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: Targets,
        formation: Formation = (1, 1),
        content_xyxy: Tensor | None = None,
    ) -> None:
        """pixels are copied. content_xyxy is rounded; None: no padding. ValueError for arguments that do not fit."""
        count, _, height, width = pixels.shape
        rows, columns = formation
        if height != width or not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(f"images of {height} x {width} pixels in {rows} x {columns} tiles")
        total = count * rows * columns
        if len(targets) and not 0 <= int(targets.image.min()) <= int(targets.image.max()) < total:
            raise ValueError(f"objects of image {int(targets.image.max())}, expected 0..{total - 1}")
        if content_xyxy is None:
            content_xyxy = torch.tensor([0, 0, width, height]).repeat(total, 1)
        self.content_xyxy = content_xyxy.round().long().cpu()
        c = self.content_xyxy
        if c.shape != (total, 4) or (c[:, 2:] <= c[:, :2]).any() or c.min() < 0 or c.max() > width:
            raise ValueError(f"content of shape {tuple(c.shape)}, expected {total} areas within {width} pixels")
        self.pixels = pixels.detach().clone().requires_grad_()
        self.targets = targets.to(pixels.device)
        self.formation = rows, columns
        self._tiles = [tile_area(k % (rows * columns), width, formation, c[k].tolist()) for k in range(total)]

    def __len__(self) -> int:
        """N, the number of stored images."""
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def tiles(self) -> int:
        """r c, the number of tiles of a stored image."""
        return self.formation[0] * self.formation[1]

    @classmethod
    def from_pictures(
        cls, pictures: Tensor, targets: Targets, formation: Formation = (1, 1), content_xyxy: Tensor | None = None
    ) -> "SyntheticSet":
        """Pack images (N r c, 3, S, S) in [0, 1] into N stored ones, r c into each, in order, row by row.

        ValueError where their number is no multiple of r c.
        """
        tiles = formation[0] * formation[1]
        if len(pictures) % tiles:
            raise ValueError(f"{len(pictures)} images in {formation[0]} x {formation[1]} tiles")
        stored = pictures.new_full((len(pictures) // tiles, *pictures.shape[1:]), PADDING)
        packed = cls(stored, targets, formation, content_xyxy)
        with torch.no_grad():
            for number, image in enumerate(pictures):
                content = crop(image, packed._content(number))
                packed._tile(packed.pixels, number).copy_(resized(content, packed._size(number)))
        return packed

    @classmethod
    def from_noise(
        cls, targets: Targets, *, count: int, image_size: int, formation: Formation = (1, 1),
        content_xyxy: Tensor | None = None, generator: torch.Generator,
    ) -> "SyntheticSet":  # fmt: skip
        """`count` stored images of noise, uniform in [0, 1], with the objects of `targets`."""
        noise = torch.rand(count, 3, image_size, image_size, generator=generator)
        return cls(noise, targets, formation, content_xyxy)

    def decode(self, rows: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Targets]:
        """rows (n,) int64, distinct -> images (n r c, 3, S, S) and their targets.

        Image i r c + t is tile t of stored image rows[i]. Differentiable in `pixels`, or in stored (n, 3, S, S), which
        is used instead of pixels[rows].
        """
        stored = self.pixels[rows.to(self.pixels.device)] if stored is None else stored
        numbers = self.numbers(rows)
        images = []
        for index, number in enumerate(numbers.tolist()):
            x1, y1, x2, y2 = self._content(number)
            tile = crop(stored[index // self.tiles], self._tiles[number])
            around = (x1, self.image_size - x2, y1, self.image_size - y2)
            images.append(F.pad(resized(tile, (y2 - y1, x2 - x1)), around, value=PADDING))
        index_of = torch.full((len(self) * self.tiles,), -1, device=self.pixels.device)  # of each image, or -1
        index_of[numbers] = torch.arange(len(numbers), device=index_of.device)
        image = index_of[self.targets.image]  # (M,)
        targets = replace(self.targets[image >= 0], image=image[image >= 0])
        return torch.stack(images) if images else stored.new_zeros(0, *self.pixels.shape[1:]), targets

    def numbers(self, rows: Tensor) -> Tensor:
        """rows (n,) of stored images -> the numbers (n r c,) of the images that they decode to, in decode's order."""
        device = self.pixels.device
        return (rows.to(device)[:, None] * self.tiles + torch.arange(self.tiles, device=device)).flatten()

    def stored_targets(self) -> Targets:
        """The objects at their places in the stored images: `image` is the row of `pixels`."""
        t = self.targets
        tile = torch.tensor(self._tiles, dtype=t.boxes_xyxy.dtype).reshape(-1, 4).to(self.pixels.device)[t.image]
        content = self.content_xyxy.to(tile)[t.image]
        scale = (tile[:, 2:] - tile[:, :2]) / (content[:, 2:] - content[:, :2])  # (M, 2)
        boxes_xyxy = tile[:, :2].repeat(1, 2) + (t.boxes_xyxy - content[:, :2].repeat(1, 2)) * scale.repeat(1, 2)
        return replace(t, boxes_xyxy=boxes_xyxy, image=t.image // self.tiles)

    def total_variation(self, rows: Tensor, stored: Tensor) -> Tensor:
        """The total variation of stored images (n, 3, S, S), used instead of pixels[rows]: (n,), the mean over tiles.

        TV(x) = mean |x_(i+1)j - x_ij| + mean |x_i(j+1) - x_ij|     (Rudin, Osher and Fatemi 1992, anisotropic)
        """
        tiles = [crop(stored[i // self.tiles], self._tiles[k]) for i, k in enumerate(self.numbers(rows).tolist())]
        return torch.stack([total_variation(tile) for tile in tiles]).view(len(stored), -1).mean(1)

    def _content(self, number: int) -> Area:
        x1, y1, x2, y2 = self.content_xyxy[number].tolist()
        return x1, y1, x2, y2

    def _size(self, number: int) -> tuple[int, int]:
        """Height and width of a tile."""
        x1, y1, x2, y2 = self._tiles[number]
        return y2 - y1, x2 - x1

    def _tile(self, stored: Tensor, number: int) -> Tensor:
        return crop(stored[number // self.tiles], self._tiles[number])

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists; pixels are copied."""
        t = self.targets
        return {
            "pixels": self.pixels.detach().clone(),
            "boxes_xyxy": t.boxes_xyxy, "labels": t.labels, "image": t.image, "ignore": t.ignore,
            "formation": list(self.formation), "content_xyxy": self.content_xyxy,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SyntheticSet":
        """The set of a state_dict, bit for bit."""
        targets = Targets(state["boxes_xyxy"], state["labels"], state["image"], state["ignore"])
        rows, columns = state["formation"]
        return cls(state["pixels"], targets, (rows, columns), state["content_xyxy"])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the pixels of a set with the same objects, in place; ValueError for other objects."""
        saved = SyntheticSet.from_state(state)
        same = saved.pixels.shape == self.pixels.shape and saved.formation == self.formation
        same = same and torch.equal(saved.content_xyxy, self.content_xyxy)
        for name in ("boxes_xyxy", "labels", "image", "ignore"):
            same = same and torch.equal(getattr(saved.targets, name).cpu(), getattr(self.targets, name).cpu())
        if not same:
            raise ValueError("the state is of another synthetic set: its size, formation or objects differ")
        self.pixels.copy_(saved.pixels)


def tile_area(tile: int, image_size: int, formation: Formation, content_xyxy: list[int]) -> Area:
    """The area of tile t in a stored image: in the middle of its cell, no larger than the content that it holds.

    Cell (i, j) has rows floor(i S / r) to floor((i + 1) S / r), and columns likewise.
    """
    x1, y1, x2, y2 = content_xyxy
    left, width = tile_span(tile % formation[1], image_size, formation[1], x2 - x1)
    top, height = tile_span(tile // formation[1], image_size, formation[0], y2 - y1)
    return left, top, left + width, top + height


def tile_span(index: int, image_size: int, cells: int, content: int) -> tuple[int, int]:
    """Start and length of a tile in one direction. content: the length of what it holds."""
    start, end = index * image_size // cells, (index + 1) * image_size // cells
    length = min(end - start, content)
    return start + (end - start - length) // 2, length


def crop(image: Tensor, area: Area) -> Tensor:
    """A view of image (3, H, W)."""
    x1, y1, x2, y2 = area
    return image[:, y1:y2, x1:x2]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) in [0, 1] -> (3, *size), bicubic, clipped to [0, 1]; the image itself where it has that size."""
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)


def total_variation(tile: Tensor) -> Tensor:
    """Of one tile (3, h, w), a scalar (): see SyntheticSet.total_variation."""
    parts = (tile[:, 1:] - tile[:, :-1], tile[:, :, 1:] - tile[:, :, :-1])
    return sum((part.abs().mean() for part in parts if part.numel()), tile.new_zeros(()))


class PixelOptimizer:
    """Moves some stored images of a set against their gradients, in place, and clips them to [0, 1].

    name: "sgd" (with momentum), "adam" (betas momentum, 0.999), or "normalized":

        m <- momentum m + (1 - momentum) g / rms(g),    x <- x - learning_rate m

    rms(g) is over one image, and the first m is the first g / rms(g). If the steps agree, a pixel moves by about the
    learning rate in each. In gradient matching, gradients differ by large factors between networks. Adam's second
    moments remember the largest for a thousand steps, so it follows the few steps with the youngest networks, and
    hardly the rest. Every image has an optimizer state of its own, which changes only with the image: a set learns the
    same way if each step draws a part of it.
    """

    def __init__(self, synthetic: SyntheticSet, *, name: str, learning_rate: float, momentum: float) -> None:
        self._rows = list(synthetic.pixels.detach().unbind(0))  # views: they share its memory
        self._is_normalized = name == "normalized"
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum}: expected 0 <= momentum < 1")
        self._optimizer: torch.optim.Optimizer
        if name == "sgd":
            self._optimizer = torch.optim.SGD(self._rows, lr=learning_rate, momentum=momentum)
        elif name == "adam":
            self._optimizer = torch.optim.Adam(self._rows, lr=learning_rate, betas=(momentum, 0.999))
        elif self._is_normalized:
            self._optimizer = torch.optim.SGD(self._rows, lr=learning_rate, momentum=momentum, dampening=momentum)
        else:
            raise ValueError(f"pixel optimizer {name!r}: expected sgd, adam or normalized")

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """rows (n,) of the set, and the gradients (n, 3, S, S) of their pixels."""
        moved = [self._rows[row] for row in rows.tolist()]
        for image, image_gradient in zip(moved, gradient, strict=True):
            if self._is_normalized:
                image_gradient = image_gradient / image_gradient.square().mean().sqrt().clamp(min=SMALLEST_RMS)
            image.grad = image_gradient
        self._optimizer.step()
        for image in moved:
            image.grad = None
            image.clamp_(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return copy.deepcopy(self._optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(copy.deepcopy(state))
