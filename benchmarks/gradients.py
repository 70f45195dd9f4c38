"""What the gradients of a young detector see of a set: how far those of few and of reduced pictures are from others'.

    python benchmarks/gradients.py [--root data/bccd] [--arch yolov8_narrow] [--image-size 160] [--visits 5]

A network learns on the training pictures of BCCD, once with BatchNorms and once with GroupNorms in their place. Now and
then the mean gradients a and b of two sets (distill.condense.mean_gradient) are compared: 1 - the mean cosine of the
output channels whose gradients both have a direction (`cosine`), and |a - b|^2 / |b|^2 (`squared`).

    tiles       12 pictures in 4 x 3 tiles of a stored one, enlarged again, and the 12 as they were
    twelve      these 12, and 48 others: what a set of 12 could gain
    five        5 of them, and the 48

`no direction`: channels without any gradient, which count 1 in a distance whatever the pixels.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from config import DataConfig
from datasets.augment import draw_siamese
from distill.condense.gradient_distance import SMALLEST_PRODUCT
from distill.condense.mean_gradient import chunks, matched_parameters, mean_gradient
from distill.condense.network_pool import NetworkPool, PoolSettings, as_float, set_statistics
from distill.condense.synthetic import SyntheticSet
from engine.condensing.config import SIAMESE
from engine.condensing.real_pictures import RealPictures
from errors import ArgumentParser, UserError, run_script
from structures import Targets

FEW, MANY, AT_ONCE = 12, 48, 12
FORMATION = (4, 3)


def compare(a: list[Tensor], b: list[Tensor]) -> tuple[float, float, int, int]:
    """cosine and squared distance of two gradients, the channels without direction, and all channels."""
    total = directed = channels = 0
    for x, y in zip(a, b):
        x, y = x.flatten(1), y.flatten(1)
        lengths = x.norm(dim=1) * y.norm(dim=1)
        has_direction = lengths > SMALLEST_PRODUCT
        total += float((1 - (x * y).sum(1) / lengths)[has_direction].sum())
        directed += int(has_direction.sum())
        channels += len(lengths)
    squared = sum((x - y).square().sum() for x, y in zip(a, b)) / sum(y.square().sum() for y in b)
    return total / max(directed, 1), float(squared), channels - directed, channels


def gradient_of(network: nn.Module, pictures: Tensor, targets: Targets) -> list[Tensor]:
    return mean_gradient(network, chunks(as_float(pictures), targets, AT_ONCE), matched_parameters(network), 0)[0]


def print_ages(real: RealPictures, arch: str, normalization: str, args: argparse.Namespace) -> None:
    """A line for each age of one network."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(args.seed)).tolist()
    few, many, five = (real.read(rows) for rows in (order[:FEW], order[FEW : FEW + MANY], order[:5]))
    tiles = SyntheticSet.from_pictures(as_float(few.images), few.targets, FORMATION, few.content_xyxy)
    pictures, targets = tiles.decode(torch.tensor([0]))
    pool = NetworkPool(
        lambda seed: models.build(arch, len(real.index.names)),
        settings=PoolSettings(
            networks=1,
            first_steps=args.first,
            steps_between=args.every,
            last_steps=args.first + args.every * args.visits,
            learning_rate=0.02,
            normalization=normalization,
        ),
        draw_real=real.draw(16),
        draw_augmentation=lambda generator: draw_siamese(generator=generator, settings=SIAMESE),
        seed=args.seed,
    )
    for visit in range(args.visits):
        network, _, age = pool.visit(visit)
        set_statistics(network, as_float(many.images))
        g_many = gradient_of(network, many.images, many.targets)
        g_few = gradient_of(network, few.images, few.targets)
        g_tiles = gradient_of(network, pictures.detach(), targets)
        g_five = gradient_of(network, five.images, five.targets)
        found = [compare(g_tiles, g_few), compare(g_few, g_many), compare(g_five, g_many)]
        cells = "".join(f"{cosine:>9.4f}{squared:>9.4f}" for cosine, squared, _, _ in found)
        print(f"{normalization:<7}{age:>6}{cells}{found[1][2]:>8} of {found[1][3]}", flush=True)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("--root", default="data/bccd")
    parser.add_argument("--arch", default="yolov8_narrow")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--first", type=int, default=10, help="steps the network has made when it is first looked at")
    parser.add_argument("--every", type=int, default=95, help="steps between two looks")
    parser.add_argument("--visits", type=int, default=5, help="looks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    real = RealPictures(DataConfig(format="voc", root=args.root, train="trainval", test="test"), args.image_size)
    if len(real) < FEW + MANY:
        raise UserError(
            f"argument --root: {args.root} has {len(real)} training pictures, expected {FEW + MANY} or more"
        )
    print(f"{args.arch}, {args.image_size} px, torch {torch.__version__}")
    print(f"{'':13}{'tiles':>18}{'twelve':>18}{'five':>18}")
    print(f"{'norms':<7}{'steps':>6}" + f"{'cosine':>9}{'squared':>9}" * 3 + f"{'no direction':>16}")
    for normalization in ("batch", "group"):
        print_ages(real, args.arch, normalization, args)
    return 0


if __name__ == "__main__":
    run_script(main)
