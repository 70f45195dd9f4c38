"""A dataset and a config so small that a training step takes milliseconds; shared by the tests of the loop."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from config import Config, from_tree
from engine.training.splits import Splits, open_indexes, scan_splits

SIZE = 64


def write_dataset(root: Path, *, train: int = 24, test: int = 8) -> Path:
    """Pictures of two kinds of rectangles in YOLO's format, the same ones every time."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            picture = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
            rows = []
            for _ in range(int(rng.integers(1, 4))):
                label = int(rng.integers(2))
                width, height = rng.integers(14, 30, 2).tolist()
                x, y = int(rng.integers(SIZE - width)), int(rng.integers(SIZE - height))
                picture[y : y + height, x : x + width] = (230, 40, 40) if label else (40, 220, 60)
                center = ((x + width / 2) / SIZE, (y + height / 2) / SIZE, width / SIZE, height / SIZE)
                rows.append(f"{label} " + " ".join(f"{value:.6f}" for value in center))
            Image.fromarray(picture).save(root / "images" / split / f"{number:03}.png")
            (root / "labels" / split / f"{number:03}.txt").write_text("\n".join(rows) + "\n")
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/test\ntest: images/test\nnames: [green, red]\n"
    )
    return root


def tiny_config(root: Path, runs: Path, **changes) -> Config:
    """The smallest YOLOv8 at 64 px, batch 8, two epochs of three steps. `changes` are keys of the config, sections as
    dicts.
    """
    tree = {
        "name": "tiny",
        "data": {"format": "yolo", "root": str(root), "train": "train", "test": "test"},
        "student": {"arch": "yolov8_narrow"},
        "epochs": 2,
        "batch_size": 8,
        "image_size": SIZE,
        "device": "cpu",
        "precision": "float32",
        "optimizer": {"warmup_epochs": 0.5},
        "evaluation": {"every_epochs": 0},
        "runs": str(runs),
    }
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return from_tree(Config, tree, source="tiny_config")


def environment() -> dict[str, str]:
    """For child processes: one thread, and no progress of their own to draw."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def open_splits(config: Config, say: Callable[[str], None]) -> Splits:
    """The splits of a config as a run opens them, without pictures that have no labels."""
    return scan_splits(config, open_indexes(config), say)
