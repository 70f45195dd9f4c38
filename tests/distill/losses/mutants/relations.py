"""Relations: the checks of each loss and of pool_boxes, and wrong variants of each."""

import numpy as np
import torch

from distill.losses.relations import instance_distance, location_similarity, pool_boxes
from tests.distill.losses.mutants.machinery import Edit, LossCase
from tests.distill.losses.mutants.maps import every_map_loss, maps
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
from tests.reference import feature_distillation as reference

IMAGE = np.array([0, 2, 0, 1, 2, 2, 0])
ROTATION = torch.tensor(np.linalg.qr(np.random.default_rng(10).normal(size=(3, 3)))[0])


def rows(count: int = 7, width: int = 3, *, image=IMAGE, **others) -> dict:
    return random_pair("features", (count, width), image=image[:count], **others)


def wider_teacher(arguments: dict) -> dict:
    rng = np.random.default_rng(11)
    key = next(k for k in arguments if k.startswith("t_"))
    n, _, *rest = arguments[key].shape
    return arguments | {key: rng.normal(size=(n, 5, *rest))}


def equal_rows(arguments: dict) -> dict:
    """All student rows alike; two teacher rows alike."""
    s, t = arguments["s_features"].copy(), arguments["t_features"].copy()
    s[:], t[2] = s[0], t[0]
    return arguments | {"s_features": s, "t_features": t}


def lengthened(arguments: dict) -> dict:
    return {"s_map": arguments["s_map"] * (1 + arguments["t_map"].square().sum(1, keepdim=True))}


def check_pooling(pool) -> None:
    rng = np.random.default_rng(12)
    feature_map = rng.normal(size=(3, 2, 5, 7))
    boxes = np.array([[0, 0, 56, 40], [8, 4, 30, 35], [-20, 10, 80, 12], [3, 3, 4, 3.5], [50, 30, 90, 70]], float)
    image = np.array([2, 0, 1, 2, 0])
    for size in (1, 3):
        got = pool(
            torch.tensor(feature_map), boxes_xyxy=torch.tensor(boxes), image=torch.tensor(image), image_size=(40, 28),
            size=size,
        )  # fmt: skip
        expected = reference.pool_boxes(feature_map, boxes, image, (40, 28), size)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-12)


def check_pooling_edges(pool) -> None:
    """No boxes; gradient to the map alone; float32 for a bfloat16 map."""
    none = pool(torch.zeros(2, 3, 4, 4), boxes_xyxy=torch.zeros(0, 4), image=torch.zeros(0).long(), image_size=(8, 8))
    assert none.shape == (0, 3, 7, 7)
    feature_map, boxes = torch.randn(1, 2, 4, 4, requires_grad=True), torch.tensor([[1.0, 1, 6, 7]], requires_grad=True)
    given = dict(boxes_xyxy=boxes, image=torch.tensor([0]), image_size=(8, 8))
    pool(feature_map, **given).sum().backward()
    assert feature_map.grad.abs().sum() > 0 and boxes.grad is None
    assert pool(feature_map.bfloat16(), **given).dtype == torch.float32


CASES = [
    LossCase(
        "location_similarity",
        location_similarity,
        checks=(
            matches_reference(
                reference.location_similarity,
                {
                    "usual": maps(nodes=3),
                    "all locations": maps(),
                    "one node": maps(nodes=1),
                    "odd": maps(3, 2, 5, 7, nodes=4),
                    "other width": wider_teacher(maps(nodes=3)),
                    "no images": maps(0, 3, 4, 5),
                    "no pixels": maps(2, 3, 0, 5),
                    "saturated": maps(scale=1e3),
                },
            ),
            unchanged_by(lengthened, maps()),
            unchanged_by(lambda a: {"s_map": torch.einsum("dc,bchw->bdhw", ROTATION, a["s_map"])}, maps(nodes=3)),
            *every_map_loss(),
            only_student_learns(wider_teacher(maps())),
            refuses(maps() | {"t_map": maps(2, 3, 4, 4)["t_map"]}, "equal"),
        ),
        mutants={
            "sum over pairs": Edit(".square().mean()", ".square().sum()"),
            "absolute difference": Edit(".square().mean()", ".abs().mean()"),
            "products, not cosines": Edit("unit_vectors(nodes, dim=1)", "nodes", within="node_cosines"),
            "channels, not locations": Edit(
                "units.transpose(1, 2) @ units", "units @ units.transpose(1, 2)", "node_cosines"
            ),
            "a fixed number of nodes": Edit(
                "(min(s_map.shape[2], nodes), min(s_map.shape[3], nodes))", "(nodes, nodes)"
            ),
            "largest, not average": Edit("F.adaptive_avg_pool2d", "F.adaptive_max_pool2d"),
            "pooled after": Edit("F.adaptive_avg_pool2d(m, grid)", "m"),
            "autocast inside": Edit("enabled=False", "enabled=torch.is_autocast_enabled('cpu')"),
            "nan when empty": Edit("s_map.numel() == 0 or t_map.numel() == 0", "False"),
            "teacher learns": lambda *, s_map, t_map, nodes=16: (
                location_similarity(s_map=t_map, t_map=s_map, nodes=nodes) + 0 * s_map.sum()
            ),
        },
    ),
    LossCase(
        "instance_distance",
        instance_distance,
        checks=(
            matches_reference(
                reference.instance_distance,
                {
                    "usual": rows(),
                    "other width": wider_teacher(rows()),
                    "far apart": rows(scale=1.0)
                    | {"s_features": np.cumsum(10.0 ** np.arange(7))[:, None] * np.ones(3)},
                    "equal rows": equal_rows(rows()),
                    "one row each": rows(image=np.arange(7)),
                    "none": rows(0),
                    "saturated": rows(scale=1e3),
                },
            ),
            unchanged_by(lambda a: {"s_features": 3 * a["s_features"] @ ROTATION - 7}, rows()),
            zero_when_empty(rows(0), rows(1), rows(image=np.arange(7))),
            minimum_at_teacher(rows()),
            only_student_learns(rows()),
            takes_inference_teacher(rows()),
            gradient_is_right(rows()),
            computes_in_float32(rows()),
            finite_when_saturated(rows(scale=1e4), equal_rows(rows())),
            refuses(rows() | {"image": IMAGE[:3]}, "rows"),
        ),
        mutants={
            "sum over pairs": Edit('reduction="sum")) / count', 'reduction="sum"))'),
            "mean over all entries": Edit('reduction="sum")) / count', 'reduction="mean"))'),
            "squared": Edit("F.smooth_l1_loss(s_scaled", "F.mse_loss(s_scaled"),
            "distances not scaled": Edit("distances * (count / torch.where(total > 0, total, 1))", "distances"),
            "scaled by the teacher's mean": Edit(
                "scaled.append(distances *",
                "total = distance_matrix(t_features.flatten(1), image).mul(related).sum(); scaled.append(distances *",
            ),
            "pairs across images": Edit(
                "(image[:, None] == image[None, :])", "torch.ones(len(image), len(image), dtype=bool)"
            ),
            "every pair twice": Edit(".triu(1)", ""),
            "nan for equal rows": Edit("torch.where(total > 0, total, 1)", "total"),
            "squared distances": Edit(
                "distance_matrix(features.to(dtype).flatten(1), image)",
                "distance_matrix(features.to(dtype).flatten(1), image).square()",
            ),
            "teacher learns": Edit("t_features.detach()", "t_features"),
        },
    ),
    LossCase(
        "pool_boxes",
        pool_boxes,
        checks=(check_pooling, check_pooling_edges),
        mutants={
            "no half pixel": Edit("(x * (w / width) - 0.5)", "(x * (w / width))"),
            "x and y swapped": Edit("(y * (h / height) - 0.5)", "(y * (w / width) - 0.5)"),
            "corners, not centers of cells": Edit("+ 0.5) / size", ") / size"),
            "nearest": Edit("right, down = (x - x0)", "right, down = 0 * (x - x0)"),
            "first image only": Edit("image[:, None, None] * h", "0 * image[:, None, None]"),
            "not clamped": Edit(
                "(y * (h / height) - 0.5).clamp(0, h - 1)", "(y * (h / height) - 0.5).clamp(0, h - 1.01)"
            ),
            "boxes learn": Edit("boxes_xyxy.detach()", "boxes_xyxy"),
        },
    ),
]
