"""Detectors early in their training on real images, whose gradients gradient matching compares.

The gradients of a well-trained network carry little information (Kim et al., arXiv:2205.14959, sec. 4.2). So a network
lives for a few steps, and a fresh one replaces it. Everything depends on (seed, step) alone.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from errors import UserError, expect
from random_streams import Stream, seeded_generator
from structures import Detector, Targets

RealBatch = Callable[[torch.Generator], tuple[Tensor, Targets]]
"""CPU generator -> real images (B, 3, S, S), uint8 or float in [0, 1], and targets. It draws from nothing else."""
Augmentation = Callable[[Tensor, Targets], tuple[Tensor, Targets]]
"""Float images (B, 3, S, S) and targets -> the same number, differentiable in the images, the same for every image."""
DrawAugmentation = Callable[[torch.Generator], Augmentation]

GROUP_CHANNELS = 8


@dataclass(frozen=True)
class PoolSettings:
    """The number of networks in the pool, and how they learn.

    The steps of gradient matching visit the networks in turn. A network is trained for first_steps when it is built and
    for steps_between at each further visit. When it has made last_steps or more, a fresh one replaces it; the networks
    are replaced at different times. The pixel gradient of a cosine distance falls as a network learns (on YOLOv8p at
    96 px to 1/12 in 10 steps, 1/33 in 40), so one learning rate of the pixels does not suit networks of all ages: hence
    first_steps. Training is SGD with momentum on real batches in train mode, with gradients clipped to gradient_clip.

    normalization: "batch": the detector's own BatchNorms, in eval mode with the statistics of the step's real images.
    "group": GroupNorms replace them (replace_batchnorms). With frozen statistics, a young network amplifies in every
    layer whatever is rare in real images: on a fresh YOLOv8p at 96 px, twenty steps of Adam at 0.002 made the gradient
    of five images a thousand times longer, and the distance grew.
    """

    networks: int = 2
    first_steps: int = 10
    steps_between: int = 2
    last_steps: int = 40
    learning_rate: float = 0.01
    momentum: float = 0.9
    gradient_clip: float = 10.0
    normalization: str = "group"


@dataclass
class Member:
    """A network and its optimizer. life: how many networks had this place before. trained: its training steps."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    life: int
    trained: int = 0


class NetworkPool:
    """The networks of PoolSettings on one device.

    build_network: seed -> a fresh detector (structures.Detector) in any mode. Torch's global generator is seeded with
    the same number around the call, so a call of models.build may ignore its argument.
    """

    def __init__(
        self,
        build_network: Callable[[int], nn.Module],
        *,
        settings: PoolSettings,
        draw_real: RealBatch,
        draw_augmentation: DrawAugmentation | None,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        s = settings
        if s.networks < 1 or min(s.first_steps, s.steps_between) < 0:
            raise ValueError(f"{s}: expected at least one network, and steps of 0 or more")
        if not (s.learning_rate >= 0 and 0 <= s.momentum < 1 and s.gradient_clip > 0):
            raise ValueError(f"{s}: expected a learning_rate of 0 or more, momentum in [0, 1), gradient_clip above 0")
        expect(s.normalization in ("batch", "group"), "pool.normalization", repr(s.normalization), "batch or group")
        self.settings, self.seed, self.device = s, seed, device
        self._build, self._draw_real, self._draw_augmentation = build_network, draw_real, draw_augmentation
        self._members: list[Member | None] = [None] * s.networks
        # Visits in a life; one without training in between, since all would be the same.
        self._visits = 1 + max(s.last_steps - s.first_steps, 0) // s.steps_between if s.steps_between else 1

    def visit(self, step: int) -> tuple[nn.Module, int, int]:
        """The network of `step` in eval mode, its number in 0..networks - 1, and the training steps that it has made.

        Call it for one step after the other, from step 0 or from the step of load_state_dict.
        """
        s = self.settings
        number, visit = step % s.networks, step // s.networks
        # The first life is shorter in all places but one, so that networks are replaced at different times.
        life = (visit + number * self._visits // s.networks) // self._visits
        member = self._members[number]
        if member is None or member.life != life:
            member = self._members[number] = self._create(number, life)
            self._train(member, number, s.first_steps)
        else:
            self._train(member, number, s.steps_between)
        member.network.eval()
        return member.network, number, member.trained

    def _create(self, number: int, life: int) -> Member:
        """A fresh network and its optimizer. Its seed depends on the seed of the pool, its number and its life."""
        seed = seeded_generator(Stream.NETWORK, self.seed, number, life).initial_seed()
        with reproducible(seed):
            network = self._build(seed).to(self.device).requires_grad_()
        if not getattr(network, "is_twice_differentiable", True):
            raise UserError(f"{type(network).__name__} cannot be matched: its attention has no second derivative")
        if self.settings.normalization == "group":
            replace_batchnorms(network)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=self.settings.learning_rate, momentum=self.settings.momentum
        )
        return Member(network, optimizer, life)

    def _train(self, member: Member, number: int, steps: int) -> None:
        """Train a network on real images. Every step has a seed of its own. UserError if the loss diverges."""
        network = member.network.train()
        detector = cast(Detector, network)
        for _ in range(steps):
            generator = seeded_generator(Stream.NETWORK_STEP, self.seed, number, member.life, member.trained)
            images, targets = real_batch(self._draw_real, self._draw_augmentation, generator, self.device)
            with reproducible(generator.initial_seed()):
                loss = sum(detector.losses(network(images), targets).values(), torch.zeros(()))
            if not loss.isfinite():
                raise UserError(
                    f"network {number} of the pool: its loss is {loss.item()} after {member.trained} steps on real"
                    f" pictures at learning rate {self.settings.learning_rate:g}, expected a finite one", 3
                )  # fmt: skip
            member.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), self.settings.gradient_clip)
            member.optimizer.step()
            member.trained += 1
        member.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """A copy, made of tensors, numbers, lists and dicts."""
        members = [
            member
            and {
                "network": member.network.state_dict(),
                "optimizer": member.optimizer.state_dict(),
                "life": member.life,
                "trained": member.trained,
            }
            for member in self._members
        ]
        return copy.deepcopy({"members": members})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict. ValueError for a pool of another size."""
        if len(state["members"]) != len(self._members):
            raise ValueError(f"a pool of {len(state['members'])} networks, expected {len(self._members)}")
        for number, saved in enumerate(state["members"]):
            if saved is not None:
                member = self._members[number] = self._create(number, saved["life"])
                member.network.load_state_dict(saved["network"])
                member.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
                member.trained = saved["trained"]


def replace_batchnorms(network: nn.Module) -> None:
    """Every nn.BatchNorm2d becomes a GroupNorm (Wu and He, arXiv:1803.08494) of its epsilon, scale and shift, in place.

    A group has gcd(8, channels) channels. The statistics are those of one image, in train and eval mode. UserError for
    a BatchNorm of another class, since its layer may use more of it than the call (Faster R-CNN).
    """
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                if type(norm) is not nn.BatchNorm2d:
                    raise UserError(
                        f"pool.normalization: found 'group', expected 'batch': the BatchNorms of"
                        f" {type(network).__name__} are part of other layers"
                    )
                channels = norm.num_features
                group = nn.GroupNorm(channels // math.gcd(channels, GROUP_CHANNELS), channels, norm.eps)
                group.load_state_dict({"weight": norm.weight.detach(), "bias": norm.bias.detach()})
                setattr(module, name, group.to(norm.weight))


def set_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every BatchNorm to the mean and (unbiased) variance of these images.

    Leaves the network in eval mode. Frozen BatchNorms keep their statistics.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # running <- (1 - momentum) running + momentum batch
    try:
        with torch.no_grad():
            network.train()(images)
    finally:
        for norm, momentum in zip(norms, before):
            norm.momentum = momentum
        network.eval()


def real_batch(
    draw_real: RealBatch, draw_augmentation: DrawAugmentation | None, generator: torch.Generator, device: Any
) -> tuple[Tensor, Targets]:
    """A batch on the device, float in [0, 1], with an augmentation of its own unless draw_augmentation is None."""
    images, targets = draw_real(generator)
    images, targets = as_float(images.to(device)), targets.to(device)
    if draw_augmentation is not None:
        with torch.no_grad():
            images, targets = draw_augmentation(generator)(images, targets)
    return images, targets


def as_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]; float images are unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator inside the context, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
