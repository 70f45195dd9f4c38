"""Gradient matching of tiny scenes, as its tests run it."""

import torch
from torch import Tensor, nn

from config import AugmentConfig
from datasets.augment import draw_siamese
from distill.condense.gradient_matching import GradientMatching, MatchingSettings
from distill.condense.network_pool import PoolSettings
from structures import Targets
from tests.distill.tiny_detector import build_tiny, tiny_scene

FRESH = PoolSettings(networks=1, first_steps=0, steps_between=0, normalization="batch")  # a new network for each step
LEARNING_RATE = 1e-4  # so small that no pixel is clipped
AUGMENT = AugmentConfig(mosaic=0.0, scale=0.3, translate=0.1, degrees=5.0, flip_vertical=0.5)


def draw_siamese_here(generator: torch.Generator):
    return draw_siamese(generator=generator, settings=AUGMENT)


def matching_of(synthetic, real=None, build=build_tiny, augmentation=None, **settings) -> GradientMatching:
    real = real if real is not None else tiny_scene(5, seed=1)
    defaults = dict(optimizer="sgd", momentum=0.0, learning_rate=LEARNING_RATE, pool=FRESH)
    return GradientMatching(
        synthetic,
        settings=MatchingSettings(**defaults | settings),
        build_network=build,
        draw_real=lambda generator: real,
        draw_augmentation=augmentation,
    )


def func_gradient(network: nn.Module, pictures: Tensor, targets: Targets) -> tuple[Tensor, ...]:
    """d/dtheta of the mean over pictures of the loss of each alone, by torch.func, for the convolution weights."""
    state = {name: p.detach() for name, p in network.state_dict().items()}
    names = [name for name, p in network.named_parameters() if p.dim() == 4]

    def mean_loss(weights: dict[str, Tensor]) -> Tensor:
        total = 0
        for index in range(len(pictures)):
            mine = targets[targets.image == index]
            mine = Targets(mine.boxes_xyxy, mine.labels, torch.zeros_like(mine.image), mine.ignore)
            output = torch.func.functional_call(network, state | weights, (pictures[index : index + 1],))
            total = total + sum(network.losses(output, mine).values())
        return total / len(pictures)

    gradients = torch.func.grad(mean_loss)({name: state[name] for name in names})
    return tuple(gradients[name] for name in names)
