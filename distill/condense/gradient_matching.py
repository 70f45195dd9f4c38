"""Dataset distillation by gradient matching: pictures that teach a detector what real pictures teach it.

    Zhao et al., "Dataset Condensation with Gradient Matching", arXiv:2006.05929: the objective
    Zhao and Bilen, "Differentiable Siamese Augmentation", arXiv:2102.08259: one augmentation for both sides
    Kim et al., arXiv:2205.14959: several pictures in one (synthetic.py), networks trained on real pictures

    min_X  E_(theta, omega, B)  D( g_theta(omega X), g_theta(omega B) ) + lambda TV(X),     X in [0, 1]
    g_theta(A) = 1/|A| sum_(x in A) d/dtheta L(theta; x, boxes and labels of x)

One step:

    1  theta: the next network of the pool, early in its training on real pictures; omega: an augmentation
    2  B: batches of real pictures. BatchNorms, where the pool keeps them, keep the statistics of the first
    3  r = g_theta(omega B)
    4  s = g_theta(omega X), without a graph, X or as many of its pictures as a step takes
    5  v = d D(s, r) / d s
    6  for each few pictures x of X:  slope of x = d/dx <v, the part of x in s>, through a graph of those alone
    7  the pixels move against their slopes and are clipped to [0, 1]

D depends on a picture through the sum s alone, so 4 to 6 are exact, and the memory of a step is that of the pictures
that go through a network together, however many there are in all.

L is the detector's own loss of a batch of one picture: its normaliser (the sum of the target scores of YOLOv8, for
instance) is the picture's own, on both sides. That is what makes g a mean over pictures; the loss of a batch divides by
a normaliser of all pictures instead, so there a picture without objects counts less. What L holds constant in its
gradient (the assignment of objects to locations, target scores, alpha of CIoU) is made of the same predictions in 4 and
in 6 and is constant in 6 too. A loss that samples (Faster R-CNN) draws the same sample in 4 and in 6.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.condense.gradient_distance import gradient_distance
from distill.condense.mean_gradient import chunks, matched_parameters, mean_gradient, summed_gradient
from distill.condense.network_pool import (
    Augmentation,
    DrawAugmentation,
    NetworkPool,
    PoolSettings,
    RealBatch,
    as_float,
    set_statistics,
)
from distill.condense.synthetic import PixelOptimizer, SyntheticSet
from errors import UserError
from random_streams import Stream, seeded_generator
from structures import Targets


@dataclass(frozen=True)
class MatchingSettings:
    """steps, seed; pool: which networks. What is matched: distance, a key of gradient_distance.DISTANCES, over the
    convolution weights whose names begin with one of `layers` (empty: all of them).

    real_batches: draws of real pictures that r is the mean over; much of the distance to one draw is chance.
    pictures_per_step: stored pictures that a step takes, drawn anew for each; 0: all. pictures_at_once: pictures that
    go through a network together; memory and speed follow it, the result does not, but for rounding.
    optimizer, learning_rate, momentum: of the pixels, see PixelOptimizer. total_variation: lambda.
    """

    steps: int = 500
    seed: int = 0
    distance: str = "cosine"
    layers: tuple[str, ...] = ()
    real_batches: int = 1
    pictures_per_step: int = 0
    pictures_at_once: int = 8
    optimizer: str = "adam"
    learning_rate: float = 0.005
    momentum: float = 0.5
    total_variation: float = 0.0
    pool: PoolSettings = field(default_factory=PoolSettings)


@dataclass(frozen=True)
class MatchingReport:
    """What a step saw. relative: D(s, r) / D(0, r), 1 where the set has no gradient, 0 where it has the real one.

    network, trained: which of the pool, and the training steps it had made. s_loss, r_loss: mean detection losses of
    the synthetic and real pictures. moved: mean change of the pixels of the step's pictures, in 0..1.
    """

    step: int
    distance: float
    relative: float
    network: int
    trained: int
    s_loss: float
    r_loss: float
    moved: float


class GradientMatching:
    """Learns the pixels of a SyntheticSet, in place.

        matching = GradientMatching(synthetic, settings=..., build_network=lambda seed: models.build("yolov8n", 3),
                                    draw_real=..., draw_augmentation=...)
        matching.run(on_step=lambda step, report: ...)        # or matching.step(), matching.steps_done

    Args:
        build_network: seed -> a fresh detector (structures.Detector), see NetworkPool.
        draw_real: generator -> a batch of real pictures and targets (network_pool.RealBatch), of the set's image size.
        draw_augmentation: generator -> the augmentation of a step, the same for every picture of both sides
            (datasets.augment.draw_siamese); None: none.
    The networks are built on the device of the set's pixels. Every number drawn follows from settings.seed and the
    step, so state_dict, written after any step, is all it takes to go on to the same bytes.
    """

    def __init__(
        self,
        synthetic: SyntheticSet,
        *,
        settings: MatchingSettings,
        build_network: Callable[[int], nn.Module],
        draw_real: RealBatch,
        draw_augmentation: DrawAugmentation | None = None,
    ) -> None:
        if settings.real_batches < 1 or settings.pictures_at_once < 1:
            raise ValueError(f"{settings}: expected real_batches and pictures_at_once of 1 or more")
        self.synthetic, self.settings, self.steps_done = synthetic, settings, 0
        self._draw_real, self._draw_augmentation = draw_real, draw_augmentation
        self.pool = NetworkPool(
            build_network,
            settings=settings.pool,
            draw_real=draw_real,
            draw_augmentation=draw_augmentation,
            seed=settings.seed,
            device=synthetic.pixels.device,
        )
        self._optimizer = PixelOptimizer(
            synthetic, name=settings.optimizer, learning_rate=settings.learning_rate, momentum=settings.momentum
        )

    def run(self, on_step: Callable[[int, MatchingReport], None] | None = None) -> None:
        """The steps that are left; on_step(steps_done, report) after each may end the run by an exception."""
        while self.steps_done < self.settings.steps:
            report = self.step()
            if on_step is not None:
                on_step(self.steps_done, report)

    def step(self) -> MatchingReport:
        """One step of the algorithm above. UserError (exit code 3), the pixels untouched, for a number not finite."""
        settings, synthetic = self.settings, self.synthetic
        network, number, trained = self.pool.visit(self.steps_done)
        parameters = matched_parameters(network, settings.layers)
        generator = seeded_generator(Stream.MATCHING, settings.seed, self.steps_done)
        augment = self._draw_augmentation(generator) if self._draw_augmentation else as_it_is  # omega
        rows = draw_rows(len(synthetic), settings.pictures_per_step, generator)
        sampling = generator.initial_seed()  # what losses that sample are seeded with

        r, r_loss = mean_gradient(network, self._real(network, augment, generator), parameters, sampling)

        # As many stored pictures as hold pictures_at_once, at least one.
        groups = rows.split(max(1, settings.pictures_at_once // synthetic.tiles))
        with torch.no_grad():
            s, s_loss = mean_gradient(
                network, (augment(*synthetic.decode(group)) for group in groups), parameters, sampling
            )
        distance, v = distance_and_slope(s, r, settings.distance)
        slopes = torch.cat(
            [self._slopes_of(group, network, augment, parameters, v, len(rows), sampling) for group in groups]
        )  # (n, 3, S, S)
        values = {"gradient distance": distance, "slope of the pixels": slopes.abs().max()}
        self._check_finite(values, number, trained)

        before = synthetic.pixels.detach()[rows]
        self._optimizer.step(rows, slopes)
        self.steps_done += 1
        nothing = gradient_distance([torch.zeros_like(x) for x in r], r, settings.distance)
        return MatchingReport(
            step=self.steps_done,
            distance=distance.item(),
            relative=(distance / nothing).item(),
            network=number,
            trained=trained,
            s_loss=s_loss,
            r_loss=r_loss,
            moved=(synthetic.pixels.detach()[rows] - before).abs().mean().item(),
        )

    def _real(
        self, network: nn.Module, augment: Augmentation, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Targets]]:
        """The real images of a step, a few at once; BatchNorms have their statistics before the first come out."""
        device = self.synthetic.pixels.device
        for number in range(self.settings.real_batches):
            images, targets = self._draw_real(generator)
            with torch.no_grad():
                images, targets = augment(as_float(images.to(device)), targets.to(device))
            if number == 0:
                set_statistics(network, images)
            yield from chunks(images, targets, self.settings.pictures_at_once)

    def _slopes_of(
        self, rows: Tensor, network: nn.Module, augment: Augmentation, parameters: list[Tensor],
        v: tuple[Tensor, ...], count: int, sampling: int,
    ) -> Tensor:  # fmt: skip
        """d/dx of D + lambda TV for n stored images, of `count` in the step: (n, 3, S, S)."""
        synthetic = self.synthetic
        stored = synthetic.pixels.detach()[rows].requires_grad_()
        images, targets = augment(*synthetic.decode(rows, stored))  # (n r c, 3, S, S)
        leaf = images.detach().requires_grad_()
        g, _ = summed_gradient(network, leaf, targets, parameters, sampling, create_graph=True)
        share = 1 / (count * synthetic.tiles)  # of an image in s
        part = share * sum((a * b).sum() for a, b in zip(g, v))  # <v, their part of s>
        (slope,) = torch.autograd.grad(part, [leaf], materialize_grads=True)
        prior = self.settings.total_variation / count * synthetic.total_variation(rows, stored).sum()
        return torch.autograd.grad([images, prior], stored, [slope, torch.ones_like(prior)])[0]

    def _check_finite(self, values: dict[str, Tensor], number: int, trained: int) -> None:
        for name, value in values.items():
            if not value.isfinite():
                raise UserError(
                    f"gradient matching: the {name} is {value.item()} at step {self.steps_done}, network {number} after"
                    f" {trained} training steps; the pixels are those of the step before", 3
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: a copy, of tensors, numbers, lists and dicts."""
        state = {
            "steps_done": self.steps_done,
            "synthetic": self.synthetic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "pool": self.pool.state_dict(),
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was written, by a run of the same arguments; the set's pixels are filled in place."""
        self.steps_done = state["steps_done"]
        self.synthetic.load_state_dict(state["synthetic"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.pool.load_state_dict(state["pool"])


def distance_and_slope(s: list[Tensor], r: list[Tensor], kind: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """D(s, r) and d D / d s."""
    s = [x.detach().requires_grad_() for x in s]
    distance = gradient_distance(s, r, kind)
    return distance.detach(), torch.autograd.grad(distance, s, materialize_grads=True)


def draw_rows(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` of 0..count - 1, or all where that is 0 or more than there are, in increasing order."""
    rows = torch.randperm(count, generator=generator)
    return rows[: wanted or count].sort().values


def as_it_is(images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """No augmentation."""
    return images, targets
