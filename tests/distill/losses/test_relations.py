"""Relations by hand; the checks against references, and the mutants, are in test_mutants."""

import pytest
import torch

from distill.losses.relations import distance_matrix, instance_distance, location_similarity, pool_boxes


def test_similarity_of_two_locations():
    """Teacher: orthogonal; student: equal. Of the 4 pairs, the 2 of different locations are off by 1."""
    t_map = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    s_map = torch.tensor([[3.0, 5.0]]).view(1, 1, 1, 2)  # of another width
    assert location_similarity(s_map=s_map, t_map=t_map).item() == pytest.approx(2 / 4)


def test_large_maps_are_related_through_few_nodes():
    """A pattern finer than a node averages out: what is related is the 16 x 16 picture of the map."""
    coarse = torch.randn(1, 3, 16, 16)
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    checkers = torch.tensor([1.0, -1.0]).repeat(32) * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    torch.testing.assert_close(location_similarity(s_map=fine + checkers, t_map=fine), torch.tensor(0.0))
    assert location_similarity(s_map=checkers.expand(1, 3, 64, 64), t_map=fine) > 0


def test_distances_of_three_objects():
    """Teacher 1, 1, 2 in units of its mean 4/3; student 1, 1, 1: off by 1/4, 1/4, 1/2 of which h is half the square."""
    t_features = torch.tensor([[0.0], [1.0], [2.0]])
    s_features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    got = instance_distance(s_features=s_features, t_features=t_features, image=torch.zeros(3).long())
    assert got.item() == pytest.approx((2 * 0.25**2 + 0.5**2) / 2 / 3)


def test_objects_of_different_images_are_strangers():
    features = torch.randn(4, 5)
    image = torch.tensor([0, 1, 0, 1])
    expected = instance_distance(s_features=features, t_features=features.square(), image=image)
    far = features + 100 * image[:, None]  # moves one image away from the other
    got = instance_distance(s_features=far, t_features=features.square(), image=image)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_near_equal_rows_of_large_numbers_keep_their_distance():
    rows = 1e4 + torch.tensor([[0.0], [0.25]]).expand(2, 64)
    assert distance_matrix(rows, torch.zeros(2, dtype=torch.int64))[0, 1].item() == pytest.approx(2.0)


def test_pooling_reads_the_picture_at_the_box():
    """A ramp in x reads as the x of the sample points, in pixels of the image."""
    ramp = ((torch.arange(16) + 0.5) * 4).expand(1, 1, 16, 16)  # stride 4: the x of each pixel's center
    pooled = pool_boxes(
        ramp, boxes_xyxy=torch.tensor([[8.0, 4, 32, 60]]), image=torch.tensor([0]), image_size=(64, 64), size=3
    )
    torch.testing.assert_close(pooled[0, 0], torch.tensor([12.0, 20.0, 28.0]).expand(3, 3))


def test_relations_from_maps_to_loss():
    """Pool the labelled boxes of both maps, relate them: the student's map learns."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [10, 30, 60, 64], [5, 5, 40, 9]])
    where = dict(boxes_xyxy=boxes, image=torch.tensor([0, 0, 0]), image_size=(64, 64))
    s_map, t_map = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 6, 4, 4)
    loss = instance_distance(
        s_features=pool_boxes(s_map, **where), t_features=pool_boxes(t_map, **where), image=where["image"]
    )
    loss.backward()
    assert loss > 0 and s_map.grad.abs().sum() > 0
