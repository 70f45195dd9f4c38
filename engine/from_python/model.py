"""A detector as a user of retort.py holds it: loaded by name or from a file, shown pictures, measured on a dataset."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import models
from checkpoint import CheckpointInfo
from config import EvaluationConfig, check_image_size
from datasets.class_names import COCO, read_class_map
from datasets.download import how_to_fetch
from datasets.images import pillow_pixels, read_image
from engine.evaluation.cross_dataset import evaluate_on_dataset
from engine.evaluation.measuring import EvaluationResult
from engine.from_python.found import Detections
from engine.onnx_files.detector import OnnxDetector, check_precision, load_detector
from engine.prediction.predictor import Predictor
from engine.prediction.sources import find_pictures
from engine.runtime.processes import choose_device
from errors import UserError, counted, expect, naming

Picture = str | Path | Image.Image | np.ndarray | Tensor


class Model:
    """A detector with what is known of it. Printed, it is one line.

    module: the nn.Module, a structures.Detector, in eval mode, float32; its tensors may be changed, in any way: predict
        then uses them.
    names: its K classes. arch, image_size (pixels), and more in info, a checkpoint.CheckpointInfo.
    source: where its weights are from.
    """

    def __init__(self, module: nn.Module, info: CheckpointInfo, source: str, device: torch.device) -> None:
        self.module, self.info, self.source, self.device = module, info, source, device
        self._predictor: tuple[dict[str, Tensor], Predictor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.info.names

    @property
    def arch(self) -> str:
        return self.info.arch

    @property
    def image_size(self) -> int:
        return self.info.image_size

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.module.parameters())
        size = f", {parameters:,} parameters" if parameters else ""
        size += f", {self.info.plumbing}" if self.info.plumbing else ""
        classes = counted(len(self.names), "class")
        return f"{self.arch} of {self.source}: {classes}, {self.image_size} px{size}, on {self.device}"

    def predict(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        score: float = 0.25,
        iou: float | None = None,
        max_detections: int | None = None,
        image_size: int | None = None,
        batch_size: int = 8,
    ) -> list[Detections]:
        """The detections of each picture, in pixels of the picture, in the order given.

        pictures: one or a list of: a path (a folder or a pattern stands for its pictures); a Pillow image; an array
            (H, W, 3) uint8 RGB; a tensor (3, H, W), uint8 or float in [0, 1], RGB.
        score: detections with a lower one are dropped. iou: non-maximum suppression drops a box with a higher IoU with
            a better one of its class. max_detections: of a picture. None: as the model is evaluated.
        image_size: side of the model's square input in pixels, a multiple of 32. None: as it was trained.
        UserError for a picture that cannot be read, or that is no picture, and for a value out of range. Threads may
        call it at the same time.
        """
        whole = {"max_detections": max_detections, "image_size": image_size, "batch_size": batch_size}
        check_kinds({"score": score, "iou": iou}, whole)
        given = {"score_threshold": score, "iou_threshold": iou, "max_detections": max_detections}
        detection = self.info.evaluation.detection.changed(**given)
        detection.check(score="argument score", iou="argument iou", most="argument max_detections")
        models.check_suppression("argument iou", self.arch, iou)
        size = self.image_size if image_size is None else image_size
        check_image_size("argument image_size", size)
        expect(batch_size is not None and batch_size >= 1, "argument batch_size", batch_size, "at least 1")
        opened = open_pictures(pictures)
        predictor = copy.copy(self._fused())  # threads share the model, and have settings of their own
        predictor.image_size, predictor.detection = size, detection
        found = []
        for start in range(0, len(opened), batch_size):
            batch = [(source, read_pixels(picture, source)) for source, picture in opened[start : start + batch_size]]
            for (source, pixels), detections in zip(batch, predictor([pixels for _, pixels in batch])):
                columns = (detections.boxes_xyxy.clone(), detections.scores.clone(), detections.labels.clone())
                found.append(Detections(*columns, self.names, pixels, source))
        return found

    def _fused(self) -> Predictor:
        """The predictor for the module's current weights: a copy with folded BatchNorms, made anew when they change.

        The weights are compared as numbers: a change through `.data` shows neither in a tensor's address nor version.
        This takes 2 to 3 % of a call with one picture (YOLOv8n and YOLOv8x at 640 px, one thread).
        """
        check_float32(self.module)
        state, held = self.module.state_dict(), self._predictor
        if held is None or not are_equal(held[0], state):
            kept = {name: tensor.clone() for name, tensor in state.items()}
            held = self._predictor = (kept, Predictor(self.module, image_size=self.image_size, device=self.device))
        return held[1]


def are_equal(kept: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same entries."""
    return kept.keys() == state.keys() and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(kept.values(), state.values())
    )


def check_float32(module: nn.Module) -> None:
    """UserError if the parameters are not float32, as load makes them."""
    found = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    expected = "float32, as images are (evaluate has an argument precision)"
    expect(found is None, "module", f"parameters in {str(found).removeprefix('torch.')}", expected)


def check_kinds(numbers: dict[str, Any], whole: dict[str, Any]) -> None:
    """UserError, with its name, for an argument that is not a number, or not a whole one. None means the default."""
    for kind, given, expected in ((Real, numbers, "a number"), (Integral, whole, "a whole number")):
        for name, value in given.items():
            is_met = value is None or (isinstance(value, kind) and not isinstance(value, bool))
            expect(is_met, f"argument {name}", repr(value), expected)


def list_of_texts(what: str, given: Sequence[str]) -> tuple[str, ...]:
    """The argument as a tuple of texts. UserError for a single text, which would be read as a list of letters."""
    is_met = isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(one, str) for one in given)
    expect(is_met, f"argument {what}", repr(given), "a list of texts")
    return tuple(given)


def load(
    source: str | Path, *, arch: str | None = None, classes: Sequence[str] | None = None, device: str = "auto"
) -> Model:
    """See retort.load."""
    chosen = choose_device(device)
    is_name = str(source) in models.ARCHITECTURES and not Path(source).exists()
    classes = None if classes is None else list_of_texts("classes", classes)
    if classes is not None and not is_name:
        raise UserError(f"argument classes: found {len(classes)} with {source}, whose classes are those of its file")
    if is_name:
        return untrained(str(source), classes, chosen)
    if not Path(source).exists() and not Path(source).suffix:
        models.check_arch(str(source))  # names the nearest
    module, info = load_detector(source, arch, device=str(chosen))
    if info.config.get("channels_last"):  # as in its run: other kernels round differently
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's types
    where = torch.device("cpu") if isinstance(module, OnnxDetector) else chosen
    return Model(module, info, str(source), where)


def evaluate(
    model: Model,
    place: tuple[str, str, str],
    *,
    classes: Sequence[str] = (),
    class_map: Sequence[str] = (),
    image_size: int | None = None,
    workers: int = 0,
    **settings: Any,
) -> EvaluationResult:
    """See retort.evaluate. place: format, root, split. settings: those of EvaluationConfig about how, not when."""
    known = [f.name for f in fields(EvaluationConfig) if f.name not in ("every_epochs", "of_start")]
    if unknown := [name for name in settings if name not in known]:
        raise UserError(f"argument {unknown[0]}: expected one of classes, class_map, image_size, {', '.join(known)}")
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in ("protocol", "precision"):
        expected = get_args(get_type_hints(EvaluationConfig)[name])
        if name in settings:
            expect(
                settings[name] in expected, f"argument {name}", repr(settings[name]), f"one of {', '.join(expected)}"
            )
    whole = {name: settings.get(name) for name in ("max_detections", "batch_size")}
    whole |= {"image_size": image_size, "workers": workers}
    check_kinds({name: settings.get(name) for name in ("score_threshold", "iou_threshold")}, whole)
    ignores = settings.get("ignore_difficult", True)
    expect(isinstance(ignores, bool), "argument ignore_difficult", repr(ignores), "True or False")
    check_float32(model.module)
    models.check_suppression("argument iou_threshold", model.arch, settings.get("iou_threshold"))
    evaluation = replace(model.info.evaluation, **settings)
    check_precision(model.module, evaluation.precision)
    size = model.image_size if image_size is None else image_size
    check_image_size("argument image_size", size)
    names = {"score": "score_threshold", "iou": "iou_threshold", "most": "max_detections"}
    evaluation.detection.check(**{key: f"argument {name}" for key, name in names.items()})
    expect(evaluation.batch_size >= 1, "argument batch_size", evaluation.batch_size, "at least 1")
    expect(workers is not None and workers >= 0, "argument workers", workers, "at least 0")
    result, _ = evaluate_on_dataset(
        model.module,
        model.names,
        place,
        classes=list_of_texts("classes", classes),
        own_classes=model.info.classes,
        given=read_class_map(list_of_texts("class_map", class_map)),
        with_difficult=evaluation.counts_difficult,
        image_size=size,
        device=model.device,
        workers=workers,
        batch_size=evaluation.batch_size,
        **evaluation.arguments(),
    )
    return result


def untrained(arch: str, classes: Sequence[str] | None, device: torch.device) -> Model:
    """A fresh model of an architecture, with COCO's 80 classes unless others are given. Warns that it is one."""
    line = f"{arch}: an architecture's name gives untrained weights, which detect nothing"
    warnings.warn(f"{line}{how_to_fetch(arch)}", stacklevel=4)  # the caller of retort.load
    names = COCO if classes is None else tuple(classes)
    module = models.build(arch, len(names)).to(device).eval().requires_grad_(False)
    return Model(module, CheckpointInfo(arch, names, 640, names_from="nothing"), "untrained weights", device)


def open_pictures(pictures: Picture | Sequence[Picture]) -> list[tuple[str, Picture]]:
    """(what to call it, picture) of each; folders and patterns are replaced by their pictures. UserError for none."""
    given: list[Picture] = [pictures] if isinstance(pictures, Picture) else list(pictures)
    opened: list[tuple[str, Picture]] = []
    for number, picture in enumerate(given):
        if isinstance(picture, str | Path):
            opened += [(str(source.path), source.path) for source in find_pictures([str(picture)])]
        else:
            opened.append((f"picture {number}", picture))
    expect(bool(opened), "argument pictures", "an empty list", "at least one picture")
    return opened


def read_pixels(picture: Picture, source: str) -> np.ndarray:
    """A copy of its pixels, upright, (H, W, 3) uint8 RGB. UserError for anything that is not a picture."""
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        with naming(source, Exception):  # decoders raise any exception; Pillow decodes when the pixels are needed
            picture = pillow_pixels(picture)
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or picture.shape[0] != 3:
            raise UserError(f"{source}: found a tensor {tuple(picture.shape)}, expected (3, H, W), RGB")
        if picture.is_floating_point():
            if not (picture.numel() and 0 <= picture.min() and picture.max() <= 1):
                raise UserError(f"{source}: found a float tensor outside 0..1, expected it in [0, 1], or uint8")
            picture = (255 * picture.float()).round().byte()
        picture = picture.permute(1, 2, 0).contiguous().cpu().numpy()
    if not isinstance(picture, np.ndarray):
        expected = "a path, a Pillow image, an array or a tensor"
        raise UserError(f"{source}: found {type(picture).__name__}, expected {expected}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        found = f"{picture.dtype} {picture.shape}"
        raise UserError(f"{source}: found {found}, expected uint8 (H, W, 3), RGB")
    return np.array(picture)  # a caller's buffer may have the next picture by the time this one is drawn
