"""Class scores learnt beside the pixels: slopes against the whole graph and finite differences, a known optimum."""

import io
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from distill.gradient_distance import gradient_distance
from distill.mean_gradient import chunks, matched_parameters, mean_gradient
from distill.network_pool import PoolSettings, set_statistics
from distill.synthetic import SyntheticSet, first_class_logits
from structures import Targets
from tests.distill.tiny_detector import TinyDetector, TinyOutput, tiny_scene
from tests.distill.tiny_matching import FRESH, LEARNING_RATE, draw_siamese_here, matching_of


class SoftTiny(TinyDetector):
    """BCE against the shares of the objects whose boxes a cell lies in, over the number of such pairs."""

    def losses(self, output: TinyOutput, targets: Targets) -> dict[str, Tensor]:
        logits, boxes = output.logits, targets.boxes_xyxy[:, :, None, None] / output.stride
        shares = targets.class_scores
        if shares is None:
            shares = F.one_hot(targets.labels, logits.shape[1]).to(logits)
        y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in logits.shape[2:]), indexing="ij")
        inside = (x > boxes[:, 0]) & (x < boxes[:, 2]) & (y > boxes[:, 1]) & (y < boxes[:, 3])  # (M, h, w)
        wanted = torch.zeros_like(logits).index_add(0, targets.image, shares[:, :, None, None] * inside[:, None])
        return {"cls": F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / inside.sum().clamp(min=1)}


def build_soft(seed: int) -> SoftTiny:
    return SoftTiny().double()


def random_logits(count: int, num_classes: int = 2) -> Tensor:
    return torch.randn(count, num_classes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def soft_set(count: int, formation=(1, 1), **options) -> SyntheticSet:
    made = SyntheticSet.from_pictures(*tiny_scene(count * formation[0] * formation[1], **options), formation)
    return SyntheticSet(made.pixels, made.targets, formation, class_logits=random_logits(len(made.targets)))


# ---------------------------------------------------------------- the slope


@pytest.mark.parametrize(
    ("kind", "formation", "at_once"), [("cosine", (1, 1), 2), ("mse", (1, 1), 100), ("cosine", (2, 1), 1)]
)
def test_slopes_are_those_of_the_whole_graph(kind, formation, at_once):
    """Pixels and class logits at once, through tiles, augmentation and parts."""
    synthetic, (real, real_targets) = soft_set(3, formation), tiny_scene(5, seed=1)
    stored, logits = (x.detach().clone().requires_grad_() for x in (synthetic.pixels, synthetic.class_logits))
    augment = draw_siamese_here(torch.Generator().manual_seed(2))
    options = dict(
        augmentation=lambda generator: augment,
        distance=kind,
        class_learning_rate=0.5,
        pictures_at_once=at_once,
        pool=replace(FRESH, normalization="group"),
    )
    matching = matching_of(synthetic, (real, real_targets), build_soft, **options)
    matching.step()
    got = (stored - synthetic.pixels) / LEARNING_RATE, (logits - synthetic.class_logits) / 0.5

    network, _, _ = matching_of(soft_set(3, formation), None, build_soft, **options).pool.visit(0)
    parameters = matched_parameters(network)

    def whole(pictures: Tensor, targets: Targets) -> list[Tensor]:
        loss = 0
        for index in range(len(pictures)):
            mine = targets[targets.image == index]
            output = network(pictures[index : index + 1])
            loss = loss + sum(network.losses(output, replace(mine, image=0 * mine.image)).values())
        return torch.autograd.grad(loss / len(pictures), parameters, create_graph=True)

    r = [x.detach() for x in whole(*augment(real, real_targets))]
    s = whole(*augment(*synthetic.decode(torch.arange(3), stored, logits)))
    expected = torch.autograd.grad(gradient_distance(s, r, kind), [stored, logits])
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine.detach(), theirs, atol=1e-8, rtol=1e-6)
        assert theirs.abs().max() > 1e-5


@pytest.mark.parametrize(
    "arch", ["yolov8p", "yolov5n", pytest.param("fasterrcnn_mobilenet_v3_small", marks=pytest.mark.slow)]
)
def test_slope_through_a_detector_of_ours_by_finite_differences(arch):
    """Assignments, weights and normalisers do not depend on the class logits, so nothing has to be held."""
    boxes_xyxy = torch.tensor([[4.0, 4, 60, 58], [10, 20, 50, 60]])  # so large that a fresh YOLOv8 aligns with them
    targets = Targets(boxes_xyxy, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.zeros(2).bool())
    synthetic = SyntheticSet(tiny_scene(2, size=64)[0], targets, class_logits=random_logits(2))
    real = tiny_scene(2, size=64, seed=1)
    first, rate = synthetic.class_logits.detach().clone(), 1e-3
    layers = ("backbone",) if arch.startswith("fasterrcnn") else ()
    options = dict(distance="mse", layers=layers, class_learning_rate=rate, learning_rate=0.0)
    build = lambda seed: models.build(arch, 2).double()
    matching_of(synthetic, real, build, **options).step()
    slope = (first - synthetic.class_logits.detach()) / rate

    matching = matching_of(synthetic, real, build, **options)
    network, _, _ = matching.pool.visit(0)
    set_statistics(network, real[0])
    parameters = matched_parameters(network, layers)
    r, _ = mean_gradient(network, [real], parameters, 0)

    def distance(logits: Tensor) -> Tensor:
        batches = chunks(*synthetic.decode(torch.arange(2), synthetic.pixels.detach(), logits), 2)
        return gradient_distance(mean_gradient(network, batches, parameters, 0)[0], r, "mse")

    direction, h = random_logits(len(first)).flip(0), 1e-4
    expected = (distance(first + h * direction) - distance(first - h * direction)) / (2 * h)
    assert expected != 0
    torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- what moves, and what does not


def test_without_a_class_learning_rate_nothing_changes():
    """Certain class logits are labels, and stay; without any, neither state nor targets know of them."""
    pictures, targets = tiny_scene(3)
    certain = SyntheticSet(pictures, targets, class_logits=1000 * F.one_hot(targets.labels, 2).double())
    plain = SyntheticSet(pictures, targets)
    for synthetic in (certain, plain):
        matching = matching_of(synthetic, None, build_soft, optimizer="adam", learning_rate=0.01)
        for _ in range(2):
            matching.step()
        assert "class_optimizer" not in matching.state_dict()
    assert torch.equal(certain.pixels, plain.pixels) and not torch.equal(plain.pixels, pictures)
    assert torch.equal(certain.class_logits.detach(), 1000 * F.one_hot(targets.labels, 2).double())
    assert "class_logits" not in plain.state_dict() and plain.decode(torch.arange(3))[1].class_scores is None
    with pytest.raises(ValueError, match=r"class_learning_rate 0.1 for a set without class_logits"):
        matching_of(plain, class_learning_rate=0.1)


def test_objects_rest_while_their_picture_does():
    synthetic = soft_set(4)
    options = dict(class_learning_rate=0.1, pictures_per_step=1, optimizer="adam", momentum=0.5)
    matching, seen = matching_of(synthetic, None, build_soft, **options), set()
    for _ in range(8):
        before, pixels = synthetic.class_logits.detach().clone(), synthetic.pixels.detach().clone()
        matching.step()
        moved = (before != synthetic.class_logits).any(1).nonzero()[:, 0]
        (picture,) = (pixels != synthetic.pixels).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert set(synthetic.targets.image[moved].tolist()) <= {picture}
        seen.add(picture)
    assert len(seen) > 1


def test_a_set_without_objects_has_nothing_to_share():
    empty = SyntheticSet(tiny_scene(2)[0], Targets.empty(), class_logits=torch.zeros(0, 2))
    report = matching_of(empty, None, build_soft, class_learning_rate=0.1, optimizer="adam").step()
    assert report.moved > 0 and empty.decode(torch.arange(2))[1].class_scores.shape == (0, 2)


def test_a_resumed_run_ends_with_the_same_bytes():
    def run():
        pool = PoolSettings(networks=2, first_steps=1, steps_between=1, last_steps=3)
        options = dict(optimizer="adam", class_learning_rate=0.1, pictures_per_step=3, pool=pool, steps=5)
        return matching_of(soft_set(4), None, build_soft, draw_siamese_here, **options)

    whole, first, file = run(), run(), io.BytesIO()
    whole.run()
    for _ in range(2):
        first.step()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = run()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.run()
    assert torch.equal(resumed.synthetic.class_logits, whole.synthetic.class_logits)
    assert torch.equal(resumed.synthetic.pixels, whole.synthetic.pixels)
    assert not torch.equal(whole.synthetic.class_logits, first.synthetic.class_logits)


# ---------------------------------------------------------------- a known optimum


@dataclass(frozen=True)
class LinearOutput:
    scores: Tensor  # (B, K)


class LinearClassifier(nn.Module):
    """z = W x and the loss -sum_k p_k z_k: d L / d W_k is -p_k x."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 3, 4, bias=False)

    def forward(self, images: Tensor) -> LinearOutput:
        return LinearOutput(self.score(images).flatten(1))

    def losses(self, output: LinearOutput, targets: Targets) -> dict[str, Tensor]:
        shares = targets.class_scores
        shares = F.one_hot(targets.labels, 3).to(output.scores) if shares is None else shares
        return {"cls": -(output.scores[targets.image] * shares).sum()}


def test_a_picture_of_all_classes_learns_their_shares():
    """Ten times one real picture, of three classes: r_k = -share_k x, so one that is x has D = 0 at these shares."""

    def labelled(labels: list[int]) -> Targets:
        boxes_xyxy = torch.tensor([[0.0, 0, 4, 4]]).repeat(len(labels), 1)
        return Targets(boxes_xyxy, torch.tensor(labels), torch.arange(len(labels)), torch.zeros(len(labels)).bool())

    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = x.repeat(10, 1, 1, 1), labelled([0] * 5 + [1] * 3 + [2] * 2)
    first = labelled([0])
    synthetic = SyntheticSet(x, first, class_logits=first_class_logits(first.labels, 3))
    matching = matching_of(
        synthetic, real, lambda seed: LinearClassifier().double(),
        distance="mse", learning_rate=0.0, class_learning_rate=0.3, steps=100,
    )  # fmt: skip
    matching.run()
    shares = synthetic.taught().class_scores.detach()
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.3, 0.2]]).double(), atol=1e-4, rtol=0)
    assert torch.equal(synthetic.pixels.detach(), x)


# ---------------------------------------------------------------- the set


def test_first_class_logits_leave_some_doubt():
    shares = first_class_logits(torch.tensor([2, 0]), 4, doubt=0.06).softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[0.02, 0.02, 0.94, 0.02], [0.94, 0.02, 0.02, 0.02]]))
    assert first_class_logits(torch.zeros(0).long(), 3).shape == (0, 3)
    with pytest.raises(ValueError, match=r"1 class, expected 2 or more"):
        first_class_logits(torch.zeros(2).long(), 1)


def test_class_scores_go_with_their_objects():
    synthetic = soft_set(3, formation=(2, 1))
    shares = synthetic.class_logits.detach().softmax(1)
    _, targets = synthetic.decode(torch.tensor([2, 0]))
    rows = (synthetic.targets.image // 2 != 1).nonzero()[:, 0]
    assert torch.equal(targets.labels, synthetic.targets.labels[rows])
    assert torch.equal(targets.class_scores, shares[rows]) and torch.equal(synthetic.taught().class_scores, shares)
    again = SyntheticSet.from_state(synthetic.state_dict())
    assert torch.equal(again.class_logits, synthetic.class_logits) and again.class_logits.requires_grad


def test_what_does_not_fit_is_refused():
    pictures, targets = tiny_scene(2)
    plain, soft = SyntheticSet(pictures, targets), soft_set(2)
    for one, other in ((plain, soft), (soft, plain)):
        with pytest.raises(ValueError, match=r"the state is of another synthetic set"):
            one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"class_logits of shape \(7, 2\) for 1 objects"):
        SyntheticSet(pictures, targets, class_logits=torch.zeros(7, 2))
    with pytest.raises(ValueError, match=r"targets with class_scores, expected class_logits"):
        SyntheticSet(pictures, replace(targets, class_scores=torch.ones(1, 1)))
