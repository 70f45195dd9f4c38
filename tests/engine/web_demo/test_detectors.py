"""What the demo tells of detections and of latency."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from checkpoint import CheckpointInfo
from engine.drawing.detections import class_color
from engine.web_demo import detectors
from engine.web_demo.detectors import Detector, class_chips
from structures import Detections


def found(*labels: int) -> Detections:
    return Detections(torch.zeros(len(labels), 4), torch.ones(len(labels)), torch.tensor(labels, dtype=torch.int64))


def test_chips_have_what_was_found_first_in_the_colours_of_the_boxes():
    chips = class_chips(found(2, 0, 2), ("cat", "dog", "cow"))
    assert chips.index("cow <b>2</b>") < chips.index("cat <b>1</b>") < chips.index(">dog</span>")
    assert f"background:rgb{class_color(2)}" in chips and f"background:rgb{class_color(1)}" not in chips
    assert class_chips(found(), ()) == '<div class="chips"></div>'


def test_many_classes_are_counted_and_named_in_a_tooltip():
    chips = class_chips(found(79), tuple(f"c{k}" for k in range(80)))
    assert chips.count("<span") == detectors.MAX_CHIPS + 1 and "and 64 more" in chips and "c78" in chips


def test_class_names_of_strangers_are_text():
    chips = class_chips(found(0), ("<img src=x onerror=alert(1)>", *[f'" onclick="{k}' for k in range(40)]))
    assert "<img" not in chips and '" onclick' not in chips and "&lt;img" in chips


@dataclass
class Sleeper:
    """A predictor that takes its time, the first time longer."""

    seconds: float
    calls: int = 0

    def __call__(self, pictures: list[np.ndarray]) -> list[Detections]:
        SLEPT.append(self.seconds)
        time.sleep(self.seconds * (10 if SLEPT.count(self.seconds) == 1 else 1))
        return [found()]


SLEPT: list[float] = []


def detector(seconds: float) -> Detector:
    return Detector("a", nn.Identity(), CheckpointInfo("a", ("x",), 64), Sleeper(seconds), 0)  # type: ignore[arg-type]


def test_a_run_that_was_no_measurement_says_so():
    """Also where a stranger's file has something else instead of a list of teachers."""
    rows = [{"name": "dino", "weights": "random"}, {"name": "given", "weights": "a.pt"}, {}, 3, None]
    for teachers, mark in ((rows, ", plumbing, not a measurement: random weights in dino"), (3, ""), (None, "")):
        info = CheckpointInfo("a", ("x",), 64, config={"teachers": teachers})
        described = Detector("a", nn.Identity(), info, Sleeper(0), 0).describe()  # type: ignore[arg-type]
        assert described == f"a, 0.00 M parameters, 1 class, 64 px{mark}"


def test_latency_is_warm_and_measured_in_turns(monkeypatch):
    monkeypatch.setattr(detectors, "TIMED_SECONDS", 0.2)
    fast, slow = detectors.measure_latency([detector(0.005), detector(0.02)], np.zeros((8, 8, 3), np.uint8))
    assert 5 <= fast.least <= fast.median <= fast.most and 20 <= slow.least <= slow.median <= slow.most
    assert fast.median < slow.median < 200  # the first call of each took ten times as long and does not count
    assert fast.rounds == slow.rounds >= detectors.FEWEST_ROUNDS
    counted = SLEPT[-2 * fast.rounds :]
    assert all({a, b} == {0.005, 0.02} for a, b in zip(counted[::2], counted[1::2]))
    assert str(detectors.Latency(12.34, 11.96, 15.0, 9)) == "12.3 ms (12.0 to 15.0)"
    assert str(detectors.Latency(312.3, 298.8, 400.0, 3)) == "312 ms (299 to 400)"
