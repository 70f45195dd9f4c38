"""The matcher against loops and by hand; the sampler by its counts and its distribution."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from frcnn.matching import BACKGROUND, IGNORED, choose, match, sample, split_targets
from structures import Targets
from tests.reference import faster_rcnn as reference
from tests.reference.boxes import iou

RPN = dict(positive_iou=0.7, negative_iou=0.3, every_object=True)
ROI = dict(positive_iou=0.5, negative_iou=0.5, every_object=False)
NONE = torch.zeros(0, 4, dtype=torch.float64)


def boxes_of(rng, count):
    corner, side = rng.integers(0, 40, (count, 2)), rng.integers(4, 30, (count, 2))  # integers: ties happen
    return np.concatenate((corner, corner + side), 1).astype(np.float64)


@pytest.mark.parametrize("rules", [RPN, ROI], ids=["rpn", "roi"])
@pytest.mark.parametrize("num_objects, num_ignored", [(0, 0), (0, 2), (1, 0), (6, 0), (6, 3)])
def test_matches_reference(rules, num_objects, num_ignored):
    kinds = set()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        boxes, objects, ignored = boxes_of(rng, 80), boxes_of(rng, num_objects), boxes_of(rng, num_ignored)
        got = match(*(torch.tensor(x) for x in (boxes, objects, ignored)), **rules)
        expected = reference.match(boxes.tolist(), objects.tolist(), ignored.tolist(), *rules.values())
        assert got.dtype == torch.int64 and got.tolist() == expected
        kinds |= {min(value, 0) for value in expected}
    assert kinds >= ({0, BACKGROUND} if num_objects else {BACKGROUND})


def test_every_object_gives_its_best_boxes_a_chance():
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]], dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 20, 20], [10, 10, 20, 20], [0, 0, 20, 20], [0, 0, 10, 9]], dtype=torch.float64)
    assert match(boxes[:3], objects, NONE, **RPN).tolist() == [0, BACKGROUND, 0]  # both equals of the best, IoU 0.25
    assert match(boxes[:3], objects, NONE, **(RPN | dict(every_object=False))).tolist() == [BACKGROUND] * 3
    # Nothing overlaps the second object: its highest IoU, 0, makes nobody positive.
    assert match(boxes, objects, NONE, **RPN).tolist() == [BACKGROUND, BACKGROUND, BACKGROUND, 0]


def test_a_rescued_box_learns_the_object_it_overlaps_most():
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4]], dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64)
    assert iou(boxes[0].tolist(), objects[1].tolist()) == pytest.approx(0.4)
    assert match(boxes, objects, NONE, **RPN).tolist() == [0]


def test_thresholds_are_inclusive_above_and_exclusive_below():
    objects = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 5], [0, 0, 10, 2], [0, 0, 10, 10]], dtype=torch.float64)
    exact = dict(positive_iou=0.8 - 1e-8, negative_iou=0.5 - 1e-8, every_object=False)
    assert match(boxes, objects, NONE, **exact).tolist() == [0, IGNORED, BACKGROUND, 0]
    assert match(boxes, objects, NONE, **(exact | dict(negative_iou=0.5 + 1e-8))).tolist() == [
        0, BACKGROUND, BACKGROUND, 0,
    ]  # fmt: skip


def test_ignored_regions():
    region = torch.tensor([[0.0, 0, 100, 100]], dtype=torch.float64)
    boxes = torch.tensor([[10, 10, 20, 20], [50, 90, 60, 110], [50, 91, 60, 111], [200, 0, 210, 10]]).double()
    inside_learns = boxes[:1] + torch.tensor([0, 0, 1, 1])
    assert match(boxes, NONE, region, **ROI).tolist() == [IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    assert match(boxes, inside_learns, region, **ROI).tolist() == [0, IGNORED, BACKGROUND, BACKGROUND]
    empty = torch.tensor([[5.0, 5, 5, 5], [500, 500, 500, 500]], dtype=torch.float64)
    assert match(empty, NONE, region, **ROI).tolist() == [BACKGROUND, BACKGROUND]
    assert match(NONE, inside_learns, region, **RPN).shape == (0,)


@pytest.mark.parametrize(
    "num_positive, num_background, expected",
    [(500, 5000, (128, 128)), (10, 5000, (10, 246)), (0, 5000, (0, 256)), (500, 20, (128, 20)), (0, 0, (0, 0)),
     (3, 4, (3, 4)), (128, 128, (128, 128)), (500, 0, (128, 0))],
)  # fmt: skip
def test_sample_counts(num_positive, num_background, expected):
    matched = torch.cat(
        (torch.arange(num_positive), torch.full((num_background,), BACKGROUND), torch.full((77,), IGNORED))
    )
    matched = matched[torch.randperm(len(matched))]
    positives, background = sample(matched, 256, 0.5)
    assert (len(positives), len(background)) == expected
    assert (matched[positives] >= 0).all() and (matched[background] == BACKGROUND).all()
    for rows in (positives, background):
        assert (rows.diff() > 0).all()  # increasing, so nothing twice


def test_second_stage_takes_a_quarter():
    matched = torch.cat((torch.zeros(300), torch.full((1000,), BACKGROUND))).long()
    positives, background = sample(matched, 512, 0.25)
    assert (len(positives), len(background)) == (128, 384)


def test_every_row_is_as_likely_as_any_other():
    """Chi-square of how often each of 40 positives and 60 background rows is taken, over 1,000 seeds."""
    matched = torch.cat((torch.zeros(40), torch.full((60,), BACKGROUND))).long()
    times, pairs, draws = torch.zeros(100), torch.zeros(40, 40), 1000
    for seed in range(draws):
        torch.manual_seed(seed)
        positives, background = sample(matched, 32, 0.25)
        times[positives] += 1
        times[background] += 1
        pairs[positives[:, None], positives] += 1
    assert times[:40].sum() == 8 * draws and times[40:].sum() == 24 * draws
    for part, taken in ((times[:40], 8), (times[40:], 24)):
        p = taken / len(part)
        # Each count is binomial; they sum to a constant, so the statistic has n - 1 degrees of freedom.
        statistic = ((part - draws * p) ** 2 / (draws * p * (1 - p))).sum().item() * (len(part) - 1) / len(part)
        degrees = len(part) - 1
        assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5
    # Pairs too: subsets are equally likely, not only rows. Expected 1000 * (8 * 7) / (40 * 39) = 35.9 each.
    together = pairs[~torch.eye(40, dtype=torch.bool)]
    expected = draws * 8 * 7 / (40 * 39)
    assert abs(together.mean().item() - expected) < 1e-3
    assert abs(together.var().item() / expected - 1) < 0.25


def test_the_choice_is_the_global_generators():
    rows = torch.arange(1000)
    torch.manual_seed(3)
    first = choose(rows, 10)
    assert not torch.equal(choose(rows, 10), first)
    torch.manual_seed(3)
    assert torch.equal(choose(rows, 10), first)
    state = torch.get_rng_state()
    assert torch.equal(choose(rows, 1000), rows)
    assert torch.equal(torch.get_rng_state(), state)  # nothing to choose, nothing drawn


def test_split_targets():
    boxes_xyxy = torch.tensor([[0.0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7], [3, 3, 3, 9], [4, 4, 9, 9]])
    targets = Targets(
        boxes_xyxy, torch.arange(5), torch.tensor([1, 0, 1, 1, 1]), torch.tensor([False, False, True, False, False])
    )
    objects, labels, scores, ignored = split_targets(targets, 1)
    assert scores is None
    assert torch.equal(objects, boxes_xyxy[[0, 4]]) and labels.tolist() == [0, 4]  # 3 has no width
    assert torch.equal(ignored, boxes_xyxy[[2]])
    shares = torch.rand(5, 3)
    assert torch.equal(split_targets(replace(targets, class_scores=shares), 1)[2], shares[[0, 4]])
    objects, labels, _, ignored = split_targets(Targets.empty(), 0)
    assert objects.shape == (0, 4) and labels.shape == (0,) and ignored.shape == (0, 4)
