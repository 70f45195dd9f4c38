"""Non-maximum suppression on the CPU, one thread: ours beside Ultralytics and torchvision, where they are installed.

    python benchmarks/nms.py [--rounds 15]
    /path/to/env/bin/python benchmarks/nms.py      # an environment with torch, ultralytics and torchvision

First table: from the raw head tensor (1, 4 + 80, 8400), cxcywh boxes and scores of a 640 px image, to at most 300
detections at IoU 0.7. Ultralytics runs with torchvision imported, without which it is some ten times slower, and
without its time limit. Second table: the operation alone; torchvision always finds every survivor.

The contestants of a row take turns, round by round; times are medians (best) of CPU milliseconds, which neighbours
on the machine disturb little. A turn with few boxes is several calls in a row, whose mean counts. "same" counts the
detections of ours that the peer found too: Ultralytics separates classes by moving their boxes apart, up to 600,000
pixels, which rounds them, so a pair close to the threshold can fall on the other side.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import header, options, parse, row, versions
from boxes import cxcywh_to_xyxy
from engine.runtime.timing import cpu_seconds, rotate
from errors import run_script
from kernels.nms import batched_nms, select_detections
from structures import Detections

NUM_CLASSES, IMAGE_SIZE, MAX_DETECTIONS, IOU_THRESHOLD = 80, 640, 300, 0.7


def clustered_boxes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 4) cxcywh and labels (count,): a dozen boxes on each object, of its class four times out of five."""
    objects = -(-count // 12)
    center = torch.rand(objects, 2, generator=generator) * IMAGE_SIZE
    side = torch.exp(torch.empty(objects, 2).uniform_(2.5, 5.5, generator=generator))
    owner = torch.arange(objects).repeat_interleave(12)[:count]
    jitter = torch.randn(count, 4, generator=generator) * 0.08
    boxes = torch.cat((center[owner] + jitter[:, :2] * side[owner], side[owner] * jitter[:, 2:].exp()), 1)
    labels = torch.randint(0, NUM_CLASSES, (objects,), generator=generator)[owner]
    other = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return boxes, torch.where(torch.rand(count, generator=generator) < 0.8, labels, other)


def head_of_candidates(count: int, lowest: float, generator: torch.Generator) -> Tensor:
    """(1, 84, 8400): `count` locations with one class above `lowest` each, the rest far below."""
    boxes, labels = clustered_boxes(8400, generator)
    scores = torch.zeros(8400, NUM_CLASSES)
    chosen = torch.randperm(8400, generator=generator)[:count]
    values = 1.01 * lowest + (0.95 - lowest) * torch.rand(count, generator=generator) ** 3
    scores[chosen, labels[chosen]] = values
    return torch.cat((boxes, scores), 1).T[None].contiguous()


def head_of_trained_model(generator: torch.Generator) -> Tensor:
    """(1, 84, 8400): 25 objects, whose locations are sure of their class, and noise, a few percent above 0.001."""
    points = []
    for stride in (8, 16, 32):
        axis = (torch.arange(IMAGE_SIZE // stride) + 0.5) * stride
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        points.append(torch.stack((x.flatten(), y.flatten(), torch.full((x.numel(),), stride)), 1))
    points = torch.cat(points)  # (8400, 3)
    center = torch.rand(25, 2, generator=generator) * IMAGE_SIZE
    side = torch.exp(torch.empty(25, 2).uniform_(3.0, 5.7, generator=generator))
    labels = torch.randint(0, NUM_CLASSES, (25,), generator=generator)
    distance = ((points[:, None, :2] - center) / side).abs().amax(2)  # (8400, 25); below 0.5 inside the object
    nearest, owner = distance.min(1)
    logits = torch.randn(8400, NUM_CLASSES, generator=generator) * 1.2 - 9
    sure = 3.0 - 12 * nearest + torch.randn(8400, generator=generator)
    rows = (nearest < 0.5).nonzero().squeeze(1)
    logits[rows, labels[owner[rows]]] = sure[rows]
    jitter = torch.randn(8400, 4, generator=generator)
    boxes = torch.cat((points[:, :2] + jitter[:, :2] * 4, points[:, 2:] * (1 + jitter[:, 2:].abs() * 2)), 1)
    boxes[rows, :2] = center[owner[rows]] + 0.04 * jitter[rows, :2] * side[owner[rows]]
    boxes[rows, 2:] = side[owner[rows]] * (0.06 * jitter[rows, 2:]).exp()
    return torch.cat((boxes, logits.sigmoid()), 1).T[None].contiguous()


def head_of_noise(generator: torch.Generator) -> Tensor:
    """(1, 84, 8400): all 672,000 pairs above 0.001."""
    scores = 0.00101 + 0.9 * torch.rand(8400, NUM_CLASSES, generator=generator) ** 4
    return torch.cat((clustered_boxes(8400, generator)[0], scores), 1).T[None].contiguous()


def our_detections(head: Tensor, score_threshold: float, multi_label: bool) -> Detections:
    (found,) = select_detections(
        cxcywh_to_xyxy(head[:, :4].mT),
        head[:, 4:].mT,
        score_threshold=score_threshold,
        iou_threshold=IOU_THRESHOLD,
        max_detections=MAX_DETECTIONS,
        multi_label=multi_label,
    )
    return found


def in_a_row(contestants: dict[str, Callable], calls: int) -> dict[str, Callable]:
    """The contestants, each of which makes `calls` calls in its turn: a single short call cannot be timed well."""
    return {name: lambda call=call: [call() for _ in range(calls)] for name, call in contestants.items()}


def same_rows(a: Tensor, b: Tensor) -> int:
    """Rows of (N, 6) that also are rows of (M, 6), to 1/100."""
    found = {tuple(row) for row in b.mul(100).round().int().tolist()}
    return sum(tuple(row) in found for row in a.mul(100).round().int().tolist())


def print_heads(rounds: int, peer: Callable | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        ("100 candidates, score > 0.25", head_of_candidates(100, 0.25, generator), 0.25, False),
        ("1,000 candidates, score > 0.25", head_of_candidates(1000, 0.25, generator), 0.25, False),
        ("8,400 candidates, score > 0.001", head_of_candidates(8400, 0.001, generator), 0.001, True),
        ("trained model, pairs > 0.001", head_of_trained_model(generator), 0.001, True),
        ("noise, 672,000 pairs > 0.001", head_of_noise(generator), 0.001, True),
    ]
    print(header("ms, head (1, 84, 8400), at most 300", "Ultralytics") + "  same")
    for name, head, score_threshold, multi_label in rows:
        contestants = {"ours": lambda: our_detections(head, score_threshold, multi_label)}  # noqa: B023
        if peer is not None:
            contestants["peer"] = lambda: peer(
                head,  # noqa: B023
                score_threshold,  # noqa: B023
                IOU_THRESHOLD,
                multi_label=multi_label,  # noqa: B023
                max_det=MAX_DETECTIONS,
                max_time_img=60.0,
            )
        calls = 5 if score_threshold == 0.25 else 1
        times = rotate(in_a_row(contestants, calls), rounds, cpu_seconds)
        line = row(name, times, lambda s: 1000 * s / calls)  # noqa: B023
        if peer is not None:
            found = our_detections(head, score_threshold, multi_label)
            table = torch.cat((found.boxes_xyxy, found.scores[:, None], found.labels[:, None]), 1)
            line += f"  {same_rows(table, contestants['peer']()[0][:, :6])} of {len(found)}"
        print(line, flush=True)


def print_operation(rounds: int, peer: Callable | None) -> None:
    print("\n" + header("ms, batched_nms, 80 classes, IoU 0.5", "torchvision") + "  same")
    for count in (300, 1000, 5000, 30_000):
        generator = torch.Generator().manual_seed(count)
        boxes, labels = clustered_boxes(count, generator)
        boxes, scores = cxcywh_to_xyxy(boxes), torch.rand(count, generator=generator)
        for limit in sorted({MAX_DETECTIONS, count}):
            contestants = {"ours": lambda: batched_nms(boxes, scores, labels, 0.5, limit)}  # noqa: B023
            if peer is not None:
                contestants["peer"] = lambda: peer(boxes, scores, labels, 0.5)[:limit]  # noqa: B023
            calls = max(1, 5000 // count)
            times = rotate(in_a_row(contestants, calls), max(3, rounds // 3), cpu_seconds)
            line = row(f"{count:,} boxes, at most {limit:,}", times, lambda s: 1000 * s / calls)  # noqa: B023
            if peer is not None:
                ours, theirs = set(contestants["ours"]().tolist()), set(contestants["peer"]().tolist())
                line += f"  {len(ours & theirs)} of {len(ours)}"
            print(line, flush=True)


def main(argv: list[str]) -> None:
    args = parse(options(__doc__, rounds=15), [*argv, "--threads", "1"])
    peer_nms = peer_batched = None
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision

        peer_batched = torchvision.ops.batched_nms
        from ultralytics.utils.nms import non_max_suppression as peer_nms  # ten times slower without torchvision
    print(versions("torchvision", "ultralytics"))
    print_heads(args.rounds, peer_nms)
    print_operation(args.rounds, peer_batched)


if __name__ == "__main__":
    run_script(main)
