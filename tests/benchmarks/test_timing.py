"""What the benchmarks share: their options, a row, the batch that both sides get."""

import argparse

import pytest
import torch

from benchmarks import timing


def test_a_row_has_medians_the_shortest_and_the_ratio():
    line = timing.row("a step", {"ours": [0.1, 0.2, 0.4], "peer": [0.3, 0.3, 0.3]}, lambda s: 1 / s)
    assert line.split() == ["a", "step", "5.00", "(", "10.00)", "3.33", "(", "3.33)", "1.50"]
    both = {("ours", "a"): [0.5], ("ours", "b"): [2.0], ("peer", "b"): [1.0]}
    assert timing.row("a", both, lambda s: s).split() == ["a", "0.50", "(", "0.50)"]
    assert timing.row("b", both, lambda s: s).split()[-1] == "0.50"
    assert len(timing.header("b", "peer")) == len(timing.row("b", both, lambda s: s))


def test_options_have_their_sizes_and_set_the_threads(one_thread):
    args = timing.parse(timing.options("what", rounds=3, image_size=320), ["--rounds", "5", "--threads", "1"])
    assert (args.image_size, args.rounds, args.cpu_time, torch.get_num_threads()) == (320, 5, False, 1)
    times = timing.take_turns({"a": lambda: None}, argparse.Namespace(rounds=2, cpu_time=True))
    assert len(times["a"]) == 2 and "no nothing_like_it: its column is empty" in timing.versions("nothing_like_it")


def test_both_sides_get_the_same_boxes():
    images, targets = timing.random_batch(2, 64, objects=3, num_classes=5)
    assert images.shape == (2, 3, 64, 64) and targets.image.tolist() == [0, 0, 0, 1, 1, 1] and targets.labels.max() < 5
    rows = timing.ultralytics_rows(targets, 64)
    center, side = rows["bboxes"].split(2, 1)
    torch.testing.assert_close(64 * torch.cat((center - side / 2, center + side / 2), 1), targets.boxes_xyxy)
    assert (targets.boxes_xyxy >= 0).all() and (targets.boxes_xyxy <= 64).all() and rows["cls"].shape == (6, 1)


def test_points_in_time_on_a_cpu():
    cpu = torch.device("cpu")
    before = timing.now(cpu)
    took = timing.device_seconds(cpu)(lambda: sum(range(100_000)))
    assert 0 < took <= timing.seconds_between(before, timing.now(cpu))


def test_a_step_learns(one_thread):
    model = torch.nn.Conv2d(3, 2, 3)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    step = timing.build_step(model, lambda images: model(images).square().mean(), images, channels_last=True)
    assert step() == pytest.approx(step(), rel=0.1) and step() > step() > step()
