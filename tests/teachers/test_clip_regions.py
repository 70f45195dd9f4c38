"""teachers.clip_regions: boxes, crops against PyTorch's own resizing, averages against points in the box."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from teachers.clip_regions import (
    average_over_boxes,
    crop_batches,
    cubic_kernel,
    enlarge_boxes,
    resample_boxes,
    sampling_weights,
)
from tests.reference.clip import average_over_box
from tests.reference.vision_transformer import cubic

pytestmark = pytest.mark.usefixtures("one_thread")


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=rng) * torch.tensor([width, height])
    return torch.cat((corners.amin(1), corners.amax(1) + 1), dim=1).clamp(max=min(height, width))


# boxes ---------------------------------------------------------------------------------------------------------------


def test_enlarged_boxes_keep_their_centre_and_grow():
    boxes = torch.tensor([[40.0, 30, 60, 40]])
    assert torch.equal(enlarge_boxes(boxes, (100, 200)), boxes)
    assert torch.equal(enlarge_boxes(boxes, (100, 200), 1.5), torch.tensor([[35.0, 27.5, 65, 42.5]]))


def test_boxes_stay_in_the_image_with_an_area():
    boxes = torch.tensor(
        [
            [-50.0, -50, 500, 500],  # larger than the image
            [10, 10, 10, 10],  # a point
            [60, 20, 50, 90],  # corners in the wrong order
            [-30, -30, -10, -5],  # outside
            [900, 900, 990, 990],
            [79.9, 0, 80, 60],  # a sliver at the edge
        ]
    )
    got = enlarge_boxes(boxes, (60, 80), 1.0)
    assert (got[:, :2] >= 0).all() and (got[:, 2:] <= torch.tensor([80.0, 60.0])).all()
    assert (got[:, 2:] - got[:, :2] >= 1).all()
    assert torch.equal(got[0], torch.tensor([0.0, 0, 80, 60]))
    assert torch.equal(got[1], torch.tensor([9.5, 9.5, 10.5, 10.5]))
    assert torch.equal(got[2], torch.tensor([50.0, 20, 60, 60]))
    assert torch.equal(got[4], torch.tensor([79.0, 59, 80, 60])) and torch.equal(got[3], torch.tensor([0.0, 0, 1, 1]))
    assert enlarge_boxes(torch.zeros(0, 4), (60, 80)).shape == (0, 4)


# crops ---------------------------------------------------------------------------------------------------------------


def test_cubic_kernel():
    x = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
    expected = torch.tensor([cubic(value, -0.5) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(cubic_kernel(x), expected)


@pytest.mark.parametrize("size", [7, 32, 90])
def test_the_box_of_the_whole_image_is_the_image_resized(size):
    """PyTorch's antialiased bicubic resizing, also where one side shrinks and the other grows."""
    image = torch.rand(3, 40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = resample_boxes(image, torch.tensor([[0.0, 0, 64, 40]]), size)
    wanted = F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(got, wanted.clamp(0, 1), rtol=0, atol=1e-12)


def test_whole_pixels_at_their_own_size_are_copied():
    image = torch.rand(3, 20, 30)
    got = resample_boxes(image, torch.tensor([[4.0, 2, 16, 14], [18, 8, 30, 20]]), 12)
    torch.testing.assert_close(got[0], image[:, 2:14, 4:16])
    torch.testing.assert_close(got[1], image[:, 8:20, 18:30])


def test_a_ramp_is_sampled_at_the_middle_of_each_part():
    """Half-pixel centres: sample i of S in x1..x2 sees x1 + (i + 1/2) (x2 - x1) / S; bicubic is exact on a line."""
    ramp = (torch.arange(100.0, dtype=torch.float64) + 0.5).div(100).expand(3, 60, 100)
    box = torch.tensor([[20.3, 15.0, 71.9, 45.0]], dtype=torch.float64)
    for size, tolerance in ((60, 1e-12), (16, 1e-4)):  # a kernel widened by an uneven factor is nearly exact
        expected = (20.3 + (torch.arange(size, dtype=torch.float64) + 0.5) * 51.6 / size) / 100
        torch.testing.assert_close(resample_boxes(ramp, box, size)[0, 0, 3], expected, rtol=0, atol=tolerance)


def test_rows_of_weights_sum_to_one():
    start, stop = torch.tensor([0.0, 5.5, 30.0]), torch.tensor([32.0, 6.5, 31.0])
    for size in (1, 5, 64):
        weights = sampling_weights(start, stop, 32, size)
        assert weights.shape == (3, size, 32)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, size))


def test_crops_stay_between_0_and_1():
    image = (torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    got = resample_boxes(image, random_boxes(9, 24, 24), 16)
    assert got.min() == 0 and got.max() == 1


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_batches_hold_all_crops_in_order(limit):
    images = torch.rand(4, 3, 16, 16)
    boxes = [random_boxes(n, 16, 16, seed=n) for n in (3, 0, 5, 1)]
    batches = list(crop_batches(images, boxes, 8, limit))
    assert all(len(batch) == limit for batch in batches[:-1]) and 0 < len(batches[-1]) <= limit
    wanted = torch.cat([resample_boxes(image, rows, 8) for image, rows in zip(images, boxes)])
    torch.testing.assert_close(torch.cat(batches), wanted)
    assert list(crop_batches(images, [torch.zeros(0, 4)] * 4, 8, limit)) == []


# averages ------------------------------------------------------------------------------------------------------------


def test_average_over_boxes_matches_points_in_the_box():
    feature_map = torch.rand(5, 4, 6, dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 48, 32], [3, 5, 29, 30.5], [9, 9, 11, 10], [40.5, 24.5, 47.25, 31.75]]).double()
    got = average_over_boxes(feature_map, boxes, stride=8)
    wanted = np.stack([average_over_box(feature_map.numpy(), box, 8, 400) for box in boxes.numpy()])
    np.testing.assert_allclose(got.numpy(), wanted, atol=3e-3)  # 400 x 400 points
    torch.testing.assert_close(got[0], feature_map.mean((1, 2)))
    torch.testing.assert_close(got[2], feature_map[:, 1, 1])


def test_average_over_boxes_splits_as_areas_do():
    """The mean over a box is the mean of those over its two halves; no boxes give no rows."""
    feature_map = torch.rand(3, 5, 5, dtype=torch.float64)
    whole, left, right = torch.tensor([[7.0, 3, 61, 70], [7, 3, 34, 70], [34, 3, 61, 70]], dtype=torch.float64)
    got = average_over_boxes(feature_map, torch.stack((whole, left, right)), stride=16)
    torch.testing.assert_close(got[0], (got[1] + got[2]) / 2)
    assert average_over_boxes(feature_map, torch.zeros(0, 4), 16).shape == (0, 3)
    assert resample_boxes(torch.rand(3, 8, 8), torch.zeros(0, 4), 4).shape == (0, 3, 4, 4)
