"""boxes.py against float64 numbers worked out one pair at a time, and against its own identities."""

import numpy as np
import pytest
import torch

import boxes
from tests.reference import boxes as reference

EMPTY = torch.zeros(0, 4)


def random_boxes(count, seed, size=100.0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, size, (count, 2, 2)), axis=1)
    return torch.tensor(corners.reshape(count, 4), dtype=dtype)


AWKWARD = torch.tensor(
    [
        [0, 0, 10, 10],  # usual
        [0, 0, 10, 10],  # the same again
        [10, 0, 20, 10],  # touches the first
        [2, 3, 4, 5],  # inside
        [5, 5, 5, 5],  # a point
        [5, 0, 5, 10],  # a line
        [0, 7, 9, 7],  # a line
        [-50, -50, -40, -45],  # far away, outside any image
        [7, 7, 8, 8],  # one pixel
        [0, 0, 1000, 0.001],  # a hair
    ],
    dtype=torch.float64,
)


def test_centers_and_corners_are_inverse():
    there, back = boxes.xyxy_to_cxcywh, boxes.cxcywh_to_xyxy
    given = random_boxes(50, 0)
    torch.testing.assert_close(back(there(given)), given, rtol=0, atol=1e-12)
    torch.testing.assert_close(there(back(given)), given, rtol=0, atol=1e-12)
    assert there(EMPTY).shape == back(EMPTY).shape == (0, 4)


def test_formats_by_hand():
    box = torch.tensor([[1.0, 2.0, 5.0, 8.0]])
    assert boxes.xyxy_to_cxcywh(box).tolist() == [[3, 5, 4, 6]]
    assert boxes.xyxy_to_xywh(box).tolist() == [[1, 2, 4, 6]]
    assert boxes.xyxy_to_distances(torch.tensor([[2.0, 3.0]]), box).tolist() == [
        [1, 1, 3, 5]
    ]  # left, top, right, bottom
    assert boxes.clip_boxes(torch.tensor([[-1.0, 2.0, 50.0, 80.0]]), height=30, width=40).tolist() == [[0, 2, 40, 30]]


def test_distances_are_inverse():
    given, points = random_boxes(50, 1), random_boxes(50, 2)[:, :2]
    ltrb = boxes.xyxy_to_distances(points, given)
    torch.testing.assert_close(boxes.distances_to_xyxy(points, ltrb), given, rtol=0, atol=1e-12)
    is_inside = (points > given[:, :2]).all(-1) & (points < given[:, 2:]).all(-1)
    assert torch.equal((ltrb > 0).all(-1), is_inside)  # a distance is negative outside the box


@pytest.mark.parametrize("pair", ["random", "awkward"])
def test_overlaps_match_reference(pair):
    a, b = (random_boxes(12, 3), random_boxes(9, 4)) if pair == "random" else (AWKWARD, AWKWARD)
    iou = boxes.box_iou(a, b)
    ciou = boxes.paired_ciou(a[:, None], b[None])
    intersection = boxes.paired_intersection(a[:, None], b[None])
    assert iou.shape == ciou.shape == (len(a), len(b))
    for i, x in enumerate(a.tolist()):
        assert boxes.box_area(a)[i].item() == pytest.approx(reference.area(x), abs=1e-12)
        for j, y in enumerate(b.tolist()):
            assert intersection[i, j].item() == pytest.approx(reference.intersection(x, y), abs=1e-12)
            assert iou[i, j].item() == pytest.approx(reference.iou(x, y), rel=1e-12, abs=1e-15)
            assert ciou[i, j].item() == pytest.approx(reference.ciou(x, y), rel=1e-9, abs=1e-12)


def test_inverted_box_has_no_area():
    inverted = torch.tensor([[5.0, 5.0, 1.0, 1.0]])
    assert boxes.box_area(inverted).item() == 0
    assert boxes.paired_iou(inverted, torch.tensor([[0.0, 0.0, 9.0, 9.0]])).item() == 0


def test_overlaps_identities():
    a, b = random_boxes(200, 5), random_boxes(200, 6)
    one = torch.ones(200, dtype=torch.float64)
    torch.testing.assert_close(boxes.paired_iou(a, a), one, rtol=0, atol=1e-6)
    torch.testing.assert_close(boxes.paired_ciou(a, a), one, rtol=0, atol=1e-6)
    torch.testing.assert_close(boxes.paired_ciou(a, b), boxes.paired_ciou(b, a))
    torch.testing.assert_close(boxes.paired_ciou(7 * a + 3, 7 * b + 3), boxes.paired_ciou(a, b), rtol=1e-5, atol=1e-6)
    assert (boxes.paired_ciou(a, b) <= boxes.paired_iou(a, b) + 1e-9).all()
    assert boxes.paired_ciou(a, b).min() > -1.5
    assert torch.equal(boxes.box_iou(a, b).diagonal(), boxes.paired_iou(a, b))
    squares = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 8.0, 8.0]]).double()
    assert boxes.paired_giou(squares[0], squares[1]).item() == pytest.approx(0.25, abs=1e-7)  # the hull is the union
    apart = torch.tensor([6.0, 0.0, 8.0, 4.0]).double()  # beside the first: union 16 + 8, hull 8 * 4
    assert boxes.paired_giou(squares[0], apart).item() == pytest.approx(-8 / 32, abs=1e-7)
    torch.testing.assert_close(boxes.paired_giou(a, a), one, rtol=0, atol=1e-6)
    torch.testing.assert_close(boxes.paired_giou(a, b), boxes.paired_giou(b, a))
    assert (boxes.paired_giou(a, b) <= boxes.paired_iou(a, b) + 1e-9).all() and boxes.paired_giou(a, b).min() > -1
    # same shape: no aspect term; centers 2, 2 apart; hull of side 8: 1/4 - 8/128
    assert boxes.paired_ciou(squares[0], squares[1]).item() == pytest.approx(0.25 - 8 / 128, abs=1e-7)


def test_empty_sets():
    some = torch.rand(3, 4)
    assert boxes.box_iou(EMPTY, some).shape == (0, 3)
    assert boxes.box_iou(some, EMPTY).shape == (3, 0)
    for function in (boxes.paired_iou, boxes.paired_ciou, boxes.paired_intersection):
        assert function(EMPTY, EMPTY).shape == (0,)
    assert boxes.box_area(EMPTY).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_stays(dtype):
    a, b = random_boxes(5, 7, dtype=dtype), random_boxes(5, 8, dtype=dtype)
    for function in (boxes.paired_iou, boxes.paired_ciou, boxes.box_iou, boxes.paired_intersection):
        assert function(a, b).dtype == dtype


def test_ciou_gradient_is_the_formulas_with_alpha_fixed():
    rng = np.random.default_rng(9)
    for _ in range(20):
        b = random_boxes(1, int(rng.integers(1000)))[0].tolist()
        a = [x + rng.normal(scale=4) + shift for x, shift in zip(b, (0, 0, 9, 9))]
        alpha, _ = reference.ciou_alpha(a, b)
        expected = reference.numeric_gradient(lambda x, alpha=alpha, b=b: reference.ciou(x, b, alpha=alpha), a)
        leaf = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        boxes.paired_ciou(leaf, torch.tensor(b, dtype=torch.float64)).backward()
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-5, atol=1e-8)


def test_ciou_of_degenerate_boxes_has_finite_gradients():
    """Division by a height of 0, and atan of the quotient, must not make nan: every awkward pair, in float32."""
    a = AWKWARD.float()[:, None].repeat(1, len(AWKWARD), 1).requires_grad_()
    b = AWKWARD.float()[None].repeat(len(AWKWARD), 1, 1).requires_grad_()
    ciou = boxes.paired_ciou(a, b)
    ciou.sum().backward()
    assert ciou.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()


def test_ciou_of_nearly_equal_boxes_stays_finite():
    """alpha = v / (1 - IoU + v): its denominator must not reach 0 when rounding makes IoU 1."""
    rng = torch.Generator().manual_seed(0)
    for size in (1e-3, 1.0, 640.0, 1e4):
        corner = size * torch.rand(20000, 2, generator=rng)
        a = torch.cat((corner, corner + size * torch.rand(20000, 2, generator=rng)), dim=-1)
        jitter = torch.randint(-2, 3, a.shape, generator=rng) * 2.0**-23
        a, b = a.requires_grad_(), a.detach() * (1 + jitter)
        ciou = boxes.paired_ciou(a, b)
        ciou.sum().backward()
        assert ciou.isfinite().all() and ciou.max() <= 1 and a.grad.isfinite().all()


def test_ciou_lower_bound():
    """Far apart rho^2 / c^2 goes to 1, and a wide box against a tall one has v near 1, alpha near 1/2."""
    wide, tall = torch.tensor([0, 0, 100, 1e-4]).double(), torch.tensor([1e6, 1e6, 1e6 + 1e-4, 1e6 + 100]).double()
    assert -1.5 < boxes.paired_ciou(wide, tall).item() < -1.499
