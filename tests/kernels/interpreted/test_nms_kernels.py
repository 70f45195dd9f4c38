"""NMS on the device against the greedy definition: the same kept set, in the same order, ties included."""

import numpy as np
import pytest
import torch

from kernels import nms_triton
from kernels.backend import IS_INTERPRETED
from kernels.nms import _float32_at_most, batched_nms, select_detections
from tests.reference.nms_cases import cases, random_boxes

SETTINGS = dict(score_threshold=0.25, iou_threshold=0.5, max_detections=100, multi_label=True, max_candidates=30_000)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two words, so that few candidates fill several."""
    monkeypatch.setattr(nms_triton, "BLOCK", 128)


@pytest.fixture(autouse=True)
def few_programs(request, monkeypatch):
    """To the interpreter a wide program costs what a narrow one does: half as many where a test is not of blocks."""
    if IS_INTERPRETED and "small_blocks" not in request.fixturenames:
        monkeypatch.setattr(nms_triton, "COLUMNS", nms_triton.WORD)


@pytest.fixture
def against_eager(monkeypatch):
    """Calls a function with the kernel and with the specification."""

    def both(function):
        found = function()
        with monkeypatch.context() as patch:
            patch.setenv("KERNELS", "eager")
            return found, function()

    return both


def tensors(device, *arrays):
    return tuple(torch.tensor(array).to(device) for array in arrays)


# Interpreted, three blocks are tried at one threshold: its limits have nothing to do with how many blocks there are.
COUNTS = [(count, iou) for iou in (0.0, 0.45, 1.0) for count in (0, 1, 2, 63, 64, 65, 128, 129, 300)]


@pytest.mark.parametrize(
    ("count", "iou_threshold"),
    [(count, iou) for count, iou in COUNTS if not IS_INTERPRETED or iou == 0.45 or count in (0, 2, 65, 129)],
)
def test_keeps_what_the_specification_keeps(count, iou_threshold, device, small_blocks, against_eager):
    rng = np.random.default_rng(count)
    boxes, scores = random_boxes(rng, count), rng.integers(1, 50, count).astype(np.float32) / 64  # many ties
    for num_classes in (1, 7):
        inputs = tensors(device, boxes, scores, rng.integers(0, num_classes, count))
        for limit in (1, count + 1):
            found, expected = against_eager(lambda: batched_nms(*inputs, iou_threshold, limit))  # noqa: B023
            assert torch.equal(found, expected) and found.dtype == torch.int64
    assert len(batched_nms(*inputs, iou_threshold, 0)) == 0


@pytest.mark.parametrize("count", [300] if IS_INTERPRETED else [700, 2048, 2049, 5000])
def test_blocks_as_large_as_in_use(count, device, against_eager):
    rng = np.random.default_rng(count)
    inputs = tensors(device, random_boxes(rng, count), rng.random(count), rng.integers(0, 2, count))
    found, expected = against_eager(lambda: batched_nms(*inputs, 0.4, count))
    assert torch.equal(found, expected) and len(found) < count


def test_pairs_exactly_at_the_threshold(device, against_eager):
    """Whole-number boxes with IoU 1/2, 3/5, ...: only a correctly rounded division falls on the same side."""
    rng = np.random.default_rng(3)
    corner = rng.integers(0, 5, (64, 2))
    boxes = np.concatenate((corner, corner + rng.integers(1, 8, (64, 2))), 1).astype(np.float32)
    inputs = tensors(device, boxes, rng.integers(0, 10, 64) / 10, rng.integers(0, 3, 64))
    for threshold in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1 / 3, 2 / 3, 1 / 7, float(np.float32(0.6))):
        found, expected = against_eager(lambda: batched_nms(*inputs, threshold, 64))  # noqa: B023
        assert torch.equal(found, expected)


def test_pairs_whose_iou_is_the_threshold_to_the_last_bit(device):
    """The pair survives at its own IoU and not at the next number below: another order of operations would show."""
    rng = np.random.default_rng(8)
    boxes, below = random_boxes(rng, 60, spread=20.0).reshape(30, 2, 4), np.float32(-np.inf)
    a, b = boxes[:, 0], boxes[:, 1]
    sides = np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), np.float32(0))
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    intersection = sides[:, 0] * sides[:, 1]
    iou = intersection / (area_a + area_b - intersection)
    others = intersection / (area_a + (area_b - intersection)), intersection / (area_a - intersection + area_b)
    assert iou.dtype == np.float32 and all((iou != other).sum() > 3 for other in others)
    scores, labels = tensors(device, np.array([2.0, 1.0]), np.array([0, 0]))
    tells = np.logical_or(*(iou != other for other in others))  # pairs at which another order would show
    for pair, threshold in zip(torch.tensor(boxes[tells]).to(device), iou[tells]):
        assert len(batched_nms(pair, scores, labels, float(threshold), 2)) == 2
        assert len(batched_nms(pair, scores, labels, float(np.nextafter(threshold, below)), 2)) == 1


@pytest.mark.parametrize("name", [n for n, (boxes, *_) in cases().items() if not IS_INTERPRETED or len(boxes) <= 300])
def test_the_recorded_cases(name, device, against_eager):
    *arrays, threshold = cases()[name]
    inputs = tensors(device, *arrays)
    found, expected = against_eager(lambda: batched_nms(*inputs, threshold, 1 << 30))
    assert torch.equal(found, expected)


def test_a_chain_in_which_every_box_suppresses_the_next(device, small_blocks):
    """The longest chain there is: every second box survives, over three blocks."""
    count = 300
    x = torch.arange(count, dtype=torch.float32)
    boxes = torch.stack((x, 0 * x, x + 2.5, 0 * x + 1), 1).to(
        device
    )  # neighbours 1.5 / 3.5, the next but one 0.5 / 4.5
    keep = batched_nms(boxes, -x.to(device), torch.zeros(count, dtype=torch.int64, device=device), 0.4, count)
    assert keep.tolist() == list(range(0, count, 2))


@pytest.mark.parametrize("survivors", [63, 64, 65])
def test_each_survivor_of_a_block_suppresses_in_the_next(survivors, device, small_blocks):
    """Boxes apart from each other, copies of the first up to the end of the block, and in the next a copy of each."""
    which = torch.cat((torch.arange(survivors), torch.zeros(128 - survivors), torch.arange(survivors))).to(device)
    corner = torch.stack((10 * which, 0 * which), 1)
    scores = torch.linspace(1, 0.1, len(which), device=device)
    keep = batched_nms(torch.cat((corner, corner + 8), 1), scores, 0 * which.long(), 0.5, len(which))
    assert keep.tolist() == list(range(survivors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_columns_of_a_table_in_other_types(dtype, device, against_eager):
    """Boxes, score and label as a head has them side by side: nothing is contiguous."""
    rng = np.random.default_rng(6)
    columns = (random_boxes(rng, 90), rng.random((90, 1)), rng.integers(0, 2, (90, 1)))
    rows = torch.tensor(np.concatenate(columns, 1)).to(device, dtype)
    rows[::13, 2], rows[::17, 4] = torch.inf, torch.nan
    for labels in (rows[:, 5], rows[:, 5].long()[:, None].expand(-1, 2)[:, 1]):
        found, expected = against_eager(lambda: batched_nms(rows[:, :4], rows[:, 4], labels, 0.4, 90))  # noqa: B023
        assert torch.equal(found, expected) and 0 < len(found) < 80


def test_zeros_of_both_signs_are_equal_scores(device):
    scores = torch.zeros(100, device=device)
    scores[::3] = -0.0
    corner = 10 * torch.arange(100.0, device=device)[:, None].expand(-1, 2)
    keep = batched_nms(torch.cat((corner, corner + 5), 1), scores, 0 * scores.long(), 0.5, 100)
    assert keep.tolist() == list(range(100))


def test_non_finite_rows(device, against_eager):
    rng = np.random.default_rng(2)
    boxes, scores = random_boxes(rng, 200), rng.random(200).astype("f4")
    boxes[rng.integers(0, 200, 30), rng.integers(0, 4, 30)] = rng.choice([np.nan, np.inf, -np.inf], 30)
    scores[::11], scores[::17], scores[::23] = np.nan, np.inf, -np.inf
    inputs = tensors(device, boxes, scores, rng.integers(0, 2, 200))
    found, expected = against_eager(lambda: batched_nms(*inputs, 0.4, 200))
    assert torch.equal(found, expected) and 0 < len(found) < 150


def test_images_do_not_touch_each_other(device, small_blocks, against_eager):
    """Three images with candidates of their own number: full, a few, none."""
    rng = np.random.default_rng(5)
    boxes = np.stack([random_boxes(rng, 200) for _ in range(3)])
    boxes, labels = tensors(device, boxes, rng.integers(0, 2, (3, 200)))
    is_candidate = torch.ones(3, 200, dtype=torch.bool, device=device)
    is_candidate[1, 5:] = False
    is_candidate[2] = False
    kept, survivors = nms_triton.suppress(boxes, labels, is_candidate, _float32_at_most(0.45), 150)
    scores = -torch.arange(200.0, device=device)
    for image, count in enumerate((200, 5, 0)):
        rows = slice(0, count)
        arguments = (boxes[image, rows], scores[rows], labels[image, rows], 0.45, 150)
        _, expected = against_eager(lambda: batched_nms(*arguments))  # noqa: B023
        assert kept[image, : survivors[image]].tolist() == expected.tolist()


def dense(count: int, classes: int, device, dtype=torch.float32):
    rng = np.random.default_rng(count)
    boxes = np.stack([random_boxes(rng, count) for _ in range(2)])
    scores = (rng.random((2, count, classes)) ** 4 * 64).round() / 64 - 0.125  # ties, and some below 0
    return tuple(x.to(dtype) for x in tensors(device, boxes, scores))


def assert_selects(against_eager, boxes, scores, **changes):
    settings = SETTINGS | changes
    found, expected = against_eager(lambda: select_detections(boxes, scores, **settings))
    assert len(found) == len(expected) == len(boxes)
    for got, wanted in zip(found, expected):
        for part in ("boxes_xyxy", "scores", "labels"):
            assert torch.equal(getattr(got, part), getattr(wanted, part)), part
            assert getattr(got, part).dtype == getattr(wanted, part).dtype
    return found


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_selects_what_the_specification_selects(dtype, multi_label, device, against_eager):
    boxes, scores = dense(24 if IS_INTERPRETED else 40, 5, device, dtype)
    for changes in (
        {},
        dict(score_threshold=-1.0, max_detections=300),
        dict(max_candidates=17),
        dict(max_detections=3),
        dict(max_detections=0),
        dict(score_threshold=2.0),
    ):
        assert_selects(against_eager, boxes, scores, multi_label=multi_label, **changes)


def test_ties_go_by_location_and_class(device, against_eager):
    boxes, scores = dense(30, 3, device)
    for value in (0.5, 0.0, -0.0):
        equal = torch.full_like(scores, value)
        equal[:, ::2] *= -1 if value == 0 else 1
        for multi_label in (True, False):
            settings = dict(score_threshold=-1.0, max_candidates=20, multi_label=multi_label)
            assert_selects(against_eager, boxes, equal, **settings)


def test_selection_ignores_non_finite_predictions(device, against_eager):
    boxes, scores = dense(24 if IS_INTERPRETED else 40, 4, device)
    scores[0, ::7, 2], scores[1, ::5, 0], scores[1, ::3, 1] = torch.nan, torch.inf, -torch.inf
    boxes[0, ::3, 1], boxes[1, ::4, 2] = torch.nan, torch.inf
    for multi_label in (True, False):
        assert_selects(against_eager, boxes, scores, multi_label=multi_label, score_threshold=-1.0)
    found = assert_selects(against_eager, boxes, torch.full_like(scores, torch.nan), score_threshold=-1.0)
    assert not any(len(detections) for detections in found)


@pytest.mark.parametrize("shape", [(0, 10, 3), (2, 0, 3), (2, 10, 0)])
def test_selection_of_nothing(shape, device, against_eager):
    boxes, scores = torch.zeros(*shape[:2], 4, device=device), torch.ones(shape, device=device)
    assert_selects(against_eager, boxes, scores)


@pytest.mark.skipif(IS_INTERPRETED, reason="too many for the interpreter")
@pytest.mark.parametrize("count", [30_000, 100_000])
def test_many_boxes(count, device, against_eager):
    rng = np.random.default_rng(count)
    inputs = tensors(device, random_boxes(rng, count, spread=3000.0), rng.random(count), rng.integers(0, 80, count))
    found, expected = against_eager(lambda: batched_nms(*inputs, 0.5, count))
    assert torch.equal(found, expected)
