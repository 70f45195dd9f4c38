"""Runs of gradient matching: stopped and resumed, with the project's detectors, refused."""

import io

import pytest
import torch
from torch import Tensor, nn

import models
from distill.condense.gradient_matching import GradientMatching, MatchingSettings
from distill.condense.mean_gradient import matched_parameters
from distill.condense.network_pool import PoolSettings
from distill.condense.synthetic import SyntheticSet
from errors import UserError
from structures import Targets
from tests.distill.condense.tiny_matching import draw_siamese_here, matching_of
from tests.distill.tiny_detector import build_tiny, tiny_scene


def tiny_run(steps: int = 6) -> GradientMatching:
    """Two networks that learn between matches, an augmentation, a part of the pictures in each step."""
    pictures, targets = tiny_scene(20, seed=1)

    def draw_real(generator: torch.Generator) -> tuple[Tensor, Targets]:
        rows = torch.randperm(len(pictures), generator=generator)[:4].sort().values
        place = torch.full((len(pictures),), -1).index_copy_(0, rows, torch.arange(4))
        objects = targets[place[targets.image] >= 0]
        return pictures[rows], Targets(objects.boxes_xyxy, objects.labels, place[objects.image], objects.ignore)

    return GradientMatching(
        SyntheticSet(*tiny_scene(4)),
        settings=MatchingSettings(
            steps=steps,
            pictures_per_step=3,
            pictures_at_once=2,
            total_variation=0.1,
            pool=PoolSettings(networks=2, first_steps=1, steps_between=2, last_steps=4),
        ),
        build_network=build_tiny,
        draw_real=draw_real,
        draw_augmentation=draw_siamese_here,
    )


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(killed_at):
    whole, reports = tiny_run(), []
    whole.run(lambda step, report: reports.append(report))
    assert {report.trained for report in reports} == {1, 3} and len({report.network for report in reports}) == 2

    class Killed(Exception):
        pass

    def kill(step: int, report) -> None:
        if step == killed_at:
            raise Killed

    first = tiny_run()
    with pytest.raises(Killed):
        first.run(kill)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed, rest = tiny_run(), []
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.run(lambda step, report: rest.append(report))
    assert torch.equal(resumed.synthetic.pixels, whole.synthetic.pixels)
    assert rest == reports[killed_at:]
    assert not torch.equal(whole.synthetic.pixels, tiny_run().synthetic.pixels)


@pytest.mark.parametrize("arch", ["yolov8_narrow", "yolov5n"])
@pytest.mark.parametrize("has_objects", [True, False])
def test_a_step_with_a_detector_of_ours(arch, has_objects):
    """Also where no picture on either side has an object."""
    pictures, targets = tiny_scene(2, size=64)
    targets = targets if has_objects else Targets.empty()
    real, real_targets = tiny_scene(2, size=64, seed=1)
    synthetic = SyntheticSet(pictures.float(), targets)
    before = synthetic.pixels.detach().clone()
    report = matching_of(
        synthetic,
        (real.float(), real_targets if has_objects else Targets.empty()),
        lambda seed: models.build(arch, 2),
        augmentation=draw_siamese_here,
        optimizer="adam",
        learning_rate=0.01,
    ).step()
    assert 0 < report.relative < 2 and report.moved > 0 and report.s_loss > 0
    assert not torch.equal(synthetic.pixels, before) and synthetic.pixels.isfinite().all()


@pytest.mark.slow
def test_a_step_with_a_two_stage_detector():
    """Pooled regions are differentiable twice, and the samples of both derivatives are the same."""
    pictures, targets = tiny_scene(2, size=64)
    real, real_targets = tiny_scene(2, size=64, seed=1)
    synthetic = SyntheticSet(pictures.float(), targets)
    build = lambda seed: models.build("fasterrcnn_mobilenet_v3_small", 2)
    options = dict(optimizer="adam", learning_rate=0.01, layers=("backbone", "rpn"))
    report = matching_of(synthetic, (real.float(), real_targets), build, **options).step()
    assert 0 < report.relative < 2 and report.moved > 0 and synthetic.pixels.isfinite().all()


def test_layers_are_chosen_by_the_beginning_of_their_names():
    network = build_tiny(0)
    assert matched_parameters(network, ("head",)) == [network.head.weight]
    assert len(matched_parameters(network)) == 2
    with pytest.raises(UserError, match="layers: 'neck' begins no convolution's name; they begin with stem, head"):
        matched_parameters(network, ("neck", "head"))
    with pytest.raises(UserError, match="Linear has no trainable convolution"):
        matched_parameters(nn.Linear(2, 2))


def test_a_step_that_is_not_finite_stops_and_leaves_the_pixels():
    def build(seed: int) -> nn.Module:
        network = build_tiny(seed)
        network.head.weight.data[0, 0, 0, 0] = float("nan")
        return network

    synthetic = SyntheticSet(*tiny_scene(3))
    before = synthetic.pixels.detach().clone()
    with pytest.raises(
        UserError, match="gradient distance is nan at step 0, network 0 after 0 training steps"
    ) as error:
        matching_of(synthetic, build=build).step()
    assert error.value.exit_code == 3 and torch.equal(synthetic.pixels, before)
