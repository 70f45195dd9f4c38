"""kernels.nms against the greedy definition in numpy, recorded torchvision results, and torchvision itself."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import nms
from kernels.nms import BLOCK, FIRST_LOCATIONS, batched_nms, select_detections
from tests.reference.nms_cases import GOLDEN, cases, random_boxes, torchvision_keep


def reference_nms(boxes, scores, labels, iou_threshold: float, max_detections: int) -> list[int]:
    """The definition in numpy float32: the best candidate left is kept and strikes out what it suppresses."""
    boxes, scores, labels = np.asarray(boxes, dtype=np.float32), np.asarray(scores), np.asarray(labels)
    usable = np.isfinite(boxes).all(1) & np.isfinite(scores)
    left = sorted(np.flatnonzero(usable).tolist(), key=lambda i: (-scores[i], i))
    kept: list[int] = []
    while left and len(kept) < max_detections:
        best, rest = left[0], np.array(left[1:], dtype=np.int64)
        kept.append(best)
        a, b = boxes[best], boxes[rest]
        sides = [np.minimum(a[k + 2], b[:, k + 2]) - np.maximum(a[k], b[:, k]) for k in (0, 1)]
        with np.errstate(all="ignore"):
            overlap = np.maximum(sides[0], 0) * np.maximum(sides[1], 0)
            areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
            iou = overlap / (areas[0] + areas[1] - overlap)
        assert iou.dtype == np.float32
        is_struck = (iou.astype(np.float64) > iou_threshold) & (labels[rest] == labels[best])
        left = rest[~is_struck].tolist()
    return kept


def reference_select(boxes, scores, score_threshold, iou_threshold, max_detections, multi_label, max_candidates):
    """Every pair of one image, sorted in Python: boxes (A, 4), scores (A, K) -> rows (location, label)."""
    pairs = []
    for location, row in enumerate(scores):
        row = [s if math.isfinite(s) and np.isfinite(boxes[location]).all() else -math.inf for s in row]
        labels = range(len(row)) if multi_label else [int(np.argmax(row))]
        pairs += [(location, k, row[k]) for k in labels if row[k] > score_threshold]
    pairs = sorted(pairs, key=lambda pair: -pair[2])[:max_candidates]
    where, labels, values = ([pair[k] for pair in pairs] for k in range(3))
    keep = reference_nms(boxes[where], values, labels, iou_threshold, max_detections) if pairs else []
    return [(where[i], labels[i]) for i in keep]


def run(boxes, scores, labels, iou_threshold: float, max_detections: int = 1 << 30) -> list[int]:
    keep = batched_nms(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), iou_threshold, max_detections)
    assert keep.dtype == torch.int64
    return keep.tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 37, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("iou_threshold", [0.0, 0.45, 0.6, 1.0])
def test_matches_the_definition(count, iou_threshold):
    rng = np.random.default_rng(count)
    boxes = random_boxes(rng, count)
    scores = rng.integers(1, 50, count).astype(np.float32) / 64  # many ties
    for num_classes in (1, 7):
        labels = rng.integers(0, num_classes, count)
        for limit in (0, 1, BLOCK, count + 1):
            expected = reference_nms(boxes, scores, labels, iou_threshold, limit)
            assert run(boxes, scores, labels, iou_threshold, limit) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk, max_band", [(1 << 16, 256), (64, 256), (1 << 16, 3)])
def test_class_by_class_as_in_one_matrix(monkeypatch, dtype, chunk, max_band):
    """Classes of one to a hundred candidates, labels below 0, ties, equal boxes; pieces smaller than a class."""
    monkeypatch.setattr(nms, "BAND_CHUNK", chunk)
    monkeypatch.setattr(nms, "MAX_BAND", max_band)
    rng = np.random.default_rng(5)
    for count in (2, 40, 300):
        boxes = torch.tensor(random_boxes(rng, count, spread=60.0)).round().to(dtype)
        boxes[count // 2 :] = boxes[: count - count // 2]
        scores = torch.tensor(rng.integers(1, 20, count) / 32).to(dtype)
        labels = torch.tensor(rng.exponential(4, count).astype(np.int64) - 2)
        expected = reference_nms(boxes.float(), scores.double(), labels, 0.4, count)
        assert batched_nms(boxes, scores, labels, 0.4, count).tolist() == expected
        assert batched_nms(boxes, scores, labels, 0.4, 7).tolist() == expected[:7]


def test_matches_the_definition_on_pairs_exactly_at_the_threshold():
    """Whole-number boxes with IoU 1/2, 3/5, ...: the float32 IoU against the threshold as the real number it is."""
    rng = np.random.default_rng(3)
    for _ in range(150):
        corner = rng.integers(0, 5, (40, 2))
        boxes = np.concatenate((corner, corner + rng.integers(1, 8, (40, 2))), 1).astype(np.float32)
        scores, labels = rng.integers(0, 10, 40) / 10, rng.integers(0, 2, 40)
        threshold = rng.choice([0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1 / 3, 2 / 3, 1 / 7, float(np.float32(0.6))])
        assert run(boxes, scores, labels, threshold) == reference_nms(boxes, scores, labels, threshold, 40)


@pytest.mark.parametrize("number,name", list(enumerate(cases())))
def test_keeps_what_torchvision_kept(number, name):
    with np.load(GOLDEN, allow_pickle=False) as file:
        assert json.loads(bytes(file["meta"]))["names"][number] == name
        case = [file[f"{number}.{part}"] for part in ("boxes", "scores", "labels")]
        threshold, expected = file[f"{number}.iou_threshold"].item(), file[f"{number}.keep"].tolist()
    assert run(*case, threshold) == expected
    assert run(*case, threshold, 20) == expected[:20]


def test_keeps_what_the_installed_torchvision_keeps():
    torchvision = pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    for case in cases().values():
        assert run(*case) == torchvision_keep(*case).tolist()
    for count in (50, 3000):  # below and above the size where batched_nms stops moving the classes apart
        boxes, scores, labels = random_boxes(rng, count), rng.permutation(count) / count, rng.integers(0, 9, count)
        expected = torchvision.ops.batched_nms(*map(torch.tensor, (boxes, scores.astype("f4"), labels)), 0.5)
        assert run(boxes, scores.astype("f4"), labels, 0.5) == expected.tolist()


@pytest.mark.parametrize("spread", [50.0, 3000.0], ids=["crowded", "sparse"])
def test_thirty_thousand_boxes_of_one_class(spread):
    """Properties only the greedy set has: no kept box suppresses another, each lost box has a kept one to blame."""
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng, 30_000, spread=spread)
    scores = rng.permutation(30_000).astype(np.float32)
    keep = run(boxes, scores, np.zeros(30_000, dtype=np.int64), 0.5, 2000)
    assert (np.diff(scores[keep]) < 0).all()
    lost = np.setdiff1d(np.flatnonzero(scores > scores[keep[-1]]), keep)
    lost = rng.permutation(lost)[:1000]

    def suppressed_by_better(rows):
        a, b = boxes[keep][:, None], boxes[rows][None]
        sides = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0)
        area = lambda x: (x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1])
        iou = sides.prod(-1) / (area(a) + area(b) - sides.prod(-1))
        return ((iou > 0.5) & (scores[keep][:, None] > scores[rows][None])).any(0)

    assert not suppressed_by_better(keep).any()
    assert suppressed_by_better(lost).all()
    assert len(keep) == 2000 or len(np.setdiff1d(np.arange(30_000), keep)) >= len(lost)


def test_many_survivors_are_found_class_by_class(monkeypatch):
    rng = np.random.default_rng(11)
    boxes, labels = random_boxes(rng, 900), rng.integers(0, 5, 900)
    scores = rng.integers(1, 50, 900) / 64
    monkeypatch.setattr(nms, "MANY", 300)
    for limit in (300, 301, 500, 900, 1000):
        assert run(boxes, scores, labels, 0.3, limit) == reference_nms(boxes, scores, labels, 0.3, limit)


def test_non_finite_rows_are_never_returned_and_suppress_nothing():
    rng = np.random.default_rng(2)
    boxes, scores, labels = random_boxes(rng, 400), rng.random(400).astype("f4"), rng.integers(0, 2, 400)
    boxes[rng.integers(0, 400, 60), rng.integers(0, 4, 60)] = rng.choice([np.nan, np.inf, -np.inf], 60)
    scores[::11] = np.nan
    scores[::17] = np.inf
    keep = run(boxes, scores, labels, 0.4)
    assert keep == reference_nms(boxes, scores, labels, 0.4, 400)
    assert np.isfinite(boxes[keep]).all() and np.isfinite(scores[keep]).all()
    assert run(np.full((3, 4), np.nan, dtype="f4"), np.ones(3), np.zeros(3, dtype=int), 0.5) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_compared_in_float32(dtype):
    rng = np.random.default_rng(4)
    boxes = torch.tensor(random_boxes(rng, 300)).to(dtype)
    scores, labels = torch.tensor(rng.random(300)).to(dtype), torch.tensor(rng.integers(0, 2, 300))
    expected = reference_nms(boxes.float().numpy(), scores.double().numpy(), labels.numpy(), 0.5, 300)
    assert batched_nms(boxes, scores, labels, 0.5, 300).tolist() == expected
    (found,) = select_detections(
        boxes[None], scores[None, :, None], score_threshold=0.1, iou_threshold=0.5, max_detections=5
    )
    assert found.boxes_xyxy.dtype == found.scores.dtype == dtype


def dense(rng: np.random.Generator, num_images: int, num_locations: int, num_classes: int) -> tuple[Tensor, Tensor]:
    boxes = np.stack([random_boxes(rng, num_locations) for _ in range(num_images)])
    scores = rng.random((num_images, num_locations, num_classes)) ** 4
    return torch.tensor(boxes), torch.tensor((scores * 256).round() / 256, dtype=torch.float32)  # ties


def assert_selects(boxes: Tensor, scores: Tensor, **changes) -> None:
    settings = dict(
        score_threshold=0.25, iou_threshold=0.5, max_detections=100, multi_label=True, max_candidates=30_000
    )
    settings.update(changes)
    found = select_detections(boxes, scores, **settings)
    assert len(found) == len(boxes)
    for image, detections in enumerate(found):
        expected = reference_select(boxes[image].numpy(), scores[image].numpy(), **settings)
        rows = torch.tensor([location for location, _ in expected], dtype=torch.int64)
        labels = torch.tensor([label for _, label in expected], dtype=torch.int64)
        assert detections.labels.tolist() == labels.tolist()
        assert torch.equal(detections.boxes_xyxy, boxes[image, rows])
        assert torch.equal(detections.scores, scores[image, rows, labels])


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("num_classes", [1, 5])
@pytest.mark.parametrize("num_locations", [1, 30, FIRST_LOCATIONS, FIRST_LOCATIONS + 1])
def test_select_matches_every_pair_sorted(num_locations, num_classes, multi_label):
    boxes, scores = dense(np.random.default_rng(num_locations), 2, num_locations, num_classes)
    for limit in (1, 300):
        assert_selects(boxes, scores, multi_label=multi_label, max_detections=limit, score_threshold=0.05)


def test_select_reaches_the_last_locations(monkeypatch):
    """All survivors are wanted, so every piece of the order is read; small pieces make many of them."""
    monkeypatch.setattr(nms, "FIRST_LOCATIONS", 16)
    boxes, scores = dense(np.random.default_rng(7), 1, 300, 6)
    assert_selects(boxes, scores, max_detections=10_000, score_threshold=0.0)
    assert_selects(boxes, scores, max_detections=10_000, score_threshold=-1.0)
    assert_selects(boxes, scores, max_detections=40, iou_threshold=0.01)
    assert_selects(boxes, torch.full_like(scores, 0.5), max_detections=700)  # nothing but ties


@pytest.mark.parametrize("max_candidates", [1, 50, 599, 600, 601])
def test_select_stops_at_the_best_candidates(max_candidates, monkeypatch):
    monkeypatch.setattr(nms, "FIRST_LOCATIONS", 32)
    boxes, scores = dense(np.random.default_rng(8), 1, 200, 3)
    for multi_label in (True, False):
        for image_scores in (scores, torch.full_like(scores, 0.5)):
            assert_selects(
                boxes,
                image_scores,
                max_candidates=max_candidates,
                multi_label=multi_label,
                score_threshold=0.0,
                max_detections=1000,
            )


def test_select_ignores_layout_and_non_finite_predictions():
    boxes, scores = dense(np.random.default_rng(9), 2, 1500, 4)
    assert_selects(boxes, scores.transpose(1, 2).contiguous().transpose(1, 2))
    scores[0, ::7, 2] = torch.nan
    scores[1, ::5, 0] = torch.inf
    boxes[0, ::3, 1] = torch.nan
    boxes[1, ::4, 2] = torch.inf
    assert_selects(boxes, scores)
    assert_selects(boxes, scores, multi_label=False)
    assert_selects(boxes, torch.full_like(scores, torch.nan))


@pytest.mark.parametrize("shape", [(0, 10, 3), (2, 0, 3), (2, 10, 0)])
def test_select_of_nothing(shape):
    found = select_detections(
        torch.zeros(*shape[:2], 4), torch.ones(shape), score_threshold=0.1, iou_threshold=0.5, max_detections=9
    )
    assert [len(detections) for detections in found] == [0] * shape[0]
    assert all(d.boxes_xyxy.shape == (0, 4) and d.labels.dtype == torch.int64 for d in found)


def test_the_score_threshold_is_exclusive():
    boxes = torch.tensor([[[0.0, 0, 1, 1], [5, 5, 6, 6]]])
    (found,) = select_detections(
        boxes, torch.tensor([[[0.5], [0.75]]]), score_threshold=0.5, iou_threshold=0.5, max_detections=9
    )
    assert found.scores.tolist() == [0.75]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_labels_may_have_any_type(dtype):
    """Such as the column of a table of detections, beside boxes and scores of its type or of float32."""
    rng = np.random.default_rng(3)
    boxes, scores = torch.tensor(random_boxes(rng, 60)).float(), torch.rand(60)
    labels = torch.tensor(rng.integers(0, 3, 60))
    expected = batched_nms(boxes, scores, labels, 0.4, 60)
    assert len(expected) < 60
    assert torch.equal(batched_nms(boxes, scores, labels.to(dtype), 0.4, 60), expected)
    doubled = batched_nms(boxes.double(), scores.double(), labels.to(dtype), 0.4, 60)  # the path of other types
    assert torch.equal(doubled, expected)


def test_no_gradient_is_kept():
    boxes, scores = dense(np.random.default_rng(10), 1, 50, 2)
    rows = batched_nms(
        boxes[0].clone().requires_grad_(), scores[0, :, 0].clone().requires_grad_(), torch.arange(50), 0.5, 9
    )
    assert len(rows) == 9
    (found,) = select_detections(
        boxes.requires_grad_(), scores.requires_grad_(), score_threshold=0.1, iou_threshold=0.5, max_detections=9
    )
    assert not found.boxes_xyxy.requires_grad and not found.scores.requires_grad
