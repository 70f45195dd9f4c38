"""Gradient matching: slopes against torch.func and finite differences, exactness of the parts, a known optimum."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import models
import yolo.losses
from distill.condense.gradient_distance import gradient_distance
from distill.condense.mean_gradient import (
    chunks,
    matched_parameters,
    mean_gradient,
    split_output,
    summed_gradient,
)
from distill.condense.network_pool import set_statistics
from distill.condense.synthetic import SyntheticSet
from structures import Targets
from tests.distill.condense.tiny_matching import FRESH, LEARNING_RATE, draw_siamese_here, func_gradient, matching_of
from tests.distill.tiny_detector import TinyDetector, build_tiny, tiny_scene


def slopes_of(synthetic: SyntheticSet, *args, **kwargs) -> Tensor:
    """What one step subtracts from the pixels, over the learning rate."""
    before = synthetic.pixels.detach().clone()
    matching_of(synthetic, *args, **kwargs).step()
    return (before - synthetic.pixels.detach()) / kwargs.get("learning_rate", LEARNING_RATE)


def prior(synthetic: SyntheticSet, x: Tensor) -> Tensor:
    return synthetic.total_variation(torch.arange(len(x)), x).mean()


# ---------------------------------------------------------------- against torch.func and finite differences


@pytest.fixture
def network() -> TinyDetector:
    torch.manual_seed(3)
    network = build_tiny(0)
    set_statistics(network, tiny_scene(5, seed=1)[0])
    return network


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_matched_gradient_is_that_of_torch_func(network, at_once):
    pictures, targets = tiny_scene(5)
    parameters = matched_parameters(network)
    got, loss = mean_gradient(network, chunks(pictures, targets, at_once), parameters, 0)
    for mine, expected in zip(got, func_gradient(network, pictures, targets), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-9)
    assert loss > 0


@pytest.mark.parametrize("normalization", ["batch", "group"])
@pytest.mark.parametrize("kind", ["cosine", "mse", "l1"])
def test_slope_of_the_pixels_is_that_of_torch_func(kind, normalization):
    """The whole objective at once, distance, mean and prior, differentiated twice by torch.func."""
    pictures, targets = tiny_scene(4)
    real, real_targets = tiny_scene(5, seed=1)
    pool = replace(FRESH, normalization=normalization)
    synthetic = SyntheticSet(pictures, targets)
    got = slopes_of(synthetic, (real, real_targets), distance=kind, total_variation=0.7, pool=pool)

    matching = matching_of(SyntheticSet(pictures, targets), pool=pool)
    network, _, _ = matching.pool.visit(0)
    set_statistics(network, real)
    r = func_gradient(network, real, real_targets)

    def objective(x: Tensor) -> Tensor:
        return gradient_distance(func_gradient(network, x, targets), r, kind) + 0.7 * prior(synthetic, x)

    torch.testing.assert_close(got, torch.func.grad(objective)(pictures), atol=1e-8, rtol=1e-6)


def test_slope_through_tiles_and_augmentation_is_that_of_torch_func():
    pictures, targets = tiny_scene(8)
    real, real_targets = tiny_scene(5, seed=1)
    augment = draw_siamese_here(torch.Generator().manual_seed(2))
    options = dict(
        augmentation=lambda generator: augment, total_variation=0.7, pool=replace(FRESH, normalization="group")
    )
    synthetic = SyntheticSet.from_pictures(pictures, targets, (2, 2))
    stored, rows = synthetic.pixels.detach().clone(), torch.arange(2)
    got = slopes_of(synthetic, (real, real_targets), **options)

    network, _, _ = matching_of(synthetic, **options).pool.visit(0)
    r = func_gradient(network, *augment(real, real_targets))

    def objective(x: Tensor) -> Tensor:
        s = func_gradient(network, *augment(*synthetic.decode(rows, x)))
        return gradient_distance(s, r, "cosine") + 0.7 * prior(synthetic, x)

    torch.testing.assert_close(got, torch.func.grad(objective)(stored), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_double_backward_by_gradcheck(network, kind):
    pictures, targets = tiny_scene(2, size=8)
    parameters = matched_parameters(network)
    r, _ = mean_gradient(network, [tiny_scene(3, size=8, seed=1)], parameters, 0)

    def distance(x: Tensor) -> Tensor:
        g, _ = summed_gradient(network, x, targets, parameters, 0, create_graph=True)
        return gradient_distance(g, r, kind)

    assert torch.autograd.gradcheck(distance, pictures.requires_grad_())


@pytest.mark.parametrize("term", ["box", "cls", "dfl"])
def test_double_backward_of_the_yolov8_loss_by_finite_differences(monkeypatch, term):
    """With the assignment, its scores and CIoU's alpha held, as they are held in both derivatives."""
    torch.manual_seed(0)
    network = models.build("yolov8n", 2).double()
    pictures, targets = tiny_scene(2, size=64)
    set_statistics(network, torch.rand(4, 3, 64, 64, dtype=torch.float64))
    output = network(pictures[:1])
    points, strides = network._locations(output)
    held = yolo.losses.yolov8_assignment(
        box_logits=output.box_logits, class_logits=output.class_logits, points=points, strides=strides, targets=targets
    )
    assert held.is_positive.any()
    monkeypatch.setattr(yolo.losses, "yolov8_assignment", lambda **_: held)
    if term == "box":
        hold_alpha(monkeypatch)
    parameters = matched_parameters(network, ("backbone.stem", "neck.down3", "head"))

    def gradient(x: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        loss = network.losses(network(x), targets)[term]
        return torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)

    x = pictures[:1].clone().requires_grad_()
    g = gradient(x, True)
    v = [torch.randn_like(p) for p in g]
    (slope,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v)), x)
    for _ in range(2):
        direction = torch.randn_like(x)
        h = 1e-5
        ends = [gradient((x + s * h * direction).detach(), False) for s in (1, -1)]
        expected = sum(((a - b) * w).sum() for a, b, w in zip(*ends, v)) / (2 * h)
        torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def hold_alpha(monkeypatch) -> None:
    """CIoU with the alpha of its first call ever after."""
    original, kept = yolo.losses.paired_ciou, {}

    def ciou(a: Tensor, b: Tensor) -> Tensor:
        value = original(a, b)
        w, h = (a[:, 2] - a[:, 0]) / (a[:, 3] - a[:, 1] + 1e-7), (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1] + 1e-7)
        v = 4 / torch.pi**2 * (torch.atan(h) - torch.atan(w)).square()
        # value = rest - alpha v, with alpha a constant in its gradient: what is left to hold is alpha's value
        side = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
        overlap = side.clamp(min=0).prod(1)
        area = lambda x: (x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1])
        iou = overlap / (area(a) + area(b) - overlap)
        alpha = (v / (v - iou + 1)).detach()
        return value + (alpha - kept.setdefault("alpha", alpha)) * v

    monkeypatch.setattr(yolo.losses, "paired_ciou", ciou)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("formation", [(1, 1), (2, 2), (1, 3)])
def test_pictures_in_parts_are_the_whole(formation):
    pictures, targets = tiny_scene(5 * formation[0] * formation[1], size=16)
    build = lambda: SyntheticSet.from_pictures(pictures, targets, formation)
    options = dict(augmentation=draw_siamese_here, total_variation=0.5)
    whole = slopes_of(build(), pictures_at_once=1000, **options)
    for at_once in (1, 2, 8):
        part = slopes_of(build(), pictures_at_once=at_once, **options)
        torch.testing.assert_close(part, whole, atol=1e-9 * whole.abs().max().item() + 1e-11, rtol=1e-9)
    assert whole.flatten(1).abs().amax(1).gt(0).all()


def test_order_of_the_pictures_does_not_matter():
    (pictures, targets), (real, real_targets) = tiny_scene(4), tiny_scene(6, seed=1)

    def reorder(images: Tensor, objects: Targets, order: list[int]) -> tuple[Tensor, Targets]:
        place = torch.tensor(order).argsort()
        rows = torch.arange(len(objects)).flip(0)
        return images[order], Targets(
            objects.boxes_xyxy[rows], objects.labels[rows], place[objects.image[rows]], objects.ignore[rows]
        )

    order, real_order = [2, 0, 3, 1], [5, 1, 4, 0, 2, 3]
    slopes = slopes_of(SyntheticSet(pictures, targets), (real, real_targets))
    again = slopes_of(SyntheticSet(*reorder(pictures, targets, order)), reorder(real, real_targets, real_order))
    torch.testing.assert_close(again, slopes[order], atol=1e-9, rtol=1e-7)


def test_real_pictures_match_themselves_under_any_augmentation():
    """The same transform on both sides: the distance of a set to itself is 0, and so is its slope."""
    real = tiny_scene(4)
    matching = matching_of(SyntheticSet(*real), real, augmentation=draw_siamese_here)
    before = matching.synthetic.pixels.detach().clone()
    report = matching.step()
    assert report.distance == pytest.approx(0, abs=1e-10) and report.relative == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(matching.synthetic.pixels.detach(), before, atol=1e-9, rtol=0)
    assert report.s_loss == pytest.approx(report.r_loss)
    other = matching_of(SyntheticSet(*tiny_scene(4, seed=7)), real, augmentation=draw_siamese_here).step()
    assert other.relative > 0.01


def test_several_real_batches_are_one_large_one():
    real, real_targets = tiny_scene(6, seed=1)
    halves = list(chunks(real, real_targets, 3))
    pool = replace(FRESH, normalization="group")
    whole = slopes_of(SyntheticSet(*tiny_scene(3)), (real, real_targets), pool=pool)
    synthetic = SyntheticSet(*tiny_scene(3))
    before = synthetic.pixels.detach().clone()
    matching = matching_of(synthetic, pool=pool, real_batches=2)
    draws = iter(halves)
    matching._draw_real = lambda generator: next(draws)
    matching.step()
    torch.testing.assert_close((before - synthetic.pixels.detach()) / LEARNING_RATE, whole, atol=1e-9, rtol=1e-7)
    assert not list(draws)
    for name in ("real_batches", "pictures_at_once"):
        with pytest.raises(ValueError, match="expected real_batches and pictures_at_once of 1 or more"):
            matching_of(synthetic, **{name: 0})


def test_the_assignment_is_the_same_in_both_derivatives_and_constant(monkeypatch):
    seen, original = [], yolo.losses.task_aligned_assignment
    monkeypatch.setattr(
        yolo.losses, "task_aligned_assignment", lambda **arguments: seen.append(original(**arguments)) or seen[-1]
    )
    pictures, targets = tiny_scene(4, size=64)
    synthetic = SyntheticSet(pictures.float(), targets)
    real = tiny_scene(3, size=64, seed=1)
    matching_of(
        synthetic, (real[0].float(), real[1]), lambda seed: models.build("yolov8_narrow", 2), pictures_at_once=2
    ).step()
    assert len(seen) == 3 + 4 + 4
    assert any(a.is_positive.any() for a in seen[3:7])
    for first, second in zip(seen[3:7], seen[7:]):
        for name in ("is_positive", "gt_index", "target_scores", "is_ignored"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert not second.target_scores.requires_grad


class SamplingDetector(TinyDetector):
    """Learns from half of the objects' cells, chosen by torch's global generator."""

    def losses(self, output, targets: Targets) -> dict[str, Tensor]:
        chosen = torch.rand(len(targets)) < 0.5
        return super().losses(output, targets[chosen])


def test_a_loss_that_samples_draws_the_same_again_in_any_company():
    torch.manual_seed(0)
    network = SamplingDetector().double().eval()
    pictures, targets = tiny_scene(6)
    parameters = matched_parameters(network)
    before = torch.get_rng_state()
    first, again, other = (
        mean_gradient(network, chunks(pictures, targets, at_once), parameters, seed)[0]
        for seed, at_once in ((1, 6), (1, 2), (2, 6))
    )
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, again, atol=1e-12, rtol=1e-9)
    assert not torch.allclose(first[0], other[0])


def test_outputs_split_into_those_of_single_pictures(network):
    pictures, _ = tiny_scene(3)
    parts = split_output(network(pictures), 3)
    for index, part in enumerate(parts):
        alone = network(pictures[index : index + 1])
        torch.testing.assert_close(part.logits, alone.logits)
        torch.testing.assert_close(part.features["stem"], alone.features["stem"])
        assert part.stride == 4


# ---------------------------------------------------------------- a known optimum


@dataclass(frozen=True)
class LinearOutput:
    scores: Tensor  # (B, K)


class LinearClassifier(nn.Module):
    """z = W x over whole pictures, and the loss -z of the label: d L / d W_k is minus the picture, for its label k."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 2, 4, bias=False)

    def forward(self, images: Tensor) -> LinearOutput:
        return LinearOutput(self.score(images).flatten(1))

    def losses(self, output: LinearOutput, targets: Targets) -> dict[str, Tensor]:
        return {"cls": -output.scores[targets.image, targets.labels].sum()}


def labelled(labels: list[int]) -> Targets:
    count = len(labels)
    return Targets(
        torch.tensor([[0.0, 0, 4, 4]]).repeat(count, 1),
        torch.tensor(labels),
        torch.arange(count),
        torch.zeros(count, dtype=torch.bool),
    )


def test_matching_a_linear_model_recovers_the_class_means():
    """One picture for each of two classes: s_k = -x_k / 2 and r_k = -mean_k / 2, so D = 0 at x_k = mean_k."""
    real = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [0, 1] * 5
    synthetic = SyntheticSet(torch.rand(2, 3, 4, 4, dtype=torch.float64), labelled([0, 1]))
    matching = matching_of(
        synthetic, (real, labelled(labels)), lambda seed: LinearClassifier().double(),
        distance="mse", learning_rate=1.0, steps=30,
    )  # fmt: skip
    seen = []
    matching.run(lambda step, report: seen.append((step, report.distance)))
    means = torch.stack((real[::2].mean(0), real[1::2].mean(0)))
    torch.testing.assert_close(synthetic.pixels.detach(), means, atol=1e-7, rtol=0)
    assert [step for step, _ in seen] == list(range(1, 31)) and seen[-1][1] < 1e-12 < seen[0][1]
