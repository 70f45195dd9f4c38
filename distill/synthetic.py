"""The learnt set of dataset distillation: pictures whose pixels move, under boxes and labels that do not.

    stored (N, 3, S, S) ── decode ── pictures (N f f, 3, S, S) that a detector is trained on

Multi-formation (Kim et al., arXiv:2205.14959, sec. 4): a stored picture is a grid of f x f tiles of S / f pixels, and
each tile, enlarged to S, is a picture of its own; its boxes grow with it. f = 1: a stored picture is a picture.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structures import Targets

TILE_TOLERANCE = 1e-2  # pixels a box may reach over the edge of its tile, from rounding


class SyntheticSet:
    """N stored pictures and their objects.

    pixels: (N, 3, S, S) float32 or float64 in [0, 1], a leaf that requires grad; changed in place by PixelOptimizer.
    targets: boxes in pixels of the stored pictures, `image` is the row of `pixels`; constants. Each box lies within
        one tile. A picture may have none.
    formation: f, a divisor of S.
    """

    def __init__(self, pixels: Tensor, targets: Targets, formation: int = 1) -> None:
        """pixels are copied. ValueError where shapes, tiles or rows do not fit."""
        count, _, height, width = pixels.shape
        if height != width or formation < 1 or height % formation:
            raise ValueError(f"pictures of {height} x {width} pixels in {formation} x {formation} tiles")
        if len(targets) and not 0 <= int(targets.image.min()) <= int(targets.image.max()) < count:
            raise ValueError(f"objects of picture {int(targets.image.max())}, expected 0..{count - 1}")
        self.pixels = pixels.detach().clone().requires_grad_()
        self.targets = targets.to(pixels.device)
        self.formation = formation
        self._tile = self._tile_of_boxes()  # (M,) int64, row by row within the picture

    def __len__(self) -> int:
        """Stored pictures."""
        return len(self.pixels)

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    @classmethod
    def from_pictures(cls, pictures: Tensor, targets: Targets, formation: int = 1) -> "SyntheticSet":
        """Packs f f pictures, (N f f, 3, S, S) in [0, 1], into each stored one, in order, row by row.

        Every picture is reduced by the mean over f x f pixels. ValueError where their number is no multiple of f f.
        """
        f = formation
        if f < 1 or len(pictures) % f**2 or pictures.shape[-1] % f:
            raise ValueError(f"{len(pictures)} pictures of {pictures.shape[-1]} pixels in {f} x {f} tiles")
        tiles = F.avg_pool2d(pictures, f) if f > 1 else pictures  # (N f f, 3, S/f, S/f)
        return cls(join_tiles(tiles, f), pack_targets(targets, pictures.shape[-1], f), f)

    @classmethod
    def from_noise(
        cls, targets: Targets, *, count: int, image_size: int, formation: int = 1, generator: torch.Generator
    ) -> "SyntheticSet":
        """`count` stored pictures of noise, uniform in [0, 1], under given layouts.

        targets: of the count f f pictures after decoding, as from_pictures takes them.
        """
        noise = torch.rand(count, 3, image_size, image_size, generator=generator)
        return cls(noise, pack_targets(targets, image_size, formation), formation)

    def decode(self, rows: Tensor, stored: Tensor | None = None) -> tuple[Tensor, Targets]:
        """rows (n,) int64, distinct -> pictures (n f f, 3, S, S) and their targets, boxes in pixels of the pictures.

        Picture k f f + t is tile t of stored picture rows[k]. Bilinear, in [0, 1]. Differentiable in `pixels`, or in
        stored (n, 3, S, S), which is read in the place of pixels[rows].
        """
        f, rows = self.formation, rows.to(self.pixels.device)
        pictures = split_tiles(self.pixels[rows] if stored is None else stored, f)  # (n f f, 3, S/f, S/f)
        if f > 1:
            pictures = F.interpolate(pictures, size=self.image_size, mode="bilinear", align_corners=False)
        place = torch.full((len(self),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        place = place[self.targets.image]  # (M,) of the object's picture among `rows`, or -1
        objects = (place >= 0).nonzero()[:, 0]
        tile, targets = self._tile[objects], self.targets[objects]
        boxes_xyxy = (targets.boxes_xyxy - tile_corners(tile, self.image_size, f).to(targets.boxes_xyxy)) * f
        return pictures, Targets(boxes_xyxy, targets.labels, place[objects] * f**2 + tile, targets.ignore)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers alone; pixels are copied."""
        t = self.targets
        return {
            "pixels": self.pixels.detach().clone(),
            "boxes_xyxy": t.boxes_xyxy, "labels": t.labels, "image": t.image, "ignore": t.ignore,
            "formation": self.formation,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "SyntheticSet":
        """The set that state_dict wrote down, bit for bit."""
        targets = Targets(state["boxes_xyxy"], state["labels"], state["image"], state["ignore"])
        return cls(state["pixels"], targets, state["formation"])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the pixels of a set with the same objects, in place; ValueError for another one."""
        saved = SyntheticSet.from_state(state)
        same = saved.pixels.shape == self.pixels.shape and saved.formation == self.formation
        for name in ("boxes_xyxy", "labels", "image", "ignore"):
            same = same and torch.equal(getattr(saved.targets, name).cpu(), getattr(self.targets, name).cpu())
        if not same:
            raise ValueError("the state is of another synthetic set: its size, formation or objects differ")
        self.pixels.copy_(saved.pixels)

    def _tile_of_boxes(self) -> Tensor:
        f, side, boxes_xyxy = self.formation, self.image_size / self.formation, self.targets.boxes_xyxy
        center = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        column, row = (center / side).long().clamp(0, f - 1).unbind(1)  # (M,) each
        tile = row * f + column
        corner = tile_corners(tile, self.image_size, f).to(boxes_xyxy)  # (M, 4)
        is_out = (boxes_xyxy - corner < -TILE_TOLERANCE) | (boxes_xyxy - corner > side + TILE_TOLERANCE)
        if is_out.any():
            first = int(is_out.any(1).nonzero()[0])
            box = [round(x, 2) for x in boxes_xyxy[first].tolist()]
            raise ValueError(f"object {first}: box {box} is not within one of {f} x {f} tiles of {side:g} pixels")
        return tile


def split_tiles(stored: Tensor, formation: int) -> Tensor:
    """(N, C, S, S) -> its tiles (N f f, C, S/f, S/f), picture by picture, row by row. Inverse of join_tiles."""
    f, (N, C, S, _) = formation, stored.shape
    tiles = stored.view(N, C, f, S // f, f, S // f).permute(0, 2, 4, 1, 3, 5)  # (N, f, f, C, S/f, S/f)
    return tiles.reshape(N * f * f, C, S // f, S // f)


def join_tiles(tiles: Tensor, formation: int) -> Tensor:
    """(N f f, C, s, s) -> (N, C, s f, s f)."""
    f, (count, C, s, _) = formation, tiles.shape
    grid = tiles.view(count // f**2, f, f, C, s, s).permute(0, 3, 1, 4, 2, 5)  # (N, C, f, s, f, s)
    return grid.reshape(count // f**2, C, f * s, f * s)


def tile_corners(tile: Tensor, image_size: int, formation: int) -> Tensor:
    """tile (M,) of 0..f f - 1 -> x, y, x, y (M, 4) of the top left corner in pixels of the stored picture."""
    x, y = tile % formation, tile // formation
    return torch.stack((x, y, x, y), dim=1) * (image_size / formation)


def pack_targets(targets: Targets, image_size: int, formation: int) -> Targets:
    """Targets of N f f pictures -> of the N stored ones: boxes reduced by f and moved into their tiles."""
    f = formation
    corner = tile_corners(targets.image % f**2, image_size, f).to(targets.boxes_xyxy)
    return Targets(targets.boxes_xyxy / f + corner, targets.labels, targets.image // f**2, targets.ignore)


def total_variation(stored: Tensor, formation: int = 1) -> Tensor:
    """How much neighbouring pixels differ, (N, C, S, S) -> (N,); not across the edges of tiles.

    TV(x) = mean |x_(i+1)j - x_ij| + mean |x_i(j+1) - x_ij|        (Rudin, Osher and Fatemi 1992, anisotropic)
    """
    tiles = split_tiles(stored, formation)
    down = (tiles[:, :, 1:] - tiles[:, :, :-1]).abs().flatten(1).mean(1)  # (N f f,)
    right = (tiles[:, :, :, 1:] - tiles[:, :, :, :-1]).abs().flatten(1).mean(1)
    return (down + right).view(len(stored), -1).mean(1)


class PixelOptimizer:
    """Moves some pictures of a set along their gradients, then clips them to [0, 1].

    name: "sgd" (with momentum) or "adam" (betas momentum, 0.999). Every stored picture has an optimizer state of its
    own, which moves only when the picture does, so a set of which each step draws a part is learnt as a whole one.
    """

    def __init__(self, synthetic: SyntheticSet, *, name: str, learning_rate: float, momentum: float) -> None:
        self._pictures = list(synthetic.pixels.detach().unbind(0))  # views: they share the pixels' memory
        if name == "sgd":
            self._optimizer = torch.optim.SGD(self._pictures, lr=learning_rate, momentum=momentum)
        elif name == "adam":
            self._optimizer = torch.optim.Adam(self._pictures, lr=learning_rate, betas=(momentum, 0.999))
        else:
            raise ValueError(f"pixel optimizer {name!r}: expected sgd or adam")

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor) -> None:
        """rows (n,) of the set and the gradient (n, 3, S, S) of their pixels."""
        rows = rows.tolist()
        for row, slope in zip(rows, gradient, strict=True):
            self._pictures[row].grad = slope
        self._optimizer.step()
        for row in rows:
            self._pictures[row].grad = None
            self._pictures[row].clamp_(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return copy.deepcopy(self._optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(copy.deepcopy(state))
