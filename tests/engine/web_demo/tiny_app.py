"""Runs and files for the tests of the demo in a browser.

The runs are a distilled one and its baseline, trained for two epochs of three steps. Their class biases are raised
afterwards, so that these hardly trained models find something.
"""

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import checkpoint
import train
from engine.runtime.run_folder import RunFolder
from tests.engine.training.test_distilled_training import TERMS, save_teacher
from tests.tiny_training import tiny_config, write_dataset


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size; its pixels are a few bytes, which nobody gets to decode."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def photo(width: int = 90, height: int = 60, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_runs(root: Path) -> None:
    """runs/study/baseline_seed0 and distilled_seed0, and what they were trained on."""
    write_dataset(root / "data")
    teacher = save_teacher(root / "teacher.pt")
    teachers = [{"name": "big", "arch": "yolov5nu", "weights": str(teacher)}]
    for name, changes in {"baseline_seed0": {}, "distilled_seed0": {"teachers": teachers, "terms": TERMS}}.items():
        config = tiny_config(root / "data", root / "runs" / "study", name=name, **changes)
        train.run(
            dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, every_epochs=1)), quiet=True
        )
        folder = RunFolder(root / "runs" / "study" / name)
        state = checkpoint.load(folder.last)
        shift = 5.0 if name == "baseline_seed0" else 5.5
        for key, value in state["ema"].items():
            if key.startswith("head.cls.") and key.endswith("2.bias"):
                value += shift
        checkpoint.save(folder.last, state)
    (root / "runs" / "study" / "comparison.md").write_text("# study\n\nthe table of the study\n", encoding="utf-8")
