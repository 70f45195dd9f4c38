"""The learnt set of dataset distillation: pictures whose pixels move, under boxes and labels that do not.

    stored (N, 3, S, S) ── decode ── pictures (N r c, 3, S, S) that a detector is trained on

Multi-formation (Kim et al., arXiv:2205.14959, sec. 4): a stored picture is a grid of r rows and c columns of tiles, and
each tile, enlarged, is a picture of its own; its boxes grow with it. 1 x 1: a stored picture is a picture.

Differs from the paper, where pictures are square and fill their squares: a letterboxed picture has grey beside it, and
a tile holds the picture alone, squeezed into its cell in either direction, but never enlarged. Decoding puts it back in
its place on grey. 4 x 3 pictures of 160 x 120 pixels fill tiles of 53 x 40, twelve to a square, without a pixel of
padding. Reducing and enlarging are bicubic, reducing over as many pixels as it takes; of all Pillow and torch offer it
loses least (BCCD at 160 px, 12 tiles: 36.9 dB, against 34.9 dB of the mean and bilinear).
"""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structures import Targets

PADDING = 114 / 255  # grey beside the pictures, as a loader has it

SMALLEST_SLOPE = 1e-30  # a row without any slope stays

Formation = tuple[int, int]  # r rows, c columns
Area = tuple[int, int, int, int]  # x1, y1, x2, y2, whole pixels


class SyntheticSet:
    """N stored pictures and the objects of the P = N r c pictures that they decode into.

    pixels: (N, 3, S, S) float32 or float64 in [0, 1], a leaf that requires grad; changed in place by PixelOptimizer.
    targets: boxes in pixels of the decoded pictures, of which `image` is the row; constants. A picture may have none.
    formation: r, c. content_xyxy: (P, 4) int64, what of each decoded picture is picture; the rest is grey.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: Targets,
        formation: Formation = (1, 1),
        content_xyxy: Tensor | None = None,
    ) -> None:
        """pixels are copied. content_xyxy is rounded; None: no padding. ValueError for what does not fit together."""
        count, _, height, width = pixels.shape
        rows, columns = formation
        if height != width or not (1 <= rows <= height and 1 <= columns <= width):
            raise ValueError(f"pictures of {height} x {width} pixels in {rows} x {columns} tiles")
        pictures = count * rows * columns
        if len(targets) and not 0 <= int(targets.image.min()) <= int(targets.image.max()) < pictures:
            raise ValueError(f"objects of picture {int(targets.image.max())}, expected 0..{pictures - 1}")
        if content_xyxy is None:
            content_xyxy = torch.tensor([0, 0, width, height]).repeat(pictures, 1)
        self.content_xyxy = content_xyxy.round().long().cpu()
        c = self.content_xyxy
        if c.shape != (pictures, 4) or (c[:, 2:] <= c[:, :2]).any() or c.min() < 0 or c.max() > width:
            raise ValueError(f"content of shape {tuple(c.shape)}, expected {pictures} areas within {width} pixels")
        self.pixels = pixels.detach().clone().requires_grad_()
        self.targets = targets.to(pixels.device)
        self.formation = rows, columns
        self._tiles = [tile_area(k % (rows * columns), width, formation, c[k].tolist()) for k in range(pictures)]

    def __len__(self) -> int:
        """Stored pictures."""
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def tiles(self) -> int:
        """r c, of each stored picture."""
        return self.formation[0] * self.formation[1]

    @classmethod
    def from_pictures(
        cls, pictures: Tensor, targets: Targets, formation: Formation = (1, 1), content_xyxy: Tensor | None = None
    ) -> "SyntheticSet":
        """Packs r c pictures, (N r c, 3, S, S) in [0, 1], into each stored one, in order, row by row.

        ValueError where their number is no multiple of r c.
        """
        tiles = formation[0] * formation[1]
        if len(pictures) % tiles:
            raise ValueError(f"{len(pictures)} pictures in {formation[0]} x {formation[1]} tiles")
        stored = pictures.new_full((len(pictures) // tiles, *pictures.shape[1:]), PADDING)
        made = cls(stored, targets, formation, content_xyxy)
        with torch.no_grad():
            for number, picture in enumerate(pictures):
                made._tile(made.pixels, number).copy_(resized(crop(picture, made._content(number)), made._size(number)))
        return made

    @classmethod
    def from_noise(
        cls, targets: Targets, *, count: int, image_size: int, formation: Formation = (1, 1),
        content_xyxy: Tensor | None = None, generator: torch.Generator,
    ) -> "SyntheticSet":  # fmt: skip
        """`count` stored pictures of noise, uniform in [0, 1], under given layouts, as from_pictures takes them."""
        noise = torch.rand(count, 3, image_size, image_size, generator=generator)
        return cls(noise, targets, formation, content_xyxy)

    def decode(self, rows: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Targets]:
        """rows (n,) int64, distinct -> pictures (n r c, 3, S, S) and their targets.

        Picture i r c + t is tile t of stored picture rows[i]. Differentiable in `pixels`, or in stored (n, 3, S, S),
        which is used instead of pixels[rows].
        """
        stored = self.pixels[rows.to(self.pixels.device)] if stored is None else stored
        numbers = self.numbers(rows)
        pictures = []
        for place, number in enumerate(numbers.tolist()):
            x1, y1, x2, y2 = self._content(number)
            tile = crop(stored[place // self.tiles], self._tiles[number])
            around = (x1, self.image_size - x2, y1, self.image_size - y2)
            pictures.append(F.pad(resized(tile, (y2 - y1, x2 - x1)), around, value=PADDING))
        found = torch.full((len(self) * self.tiles,), -1, device=self.pixels.device)
        found[numbers] = torch.arange(len(numbers), device=found.device)
        place = found[self.targets.image]  # (M,) of the object's picture among `numbers`, or -1
        targets = replace(self.targets[place >= 0], image=place[place >= 0])
        return torch.stack(pictures) if pictures else stored.new_zeros(0, *self.pixels.shape[1:]), targets

    def numbers(self, rows: Tensor) -> Tensor:
        """rows (n,) of stored pictures -> the decoded pictures they hold (n r c,), in the order of decode."""
        device = self.pixels.device
        return (rows.to(device)[:, None] * self.tiles + torch.arange(self.tiles, device=device)).flatten()

    def stored_targets(self) -> Targets:
        """The objects where they are in the stored pictures: `image` is the row of `pixels`."""
        t = self.targets
        tile = torch.tensor(self._tiles, dtype=t.boxes_xyxy.dtype).reshape(-1, 4).to(self.pixels.device)[t.image]
        content = self.content_xyxy.to(tile)[t.image]
        scale = (tile[:, 2:] - tile[:, :2]) / (content[:, 2:] - content[:, :2])  # (M, 2)
        boxes_xyxy = tile[:, :2].repeat(1, 2) + (t.boxes_xyxy - content[:, :2].repeat(1, 2)) * scale.repeat(1, 2)
        return replace(t, boxes_xyxy=boxes_xyxy, image=t.image // self.tiles)

    def total_variation(self, rows: Tensor, stored: Tensor) -> Tensor:
        """How much neighbouring pixels of a tile differ, of stored (n, 3, S, S) in the place of pixels[rows] -> (n,).

        TV(x) = mean |x_(i+1)j - x_ij| + mean |x_i(j+1) - x_ij|     (Rudin, Osher and Fatemi 1992, anisotropic)

        of each tile, and the mean over the tiles of a picture.
        """
        tiles = [crop(stored[i // self.tiles], self._tiles[k]) for i, k in enumerate(self.numbers(rows).tolist())]
        return torch.stack([total_variation(tile) for tile in tiles]).view(len(stored), -1).mean(1)

    def _content(self, number: int) -> Area:
        return tuple(self.content_xyxy[number].tolist())

    def _size(self, number: int) -> tuple[int, int]:
        """Height and width of a tile."""
        x1, y1, x2, y2 = self._tiles[number]
        return y2 - y1, x2 - x1

    def _tile(self, stored: Tensor, number: int) -> Tensor:
        return crop(stored[number // self.tiles], self._tiles[number])

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists alone; pixels are copied."""
        t = self.targets
        return {
            "pixels": self.pixels.detach().clone(),
            "boxes_xyxy": t.boxes_xyxy, "labels": t.labels, "image": t.image, "ignore": t.ignore,
            "formation": list(self.formation), "content_xyxy": self.content_xyxy,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SyntheticSet":
        """The set that state_dict wrote down, bit for bit."""
        targets = Targets(state["boxes_xyxy"], state["labels"], state["image"], state["ignore"])
        return cls(state["pixels"], targets, tuple(state["formation"]), state["content_xyxy"])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the pixels of a set with the same objects, in place; ValueError for another one."""
        saved = SyntheticSet.from_state(state)
        same = saved.pixels.shape == self.pixels.shape and saved.formation == self.formation
        same = same and torch.equal(saved.content_xyxy, self.content_xyxy)
        for name in ("boxes_xyxy", "labels", "image", "ignore"):
            same = same and torch.equal(getattr(saved.targets, name).cpu(), getattr(self.targets, name).cpu())
        if not same:
            raise ValueError("the state is of another synthetic set: its size, formation or objects differ")
        self.pixels.copy_(saved.pixels)


def tile_area(tile: int, image_size: int, formation: Formation, content_xyxy: list[int]) -> Area:
    """Where tile t of a stored picture lies: in the middle of its cell, no larger than the content it holds.

    Cell (i, j) has rows floor(i S / r) to floor((i + 1) S / r), and columns likewise.
    """
    x1, y1, x2, y2 = content_xyxy
    left, width = along(tile % formation[1], image_size, formation[1], x2 - x1)
    top, height = along(tile // formation[1], image_size, formation[0], y2 - y1)
    return left, top, left + width, top + height


def along(index: int, image_size: int, cells: int, length: int) -> tuple[int, int]:
    """Start and length of a tile in one direction."""
    start, end = index * image_size // cells, (index + 1) * image_size // cells
    taken = min(end - start, length)
    return start + (end - start - taken) // 2, taken


def crop(picture: Tensor, area: Area) -> Tensor:
    """A view of picture (3, H, W)."""
    x1, y1, x2, y2 = area
    return picture[:, y1:y2, x1:x2]


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) in [0, 1] -> (3, *size), bicubic, clipped to [0, 1] where it overshoots; as it is where sizes agree."""
    if tuple(picture.shape[1:]) == size:
        return picture
    return F.interpolate(picture[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)


def total_variation(tile: Tensor) -> Tensor:
    """A scalar, of (3, h, w)."""
    parts = (tile[:, 1:] - tile[:, :-1], tile[:, :, 1:] - tile[:, :, :-1])
    return sum(part.abs().mean() for part in parts if part.numel())


class PixelOptimizer:
    """Moves some stored images of a set along their gradients, in place, and clips them to [0, 1].

    name: "sgd" (with momentum), "adam" (betas momentum, 0.999), or "normalized":

        m <- momentum m + (1 - momentum) g / rms(g),    x <- x - learning_rate m

    with rms(g) over one image, and the first g / rms(g) for the first m: the learning rate is what a pixel moves in a
    step, where steps agree. Slopes of gradient matching differ many times over from network to network; Adam, whose
    second moments remember the largest for a thousand steps, then moves by the few steps with the youngest networks and
    hardly by the rest. Every image has an optimizer state of its own, which moves only when the image does, so a set of
    which each step draws a part is learnt as a whole one.
    """

    def __init__(self, synthetic: SyntheticSet, *, name: str, learning_rate: float, momentum: float) -> None:
        self._rows = list(synthetic.pixels.detach().unbind(0))  # views: they share its memory
        self._is_normalized = name == "normalized"
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
        """rows (n,) of the set and the gradient (n, 3, S, S) of their pixels."""
        rows = rows.tolist()
        for row, slope in zip(rows, gradient, strict=True):
            if self._is_normalized:
                slope = slope / slope.square().mean().sqrt().clamp(min=SMALLEST_SLOPE)
            self._rows[row].grad = slope
        self._optimizer.step()
        for row in rows:
            self._rows[row].grad = None
            self._rows[row].clamp_(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return copy.deepcopy(self._optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(copy.deepcopy(state))
