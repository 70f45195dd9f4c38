"""Model inversion: pictures in which a trained detector sees the objects they are said to hold.

    min_X  L(theta*; X, boxes and labels) + lambda TV(X) + mu R(X),     X in [0, 1], theta* trained and fixed

    R(X) = 1/L sum_l ( |mean_l(X) - mean*_l|^2 + |var_l(X) - var*_l|^2 ) / C_l

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", arXiv:1912.08795, with the loss of a
detector in the place of the class loss. mean_l and var_l are those of a step's pictures at the input of the l-th of L
BatchNorms, over their C_l channels; the starred ones its running statistics. L is the loss of the step's pictures as
one batch.

Differs from the paper: R is a mean over layers and channels of squares, there a sum over layers of the lengths of the
vectors; no second network to disagree with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.gradient_matching import as_it_is, draw_rows
from distill.network_pool import MATCH, DrawAugmentation, reproducible, seeded_generator
from distill.synthetic import PixelOptimizer, SyntheticSet
from errors import UserError


@dataclass(frozen=True)
class InversionSettings:
    """pictures_per_step: stored pictures that a step takes, one batch of the detector; 0: all.

    optimizer, learning_rate, momentum: of the pixels, see PixelOptimizer. total_variation: lambda. statistics: mu.
    """

    steps: int = 500
    seed: int = 0
    pictures_per_step: int = 16
    optimizer: str = "adam"
    learning_rate: float = 0.01
    momentum: float = 0.9
    total_variation: float = 0.1
    statistics: float = 1.0


@dataclass(frozen=True)
class InversionReport:
    """What a step saw, before its pixels moved: the detection loss, R and the mean TV."""

    step: int
    loss: float
    statistics: float
    total_variation: float


class Inversion:
    """Learns the pixels of a SyntheticSet, in place, from one trained detector. Used as GradientMatching is.

    network: a trained detector (structures.Detector) on the device of the set's pixels; put into eval mode, unchanged.
    draw_augmentation: as for GradientMatching; the same for all pictures of a step.
    UserError where statistics > 0 and the detector has no live BatchNorm that it calls in eval mode.
    """

    def __init__(
        self,
        synthetic: SyntheticSet,
        *,
        settings: InversionSettings,
        network: nn.Module,
        draw_augmentation: DrawAugmentation | None = None,
    ) -> None:
        self.synthetic, self.settings, self.steps_done = synthetic, settings, 0
        self.network = network.eval().requires_grad_(False)
        self._draw_augmentation = draw_augmentation
        self._optimizer = PixelOptimizer(
            synthetic, name=settings.optimizer, learning_rate=settings.learning_rate, momentum=settings.momentum
        )

    def run(self, on_step: Callable[[int, InversionReport], None] | None = None) -> None:
        """The steps that are left; on_step(steps_done, report) after each may end the run by an exception."""
        while self.steps_done < self.settings.steps:
            report = self.step()
            if on_step is not None:
                on_step(self.steps_done, report)

    def step(self) -> InversionReport:
        """One step of descent. UserError (exit code 3), the pixels untouched, for a number not finite."""
        settings, synthetic = self.settings, self.synthetic
        generator = seeded_generator(settings.seed, MATCH, self.steps_done)
        augment = self._draw_augmentation(generator) if self._draw_augmentation else as_it_is
        rows = draw_rows(len(synthetic), settings.pictures_per_step, generator)
        stored = synthetic.pixels.detach()[rows].requires_grad_()
        pictures, targets = augment(*synthetic.decode(rows, stored))
        with reproducible(generator.initial_seed()), statistics_distances(self.network) as distances:
            loss = sum(self.network.losses(self.network(pictures), targets).values())
        if settings.statistics and not distances:
            raise UserError(
                f"inversion.statistics: found {settings.statistics:g}, expected 0: {type(self.network).__name__} calls"
                " no BatchNorm in eval mode"
            )
        statistics = sum(distances) / max(len(distances), 1) * torch.ones_like(loss)
        variation = synthetic.total_variation(rows, stored).mean()
        objective = loss + settings.total_variation * variation + settings.statistics * statistics
        slope = torch.autograd.grad(objective, stored)[0]
        if not (objective.isfinite() and slope.isfinite().all()):
            raise UserError(
                f"inversion: the objective is {objective.item()} at step {self.steps_done}, or its slope is not finite;"
                " the pixels are those of the step before", 3
            )  # fmt: skip
        self._optimizer.step(rows, slope)
        self.steps_done += 1
        return InversionReport(self.steps_done, loss.item(), statistics.item(), variation.item())

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: a copy, of tensors, numbers, lists and dicts."""
        return {
            "steps_done": self.steps_done,
            "synthetic": self.synthetic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was written, by a run of the same arguments; the set's pixels are filled in place."""
        self.steps_done = state["steps_done"]
        self.synthetic.load_state_dict(state["synthetic"])
        self._optimizer.load_state_dict(state["optimizer"])


@contextmanager
def statistics_distances(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that fills with the terms of R, scalars, one for each call of a BatchNorm in this context."""
    distances: list[Tensor] = []

    def compare(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]  # (B, C, H, W)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)  # (C,) each
        distances.append((mean - norm.running_mean).square().mean() + (var - norm.running_var).square().mean())

    handles = [m.register_forward_pre_hook(compare) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()
