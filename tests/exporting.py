"""A distilled student of a few steps, exported in three forms, and a small RT-DETR; shared by several tests."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import models
from rtdetr.rtdetr import RTDETR
from tests.golden import recipe
from tests.tiny_training import SIZE, tiny_config, write_dataset
from weights import PublicLayout
from yolo.yolov8 import NUM_BINS

ARCH, NAMES = "yolov8_narrow", ("green", "red")  # of the student
GAIN = 1.355  # of the weights in tests/golden


@dataclass(frozen=True)
class Exported:
    """dynamic ends in detections, the other two in boxes and scores of one picture. said: by each call of export.py."""

    data: Path
    checkpoint: Path
    dynamic: Path
    fixed: Path
    int8: Path
    said: tuple[str, str]


def fill(state: dict[str, Tensor]) -> None:
    """Weights that are a function of their names, so large that what a model says depends on the picture.

    Of YOLOv8 and YOLOv5u the scores are spread out, and boxes are a few strides wide.
    """
    for name, value in state.items():
        filled = recipe.fill(name, tuple(value.shape), GAIN)
        if filled is not None:
            value.copy_(torch.from_numpy(filled))
        if re.fullmatch(r"head\.(box|cls)\.\d\.2\.weight", name):
            value *= 6
        if re.fullmatch(r"head\.box\.\d\.2\.bias", name):  # short distances, or every box is the whole picture
            value -= 0.6 * torch.arange(NUM_BINS).repeat(4)


def save_model(path: Path, arch: str, names: tuple[str, ...] = NAMES, image_size: int = SIZE) -> Path:
    """A checkpoint of ours with the weights of `fill`."""
    state = models.build(arch, len(names)).state_dict()
    fill(state)
    checkpoint.save(path, {"arch": arch, "names": list(names), "image_size": image_size, "ema": state})
    return path


class StridedBackbone(nn.Module):
    """c3, c4, c5 from one convolution each: what an RT-DETR that is quick to trace stands on."""

    channels = {"c3": 8, "c4": 8, "c5": 8}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, convolution in zip(self.channels, self.convolutions):
            x = maps[name] = convolution(x)
        return maps


def small_rtdetr() -> RTDETR:
    """Weights by their names: fresh ones give all queries nearly one score, and rounding would choose among them."""
    model = RTDETR(
        backbone=StridedBackbone(), num_classes=2, width=32, hidden=16, feedforward=32, num_layers=1,
        batchnorm_eps=1e-5, public_layout=PublicLayout("none", []),
    )  # fmt: skip
    fill(model.state_dict())
    return model.eval().requires_grad_(False)


def export_student(folder: Path) -> Exported:
    """Train with a teacher and adapters, then run export.py twice."""
    import export
    import train

    data = write_dataset(folder / "data", train=8, test=6)
    terms = [{"teacher": "big", "loss": "mse", "weight": 0.5, "student_maps": ["p3", "p4"], "adapter": "conv1x1"}]
    teachers = [{"name": "big", "arch": ARCH, "weights": str(save_model(folder / "teacher.pt", ARCH))}]
    student = {"arch": ARCH, "weights": str(save_model(folder / "start.pt", ARCH))}
    parts = {"student": student, "teachers": teachers, "terms": terms, "data": {"classes": list(NAMES)}}
    config = tiny_config(data, folder / "runs", epochs=1, **parts)
    train.run(config, quiet=True)
    weights = folder / "runs" / "tiny" / "weights" / "last.pt"
    said, pictures = [], ["--pictures", str(data / "images")]
    for arguments in (
        ["--output", str(folder / "dynamic.onnx"), "--dynamic", "--with-nms", *pictures],
        ["--output", str(folder / "fixed.onnx"), "--int8", "--calibrate", "yolo", str(data), "train", *pictures],
    ):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            export.main([str(weights), *arguments])
        said.append(printed.getvalue())
    paths = [folder / f"{name}.onnx" for name in ("dynamic", "fixed", "fixed.int8")]
    return Exported(data, weights, *paths, tuple(said))
