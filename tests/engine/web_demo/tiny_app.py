"""Runs and files for the tests of the demo in a browser.

One distilled run is trained for two epochs of a step; its baseline is a copy with a config and weights of its own. The
class biases are raised, so that these hardly trained models find something.
"""

import dataclasses
import io
import shutil
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

import checkpoint
import train
from config import Config, from_tree, to_tree
from engine.prediction.video import VideoWriter
from engine.runtime.run_folder import RunFolder, write_config
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


def clip(seconds: float, side: int = 64, rate: int = 16) -> bytes:
    """An MP4 file in which a square moves."""
    file = io.BytesIO()
    frame_rate = Fraction(rate)
    with VideoWriter(file, width=side, height=side, frame_rate=frame_rate, time_base=1 / frame_rate) as writer:
        for number in range(round(seconds * rate)):
            pixels = np.zeros((side, side, 3), np.uint8)
            pixels[20:44, number % 32 : number % 32 + 24] = (230, 40, 40)
            writer.write(pixels, number)
    return file.getvalue()


def write_runs(root: Path) -> None:
    """runs/study/baseline_seed0 and distilled_seed0, and what they were trained on."""
    write_dataset(root / "data", train=8, test=8)
    teacher = save_teacher(root / "teacher.pt")
    student, evaluation = {"arch": "yolov8_narrow"}, {"every_epochs": 1}
    teachers = [{"name": "big", "arch": "yolov8_narrow", "weights": str(teacher)}]
    config = tiny_config(root / "data", root / "runs" / "study", student=student, evaluation=evaluation)
    plain = dataclasses.replace(config, name="baseline_seed0")
    tree = to_tree(config) | {"name": "distilled_seed0", "teachers": teachers, "terms": TERMS}
    train.run(from_tree(Config, tree, source="tiny_app"), quiet=True)
    distilled, baseline = (RunFolder(Path(config.runs) / f"{name}_seed0") for name in ("distilled", "baseline"))
    shutil.copytree(distilled.path, baseline.path)
    write_config(baseline, plain)
    for folder, shift in ((distilled, 5.5), (baseline, 5.0)):
        state = checkpoint.load(folder.last)
        for key, value in state["ema"].items():
            if key.startswith("head.cls.") and key.endswith("2.bias"):
                value += shift
        checkpoint.save(folder.last, state)
    (root / "runs" / "study" / "comparison.md").write_text("# study\n\nthe table of the study\n", encoding="utf-8")
