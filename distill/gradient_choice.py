"""Gradient matching by choice: real pictures whose mean gradient is that of all.

    min_S  1/|Theta| sum_theta |1/k sum_(i in S) g_theta(x_i) - 1/N sum_i g_theta(x_i)|^2 / (1/N sum_i |g_theta(x_i)|^2)

over sets S of k of N pictures, with g_theta(x) the gradient of the detection loss of x alone and Theta networks early
in their training on real pictures (network_pool.py). What gradient_matching.py moves pixels for, with nothing to move:
a choice cannot fool the networks it is made with, and holds on others.

Killamsetty et al., "GRAD-MATCH: Gradient Matching based Data Subset Selection", arXiv:2103.00123. Deliberate
differences: every chosen picture counts the same, so that the set is an ordinary one; it is chosen once, for several
networks, not anew as one network learns; rows are added one by one and then exchanged, where the paper has orthogonal
matching pursuit, which needs weights.

All that the objective needs of the gradients are their inner products K (N, N), one matrix for each network. They are
taken of sketches (Charikar, Chen and Farach-Colton 2002): every weight has a random one of SKETCH places and a random
sign, so that <sketch(a), sketch(b)> has the mean <a, b> and a standard deviation of about |a| |b| / sqrt(SKETCH).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill.mean_gradient import matched_parameters, summed_gradient
from distill.network_pool import (
    DrawAugmentation,
    NetworkPool,
    PoolSettings,
    RealBatch,
    as_float,
    seeded_generator,
    set_statistics,
)
from structures import Targets

SKETCH = 16384
STATISTICS, PLACES = range(3, 5)  # streams of random numbers, beside those of the pool
MOST_EXCHANGES, SMALLEST_GAIN = 1000, 1e-12  # less is rounding: the mean of K's diagonal is 1


@dataclass(frozen=True)
class ChoiceSettings:
    """visits: |Theta|, networks as the pool has them in turn; by default one at 50, 200 and 350 steps of its training,
    one at 50 and 200, and, since the places of a pool do not start anew together, a third at 50.

    BatchNorms are kept (PoolSettings.normalization): nothing learns to exploit them here.
    """

    visits: int = 6
    pool: PoolSettings = field(
        default_factory=lambda: PoolSettings(
            networks=2, first_steps=50, steps_between=150, last_steps=350, learning_rate=0.02, normalization="batch"
        )
    )


def gradient_products(
    read: Callable[[int], tuple[Tensor, Targets]],
    count: int,
    *,
    settings: ChoiceSettings,
    build_network: Callable[[int], nn.Module],
    draw_real: RealBatch,
    draw_augmentation: DrawAugmentation | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_visit: Callable[[int], None] = lambda visit: None,
) -> Tensor:
    """K (N, N) float64, the mean over networks of <g_i, g_j> / (1/N sum_i |g_i|^2); N = count.

    read: row -> that picture (1, 3, S, S) and its targets. The other arguments are those of NetworkPool; BatchNorms
    have the statistics of a batch of draw_real. ValueError for fewer than one visit.
    """
    if settings.visits < 1:
        raise ValueError(f"visits: found {settings.visits}, expected at least 1")
    pool = NetworkPool(
        build_network,
        settings=settings.pool,
        draw_real=draw_real,
        draw_augmentation=draw_augmentation,
        seed=seed,
        device=device,
    )
    products = torch.zeros(count, count, dtype=torch.float64)
    for visit in range(settings.visits):
        network, _, _ = pool.visit(visit)
        generator = seeded_generator(seed, STATISTICS, visit)
        set_statistics(network, as_float(draw_real(generator)[0].to(device)))
        parameters = matched_parameters(network)
        places, signs = sketch_of(sum(p.numel() for p in parameters), seeded_generator(seed, PLACES, visit))
        places, signs = places.to(device), signs.to(device)
        sketches = []
        for row in range(count):
            images, targets = read(row)
            g, _ = summed_gradient(
                network,
                as_float(images.to(device)),
                targets.to(device),
                parameters,
                generator.initial_seed(),
                create_graph=False,
            )
            g = torch.cat([part.flatten() for part in g])
            sketches.append(torch.zeros(SKETCH, dtype=g.dtype, device=device).index_add(0, places, g * signs).cpu())
        A = torch.stack(sketches).double()  # (N, SKETCH)
        inner = A @ A.T
        products += inner / inner.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        on_visit(visit + 1)
    return products / settings.visits


def sketch_of(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of `length` numbers each: its place in 0..SKETCH - 1 and its sign, 1 or -1."""
    places = torch.randint(SKETCH, (length,), generator=generator)
    return places, torch.randint(2, (length,), generator=generator) * 2.0 - 1


def set_distance(products: Tensor, rows: Tensor) -> float:
    """The objective above for a set of rows (k,), from K."""
    within = products[rows][:, rows].mean() if len(rows) else products.new_zeros(())
    across = products[rows].mean() if len(rows) else products.new_zeros(())
    return float(within - 2 * across + products.mean())


def matching_rows(products: Tensor, count: int) -> Tensor:
    """`count` different rows (k,) int64: each next one brings the objective lowest, then single exchanges that lower
    it most, until none does."""
    total, mean, constant = len(products), products.mean(1), float(products.mean())
    chosen: list[int] = []
    for size in range(1, count + 1):
        chosen.append(_best_addition(products, mean, chosen, size)[0])
    for _ in range(MOST_EXCHANGES if 0 < count < total else 0):
        now = set_distance(products, torch.tensor(chosen)) - constant
        options = []
        for place in range(count):
            rest = chosen[:place] + chosen[place + 1 :]
            row, value = _best_addition(products, mean, rest, count, without=chosen[place])
            options.append((value, place, row))
        value, place, row = min(options)
        if not value < now - SMALLEST_GAIN:
            break
        chosen[place] = row
    return torch.tensor(chosen, dtype=torch.int64)


def _best_addition(
    products: Tensor, mean: Tensor, chosen: list[int], size: int, without: int | None = None
) -> tuple[int, float]:
    """The row that brings a set of `size` with `chosen` in it lowest, and the objective then, less its constant."""
    rows = torch.tensor(chosen, dtype=torch.int64)
    within = products[rows][:, rows].sum() + 2 * products[rows].sum(0) + products.diagonal()  # (N,)
    value = within / size**2 - 2 * (mean[rows].sum() + mean) / size
    value[rows] = torch.inf
    if without is not None:
        value[without] = torch.inf
    row = int(value.argmin())
    return row, float(value[row])
