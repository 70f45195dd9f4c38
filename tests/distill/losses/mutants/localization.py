"""Localization distillation: the checks of its loss and of its region, and wrong variants of each."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from distill.losses.localization import localization_kl, paired_diou, valuable_region
from structures import Targets
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.properties import (
    computes_in_float32,
    finite_when_saturated,
    gradient_is_right,
    matches_reference,
    minimum_at_teacher,
    only_student_learns,
    random_pair,
    refuses,
    takes_inference_teacher,
    unchanged_by,
    zero_when_empty,
)
from tests.reference import logit_distillation as reference


def edges(n: int = 5, bins: int = 6, *, weight=None, **others) -> dict:
    weight = np.random.default_rng(4).random(n) if weight is None else weight
    return random_pair("logits", (*weight.shape, 4, bins), weight=weight, **others)


def edge_constant(arguments: dict) -> dict:
    """A constant added to all bins of an edge, in the student and in the teacher."""
    return {
        "s_logits": arguments["s_logits"] + arguments["t_logits"][..., :1],
        "t_logits": arguments["t_logits"] - 2 * arguments["s_logits"][..., 2:3],
    }


def cross_entropy_of_edges(*, s_logits, t_logits, weight, temperature=10.0):
    """Without the teacher's entropy."""
    log_p_s = F.log_softmax(s_logits / temperature, -1)
    rows = -((t_logits.detach() / temperature).softmax(-1) * log_p_s).sum(-1).mean(-1)
    return temperature**2 * (weight.detach() * rows).sum() / weight.detach().sum().clamp(min=1)


def scene(objects: int = 4, *, seed: int = 0, locations: int = 30) -> tuple[np.ndarray, np.ndarray, Targets]:
    """Boxes (2, A, 4) scattered around random objects of two images, who learns what (2, A), and the objects.

    The last object has no positives, and one location predicts exactly the first object's box without learning it.
    """
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (objects, 2))
    gt = np.concatenate((corners, corners + rng.uniform(10, 40, (objects, 2))), axis=1)
    image = np.arange(objects) % 2
    boxes = np.empty((2, locations, 4))
    gt_index = np.full((2, locations), -1)
    for b, a in np.ndindex(2, locations):
        near = [g for g in range(objects) if image[g] == b]
        g = near[rng.integers(len(near))] if near else None
        boxes[b, a] = gt[g] + rng.normal(size=4) * rng.choice([1, 6, 12, 18, 60]) if near else rng.uniform(0, 90, 4)
        boxes[b, a, 2:] = np.maximum(boxes[b, a, 2:], boxes[b, a, :2] + 1)
        if near and g < objects - 1 and a % 4 == 0:
            gt_index[b, a] = g
    if objects:
        boxes[0, 1], gt_index[0, 1] = gt[0], -1
    targets = Targets(
        torch.tensor(gt).view(-1, 4),
        torch.zeros(objects, dtype=torch.int64),
        torch.tensor(image),
        torch.zeros(objects, dtype=torch.bool),
    )
    return boxes, gt_index, targets


def region_of(region, boxes, gt_index, targets, is_ignored=None, **others) -> np.ndarray:
    """Without is_ignored nothing is."""
    ignored = torch.tensor(np.zeros(gt_index.shape, dtype=bool) if is_ignored is None else is_ignored)
    given = dict(boxes_xyxy=torch.tensor(boxes), gt_index=torch.tensor(gt_index), targets=targets, is_ignored=ignored)
    got = region(**given, **others)
    assert got.dtype == torch.bool
    return got.numpy()


def check_region_matches(region) -> None:
    total = 0
    for objects, seed, gamma in [(4, 0, 0.25), (4, 1, 0.0), (7, 2, 0.6), (7, 3, 1.0), (1, 4, 0.25), (0, 5, 0.25)]:
        boxes, gt_index, targets = scene(objects, seed=seed)
        rng = np.random.default_rng(seed)
        for is_ignored in (None, rng.random(gt_index.shape) < 0.3):
            expected = reference.valuable_region(
                boxes, gt_index, targets.boxes_xyxy.numpy(), targets.image.numpy(), is_ignored, gamma
            )
            got = region_of(region, boxes, gt_index, targets, gamma=gamma, is_ignored=is_ignored)
            np.testing.assert_array_equal(got, expected)
            total += expected.sum()
    assert total > 40


def check_default_gamma(region) -> None:
    boxes, gt_index, targets = scene(7, seed=6, locations=60)
    assert (
        region_of(region, boxes, gt_index, targets) == region_of(region, boxes, gt_index, targets, gamma=0.25)
    ).all()
    assert (region_of(region, boxes, gt_index, targets) != region_of(region, boxes, gt_index, targets, gamma=0.5)).any()


def check_larger_gamma_takes_fewer(region) -> None:
    boxes, gt_index, targets = scene(7, seed=7, locations=60)
    regions = [region_of(region, boxes, gt_index, targets, gamma=g) for g in (0.0, 0.25, 0.5, 1.0)]
    sizes = [r.sum() for r in regions]
    assert all((small <= large).all() for large, small in itertools.pairwise(regions)) and len(set(sizes)) == 4, sizes


def check_no_images(region) -> None:
    empty = region_of(region, np.zeros((0, 5, 4)), np.zeros((0, 5), dtype=int), Targets.empty())
    assert empty.shape == (0, 5)
    assert region_of(region, np.zeros((2, 0, 4)), np.zeros((2, 0), dtype=int), Targets.empty()).shape == (2, 0)


def check_diou_matches(diou) -> None:
    rng = np.random.default_rng(8)
    a, b = rng.uniform(0, 20, (2, 200, 4))
    a[:, 2:], b[:, 2:] = a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]
    a[:20] = b[:20]  # equal
    a[20, 2:], b[20] = a[20, :2], np.tile(a[20, :2], 2)  # two equal points
    got = diou(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(got.numpy(), [reference.diou(x, y) for x, y in zip(a, b)], atol=1e-7)  # IoU has an eps


CASES = [
    LossCase(
        "localization_kl",
        localization_kl,
        checks=(
            matches_reference(
                reference.localization_kl,
                {
                    "default": edges(),
                    "cross-head": edges(temperature=1.0),
                    "batch": edges(weight=np.random.default_rng(5).random((2, 7))),
                    "mask": edges(weight=np.array([1.0, 0.0, 1.0])),
                    "hardly weighted": edges(weight=np.array([0.01, 0.2])),
                    "normaliser of all levels": edges(normaliser=np.array(7.5)),
                    "small normaliser": edges(normaliser=0.3),
                    "nowhere": edges(weight=np.zeros(3)),
                    "one bin": edges(bins=1),
                    "none": edges(0),
                    "saturated": edges(scale=1e3),
                },
            ),
            unchanged_by(edge_constant, edges(temperature=2.0)),
            refuses(edges() | {"weight": np.ones(1)}, "weight"),
            refuses(edges() | {"t_logits": edges(bins=5)["t_logits"]}, "differ"),
            refuses(random_pair("logits", (5, 3, 6), weight=np.ones(5)), "(..., 4, R)"),
            zero_when_empty(edges(0), edges(weight=np.zeros(3))),
            minimum_at_teacher(edges(temperature=2.0)),
            only_student_learns(edges(temperature=2.0), also=("weight",)),
            only_student_learns(edges(normaliser=np.array(7.5)), also=("normaliser",)),
            takes_inference_teacher(edges()),
            gradient_is_right(edges(temperature=2.0)),
            computes_in_float32(edges()),
            finite_when_saturated(edges(scale=1e4)),
        ),
        mutants={
            "no T^2": Edit("return temperature**2 *", "return"),
            "T, not T^2": Edit("temperature**2", "temperature"),
            "mean over bins": Edit(".sum(-1).mean(-1)", ".mean(-1).mean(-1)"),
            "sum over edges": Edit(".sum(-1).mean(-1)", ".sum(-1).sum(-1)"),
            "mean over locations": Edit(
                "weighted_mean(kl, weight, normaliser)", "(weight.detach() * kl).sum() / max(len(kl), 1)"
            ),
            "unweighted": Edit("weighted_mean(kl, weight, normaliser)", "weighted_mean(kl, None, normaliser)"),
            "normaliser not held above 1": Edit(
                "weighted_mean(kl, weight, normaliser)", "(weight.detach() * kl).sum() / weight.detach().sum()"
            ),
            "weights learn": Edit(
                "weighted_mean(kl, weight, normaliser)",
                "(weight * kl).sum() / weight.sum().clamp(min=1) + 0 * weighted_mean(kl, weight)",
            ),
            "normaliser ignored": Edit("weighted_mean(kl, weight, normaliser)", "weighted_mean(kl, weight)"),
            "softmax over edges": Edit(
                "F.log_softmax(z / temperature, dim=-1)", "F.log_softmax(z / temperature, dim=-2)"
            ),
            "no temperature": Edit("F.log_softmax(z / temperature, dim=-1)", "F.log_softmax(z, dim=-1)"),
            "default of class distillation": Edit("temperature: float = 10.0", "temperature: float = 2.0"),
            "swapped roles": Edit("log_p_t.exp() * (log_p_t - log_p_s)", "log_p_s.exp() * (log_p_s - log_p_t)"),
            "cross-entropy": cross_entropy_of_edges,
            "log of a softmax": Edit("F.log_softmax(z / temperature, dim=-1)", "(z / temperature).softmax(-1).log()"),
            "teacher learns": Edit(
                "as_logit_pair(s_logits, t_logits)",
                "s_logits, t_logits + 0 * as_logit_pair(s_logits, t_logits)[0].detach()",
            ),
        },
    ),
    LossCase(
        "valuable_region",
        valuable_region,
        checks=(check_region_matches, check_default_gamma, check_larger_gamma_takes_fewer, check_no_images),
        mutants={
            "positives too": Edit("region &= ~is_positive", "pass"),
            "ignored too": Edit("region & ~is_ignored", "region"),
            "objects of the other image": Edit("paired_diou(boxes_xyxy[image]", "paired_diou(boxes_xyxy[1 - image]"),
            "no threshold": Edit("(x > 0) & (x >= gamma * alpha[chosen, None])", "(x > 0)"),
            "boxes apart from the object": Edit("(x > 0) & ", ""),
            "bounded by alpha from within": Edit("(x > 0) & ", "(x > 0) & (x <= alpha[chosen, None]) & "),
            "one threshold for all": Edit("gamma * alpha[chosen, None]", "gamma * alpha[chosen].mean()"),
            "sum over positives": Edit(" / count.clamp(min=1)", ""),
            "gamma, not its part of alpha": Edit("gamma * alpha[chosen, None]", "gamma"),
            "objects without positives": Edit("chosen = count.nonzero()[:, 0]", "chosen = torch.arange(len(count))"),
            "other default": Edit("gamma: float = 0.25", "gamma: float = 0.5"),
            "IoU": Edit(" - distance / torch.where(diagonal > 0, diagonal, 1)", "", "paired_diou"),
        },
    ),
    LossCase(
        "diou",
        paired_diou,
        checks=(check_diou_matches,),
        mutants={
            "IoU": Edit(" - distance / torch.where(diagonal > 0, diagonal, 1)", ""),
            "sides, not centers": Edit("/ 4", "/ 1"),
            "intersection's diagonal": Edit(
                "torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])",
                "torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])",
            ),
            "not squared": Edit("hull.square().sum(-1)", "hull.square().sum(-1).sqrt()"),
            "nan for points": Edit("torch.where(diagonal > 0, diagonal, 1)", "diagonal"),
        },
    ),
]
