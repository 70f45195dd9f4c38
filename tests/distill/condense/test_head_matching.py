"""Matching a linear head on a frozen backbone against float64 numpy, torch.func and finite differences; mutants."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.condense import head_matching, linear_head
from distill.condense.head_matching import CURVATURE, DISTANCES, HeadMatching, HeadSettings, head_gradient_rows
from distill.condense.linear_head import (
    HeadData,
    LocationGrid,
    fit_head,
    gradient_products,
    head_curvature,
    head_loss,
    location_targets,
    newton_step,
)
from distill.condense.synthetic import SyntheticSet
from errors import UserError
from structures import Targets
from tests.distill.losses.mutants.machinery import Edit, apply_edit
from tests.distill.tiny_detector import tiny_scene

SIZE, NUM_CLASSES, RIDGE, TV = 16, 2, 0.3, 0.7


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    pass


def tiny_grid() -> LocationGrid:
    """Cells of 4 and of 8 pixels."""
    centers, sides = [], []
    for stride in (4, 8):
        along = (torch.arange(SIZE // stride) + 0.5) * stride
        y, x = torch.meshgrid(along, along, indexing="ij")
        centers.append(torch.stack((x, y), -1).reshape(-1, 2))
        sides.append(torch.full((len(centers[-1]),), 2.0 * stride))
    return LocationGrid(torch.cat(centers), torch.cat(sides), (16, 4), (-2.0, -1.0))


GRID = tiny_grid()
BACKBONE = nn.ModuleList([nn.Conv2d(3, 3, 4, 4), nn.Conv2d(3, 4, 8, 8)]).double().requires_grad_(False)
for number, layer in enumerate(BACKBONE):
    noise = torch.Generator().manual_seed(number)
    layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=noise, dtype=torch.float64))
    layer.bias.zero_()


def features(images: Tensor) -> list[Tensor]:
    """Two smooth groups of features of 3 + 1 and 4 + 1 numbers."""
    maps = [torch.tanh(layer(images)).flatten(2).transpose(1, 2) for layer in BACKBONE]
    return [torch.cat((h, torch.ones_like(h[..., :1])), -1) for h in maps]


def data_of(images: Tensor, targets: Targets) -> HeadData:
    y = location_targets(GRID, targets, count=len(images), num_classes=NUM_CLASSES)
    return HeadData(features(images), [part.double() for part in y])


REAL = data_of(*tiny_scene(8, SIZE, seed=1))
FRESH = GRID.fresh_head(REAL.widths, NUM_CLASSES)
SOME_HEAD = [torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) for x in FRESH]


def synthetic_set(count: int = 3) -> SyntheticSet:
    return SyntheticSet(*tiny_scene(count, SIZE))


def matching_of(synthetic: SyntheticSet, make: Callable = HeadMatching, **settings) -> HeadMatching:
    """SGD whose first step is the gradient times 1e-4: no pixel is clipped."""
    defaults = dict(optimizer="sgd", momentum=0.0, learning_rate=1e-4, ridge=RIDGE)
    made = HeadSettings(**defaults | settings)
    matching = make(synthetic, settings=made, features=features, grid=GRID, real=REAL)
    matching._targets = [y.double() for y in matching._targets]
    return matching


def pixel_gradient(synthetic: SyntheticSet, make: Callable = HeadMatching, **settings) -> Tensor:
    before = synthetic.pixels.detach().clone()
    matching_of(synthetic, make, **settings).step()
    return (before - synthetic.pixels.detach()) * 1e4


def objective(pixels: Tensor, synthetic: SyntheticSet) -> float:
    """L_R(theta_X) + lambda TV(X) in numpy, with each logistic regression fitted by reweighted least squares."""
    y = [part.numpy() for part in data_of(pixels, synthetic.targets).targets]
    n, real_n, loss = sum(part.sum() for part in y), sum(part.sum().item() for part in REAL.targets), 0.0
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    for g, h in enumerate(features(pixels)):
        h, real_h = h.flatten(0, 1).numpy(), REAL.features[g].flatten(0, 1).numpy()
        for k in range(NUM_CLASSES):
            fresh = FRESH[g][k].numpy()
            target, theta = y[g][..., k].reshape(-1), fresh.copy()
            for _ in range(12):
                p = sigmoid(h @ theta)
                slope = h.T @ (p - target) / n + RIDGE * (theta - fresh)
                theta -= np.linalg.solve((h.T * (p * (1 - p))) @ h / n + RIDGE * np.eye(len(theta)), slope)
            assert np.abs(slope).max() < 1e-13
            p, target = sigmoid(real_h @ theta), REAL.targets[g][..., k].numpy().reshape(-1)
            loss -= (target * np.log(p) + (1 - target) * np.log(1 - p)).sum() / real_n
    return loss + TV * synthetic.total_variation(torch.arange(len(pixels)), pixels).mean().item()


# ---------------------------------------------------------------- the head


def test_loss_gradient_and_curvature_equal_numpy():
    """Each class and group alone, location by location."""
    losses, gradient = head_loss(SOME_HEAD, REAL)
    curvature = head_curvature(SOME_HEAD, REAL, RIDGE)
    n = max(1.0, sum(y.sum().item() for y in REAL.targets))
    assert n > 1 and REAL.total == pytest.approx(n)
    for g, theta in enumerate(SOME_HEAD):
        h, y = REAL.features[g].flatten(0, 1).numpy(), REAL.targets[g].flatten(0, 1).numpy()
        for k in range(NUM_CLASSES):
            loss, slope, curve = 0.0, np.zeros(h.shape[1]), RIDGE * np.eye(h.shape[1])
            for a in range(len(h)):
                p = 1 / (1 + np.exp(-h[a] @ theta[k].numpy()))
                loss -= (y[a, k] * np.log(p) + (1 - y[a, k]) * np.log(1 - p)) / n
                slope += (p - y[a, k]) * h[a] / n
                curve += p * (1 - p) * np.outer(h[a], h[a]) / n
            assert losses[g][k].item() == pytest.approx(loss, rel=1e-12)
            np.testing.assert_allclose(gradient[g][k].numpy(), slope, rtol=1e-10, atol=1e-13)
            np.testing.assert_allclose(curvature[g][k].numpy(), curve, rtol=1e-10, atol=1e-13)


def test_locations_in_parts_are_the_whole(monkeypatch):
    whole = head_loss(SOME_HEAD, REAL), head_curvature(SOME_HEAD, REAL, RIDGE)
    monkeypatch.setattr(linear_head, "ROWS_AT_ONCE", 50)
    torch.testing.assert_close((head_loss(SOME_HEAD, REAL), head_curvature(SOME_HEAD, REAL, RIDGE)), whole)


def test_the_fitted_head_has_no_gradient_and_does_not_depend_on_the_start():
    head = fit_head(REAL, FRESH, RIDGE)
    slope = [g + RIDGE * (t - f) for g, t, f in zip(head_loss(head, REAL)[1], head, FRESH)]
    assert max(float(g.abs().max()) for g in slope) < 1e-4
    torch.testing.assert_close(fit_head(REAL, FRESH, RIDGE, start=SOME_HEAD), head, atol=1e-4, rtol=0)


def test_a_step_of_newton_never_raises_the_loss():
    """Far away, where a full step overshoots."""
    head = [20 * x for x in SOME_HEAD]
    value = lambda theta: sum(x.sum() for x in linear_head.with_ridge(theta, REAL, FRESH, 1e-4)[0])
    for _ in range(5):
        new, gain = newton_step(head, REAL, FRESH, 1e-4)
        assert gain > 0 and value(new) <= value(head)
        head = new


def test_images_without_objects_train_the_background():
    empty = data_of(tiny_scene(2, SIZE)[0], Targets.empty())
    assert empty.total == 1
    head = fit_head(empty, FRESH, RIDGE)
    for z in linear_head.head_logits(head, empty.features):
        assert (z < -1).all() and z.isfinite().all()


def test_features_that_are_not_finite_are_refused():
    broken = HeadData([h.clone() for h in REAL.features], REAL.targets)
    broken.features[0][0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="a linear head on frozen features: its loss is nan") as error:
        fit_head(broken, FRESH, RIDGE)
    assert error.value.exit_code == 3


def test_products_with_the_gradient_are_those_of_each_image():
    v = [torch.randn_like(x) for x in FRESH]
    got = gradient_products(SOME_HEAD, v, REAL.features, REAL.targets)
    assert got.shape == (len(REAL),)
    for i in range(len(REAL)):
        alone = REAL[torch.tensor([i])]
        s = head_loss(SOME_HEAD, alone)[1]
        assert got[i].item() == pytest.approx(sum((a * b).sum().item() for a, b in zip(s, v)) * alone.total)


# ---------------------------------------------------------------- the targets


def one_object(box, label=1, ignore=False) -> Targets:
    return Targets(torch.tensor([box]), torch.tensor([label]), torch.tensor([0]), torch.tensor([ignore]))


def test_targets_by_hand():
    """A box of 8 x 8 around (6, 6): it suits cells of 4 pixels, of which four have their centers 0, 1/2 of it away."""
    small, large = location_targets(GRID, one_object([2.0, 2.0, 10.0, 10.0]), count=1, num_classes=2)
    assert (
        small.shape == (1, 16, 2) and large.shape == (1, 4, 2) and not small[..., 0].any() and not large[..., 0].any()
    )
    cells = small[0, :, 1].view(4, 4)
    assert cells[1, 1] == pytest.approx(0.9)  # center (6, 6): fit 1
    assert not cells[0, 1] and not cells[3].any()  # centers at the edge: fit 0
    # cells of 8: the center (4, 4) is 2 of 8 pixels away in both directions, and its side twice as long
    assert large[0, :, 1].tolist() == pytest.approx([0.9 * 0.5 * np.exp(-0.5), 0, 0, 0], abs=1e-6)


def test_an_object_has_ten_locations_at_most_and_an_ignored_one_none():
    whole = location_targets(GRID, one_object([0.0, 0.0, 16.0, 16.0]), count=1, num_classes=2)
    assert sum(int((y > 0).sum()) for y in whole) == 10 and max(float(y.max()) for y in whole) == pytest.approx(0.9)
    for nothing in (one_object([0.0, 0.0, 16.0, 16.0], ignore=True), one_object([1.0, 1.0, 1.5, 1.5]), Targets.empty()):
        assert not any(map(torch.any, location_targets(GRID, nothing, count=1, num_classes=2)))


def test_overlapping_objects_of_a_class_share_by_the_larger_target():
    a, b = [2.0, 2.0, 10.0, 10.0], [4.0, 4.0, 12.0, 12.0]
    both = Targets(torch.tensor([a, b]), torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([False, False]))
    apart = [location_targets(GRID, one_object(box), count=1, num_classes=2) for box in (a, b)]
    torch.testing.assert_close(
        location_targets(GRID, both, count=1, num_classes=2), [torch.maximum(x, y) for x, y in zip(*apart)]
    )


# ---------------------------------------------------------------- the gradient of the pixels


EXPECTED_SET = synthetic_set()


@pytest.fixture(scope="module")
def expected() -> list[tuple[Tensor, float]]:
    """Finite differences of the whole objective in four directions: (direction, derivative)."""
    pixels, found = EXPECTED_SET.pixels.detach(), []
    for seed in range(4):
        direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ends = [objective(pixels + sign * 1e-6 * direction, EXPECTED_SET) for sign in (1, -1)]
        found.append((direction, (ends[0] - ends[1]) / 2e-6))
    return found


def check_pixels(expected, make: Callable = HeadMatching) -> None:
    got = pixel_gradient(synthetic_set(), make, total_variation=TV)
    for direction, derivative in expected:
        assert (got * direction).sum().item() == pytest.approx(derivative, rel=1e-5, abs=1e-7)


def test_gradient_of_the_pixels_by_finite_differences(expected):
    """Through the head that the set trains: the implicit function theorem against fitting it anew."""
    check_pixels(expected)


MUTANTS = {
    "no curvature": Edit("solve(head_curvature(theta, data, ridge), r)", "r"),
    "the curvature of the real images": Edit(
        "head_curvature(theta, data, ridge)", "head_curvature(theta, self._real, ridge)"
    ),
    "the other way": Edit("v = [-step for step in", "v = [step for step in"),
    "the ridge in r": Edit(
        "losses, r = head_loss(theta, self._real)",
        "losses, r = head_loss(theta, self._real); r = [g + ridge * (t - f) for g, t, f in zip(r, theta, self._fresh)]",
    ),
    "the gradient of a fresh head": Edit(
        "return float(sum(loss.sum() for loss in losses)), [(theta, v)]", "return 0.0, [(self._fresh, v)]"
    ),
    "a sum in place of a mean": Edit(".sum() / total for theta, v in terms", ".sum() for theta, v in terms"),
    "the prior of the sum": Edit("total_variation / len(synthetic) * prior", "total_variation * prior"),
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_a_wrong_gradient_is_noticed(expected, wrong):
    with pytest.raises(AssertionError):
        check_pixels(expected, apply_edit(HeadMatching, MUTANTS[wrong]))


@pytest.mark.parametrize("kind", DISTANCES)
def test_gradient_at_a_pool_of_heads_is_that_of_torch_func(kind):
    synthetic = synthetic_set()
    got = pixel_gradient(synthetic, distance=kind, pool=3)
    heads = [FRESH]
    for _ in range(2):
        heads.append(newton_step(heads[-1], REAL, FRESH, RIDGE)[0])
    y = data_of(*tiny_scene(3, SIZE)).targets

    def whole(pixels: Tensor) -> Tensor:
        total = 0
        for theta in heads:
            parts = [(z.sigmoid() - t).flatten(0, 1).T @ h.flatten(0, 1) for h, t, z in
                     ((h, t, h @ w.T) for h, t, w in zip(features(pixels), y, theta))]  # fmt: skip
            s = [part / sum(t.sum() for t in y) for part in parts]
            total = total + DISTANCES[kind](s, head_loss(theta, REAL)[1]) / len(heads)
        return total

    torch.testing.assert_close(got, torch.func.grad(whole)(tiny_scene(3, SIZE)[0]), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_set_is_at_no_distance_from_itself(kind):
    s, _ = head_loss(SOME_HEAD, REAL)[1], None
    assert DISTANCES[kind](s, s).item() == pytest.approx(0, abs=1e-12)
    turned = [-x for x in s]
    assert DISTANCES[kind](s, turned).item() == pytest.approx({"squared": 4}.get(kind, 2))
    scaled = [3 * x for x in s]
    assert (DISTANCES[kind](scaled, s).item() < 1e-12) == (kind != "squared")


def test_classes_that_a_set_lacks_do_not_swamp_its_orthogonal_gradient():
    """Of four classes two have no object: their rows of s are equal, one singular value is 0. By finite differences of
    numpy, which knows that one row of sqrt(2) times the length stands for both."""
    pictures, objects = tiny_scene(3, SIZE)
    real_images, real_objects = tiny_scene(8, SIZE, seed=1)
    real_objects = replace(real_objects, labels=torch.arange(len(real_objects)) % 4)
    on_grid = dict(num_classes=4)
    real = HeadData(
        features(real_images), [y.double() for y in location_targets(GRID, real_objects, count=8, **on_grid)]
    )
    settings = HeadSettings(optimizer="sgd", momentum=0, learning_rate=1e-4, distance="orthogonal", pool=1)
    synthetic = SyntheticSet(pictures, objects)
    matching = HeadMatching(synthetic, settings=settings, features=features, grid=GRID, real=real)
    matching._targets = [y.double() for y in matching._targets]
    report = matching.step()
    got = (pictures - synthetic.pixels.detach()) * 1e4

    fresh = GRID.fresh_head(real.widths, 4)
    merge = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5**0.5, 0.5**0.5]])
    wanted = [polar(r.numpy()) for r in head_loss(fresh, real)[1]]

    def distance(pixels: Tensor) -> float:
        data = HeadData(features(pixels), location_targets(GRID, objects, count=3, **on_grid))
        rows = [merge @ s.numpy() for s in head_loss(fresh, data)[1]]
        return float(np.mean([1 - (polar(s) * (merge @ r)).sum() / 4 for s, r in zip(rows, wanted)]))

    assert report.distance == pytest.approx(distance(pictures), abs=1e-6)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (distance(pictures + 1e-5 * direction) - distance(pictures - 1e-5 * direction)) / 2e-5
    assert (got * direction).sum().item() == pytest.approx(slope, rel=1e-3)


def polar(x: np.ndarray) -> np.ndarray:
    """U V^T."""
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("kind", [CURVATURE, "cosine"])
@pytest.mark.parametrize("formation", [(1, 1), (2, 2)])
def test_pictures_in_parts_are_the_whole(kind, formation):
    pictures, targets = tiny_scene(5 * formation[0] * formation[1], SIZE)
    build = lambda: SyntheticSet.from_pictures(pictures, targets, formation)
    options = dict(distance=kind, total_variation=TV, pool=2)
    whole = pixel_gradient(build(), pictures_at_once=1000, **options)
    for at_once in (1, 8):
        torch.testing.assert_close(
            pixel_gradient(build(), pictures_at_once=at_once, **options), whole, atol=1e-9, rtol=1e-6
        )
    assert whole.flatten(1).abs().amax(1).gt(0).all()


# ---------------------------------------------------------------- runs


def test_the_set_learns_and_trains_the_head_of_all_real_images():
    """Noise under boxes: at the end the loss of its head on real images is near the lowest of any head."""
    synthetic = SyntheticSet.from_noise(
        tiny_scene(3, SIZE)[1], count=3, image_size=SIZE, generator=torch.Generator().manual_seed(0)
    )
    synthetic = SyntheticSet(synthetic.pixels.double(), synthetic.targets)
    matching, seen = matching_of(synthetic, steps=60, optimizer="adam", momentum=0.9, learning_rate=0.03), []
    matching.run(lambda step, report: seen.append(report.distance))
    loss = lambda head: float(sum(x.sum() for x in head_loss(head, REAL)[0]))
    lowest, at_start = loss(fit_head(REAL, FRESH, 1e-6)), seen[0]
    assert seen[-1] - lowest < 0.5 * (at_start - lowest)
    assert 0 <= synthetic.pixels.min() and synthetic.pixels.max() <= 1


@pytest.mark.parametrize("kind", [CURVATURE, "cosine"])
def test_a_resumed_run_ends_with_the_same_bytes(kind):
    options = dict(
        steps=5, optimizer="adam", momentum=0.9, distance=kind, pool=2, learning_rate=0.01, pictures_at_once=2
    )
    whole, reports = matching_of(synthetic_set(), **options), []
    whole.run(lambda step, report: reports.append(report))
    first = matching_of(synthetic_set(), **options)
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed, rest = matching_of(synthetic_set(), **options), []
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.run(lambda step, report: rest.append(report))
    assert torch.equal(resumed.synthetic.pixels, whole.synthetic.pixels) and rest == reports[2:]
    assert not torch.equal(whole.synthetic.pixels, synthetic_set().pixels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "a ridge above 0"),
        ({"pool": 0}, "expected pictures_at_once and pool of 1 or more"),
        ({"distance": "mse"}, "distance 'mse': expected one of curvature, cosine, orthogonal, squared"),
        ({"optimizer": "lbfgs"}, "pixel optimizer 'lbfgs'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        matching_of(synthetic_set(), **settings)


def test_a_step_that_is_not_finite_leaves_the_pixels(monkeypatch):
    synthetic = synthetic_set()
    before = synthetic.pixels.detach().clone()
    monkeypatch.setitem(head_matching.DISTANCES, "cosine", lambda s, r: torch.nan * sum(x.sum() for x in s))
    with pytest.raises(UserError, match="the distance is nan at step 0") as error:
        matching_of(synthetic, distance="cosine").step()
    assert error.value.exit_code == 3 and torch.equal(synthetic.pixels, before)


# ---------------------------------------------------------------- a choice of real images


def test_the_first_choice_is_the_steepest_and_all_are_prefixes():
    rows = head_gradient_rows(REAL, 4, FRESH, RIDGE)
    assert len(set(rows.tolist())) == 4 and rows.dtype == torch.int64
    assert head_gradient_rows(REAL, 2, FRESH, RIDGE).tolist() == rows[:2].tolist()
    r = head_loss(FRESH, REAL)[1]
    score = []
    for i in range(len(REAL)):
        alone = REAL[torch.tensor([i])]
        s = head_loss(FRESH, alone)[1]
        own = sum(float(y.sum()) for y in alone.targets)
        score.append(-np.inf if own == 0 else alone.total / own * sum(float((a * b).sum()) for a, b in zip(s, r)))
    assert rows[0] == int(np.argmax(score))
    with pytest.raises(ValueError, match="9 pictures of 8"):
        head_gradient_rows(REAL, 9, FRESH, RIDGE)


def test_a_choice_lowers_the_loss_more_than_most():
    """Over all pairs of images, the loss of the head that they train; the chosen pair is in the better half."""
    loss = lambda rows: float(
        sum(x.sum() for x in head_loss(fit_head(REAL[torch.tensor(rows)], FRESH, RIDGE), REAL)[0])
    )
    pairs = [loss([i, j]) for i in range(8) for j in range(i)]
    assert loss(head_gradient_rows(REAL, 2, FRESH, RIDGE).tolist()) < np.median(pairs)
