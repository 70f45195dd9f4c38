"""Weights that are shares of a gradient: on losses with known gradients; measured, then fixed."""

import math

import pytest
import torch
from torch import Tensor

from config import Config, GradientShare, from_tree, to_tree
from distill.gradient_shares import BATCHES, GradientShares
from errors import UserError

MAPS = ("c3", "c4", "p3", "p4")


def of(*own: str, **shares: float) -> GradientShares:
    """Of terms that compare the maps `own`, by name."""
    return GradientShares(shares, dict.fromkeys(shares, own or ("p3", "p4")), MAPS)


def features() -> dict[str, Tensor]:
    """c3 -> p3 -> p4: p4 is twice p3, which is three times c3; one value each."""
    c3 = torch.ones(1, requires_grad=True)
    p3 = 3 * c3
    return {"c3": c3, "p3": p3, "p4": 2 * p3}


def by_hand(maps: dict[str, Tensor], p3: float, p4: float) -> Tensor:
    """A loss with d/dp4 = p4 and d/dp3 = p3 + 2 p4, since p4 = 2 p3; d/dc3 is three times that of p3."""
    return p3 * maps["p3"].sum() + p4 * maps["p4"].sum()


def measure(shares: GradientShares, losses: dict[str, tuple], detection: tuple, *, counts: bool) -> dict[str, float]:
    maps = features()
    values = {name: by_hand(maps, *slopes) for name, slopes in losses.items()}
    weights = shares(values, {"box": by_hand(maps, *detection), "cls": torch.zeros(())}, maps, counts=counts)
    return {name: float(weight) for name, weight in weights.items()}


def norm(p3: float, p4: float) -> float:
    return math.hypot(p3 + 2 * p4, p4)


def test_the_weight_brings_the_gradient_to_its_share():
    """Both maps together, with what p3 does through p4; every term by itself."""
    shares = of(a=0.1, b=0.5)
    found = measure(shares, {"a": (1.0, 2.0), "b": (0.0, 7.0), "number": (1.0, 1.0)}, (5.0, -1.0), counts=False)
    assert set(found) == {"a", "b"}
    assert found["a"] == pytest.approx(0.1 * norm(5, -1) / norm(1, 2))
    assert found["b"] == pytest.approx(0.5 * norm(5, -1) / norm(0, 7))


def test_maps_of_the_backbone_are_measured_there():
    shares = of("c3", a=0.1)
    assert shares.maps == {"a": ("c3",)}
    maps = features()
    (weight,) = shares({"a": (maps["c3"] ** 2).sum()}, {"box": by_hand(maps, 5.0, 0.0)}, maps, counts=False).values()
    assert float(weight) == pytest.approx(0.1 * 15 / 2)


def test_the_weight_is_that_of_the_first_batches_after_the_warm_up():
    """Each batch has its own weight until then. Norms are summed before they are divided."""
    shares = of(a=0.2)
    assert measure(shares, {"a": (1.0, 0.0)}, (1000.0, 0.0), counts=False)["a"] == pytest.approx(200)
    expected_sum = 0.0
    for number in range(1, BATCHES + 1):
        assert shares.is_measuring and not shares.announcements()
        own = measure(shares, {"a": (float(number), 0.0)}, (6.0, 0.0), counts=True)["a"]
        assert own == pytest.approx(0.2 * 6 / number)
        expected_sum += number
    assert not shares.is_measuring
    expected = 0.2 * 6 * BATCHES / expected_sum
    for detection in (6.0, 600.0, 0.0):
        assert measure(shares, {"a": (1.0, 0.0)}, (detection, 0.0), counts=True)["a"] == pytest.approx(expected)
    (line,) = shares.announcements()
    assert line == f"a: weight {expected:.4g}, 0.2 of the detection loss's gradient on p3, p4, from here on"
    assert shares.announcements() == []
    assert shares.report() == {"a": {"share": 0.2, "weight": pytest.approx(expected), "measured_batches": BATCHES}}


def test_a_batch_without_either_gradient_has_weight_zero_and_is_not_counted():
    shares = of(a=0.1)
    assert measure(shares, {"a": (1.0, 0.0)}, (0.0, 0.0), counts=True) == {"a": 0.0}
    assert measure(shares, {"a": (0.0, 0.0)}, (1.0, 0.0), counts=True) == {"a": 0.0}
    maps = features()  # no graph: nothing to compare in the batch
    assert float(shares({"a": torch.zeros(())}, {"box": by_hand(maps, 1.0, 0.0)}, maps, counts=True)["a"]) == 0
    assert shares.measured.tolist() == [[0, 0, 0]] and shares.measured_weights() == {}
    assert shares({}, None, {}, counts=True) == {}  # no term acts


def test_a_resumed_run_goes_on_measuring():
    """Saved in the middle of it: the same weights, bit by bit, as without the stop; saved after it: fixed at once."""
    whole, first, second = (of(a=0.1, b=0.3) for _ in range(3))
    batches = [({"a": (1.0 + n, 0.1), "b": (0.3, 0.1 * n)}, (3.0, 0.7 * n)) for n in range(BATCHES + 2)]
    expected = [measure(whole, *batch, counts=True) for batch in batches]
    for batch in batches[:4]:
        measure(first, *batch, counts=True)
    second.load_state_dict(first.state_dict())
    assert [measure(second, *batch, counts=True) for batch in batches[4:]] == expected[4:]
    third = of(a=0.1, b=0.3)
    third.load_state_dict(whole.state_dict())
    assert third.fixed == whole.fixed and not third.is_measuring


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="term 'a': found stem, expected a student with maps p3, p4"):
        GradientShares({"a": 0.1}, {"a": ("stem",)}, ("stem",))
    shares, maps = of(a=0.1), features()
    with pytest.raises(UserError, match="term 'a': its gradient reaches none of p3, p4: expected a number as weight"):
        shares({"a": (torch.ones(1, requires_grad=True) ** 2).sum()}, {"box": maps["p4"].sum()}, maps, counts=True)
    with pytest.raises(ValueError, match="found no detection losses"):
        shares({"a": maps["p3"].sum()}, None, maps, counts=True)


def test_runs_without_shares_save_nothing():
    assert not of().state_dict()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"share": "much"}, "key 'terms.0.weight.share': found 'much', expected a number"),
        ({"shares": 0.1}, "unknown key 'terms.0.weight.shares', did you mean 'terms.0.weight.share'?"),
        ({}, "key 'terms.0.weight.share' is missing"),
        ([0.1], "key 'terms.0.weight': found [0.1], expected a number"),
    ],
)
def test_a_weight_is_a_number_or_a_share(weight, message):
    tree = {
        "name": "x",
        "data": {"format": "yolo", "root": "r"},
        "student": {"arch": "yolov8n"},
        "terms": [{"teacher": "t", "loss": "mse", "weight": {"share": 0.25}}],
    }
    config = from_tree(Config, tree, source="c")
    assert config.terms[0].weight == GradientShare(0.25)
    assert from_tree(Config, to_tree(config), source="c") == config
    tree["terms"][0]["weight"] = weight
    with pytest.raises(UserError) as error:
        from_tree(Config, tree, source="c")
    assert str(error.value) == f"c: {message}"
