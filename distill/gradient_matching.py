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

Where class_learning_rate is above 0, the class scores of the synthetic objects are learnt beside the pixels: X is then
pixels and class logits, 6 has the slopes of both, and the logits move in 7 with an optimizer of their own. L is affine
in class scores: the alignments, matches and normalisers of our detectors are made of predictions, boxes and labels.

With by_class a step is of one class k: X and B are then the pictures with objects of k, and the other objects in them
are to be ignored. What share each class has on either side, which no pixel changes, is then no part of D. The first
paper matches class by class too, but adds up D over all classes in a step; here a step draws one.

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

from distill.gradient_distance import gradient_distance
from distill.mean_gradient import chunks, matched_parameters, mean_gradient, of_class, summed_gradient
from distill.network_pool import (
    MATCH,
    Augmentation,
    DrawAugmentation,
    NetworkPool,
    PoolSettings,
    RealBatch,
    as_float,
    seeded_generator,
    set_statistics,
)
from distill.synthetic import PixelOptimizer, RowOptimizer, SyntheticSet
from errors import UserError
from structures import Targets

MOST_DRAWS = 100  # of real pictures, in search of a class


@dataclass(frozen=True)
class MatchingSettings:
    """steps, seed; pool: which networks. What is matched: distance, a key of gradient_distance.DISTANCES, over the
    convolution weights whose names begin with one of `layers` (empty: all of them).

    against: what r is of. "real": real pictures drawn anew in every step, real_batches draws of them; of one draw, much
    of the distance is chance. "originals": the very pictures that the stored ones of a step hold, before they were
    reduced to their tiles. s and r then differ by what the reduction lost alone, and it is that which the pixels learn
    to make up for, with far less noise.
    pictures_per_step: stored pictures that a step takes, drawn anew for each; 0: all. pictures_at_once: pictures that
    go through a network together; memory and speed follow it, the result does not, but for rounding.
    optimizer, learning_rate, momentum: of the pixels, see PixelOptimizer. total_variation: lambda.
    class_learning_rate: of the set's class_logits, by the same optimizer; 0: they stay.
    by_class: each step is of one of the classes that the set has objects of, drawn at random.
    """

    steps: int = 500
    seed: int = 0
    distance: str = "cosine"
    layers: tuple[str, ...] = ()
    against: str = "real"
    real_batches: int = 1
    pictures_per_step: int = 0
    pictures_at_once: int = 8
    optimizer: str = "adam"
    learning_rate: float = 0.005
    class_learning_rate: float = 0.0
    by_class: bool = False
    momentum: float = 0.5
    total_variation: float = 0.0
    pool: PoolSettings = field(default_factory=PoolSettings)


@dataclass(frozen=True)
class MatchingReport:
    """What a step saw. relative: D(s, r) / D(0, r), 1 where the set has no gradient, 0 where it has the real one.

    label: of the step's class, -1 without by_class.
    network, trained: which of the pool, and the training steps it had made. s_loss, r_loss: mean detection losses of
    the synthetic and real pictures. moved: mean change of the pixels of the step's pictures, in 0..1.
    """

    step: int
    distance: float
    relative: float
    label: int
    network: int
    trained: int
    s_loss: float
    r_loss: float
    moved: float


class GradientMatching:
    """Learns the pixels of a SyntheticSet, in place, and its class_logits where class_learning_rate is above 0.

        matching = GradientMatching(synthetic, settings=..., build_network=lambda seed: models.build("yolov8n", 3),
                                    draw_real=..., draw_augmentation=...)
        matching.run(on_step=lambda step, report: ...)        # or matching.step(), matching.steps_done

    Args:
        build_network: seed -> a fresh detector (structures.Detector), see NetworkPool.
        draw_real: generator -> a batch of real pictures and targets (network_pool.RealBatch), of the set's image size.
        draw_augmentation: generator -> the augmentation of a step, the same for every picture of both sides
            (datasets.augment.draw_siamese); None: none.
        read_originals: numbers (n,) of decoded pictures -> what they were made of and its targets, as draw_real gives
            them; for settings.against = "originals".
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
        read_originals: Callable[[Tensor], tuple[Tensor, Targets]] | None = None,
    ) -> None:
        if settings.real_batches < 1 or settings.pictures_at_once < 1:
            raise ValueError(f"{settings}: expected real_batches and pictures_at_once of 1 or more")
        if settings.against not in ("real", "originals"):
            raise ValueError(f"against: found {settings.against!r}, expected real or originals")
        if settings.against == "originals" and (read_originals is None or synthetic.tiles == 1):
            raise ValueError("against: found 'originals', expected 'real' where pictures are stored as they are")
        if settings.by_class and synthetic.targets.ignore.all():
            raise ValueError("by_class: found true, expected false for a set without objects")
        if settings.class_learning_rate and synthetic.class_logits is None:
            raise ValueError(f"class_learning_rate {settings.class_learning_rate} for a set without class_logits")
        self.synthetic, self.settings, self.steps_done = synthetic, settings, 0
        self._draw_real, self._draw_augmentation = draw_real, draw_augmentation
        self._read_originals = read_originals
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
        self._class_optimizer = None
        if settings.class_learning_rate and len(synthetic.targets):
            self._class_optimizer = RowOptimizer(
                synthetic.class_logits,
                name=settings.optimizer,
                learning_rate=settings.class_learning_rate,
                momentum=settings.momentum,
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
        generator = seeded_generator(settings.seed, MATCH, self.steps_done)
        augment = self._draw_augmentation(generator) if self._draw_augmentation else as_it_is  # omega
        rows, label = self._draw_rows(generator)
        sampling = generator.initial_seed()  # what losses that sample are seeded with

        r, r_loss = mean_gradient(network, self._real(network, augment, rows, label, generator), parameters, sampling)

        # As many stored pictures as hold pictures_at_once, at least one.
        groups = rows.split(max(1, settings.pictures_at_once // synthetic.tiles))
        with torch.no_grad():
            s, s_loss = mean_gradient(
                network, (augment(*of_class(*synthetic.decode(group), label)) for group in groups), parameters, sampling
            )
        distance, v = distance_and_slope(s, r, settings.distance)
        share = 1 / len(self._pictures_of(rows, label))  # of a picture in s
        found = [
            self._slopes_of(group, network, augment, label, parameters, v, share, len(rows), sampling)
            for group in groups
        ]
        slopes = torch.cat([slope for slope, _ in found])  # (n, 3, S, S)
        values = {"gradient distance": distance, "slope of the pixels": slopes.abs().max()}
        if self._class_optimizer is not None:
            class_slopes = sum(slope for _, slope in found)  # (M, K); an object is in one group
            values["slope of the class logits"] = class_slopes.abs().max()
        self._check_finite(values, number, trained)

        before = synthetic.pixels.detach()[rows]
        self._optimizer.step(rows, slopes)
        if self._class_optimizer is not None:
            objects = torch.isin(synthetic.targets.image, synthetic.numbers(rows)).nonzero()[:, 0]
            self._class_optimizer.step(objects, class_slopes[objects])
        self.steps_done += 1
        nothing = gradient_distance([torch.zeros_like(x) for x in r], r, settings.distance)
        return MatchingReport(
            step=self.steps_done,
            distance=distance.item(),
            relative=(distance / nothing).item(),
            label=-1 if label is None else label,
            network=number,
            trained=trained,
            s_loss=s_loss,
            r_loss=r_loss,
            moved=(synthetic.pixels.detach()[rows] - before).abs().mean().item(),
        )

    def _draw_rows(self, generator: torch.Generator) -> tuple[Tensor, int | None]:
        """The stored pictures of a step, and its class: all of them hold an object of it. None without by_class."""
        targets, wanted = self.synthetic.targets, self.settings.pictures_per_step
        if not self.settings.by_class:
            return draw_rows(len(self.synthetic), wanted, generator), None
        labels = targets.labels[~targets.ignore].unique()
        label = int(labels[torch.randint(len(labels), (), generator=generator)])
        every = torch.arange(len(self.synthetic))
        holding = (self._pictures_of(every, label) // self.synthetic.tiles).unique().cpu()
        return holding[draw_rows(len(holding), wanted, generator)], label

    def _pictures_of(self, rows: Tensor, label: int | None) -> Tensor:
        """Numbers of the decoded pictures that of_class keeps of these stored ones."""
        numbers, t = self.synthetic.numbers(rows), self.synthetic.targets
        if label is None:
            return numbers
        return numbers[torch.isin(numbers, t.image[(t.labels == label) & ~t.ignore])]

    def _real(
        self, network: nn.Module, augment: Augmentation, rows: Tensor, label: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Targets]]:
        """The real pictures of a step, a few at once; BatchNorms have their statistics before the first come out."""
        device = self.synthetic.pixels.device
        if self.settings.against == "originals":
            batches = map(self._read_originals, self.synthetic.numbers(rows).split(self.settings.pictures_at_once))
            batches = (part for part in (of_class(*batch, label) for batch in batches) if len(part[0]))
        else:
            batches = self._draw_real_of(label, generator)
        for number, (images, targets) in enumerate(batches):
            with torch.no_grad():
                images, targets = augment(as_float(images.to(device)), targets.to(device))
            if number == 0:
                set_statistics(network, images)
            yield from chunks(images, targets, self.settings.pictures_at_once)

    def _draw_real_of(self, label: int | None, generator: torch.Generator) -> Iterator[tuple[Tensor, Targets]]:
        """settings.real_batches draws, of which those without an object of the class do not count."""
        found = 0
        for _ in range(MOST_DRAWS * self.settings.real_batches):
            images, targets = of_class(*self._draw_real(generator), label)
            if len(images) or label is None:
                yield images, targets
                found += 1
            if found == self.settings.real_batches:
                return
        raise UserError(
            f"by_class: {MOST_DRAWS} draws of real pictures hold no object of class {label}, which the set has"
        )

    def _slopes_of(
        self, rows: Tensor, network: nn.Module, augment: Augmentation, label: int | None, parameters: list[Tensor],
        v: tuple[Tensor, ...], share: float, count: int, sampling: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """d/dx of D + lambda TV for n stored pictures, of `count` in the step: (n, 3, S, S). share: of a picture in s.

        And d D / d class_logits (M, K), 0 for the objects of other pictures; None where they are not learnt.
        """
        synthetic = self.synthetic
        stored = synthetic.pixels.detach()[rows].requires_grad_()
        learnt = [] if self._class_optimizer is None else [synthetic.class_logits.detach().requires_grad_()]
        decoded = of_class(*synthetic.decode(rows, stored, *learnt), label)
        pictures, targets = augment(*decoded)  # (n r c, 3, S, S), or fewer: those of the class
        leaf = pictures.detach().requires_grad_()
        g, _ = summed_gradient(network, leaf, targets, parameters, sampling, create_graph=True)
        part = share * sum((a * b).sum() for a, b in zip(g, v))  # <v, their part of s>
        # The classes have no slope where none of the objects is learnt.
        slope, *class_slope = torch.autograd.grad(part, [leaf, *learnt], materialize_grads=True)
        prior = self.settings.total_variation / count * synthetic.total_variation(rows, stored).sum()
        stored_slope = torch.autograd.grad([pictures, prior], stored, [slope, torch.ones_like(prior)])[0]
        return stored_slope, class_slope[0] if class_slope else None

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
        if self._class_optimizer is not None:
            state["class_optimizer"] = self._class_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was written, by a run of the same arguments; the set's pixels are filled in place."""
        self.steps_done = state["steps_done"]
        self.synthetic.load_state_dict(state["synthetic"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._class_optimizer is not None:
            self._class_optimizer.load_state_dict(state["class_optimizer"])
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
