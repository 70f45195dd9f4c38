"""Gradient matching of one class a step: which pictures and objects count, on both sides."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.gradient_distance import gradient_distance
from distill.mean_gradient import of_class
from distill.synthetic import SyntheticSet
from errors import UserError
from structures import Targets
from tests.distill.tiny_detector import tiny_scene
from tests.distill.tiny_matching import FRESH, LEARNING_RATE, func_gradient, matching_of


@pytest.mark.parametrize("formation", [(1, 1), (2, 2)])
def test_slope_of_one_class_is_that_of_torch_func(formation):
    """Pictures with the class alone on both sides, their other objects ignored; the rest of a set does not move."""
    pictures, targets = tiny_scene(8)
    real, real_targets = tiny_scene(6, seed=1)
    synthetic = SyntheticSet.from_pictures(pictures, targets, formation)
    stored = synthetic.pixels.detach().clone()
    options = dict(by_class=True, pool=replace(FRESH, normalization="group"), pictures_at_once=3)
    matching = matching_of(synthetic, (real, real_targets), **options)
    label = matching.step().label
    got = (stored - synthetic.pixels.detach()) / LEARNING_RATE

    def of_label(images: Tensor, t: Targets) -> tuple[Tensor, Targets]:
        """The contract in loops."""
        kept = [i for i in range(len(images)) if label in t.labels[t.image == i]]
        rows = [row for i in kept for row in range(len(t)) if t.image[row] == i]
        image = torch.tensor([kept.index(int(t.image[row])) for row in rows])
        return images[kept], Targets(t.boxes_xyxy[rows], t.labels[rows], image, t.labels[rows] != label)

    network, _, _ = matching_of(synthetic, **options).pool.visit(0)
    r = func_gradient(network, *of_label(real, real_targets))

    def objective(x: Tensor) -> Tensor:
        s = func_gradient(network, *of_label(*synthetic.decode(torch.arange(len(x)), x)))
        return gradient_distance(s, r, "cosine")

    torch.testing.assert_close(got, torch.func.grad(objective)(stored), atol=1e-8, rtol=1e-6)
    if formation == (1, 1):
        holds = [label in targets.labels[targets.image == i] for i in range(8)]
        assert got.flatten(1).abs().amax(1).gt(0).tolist() == holds and not all(holds)


def test_steps_draw_from_the_classes_of_the_set_and_no_other():
    pictures, targets = tiny_scene(6)
    matching = matching_of(SyntheticSet(pictures, targets), by_class=True)
    assert {matching.step().label for _ in range(12)} == {0, 1}
    one = replace(targets, labels=torch.ones_like(targets.labels))
    matching = matching_of(SyntheticSet(pictures, one), by_class=True, pictures_per_step=2)
    assert {matching.step().label for _ in range(6)} == {1}
    assert matching_of(SyntheticSet(pictures, targets)).step().label == -1
    nothing = tiny_scene(1, seed=1)  # a picture without any object
    with pytest.raises(UserError, match="draws of real pictures hold no object of class 1"):
        matching_of(SyntheticSet(pictures, one), nothing, by_class=True).step()
    with pytest.raises(ValueError, match="by_class"):
        matching_of(SyntheticSet(*nothing), by_class=True)


def test_one_class_of_originals_is_of_the_same_pictures():
    """Originals that the tiles have lost nothing of: no distance, whatever the class and the pictures of a step."""
    pictures, targets = tiny_scene(16)
    synthetic = SyntheticSet.from_pictures(pictures, targets, (2, 2))

    def read(numbers: Tensor) -> tuple[Tensor, Targets]:
        with torch.no_grad():
            decoded, objects = synthetic.decode(torch.arange(4))
        return decoded[numbers], replace(
            objects[torch.isin(objects.image, numbers)],
            image=torch.searchsorted(numbers, objects.image[torch.isin(objects.image, numbers)]),
        )

    options = dict(against="originals", read_originals=read, pictures_per_step=2, pictures_at_once=3, learning_rate=0.0)
    matching = matching_of(synthetic, by_class=True, pool=replace(FRESH, normalization="group"), **options)
    reports = [matching.step() for _ in range(6)]
    assert {report.label for report in reports} == {0, 1}
    assert all(report.distance < 1e-9 and report.s_loss == pytest.approx(report.r_loss) for report in reports)


def test_pictures_of_a_class():
    images, targets = tiny_scene(5)
    assert of_class(images, targets, None) == (images, targets)
    kept, objects = of_class(images, targets, 0)
    assert torch.equal(kept, images[targets.image[targets.labels == 0].unique()])
    assert objects.image.max() < len(kept) and torch.equal(objects.ignore, objects.labels != 0)
    none, objects = of_class(images, targets, 7)
    assert len(none) == len(objects) == 0 and none.shape[1:] == images.shape[1:]
    ignored = replace(targets, ignore=torch.ones_like(targets.ignore))
    assert len(of_class(images, ignored, 0)[0]) == 0  # what is ignored is no object of the class
