"""Measures a detector on a dataset, and detections against ground truth, for train.py and eval.py.

    evaluate_model(model, index, ...)     runs the model over the pictures of an index
    evaluate_loader(model, loader, ...)   the same, in one or many processes
    measure(ground_truth, detections)     computes a protocol's numbers and the detection report, without a model

Both return an EvaluationResult.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from datasets.class_names import ClassMap
from datasets.index import DatasetIndex
from datasets.loader import Batch, Loader
from engine.runtime.processes import use_bfloat16
from errors import NOT_FINITE_EXIT_CODE, UserError
from layers.eval_mode import in_eval_mode
from metrics import coco, report, voc
from metrics.tables import DetectionTable, GroundTruth, ground_truth_from_samples
from structures import Detections, DetectionSettings, Detector

Protocol = Literal["coco", "voc07", "voc12"]


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Everything that was measured. `numbers` and `ap` depend on the protocol, `report` does not.

    ap_result: the CocoResult or VocResult.
    ap50, ap (K,): AP of each class at IoU 0.5 and over the IoU thresholds; -1 for a class without objects.
    seconds: time of "loading", "inference" (with NMS) and "metrics"; the first two are 0 without a model.
    class_map: how the model's classes were mapped to the dataset's; None if they were not.
    mark: why the model's run was no measurement (CheckpointInfo.plumbing), else "".
    """

    protocol: Protocol
    ground_truth: GroundTruth
    detections: DetectionTable
    ap_result: coco.CocoResult | voc.VocResult
    report: report.DetectionReport
    seconds: dict[str, float]
    class_map: ClassMap | None = None
    mark: str = ""

    @property
    def numbers(self) -> dict[str, float]:
        """precision, recall and F1 (class means at the best mean F1), mAP50, mAP50-95, and the protocol's numbers."""
        best = self.report.best
        return {
            "precision": best.mean_precision,
            "recall": best.mean_recall,
            "F1": best.mean_f1,
            "mAP50": coco.mean_of_measured(self.ap50),
            "mAP50-95": coco.mean_of_measured(self.ap),
        } | self.ap_result.numbers

    @property
    def ap50(self) -> np.ndarray:
        if isinstance(self.ap_result, coco.CocoResult):
            return self.ap_result.ap50
        at = np.isclose(self.ap_result.iou_thresholds, 0.5)
        return self.ap_result.ap[at][0] if at.any() else np.full(len(self.ap_result.names), coco.ABSENT)

    @property
    def ap(self) -> np.ndarray:
        return self.ap_result.ap if isinstance(self.ap_result, coco.CocoResult) else self.ap_result.ap.mean(axis=0)

    def table(self) -> str:
        """Columns `Class Images Instances P R mAP50 mAP50-95`; a row for all classes and one for each."""
        thresholds = 100 * self.ap_result.iou_thresholds
        span = f"mAP{thresholds[0]:.0f}" + (f"-{thresholds[-1]:.0f}" if len(thresholds) > 1 else "")
        return report.format_table(self.report, self.ap50, self.ap, columns=("mAP50", span))

    def text(self) -> str:
        """The lines that eval.py prints."""
        best, given = self.report.best, self.report.given
        lines = [self.mark] if self.mark else []
        lines += [] if self.class_map is None else [*self.class_map.lines(), ""]
        if isinstance(self.ap_result, coco.CocoResult):
            lines += [coco.format_numbers(self.ap_result), coco.format_per_iou(self.ap_result)]
        else:
            lines += [voc.format_numbers(self.ap_result)]
        at_best = f"P and R at score {best.score_threshold:.3f}, where the mean F1 is highest ({best.mean_f1:.4f})"
        at_given = f"at score {given.score_threshold:.3f}: P {given.mean_precision:.4f}, R {given.mean_recall:.4f}"
        lines += ["", self.table(), "", f"{at_best}; {at_given}, F1 {given.mean_f1:.4f}"]
        if self.seconds["inference"]:
            per_image = {k: 1000 * v / max(self.ground_truth.num_images, 1) for k, v in self.seconds.items()}
            shown = ", ".join(f"{name} {value:.1f} ms" for name, value in per_image.items())
            lines += [f"Speed: {shown} per image"]
        return "\n".join(lines)

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON: None for nan, -1 for the AP of a class without objects."""
        measured = self.report
        rows: dict[str, dict[str, Any]] = {name: {**own} for name, own in self.ap_result.per_class.items()}
        points = {"best_f1": measured.best, "given": measured.given}
        for k, name in enumerate(measured.names):
            own = {"images": int(measured.images[k]), "instances": int(measured.instances[k])}
            at_best = {p: _nan_to_none(getattr(measured.best, p)[k]) for p in ("precision", "recall", "f1")}
            rows[name] = own | at_best | rows[name]
        return {
            "mark": self.mark or None,
            "protocol": self.protocol,
            "class_map": self.class_map and self.class_map.to_tree(),
            "images": self.ground_truth.num_images,
            "detections": len(self.detections),
            "numbers": {name: _nan_to_none(value) for name, value in self.numbers.items()},
            "AP_at_IoU": {f"{t:.2f}": value for t, value in self.ap_result.ap_per_iou.items()},
            "per_class": rows,
            "at_score": {
                kind: {
                    "score_threshold": point.score_threshold,
                    "precision": _nan_to_none(point.mean_precision),
                    "recall": _nan_to_none(point.mean_recall),
                    "f1": _nan_to_none(point.mean_f1),
                }
                for kind, point in points.items()
            },
            "confusion": {
                "rows": "predicted, then background",
                "columns": "true, then background",
                "names": list(measured.names),
                "score_threshold": measured.given.score_threshold,
                "iou_threshold": measured.iou_threshold,
                "counts": measured.confusion.tolist(),
            },
            "seconds": self.seconds,
        }


def _nan_to_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def measure(
    ground_truth: GroundTruth,
    detections: DetectionTable,
    *,
    protocol: Protocol = "coco",
    iou_thresholds: Sequence[float] = tuple(coco.IOU_THRESHOLDS),
    ignore_difficult: bool = True,
    report_score: float = 0.25,
    seconds: dict[str, float] | None = None,
) -> EvaluationResult:
    """Compute a protocol's numbers and the detection report from boxes in continuous coordinates.

    ignore_difficult: objects marked difficult, which training ignores, count neither as found nor as missed. The VOC
        protocols always ignore them.
    report_score: score threshold of the confusion matrix and of the report's given operating point.
    """
    began = time.perf_counter()
    ap_result: coco.CocoResult | voc.VocResult
    if protocol == "coco":
        ap_result = coco.evaluate(
            ground_truth, detections, iou_thresholds=iou_thresholds, ignore_difficult=ignore_difficult
        )
    else:
        ap_result = voc.evaluate(ground_truth, detections, style=protocol, iou_thresholds=iou_thresholds)
    measured = report.detection_report(
        ground_truth,
        detections,
        score_threshold=report_score,
        ignore_difficult=ignore_difficult or protocol != "coco",
    )
    seconds = {"loading": 0.0, "inference": 0.0} | (seconds or {})
    seconds["metrics"] = time.perf_counter() - began
    return EvaluationResult(protocol, ground_truth, detections, ap_result, measured, seconds)


def evaluate_model(
    model: nn.Module,
    index: DatasetIndex,
    detection: DetectionSettings,
    *,
    image_size: int,
    batch_size: int,
    workers: int = 0,
    **options: Any,
) -> EvaluationResult:
    """evaluate_loader over every picture of an index, in this process alone. options: its other arguments."""
    loader = Loader(index, image_size=image_size, batch_size=batch_size, seed=0, workers=workers, shuffle=False)
    return evaluate_loader(model, loader, detection, **options)


def evaluate_loader(
    model: nn.Module,
    loader: Loader,
    detection: DetectionSettings,
    *,
    device: torch.device | str = "cpu",
    precision: Literal["auto", "float32", "bfloat16"] = "float32",
    protocol: Protocol = "coco",
    ignore_difficult: bool = True,
    report_score: float = 0.25,
) -> EvaluationResult:
    """Run a detector over the pictures of a loader and measure its detections in pixels of the original pictures.

    The model runs in eval mode, without gradients; its mode is restored afterwards. Memory grows with the number of
    detections and with one batch. The COCO numbers use the best 100 detections of each class in an image.

    loader: unshuffled. If it has a part of the pictures (world_size above 1), every process of the torch.distributed
        group calls this at the same time with its part, and each gets the whole result.
    """
    index, device = loader.index, torch.device(device)
    num_classes = getattr(model, "num_classes", len(index.names))
    if num_classes != len(index.names):
        raise UserError(f"the model has {num_classes} classes, the dataset {len(index.names)}: {list(index.names)}")
    with in_eval_mode(model):
        detections, seconds = detect_all(model, loader, detection, device, bfloat16=use_bfloat16(precision, device))
    if loader.world_size > 1:
        parts: list[Any] = [None] * loader.world_size
        torch.distributed.all_gather_object(parts, detections)
        detections = DetectionTable.concatenate(parts)
        # The order that one process gives: the order of the index, every image once.
        detections = detections[np.argsort(detections.image, kind="stable")]
    return measure(
        ground_truth_from_samples(index.samples, index.names),
        detections,
        protocol=protocol,
        ignore_difficult=ignore_difficult,
        report_score=report_score,
        seconds=seconds,
    )


@torch.inference_mode()
def detect_all(
    model: nn.Module, loader: Loader, detection: DetectionSettings, device: torch.device, *, bfloat16: bool = False
) -> tuple[DetectionTable, dict[str, float]]:
    """The detections of a model in eval mode on the loader's pictures, and the seconds of "loading" and "inference"."""
    detector = cast(Detector, model)  # PyTorch types every attribute of a module as Tensor | Module
    tables, seconds = [], {"loading": 0.0, "inference": 0.0}
    began = time.perf_counter()
    for batch in loader.epoch(0):
        seconds["loading"] += time.perf_counter() - began
        began = time.perf_counter()
        images = batch.images.to(device, non_blocking=True).float() / 255  # (B, 3, S, S)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            output = model(images)
        tables.append(to_table(detector.detect(output, **asdict(detection)), batch, loader.index))
        seconds["inference"] += time.perf_counter() - began
        began = time.perf_counter()
    return DetectionTable.concatenate(tables), seconds


def to_table(found: list[Detections], batch: Batch, index: DatasetIndex) -> DetectionTable:
    """The detections of a batch in pixels of the original pictures; column `image` is the row of index.samples."""
    tables = []
    for row, detections in enumerate(found):
        sample = index.samples[int(batch.indices[row])]
        detections = detections.to("cpu")
        boxes = batch.unletterbox(row, detections.boxes_xyxy.double(), sample.width, sample.height)
        scores = detections.scores.double()
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise UserError(f"{sample.image_path}: the model found boxes that are not finite", NOT_FINITE_EXIT_CODE)
        image = np.full(len(detections), int(batch.indices[row]), dtype=np.int64)
        tables.append(DetectionTable(image, boxes.numpy(), scores.numpy(), detections.labels.numpy()))
    return DetectionTable.concatenate(tables)
