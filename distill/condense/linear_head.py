"""A linear class head on frozen features: its loss, its gradient, its curvature, and the one head that minimises it.

A released detector is frozen up to the last layer of its class branch. What that layer reads at location a, with a 1
for the bias behind it, is a fixed vector h_a. The locations come in groups that share weights (the levels of YOLOv8).
A class head is a logistic regression for each class k and group g:

    z_ak = <theta_gk, h_a>,    g the group of a
    L(theta) = 1/n sum_ak softplus(z_ak) - y_ak z_ak  +  ridge/2 |theta - fresh|^2,    n = max(1, sum_ak y_ak)
    gradient   s_gk = 1/n sum_a (sigmoid(z_ak) - y_ak) h_a  +  ridge (theta_gk - fresh_gk)
    curvature  H_gk = 1/n sum_a sigmoid(z_ak) sigmoid(-z_ak) h_a h_a^T  +  ridge 1

The sum over softplus(z) - y z is the binary cross-entropy with targets y. fresh: weights 0, and biases that encode how
rare objects are. The ridge makes L strictly convex, so a set of images trains exactly one head, which Newton's method
finds. theta_gk of different g or k do not meet in L: the curvature is a matrix for each.

The targets follow from the boxes alone, not from what a detector predicts, so that they are constant in the pixels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from structures import Targets

Head = list[Tensor]
"""theta: for each group (K, D_g + 1) float64, the bias in the last column. Gradients have the same form."""

LOCATIONS_PER_OBJECT, PEAK = 10, 0.9  # of the targets
CELLS_PER_SIDE = 4.0  # an object is this many strides long at the level that suits it
ROWS_AT_ONCE = 4096  # of a sum over locations: they fit the processor's cache
NEWTON_STEPS, HALVINGS = 60, 12
DECREMENT = 1e-9  # of L, per class and group, that a further step could gain: Newton's method stops


@dataclass(frozen=True, eq=False)
class LocationGrid:
    """The A locations of a frozen detector, group by group.

    centers (A, 2) and sides (A,) in pixels: where a location is, and how long the objects are that suit it (the square
    root of their area). group_sizes: A_g, which add up to A. prior_logits: the bias of a fresh head, for each group.
    """

    centers: Tensor
    sides: Tensor
    group_sizes: tuple[int, ...]
    prior_logits: tuple[float, ...]

    def fresh_head(self, widths: Sequence[int], num_classes: int) -> Head:
        """Weights 0 and the prior biases; widths: D_g + 1."""
        head = [torch.zeros(num_classes, width, dtype=torch.float64, device=self.centers.device) for width in widths]
        for theta, logit in zip(head, self.prior_logits, strict=True):
            theta[:, -1] = logit
        return head


@dataclass(frozen=True, eq=False)
class HeadData:
    """What a head sees of B images: for each group features h (B, A_g, D_g + 1) and targets y (B, A_g, K)."""

    features: list[Tensor]
    targets: list[Tensor]

    def __len__(self) -> int:
        return len(self.features[0])

    def __getitem__(self, rows: Tensor) -> "HeadData":
        """The images `rows`."""
        return HeadData([h[rows] for h in self.features], [y[rows] for y in self.targets])

    @property
    def widths(self) -> list[int]:
        return [h.shape[-1] for h in self.features]

    @property
    def total(self) -> float:
        """n: the sum of all targets, at least 1."""
        return max(1.0, sum(float(y.double().sum()) for y in self.targets))

    def rows(self, group: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The locations of a group, some at a time: h (M, D_g + 1) and y (M, K)."""
        h, y = self.features[group].flatten(0, 1), self.targets[group].flatten(0, 1)
        return zip(h.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE))


def location_targets(grid: LocationGrid, targets: Targets, *, count: int, num_classes: int) -> list[Tensor]:
    """y of `count` images by their boxes alone: for each group (B, A_g, K) float32 in [0, 0.9].

        y_ak = 0.9 fit_a / max_a fit_a     at the ten locations of the largest fit_a > 0, for an object of class k
        fit_a = sqrt(u_x u_y) exp(-1/2 log2(side / side_a)^2)
        u_x = max(0, 1 - 2 |x_a - x| / w),    u_y likewise

    (x, y), w, h: center and size of the box, side = sqrt(w h). fit is largest in the middle of the box and at the level
    of its size; outside of the box it is 0. Of several objects of one class the largest y counts. An object too small
    to hold a center has no location. Objects to be ignored have none either.
    """
    y = torch.zeros(count, len(grid.sides), num_classes, device=grid.centers.device)
    for box_xyxy, label, image in zip(
        *(x[~targets.ignore] for x in (targets.boxes_xyxy, targets.labels, targets.image))
    ):
        box_xyxy = box_xyxy.to(grid.centers)
        size = (box_xyxy[2:] - box_xyxy[:2]).clamp(min=1e-6)
        offset = (grid.centers - (box_xyxy[:2] + box_xyxy[2:]) / 2).abs() / size  # (A, 2)
        u = (1 - 2 * offset).clamp(min=0).prod(1).sqrt()
        fit = u * torch.exp(-0.5 * torch.log2(size.prod().sqrt() / grid.sides).square())  # (A,)
        best, location = fit.sort(descending=True, stable=True)
        best, location = best[:LOCATIONS_PER_OBJECT], location[:LOCATIONS_PER_OBJECT]
        if best[0] > 0:
            before = y[image, location, label]
            y[image, location, label] = torch.maximum(before, PEAK * best / best[0])
    return list(y.split(grid.group_sizes, dim=1))


def head_logits(head: Head, features: Sequence[Tensor]) -> list[Tensor]:
    """z: for each group (..., D_g + 1) -> (..., K), in the precision of the features."""
    return [h @ theta.to(h).T for h, theta in zip(features, head, strict=True)]


def head_loss(head: Head, data: HeadData) -> tuple[list[Tensor], Head]:
    """L without the ridge, by group and class (K,), and its gradient. float64."""
    losses, gradient = [torch.zeros_like(theta[:, 0]) for theta in head], [torch.zeros_like(theta) for theta in head]
    for group, theta in enumerate(head):
        for h, y in data.rows(group):
            (z,) = head_logits([theta], [h])  # (M, K)
            losses[group] += (F.softplus(z) - y * z).sum(0)
            gradient[group] += (z.sigmoid() - y).T @ h
    n = data.total
    return [loss / n for loss in losses], [g / n for g in gradient]


def head_curvature(head: Head, data: HeadData, ridge: float) -> list[Tensor]:
    """H: for each group (K, D_g + 1, D_g + 1) float64."""
    curvature = []
    for group, theta in enumerate(head):
        H = theta.new_zeros(*theta.shape, theta.shape[1])
        for h, _ in data.rows(group):
            (z,) = head_logits([theta], [h])
            weight = z.sigmoid() * (-z).sigmoid()  # (M, K)
            for k in range(len(theta)):
                H[k] += (weight[:, k, None] * h).T @ h
        curvature.append(H / data.total + ridge * torch.eye(theta.shape[1]).to(H))
    return curvature


def newton_step(head: Head, data: HeadData, fresh: Head, ridge: float) -> tuple[Head, float]:
    """One step of Newton's method on L, and how much of L a full step would gain at most, over classes and groups.

    A step of a class and group is halved until its part of L does not grow.
    """
    losses, gradient = with_ridge(head, data, fresh, ridge)
    steps = solve(head_curvature(head, data, ridge), gradient)
    gain = max(float((g * step).sum(1).max()) / 2 for g, step in zip(gradient, steps))
    if not math.isfinite(gain):
        raise UserError(f"a linear head on frozen features: its loss is {float(sum(map(torch.sum, losses)))}", 3)
    lengths = [torch.ones_like(loss) for loss in losses]
    rounding = 16 * torch.finfo(data.features[0].dtype).eps
    for _ in range(HALVINGS):
        trial = [theta - length[:, None] * step for theta, length, step in zip(head, lengths, steps)]
        grows = [new > old + rounding * (1 + old) for new, old in zip(with_ridge(trial, data, fresh, ridge)[0], losses)]
        if not any(map(torch.any, grows)):
            break
        lengths = [torch.where(too_long, length / 2, length) for too_long, length in zip(grows, lengths)]
    return trial, gain


def fit_head(data: HeadData, fresh: Head, ridge: float, start: Head | None = None) -> Head:
    """The head that minimises L. start: where Newton's method begins, if not at `fresh`; the result depends on it by
    rounding alone. UserError (exit code 3) if the features are not finite.
    """
    head = fresh if start is None else start
    for _ in range(NEWTON_STEPS):
        head, gain = newton_step(head, data, fresh, ridge)
        if gain < DECREMENT:
            return head
    raise UserError(
        f"a linear head on frozen features: still {gain:.2g} above its minimum after {NEWTON_STEPS} steps", 3
    )


def with_ridge(head: Head, data: HeadData, fresh: Head, ridge: float) -> tuple[list[Tensor], Head]:
    """L by group and class, and its gradient."""
    losses, gradient = head_loss(head, data)
    away = [theta - start for theta, start in zip(head, fresh, strict=True)]
    losses = [loss + ridge / 2 * d.square().sum(1) for loss, d in zip(losses, away)]
    return losses, [g + ridge * d for g, d in zip(gradient, away)]


def solve(curvature: list[Tensor], gradient: Head) -> Head:
    """H^-1 s, for each class and group."""
    return [torch.linalg.solve(H, s) for H, s in zip(curvature, gradient)]


def gradient_products(head: Head, v: Head, features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """<v, n s_i> (B,) of each image i alone, s_i its part of the gradient of L without the ridge.

        <v, n s_i> = sum_ak (sigmoid(z_ak) - y_ak) <v_gk, h_a>

    Differentiable in the features.
    """
    z, along = head_logits(head, features), head_logits(v, features)
    parts = [((a.sigmoid() - y) * b).sum((1, 2)) for a, b, y in zip(z, along, targets)]
    return torch.stack(parts).sum(0)
