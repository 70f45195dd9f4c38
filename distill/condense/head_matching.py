"""Gradient matching where it works: the pixels of a few images, a frozen backbone, and a linear class head to learn.

    Zhao et al., "Dataset Condensation with Gradient Matching", arXiv:2006.05929: the idea
    linear_head.py: theta, the loss L and its gradient s, the curvature H

A few images X train one head, theta_X = argmin L_X. They are good if it is a good head for all real images R:

    min_X  L_R(theta_X) + lambda TV(X),     X in [0, 1]

One step:

    1  h = the frozen features of X
    2  theta = theta_X, by Newton's method, from the head of the step before
    3  r = gradient of L_R at theta, without the ridge. The features of all real images are kept, so r is exact
    4  v = -H^-1 r, H the curvature of L_X at theta
    5  for each group of images x of X:  gradient of x = d/dx <v, the part of x in s>, s the gradient of L_X at theta
    6  the pixels move against their gradients and are clipped to [0, 1]

This is the gradient of L_R(theta_X) by the implicit function theorem: s(theta_X, X) = 0 for all X, so
d theta_X / dX = -H^-1 ds/dX. It is gradient matching too, at the head that X itself trains and in the metric of its
curvature: at theta_X the gradients of the two sets differ by r, and v is d/ds of 1/2 (s - r)^T H^-1 (s - r) there.
The distances of the literature are others, at heads that X has not trained (`pool`): see DISTANCES.

L_X depends on an image only through sums over images, and its n through the boxes alone. So step 5 is exact, and the
memory of a step is that of one group and of the features, whatever the number of images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.condense.coresets import check_count
from distill.condense.linear_head import (
    Head,
    HeadData,
    LocationGrid,
    fit_head,
    gradient_products,
    head_curvature,
    head_loss,
    location_targets,
    newton_step,
    solve,
)
from distill.condense.synthetic import PixelOptimizer, SyntheticSet
from errors import UserError

Features = Callable[[Tensor], list[Tensor]]
"""Images (B, 3, S, S) in [0, 1] -> h for each group (B, A_g, D_g + 1), differentiable."""
SMALLEST_SINGULAR_VALUE = 1e-6  # of the largest; below it is rounding, since features are float32
CURVATURE = "curvature"  # the algorithm above; the other distances are in DISTANCES


@dataclass(frozen=True)
class HeadSettings:
    """How pixels are learnt for a linear head on a frozen backbone: distill/condense/head_matching.py."""

    steps: int = 60  # steps of the pixels
    distance: str = CURVATURE  # the algorithm; cosine, orthogonal or squared: distances at the heads of a pool
    ridge: float = 0.2  # of the head that the set trains
    pool: int = 12  # heads of the other distances: the first steps of Newton's method on all real pictures
    optimizer: str = "adam"  # adam, sgd or normalized
    learning_rate: float = 0.01  # of the pixels, which are in 0..1
    momentum: float = 0.9  # of the optimizer; beta_1 of adam
    total_variation: float = 0.0  # weight of the pictures' total variation
    pictures_at_once: int = 16  # images in a group: memory depends on it; the result does not, except for rounding


@dataclass(frozen=True)
class HeadReport:
    """The numbers of a step.

    distance: L_R(theta_X), or the mean distance over the pool, of the set before the step. moved: mean change of the
        pixels in the step, in 0..1.
    """

    step: int
    distance: float
    moved: float


class HeadMatching:
    """Learns the pixels of a SyntheticSet, in place.

        matching = HeadMatching(synthetic, settings=..., features=..., grid=..., real=...)
        matching.run(on_step=lambda step, report: ...)        # or matching.step(), matching.steps_done

    Args:
        features: the frozen backbone, on the device of the set's pixels.
        grid: its locations.
        real: the features and targets of all real images, on that device.
    Nothing is drawn at random: a run that goes on from the state_dict of any step ends with the same bytes.
    """

    def __init__(
        self, synthetic: SyntheticSet, *, settings: HeadSettings, features: Features, grid: LocationGrid, real: HeadData
    ) -> None:
        if settings.pictures_at_once < 1 or settings.pool < 1 or not settings.ridge > 0:
            raise ValueError(f"{settings}: expected pictures_at_once and pool of 1 or more, and a ridge above 0")
        if settings.distance != CURVATURE and settings.distance not in DISTANCES:
            expected = ", ".join((CURVATURE, *DISTANCES))
            raise ValueError(f"distance {settings.distance!r}: expected one of {expected}")
        self.synthetic, self.settings, self.steps_done = synthetic, settings, 0
        self._features, self._real = features, real
        num_classes = real.targets[0].shape[-1]
        self._fresh = grid.fresh_head(real.widths, num_classes)
        count = len(synthetic) * synthetic.tiles
        self._targets = location_targets(grid, synthetic.targets, count=count, num_classes=num_classes)
        self._head: Head | None = None  # theta_X of the last step
        self._pool: list[tuple[Head, Head]] = []  # heads, and the gradients of all real images there
        self._optimizer = PixelOptimizer(
            synthetic, name=settings.optimizer, learning_rate=settings.learning_rate, momentum=settings.momentum
        )

    def run(self, on_step: Callable[[int, HeadReport], None] | None = None) -> None:
        """Run the steps that are left, with on_step(steps_done, report) after each, which may raise to end the run."""
        while self.steps_done < self.settings.steps:
            report = self.step()
            if on_step is not None:
                on_step(self.steps_done, report)

    def step(self) -> HeadReport:
        """One step of the algorithm above. UserError (exit code 3), before the pixels change, if one is not finite."""
        synthetic = self.synthetic
        groups = torch.arange(len(synthetic)).split(max(1, self.settings.pictures_at_once // synthetic.tiles))

        keep = len(groups) == 1  # the graphs of all groups at once would fill the memory
        passes = [self._forward(group, keep=keep) for group in groups]
        features = [torch.cat(parts).detach() for parts in zip(*(h for _, h in passes))]
        data = HeadData(features, self._targets)

        if self.settings.distance == CURVATURE:
            distance, terms = self._own_head(data)
        else:
            distance, terms = self._pool_of_heads(data)

        gradients = torch.cat(
            [
                self._pixel_gradients(group, passes[0] if keep else self._forward(group, keep=True), terms, data.total)
                for group in groups
            ]
        )  # (N, 3, S, S)
        for name, value in (("distance", distance), ("gradient of the pixels", float(gradients.abs().max()))):
            if not torch.tensor(value).isfinite():
                raise UserError(f"matching a linear head: the {name} is {value} at step {self.steps_done}", 3)

        before = synthetic.pixels.detach().clone()
        self._optimizer.step(torch.arange(len(synthetic)), gradients)
        self.steps_done += 1
        moved = (synthetic.pixels.detach() - before).abs().mean().item()
        return HeadReport(step=self.steps_done, distance=distance, moved=moved)

    def _own_head(self, data: HeadData) -> tuple[float, list[tuple[Head, Head]]]:
        """Steps 2 to 4: L_R(theta), and theta with v."""
        ridge = self.settings.ridge
        theta = self._head = fit_head(data, self._fresh, ridge, self._head)
        losses, r = head_loss(theta, self._real)
        v = [-step for step in solve(head_curvature(theta, data, ridge), r)]
        return float(sum(loss.sum() for loss in losses)), [(theta, v)]

    def _pool_of_heads(self, data: HeadData) -> tuple[float, list[tuple[Head, Head]]]:
        """Instead of them, of the other distances: the mean of D(s, r) over the pool, and each head with dD/ds."""
        if not self._pool:
            theta = self._fresh
            for _ in range(self.settings.pool):
                self._pool.append((theta, head_loss(theta, self._real)[1]))
                theta, _ = newton_step(theta, self._real, self._fresh, self.settings.ridge)
        total, terms = 0.0, []
        for theta, r in self._pool:
            s = [g.requires_grad_() for g in head_loss(theta, data)[1]]
            distance = DISTANCES[self.settings.distance](s, r) / len(self._pool)
            terms.append((theta, list(torch.autograd.grad(distance, s))))
            total += distance.item()
        return total, terms

    def _forward(self, rows: Tensor, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """The stored images `rows` as a leaf (n, 3, S, S), and h of what they decode to. keep: the graph of h."""
        stored = self.synthetic.pixels.detach()[rows].requires_grad_()
        with torch.set_grad_enabled(keep):
            return stored, self._features(self.synthetic.decode(rows, stored)[0])

    def _pixel_gradients(
        self, rows: Tensor, forward: tuple[Tensor, list[Tensor]], terms: list[tuple[Head, Head]], total: float
    ) -> Tensor:
        """Step 5 for the stored images `rows`: (n, 3, S, S). forward: their _forward, with its graph."""
        synthetic, (stored, features) = self.synthetic, forward
        targets = [y[synthetic.numbers(rows)] for y in self._targets]
        products = [gradient_products(theta, v, features, targets).sum() / total for theta, v in terms]
        objective = torch.stack(products).sum()
        if self.settings.total_variation:
            prior = synthetic.total_variation(rows, stored).sum()
            objective = objective + self.settings.total_variation / len(synthetic) * prior
        return torch.autograd.grad(objective, stored)[0]

    def state_dict(self) -> dict[str, Any]:
        """The state of the run: a copy, made of tensors, numbers, lists and dicts. The pool is made again."""
        return {
            "steps_done": self.steps_done,
            "synthetic": self.synthetic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "head": self._head and [theta.clone() for theta in self._head],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state_dict of a run with the same arguments. Fills the set's pixels in place."""
        self.steps_done = state["steps_done"]
        self.synthetic.load_state_dict(state["synthetic"])
        self._optimizer.load_state_dict(state["optimizer"])
        device = self.synthetic.pixels.device
        self._head = state["head"] and [theta.to(device) for theta in state["head"]]


def cosine_distance(s: Head, r: Head) -> Tensor:
    """sum_gk |r_gk| (1 - cos(s_gk, r_gk)) / sum_gk |r_gk|: each class and group by the length of the real gradient."""
    lengths = [x.norm(dim=1) for x in r]  # (K,)
    apart = [(1 - torch.cosine_similarity(a, b, dim=1)) * length for a, b, length in zip(s, r, lengths)]
    return torch.cat(apart).sum() / torch.cat(lengths).sum().clamp(min=1e-12)


def orthogonal_distance(s: Head, r: Head) -> Tensor:
    """The mean over groups of 1 - <U_s V_s^T, U_r V_r^T> / K, the gradients (K, D_g + 1) with singular values of 1.

    Singular values that are 0 stay 0. Two classes without an object in the set have equal rows at a head that does not
    tell them apart, whatever the pixels: their difference has no direction, and gets no gradient.
    """

    def orthogonal(x: Tensor) -> Tensor:
        basis, sizes, _ = torch.linalg.svd(x.detach(), full_matrices=False)
        basis = basis[:, sizes > SMALLEST_SINGULAR_VALUE * sizes[0]]  # (K, rank)
        u, _, vh = torch.linalg.svd(basis.T @ x, full_matrices=False)  # of full rank: its derivative is finite
        return basis @ u @ vh

    return torch.stack([1 - (orthogonal(a) * orthogonal(b)).sum() / min(a.shape) for a, b in zip(s, r)]).mean()


def squared_distance(s: Head, r: Head) -> Tensor:
    """|s - r|^2 / |r|^2."""
    a, b = (torch.cat([x.flatten() for x in gradient]) for gradient in (s, r))
    return (a - b).square().sum() / b.square().sum().clamp(min=1e-24)


DISTANCES: dict[str, Callable[[Head, Head], Tensor]] = {
    "cosine": cosine_distance,
    "orthogonal": orthogonal_distance,
    "squared": squared_distance,
}


def head_gradient_rows(real: HeadData, count: int, fresh: Head, ridge: float) -> Tensor:
    """Greedily, the real image whose gradient moves the head most towards that of all images: rows (count,) int64.

    With theta the head of the chosen images C, n the sum of their targets, r and v as above, and s_C the gradient of
    L_C without its ridge, an image i with the gradient s_i and the sum n_i of targets changes L_R(theta_C) by about

        <v, n_i s_i - n_i s_C> / (n + n_i)

    next is the image for which this is lowest; images without objects come last. Before the first choice theta is
    `fresh` and H is the ridge. It is what HeadMatching does to pixels, with a choice instead of a step.
    """
    check_count(count, len(real))
    chosen: list[int] = []
    totals = torch.stack([y.double().sum((1, 2)) for y in real.targets]).sum(0)  # n_i (B,)
    for _ in range(count):
        subset = real[torch.tensor(chosen, dtype=torch.int64)]
        theta = fit_head(subset, fresh, ridge) if chosen else fresh
        _, r = head_loss(theta, real)
        v = [-step for step in solve(head_curvature(theta, subset, ridge), r)]
        s = head_loss(theta, subset)[1]
        along = float(sum((a * b).sum() for a, b in zip(v, s)))  # <v, s_C>
        change = gradient_products(theta, v, real.features, real.targets).double() - totals * along
        change = change / (totals + (subset.total if chosen else 0)).clamp(min=1)
        change[totals == 0] = torch.finfo(change.dtype).max
        change[chosen] = torch.inf
        chosen.append(int(change.argmin()))
    return torch.tensor(chosen)
