"""Dataset distillation by gradient matching: synthetic images whose gradients are those of real images.

    Zhao et al., "Dataset Condensation with Gradient Matching", arXiv:2006.05929: the objective
    Zhao and Bilen, "Differentiable Siamese Augmentation", arXiv:2102.08259: one augmentation for both sides
    Kim et al., arXiv:2205.14959: several images stored in one (synthetic.py), networks trained on real images

    min_X  E_(theta, omega, B)  D( g_theta(omega X), g_theta(omega B) ) + lambda TV(X),     X in [0, 1]
    g_theta(A) = 1/|A| sum_(x in A) d/dtheta L(theta; x, boxes and labels of x)

One step:

    1  theta: the next network of the pool, early in its training on real images; omega: an augmentation
    2  B: batches of real images. If the pool keeps BatchNorms, they take the statistics of the first batch
    3  r = g_theta(omega B)
    4  s = g_theta(omega X), without a graph, for all images of X or for those that the step draws
    5  v = d D(s, r) / d s
    6  for each group of images x of X:  gradient of x = d/dx <v, the part of x in s>, through a graph of this group
    7  the pixels move against their gradients and are clipped to [0, 1]

D depends on an image only through the sum s. So steps 4 to 6 are exact, and the memory of a step is that of one group,
whatever the number of images.

L is the detector's own loss for a batch of one image, so its normaliser (such as the sum of YOLOv8's target scores) is
that of the image, on both sides. This makes g a mean over images. The loss of a larger batch has one normaliser for all
images, so an image without objects would count less. What L treats as constant in its gradient (the assignment of
objects to locations, target scores, alpha of CIoU) follows from the same predictions in 4 and 6, and is constant in 6,
too. A loss that samples (Faster R-CNN) draws the same sample in 4 and 6.
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
    """The settings of a run.

    distance: D, a key of gradient_distance.DISTANCES.
    layers: D compares the convolution weights whose names begin with one of these; (): all.
    real_batches: r is the mean over this many batches of real images; with one, much of the distance is chance.
    pictures_per_step: stored images that a step draws; 0: all.
    pictures_at_once: images in a group. Memory and speed depend on it; the result does not, except for rounding.
    optimizer, learning_rate, momentum: of the pixels, see PixelOptimizer.
    total_variation: lambda.
    pool: the networks.
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
    """The numbers of a step, all but `moved` of the set before it.

    relative: D(s, r) / D(0, r): 1 for a set without gradients, 0 for one with the gradients of real images.
    network, trained: the network's number in the pool, and the training steps that it has made.
    s_loss, r_loss: mean detection loss of the synthetic and of the real images.
    moved: mean change of the pixels in the step, in 0..1.
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
        draw_real: generator -> a batch of real images and targets (network_pool.RealBatch), of the set's image size.
        draw_augmentation: generator -> the augmentation of a step, the same for every image of both sides
            (datasets.augment.draw_siamese); None: no augmentation.
    The networks are built on the device of the set's pixels. All random draws depend on settings.seed and the step
    alone, so a run that goes on from the state_dict of any step ends with the same bytes.
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
        if min(settings.real_batches, settings.pictures_at_once) < 1 or settings.pictures_per_step < 0:
            raise ValueError(
                f"{settings}: expected real_batches and pictures_at_once of 1 or more, pictures_per_step of 0 or more"
            )
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
        """Run the steps that are left, with on_step(steps_done, report) after each, which may raise to end the run."""
        while self.steps_done < self.settings.steps:
            report = self.step()
            if on_step is not None:
                on_step(self.steps_done, report)

    def step(self) -> MatchingReport:
        """One step of the algorithm above. UserError (exit code 3), before the pixels change, if one is not finite."""
        settings, synthetic = self.settings, self.synthetic
        network, number, trained = self.pool.visit(self.steps_done)
        parameters = matched_parameters(network, settings.layers)
        generator = seeded_generator(Stream.MATCHING, settings.seed, self.steps_done)
        augment = self._draw_augmentation(generator) if self._draw_augmentation else no_augmentation  # omega
        rows = draw_rows(len(synthetic), settings.pictures_per_step, generator)
        sampling_seed = generator.initial_seed()  # of losses that draw samples

        r, r_loss = mean_gradient(network, self._real(network, augment, generator), parameters, sampling_seed)

        # A group holds pictures_at_once images, but at least one stored image.
        groups = rows.split(max(1, settings.pictures_at_once // synthetic.tiles))
        with torch.no_grad():
            s, s_loss = mean_gradient(
                network, (augment(*synthetic.decode(group)) for group in groups), parameters, sampling_seed
            )
        distance, v = distance_and_gradient(s, r, settings.distance)
        gradients = torch.cat(
            [
                self._pixel_gradients(group, network, augment, parameters, v, len(rows), sampling_seed)
                for group in groups
            ]
        )  # (n, 3, S, S)
        values = {"gradient distance": distance, "gradient of the pixels": gradients.abs().max()}
        self._check_finite(values, number, trained)

        before = synthetic.pixels.detach()[rows]
        self._optimizer.step(rows, gradients)
        self.steps_done += 1
        distance_to_zero = gradient_distance([torch.zeros_like(x) for x in r], r, settings.distance)
        return MatchingReport(
            step=self.steps_done,
            distance=distance.item(),
            relative=(distance / distance_to_zero).item(),
            network=number,
            trained=trained,
            s_loss=s_loss,
            r_loss=r_loss,
            moved=(synthetic.pixels.detach()[rows] - before).abs().mean().item(),
        )

    def _real(
        self, network: nn.Module, augment: Augmentation, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Targets]]:
        """The real images of a step in groups. BatchNorms get their statistics before the first group."""
        device = self.synthetic.pixels.device
        for number in range(self.settings.real_batches):
            images, targets = self._draw_real(generator)
            with torch.no_grad():
                images, targets = augment(as_float(images.to(device)), targets.to(device))
            if number == 0:
                set_statistics(network, images)
            yield from chunks(images, targets, self.settings.pictures_at_once)

    def _pixel_gradients(
        self, rows: Tensor, network: nn.Module, augment: Augmentation, parameters: list[Tensor],
        v: tuple[Tensor, ...], count: int, sampling_seed: int,
    ) -> Tensor:  # fmt: skip
        """d/dx of D + lambda TV for the n stored images `rows`, (n, 3, S, S). count: stored images in the step."""
        synthetic = self.synthetic
        stored = synthetic.pixels.detach()[rows].requires_grad_()
        images, targets = augment(*synthetic.decode(rows, stored))  # (n r c, 3, S, S)
        leaf = images.detach().requires_grad_()
        g, _ = summed_gradient(network, leaf, targets, parameters, sampling_seed, create_graph=True)
        share = 1 / (count * synthetic.tiles)  # of an image in s
        part = share * sum(((a * b).sum() for a, b in zip(g, v)), leaf.new_zeros(()))  # <v, the part of rows in s>
        (image_gradient,) = torch.autograd.grad(part, [leaf], materialize_grads=True)
        prior = self.settings.total_variation / count * synthetic.total_variation(rows, stored).sum()
        return torch.autograd.grad([images, prior], stored, [image_gradient, torch.ones_like(prior)])[0]

    def _check_finite(self, values: dict[str, Tensor], number: int, trained: int) -> None:
        for name, value in values.items():
            if not value.isfinite():
                raise UserError(
                    f"gradient matching: the {name} is {value.item()} at step {self.steps_done}, network {number} after"
                    f" {trained} training steps; the pixels are those of the step before", 3
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The state of the run: a copy, made of tensors, numbers, lists and dicts."""
        state = {
            "steps_done": self.steps_done,
            "synthetic": self.synthetic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "pool": self.pool.state_dict(),
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state_dict of a run with the same arguments. Fills the set's pixels in place."""
        self.steps_done = state["steps_done"]
        self.synthetic.load_state_dict(state["synthetic"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.pool.load_state_dict(state["pool"])


def distance_and_gradient(s: list[Tensor], r: list[Tensor], kind: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """D(s, r) and d D / d s."""
    s = [x.detach().requires_grad_() for x in s]
    distance = gradient_distance(s, r, kind)
    return distance.detach(), torch.autograd.grad(distance, s, materialize_grads=True)


def draw_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` random rows of 0..count - 1 in increasing order; all of them if `size` is 0 or more than `count`."""
    rows = torch.randperm(count, generator=generator)
    return rows[: size or count].sort().values


def no_augmentation(images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    return images, targets
