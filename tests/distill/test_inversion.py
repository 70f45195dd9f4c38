"""Model inversion: its objective against numpy, descent, exact resume, and what it refuses."""

import numpy as np
import pytest
import torch

import models
from config import AugmentConfig
from datasets.augment import draw_siamese
from distill.inversion import Inversion, InversionSettings, statistics_distances
from distill.network_pool import set_statistics
from distill.synthetic import SyntheticSet
from errors import UserError
from structures import Targets
from tests.distill.tiny_detector import build_tiny, tiny_scene


def trained_network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_tiny(0)
    set_statistics(network, tiny_scene(6, seed=1)[0])
    return network


def inversion_of(pictures, targets, network=None, formation=(1, 1), **settings) -> Inversion:
    synthetic = SyntheticSet.from_pictures(pictures, targets, formation)
    return Inversion(synthetic, settings=InversionSettings(**settings), network=network or trained_network())


def test_statistics_term_matches_numpy():
    norm = torch.nn.BatchNorm2d(3).eval()
    norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = torch.rand(4, 3, 5, 5)
    with statistics_distances(torch.nn.Sequential(norm, torch.nn.ReLU())) as distances:
        norm(x)
        norm(2 * x)
    norm(x)  # outside of the context nothing is added
    assert len(distances) == 2
    for got, y in zip(distances, (x, 2 * x)):
        y = y.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
        expected = np.mean((y.mean(1) - [0.1, 0.2, 0.3]) ** 2) + np.mean((y.var(1) - [0.5, 1.0, 2.0]) ** 2)
        assert got.item() == pytest.approx(expected, rel=1e-5)


def test_a_step_of_descent_is_that_of_the_whole_objective():
    pictures, targets = tiny_scene(4)
    run = inversion_of(
        pictures, targets, optimizer="sgd", momentum=0.0, learning_rate=1e-4, total_variation=0.3, statistics=0.7
    )
    network = run.network
    x = pictures.clone().requires_grad_()
    with statistics_distances(network) as distances:
        loss = sum(network.losses(network(x), targets).values())
    objective = (
        loss + 0.3 * run.synthetic.total_variation(torch.arange(4), x).mean() + 0.7 * sum(distances) / len(distances)
    )
    (slope,) = torch.autograd.grad(objective, x)
    report = run.step()
    torch.testing.assert_close((pictures - run.synthetic.pixels.detach()) / 1e-4, slope, atol=1e-8, rtol=1e-6)
    assert report.loss == pytest.approx(loss.item()) and report.statistics == pytest.approx(distances[0].item())


@pytest.mark.parametrize("formation", [(1, 1), (2, 2)])
def test_the_detector_sees_its_objects_after_some_steps_from_noise(formation):
    _, targets = tiny_scene(4 * formation[0] * formation[1])
    noise = torch.rand(
        4 * formation[0] * formation[1], 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    run = inversion_of(noise, targets, formation=formation, steps=40, learning_rate=0.05, statistics=0.1)
    before = {name: p.clone() for name, p in run.network.state_dict().items()}
    losses = []
    run.run(lambda step, report: losses.append(report.loss))
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(before[name], p) for name, p in run.network.state_dict().items())
    assert 0 <= run.synthetic.pixels.min() and run.synthetic.pixels.max() <= 1


def test_a_resumed_run_ends_with_the_same_bytes():
    def build() -> Inversion:
        settings = AugmentConfig(mosaic=0.0)
        return Inversion(
            SyntheticSet(*tiny_scene(5)),
            settings=InversionSettings(steps=6, pictures_per_step=2),
            network=trained_network(),
            draw_augmentation=lambda generator: draw_siamese(generator=generator, settings=settings),
        )

    whole, first, resumed = build(), build(), build()
    whole.run()
    for _ in range(3):
        first.step()
    resumed.load_state_dict(first.state_dict())
    resumed.run()
    assert torch.equal(resumed.synthetic.pixels, whole.synthetic.pixels)
    assert not torch.equal(first.synthetic.pixels, whole.synthetic.pixels)


def test_pictures_without_objects_are_background():
    pictures, _ = tiny_scene(2)
    report = inversion_of(pictures, Targets.empty()).step()
    assert report.loss > 0


def test_what_cannot_be_done_is_refused():
    pictures, targets = tiny_scene(2, size=64)
    torch.manual_seed(0)
    two_stage = models.build("fasterrcnn_mobilenet_v3_small", 2)
    with pytest.raises(UserError, match=r"inversion\.statistics: found 1, expected 0: FasterRCNN calls no BatchNorm"):
        inversion_of(pictures.float(), targets, two_stage).step()
    broken = trained_network()
    broken.head.bias.data.fill_(float("nan"))
    run = inversion_of(*tiny_scene(3), broken)
    before = run.synthetic.pixels.detach().clone()
    with pytest.raises(UserError, match="inversion: the objective is nan at step 0") as error:
        run.step()
    assert error.value.exit_code == 3 and torch.equal(run.synthetic.pixels, before)
