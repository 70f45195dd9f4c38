"""Sets of boxes for non-maximum suppression, easy and adversarial, and what torchvision keeps of them.

`python -m tests.reference.nms_cases`, where torchvision is installed, records tests/golden/nms_cases.npz.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "nms_cases.npz"


def random_boxes(rng: np.random.Generator, count: int, *, size: float = 60.0, spread: float = 200.0) -> np.ndarray:
    """(count, 4) float32 corners of boxes with sides 1..size, top left corners in 0..spread."""
    corner = rng.uniform(0, spread, (count, 2))
    return np.concatenate((corner, corner + rng.uniform(1, size, (count, 2))), 1).astype(np.float32)


def cases() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """name -> boxes_xyxy (N, 4) float32, scores (N,) float32, labels (N,) int64, IoU threshold."""
    rng = np.random.default_rng(20240731)
    made = {}

    def add(name: str, boxes: np.ndarray, iou_threshold: float, *, classes: int = 1, ties: bool = False) -> None:
        scores = rng.integers(1, 8, len(boxes)) / 8 if ties else rng.permutation(len(boxes)) / len(boxes)
        labels = rng.integers(0, classes, len(boxes))
        made[name] = (boxes.astype(np.float32), scores.astype(np.float32), labels, iou_threshold)

    add("one box", random_boxes(rng, 1), 0.5)
    for threshold in (0.0, 0.1, 0.5, 0.7, 0.9, 1.0):
        add(f"random, {threshold}", random_boxes(rng, 700), threshold)
    add("random, 20 classes", random_boxes(rng, 1500, spread=120), 0.5, classes=20)
    add("crowded, longer than a block", random_boxes(rng, 1400, spread=40), 0.6)
    add("clusters", np.repeat(random_boxes(rng, 60), 12, 0) + rng.normal(0, 2, (720, 4)), 0.45, classes=3)
    add("equal scores", random_boxes(rng, 600, spread=100), 0.5, classes=2, ties=True)
    add("equal boxes and scores", np.repeat(random_boxes(rng, 40), 5, 0), 0.5, classes=2, ties=True)
    # Small whole numbers: thousands of pairs lie exactly on the threshold, where float32 rounding decides.
    for threshold in (1 / 3, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8):
        corner = rng.integers(0, 6, (400, 2))
        grid = np.concatenate((corner, corner + rng.integers(1, 7, (400, 2))), 1)
        add(f"on the threshold, {threshold:.3g}", grid, threshold)
    # Each box overlaps only its neighbours, so every keep hangs on the whole chain before it.
    left = np.arange(1100)[:, None] * 4.0
    chain = np.concatenate((left, 0 * left, left + 10, 0 * left + 10), 1)
    made["chain"] = (
        chain.astype(np.float32),
        np.linspace(1, 0.1, 1100, dtype=np.float32),
        np.zeros(1100, dtype=np.int64),
        0.4,
    )
    flat = random_boxes(rng, 300, spread=20)
    flat[::3, 2] = flat[::3, 0]  # no width
    flat[1::3, 3] = flat[1::3, 1]  # no height
    flat[150:] = flat[:150]
    add("without area", flat, 0.5)
    inverted = random_boxes(rng, 300, spread=50)
    inverted[::2] = inverted[::2][:, [2, 3, 0, 1]]
    add("inside out", inverted, 0.3)
    add("huge", random_boxes(rng, 300) * np.float32(1e15), 0.5)
    add("beyond float32 areas", random_boxes(rng, 300) * np.float32(1e19), 0.5)
    add("far from the origin", random_boxes(rng, 300) + np.float32(4e6), 0.5)
    add("tiny", random_boxes(rng, 300) * np.float32(1e-20), 0.5)
    add("nested", np.array([[i, i, 400 - i, 400 - i] for i in range(200)]), 0.5)
    return made


def torchvision_keep(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou_threshold: float) -> np.ndarray:
    """torchvision.ops.nms class by class, merged by falling score, ties by index: (M,) int64."""
    import torch
    from torchvision.ops import nms

    kept = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept += rows[nms(torch.tensor(boxes[rows]), torch.tensor(scores[rows]), iou_threshold).numpy()].tolist()
    return np.array(sorted(kept, key=lambda i: (-scores[i], i)), dtype=np.int64)


def record() -> None:
    import torch
    import torchvision

    arrays, names = {}, []
    for number, (name, case) in enumerate(cases().items()):
        names.append(name)
        for part, value in zip(("boxes", "scores", "labels", "iou_threshold"), case):
            arrays[f"{number}.{part}"] = np.asarray(value)
        arrays[f"{number}.keep"] = torchvision_keep(*case)
    meta = {"names": names, "torch": torch.__version__, "torchvision": torchvision.__version__}
    np.savez_compressed(GOLDEN, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
    print(f"{GOLDEN}: {len(names)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    record()
