"""One augmentation for every picture of any batch: what a siamese draw does, and how it differs from a batch's own."""

from dataclasses import replace

import pytest
import torch

from datasets import augment as A
from datasets.augment import augment
from errors import UserError
from structures import Targets
from tests.datasets.test_augment import EVERYTHING, count_found, generator, scene, targets_of

SIAMESE = replace(EVERYTHING, mosaic=0.0, mixup=0.0)


def test_a_siamese_draw_does_the_same_to_every_picture_in_any_batch():
    images, targets = scene()
    images = images.float() / 255
    apply = A.draw_siamese(generator=generator(5), settings=SIAMESE)
    together, moved = apply(images, targets)
    alone = targets_of(targets.boxes_xyxy[2:3].tolist(), [0], labels=[2])
    single, single_moved = apply(images[2:3], alone)
    torch.testing.assert_close(single, together[2:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(single_moved.boxes_xyxy, moved.boxes_xyxy[moved.image == 2])
    twins, twin_boxes = apply(images[[1, 1]], targets_of(targets.boxes_xyxy[[1, 1]].tolist(), [0, 1]))
    torch.testing.assert_close(twins[0], twins[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(*twin_boxes.boxes_xyxy)
    # and it is what a training batch of one gets
    out, one = augment(images[2:3], alone, generator=generator(5), settings=SIAMESE)
    torch.testing.assert_close(out, single, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.boxes_xyxy, single_moved.boxes_xyxy)
    other, _ = A.draw_siamese(generator=generator(6), settings=SIAMESE)(images, targets)
    assert not torch.allclose(other, together, atol=0.01)


def test_siamese_boxes_follow_siamese_pixels():
    settings, found = replace(SIAMESE, degrees=0.0, shear=0.0, hue=0.0, saturation=0.0, value=0.0), 0
    for seed in range(4):
        images, targets = scene(seed=seed)
        found += count_found(*A.draw_siamese(generator=generator(seed), settings=settings)(images / 255, targets))
    assert found >= 15


def test_a_siamese_draw_is_differentiable_in_the_pixels_and_a_training_batch_is_not():
    images = 0.2 + 0.6 * torch.rand(2, 3, 5, 5, dtype=torch.float64, generator=generator())
    images.requires_grad_()
    apply = A.draw_siamese(generator=generator(1), settings=SIAMESE)
    assert torch.autograd.gradcheck(lambda x: apply(x, Targets.empty())[0], images)
    out, _ = augment(images, Targets.empty(), generator=generator(1), settings=SIAMESE)
    assert not out.requires_grad


@pytest.mark.parametrize("name", ["mosaic", "mixup"])
def test_a_siamese_draw_refuses_what_joins_pictures(name):
    with pytest.raises(UserError, match=rf"augment\.{name}: found 0.5, expected 0: every picture on its own"):
        A.draw_siamese(generator=generator(), settings=replace(SIAMESE, **{name: 0.5}))
