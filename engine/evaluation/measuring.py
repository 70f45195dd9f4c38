"""A detector on a dataset, and detections against ground truth: what train.py measures with and eval.py prints.

    evaluate_model(model, index, ...)     runs the model over the pictures of an index, in one process or in many
    measure(ground_truth, detections)     the numbers of a protocol and the detection report, without a model

Both give an EvaluationResult.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from datasets.class_names import ClassMap
from datasets.index import DatasetIndex
from datasets.loader import Batch, Loader
from engine.runtime.processes import use_bfloat16
from errors import UserError
from metrics import coco, report, voc
from metrics.tables import DetectionTable, GroundTruth, ground_truth_from_samples
from structures import Detections

Protocol = Literal["coco", "voc07", "voc12"]
NOT_FINITE_EXIT_CODE = 3


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """All that was measured. `numbers` and `ap` are of the protocol, `report` is the same for all of them.

    ap_result: the CocoResult or VocResult.
    ap50, ap (K,): AP of each class at IoU 0.5 and over the IoU thresholds; -1 for a class without objects.
    seconds: of "loading", "inference" (with NMS) and "metrics"; the first two 0 without a model.
    class_map: where the model's classes had to be brought to the dataset's.
    """

    protocol: Protocol
    ground_truth: GroundTruth
    detections: DetectionTable
    ap_result: coco.CocoResult | voc.VocResult
    report: report.DetectionReport
    seconds: dict[str, float]
    class_map: ClassMap | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """precision, recall, F1 (class means at the best mean F1), mAP50, mAP50-95, and the protocol's numbers."""
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
        """`Class Images Instances P R mAP50 mAP50-95`, an "all" row and one per class."""
        thresholds = 100 * self.ap_result.iou_thresholds
        span = f"mAP{thresholds[0]:.0f}" + (f"-{thresholds[-1]:.0f}" if len(thresholds) > 1 else "")
        return report.format_table(self.report, self.ap50, self.ap, columns=("mAP50", span))

    def text(self) -> str:
        """What eval.py prints."""
        best, given = self.report.best, self.report.given
        lines = [] if self.class_map is None else [*self.class_map.lines(), ""]
        if isinstance(self.ap_result, coco.CocoResult):
            lines += [coco.format_numbers(self.ap_result), coco.format_per_iou(self.ap_result)]
        else:
            lines += [voc.format_numbers(self.ap_result)]
        lines += ["", self.table(), ""]
        lines += [f"P and R at score {best.score_threshold:.3f}, where the mean F1 is highest ({best.mean_f1:.4f});"]
        lines[-1] += f" at score {given.score_threshold:.3f}: P {given.mean_precision:.4f}, R {given.mean_recall:.4f},"
        lines[-1] += f" F1 {given.mean_f1:.4f}"
        if self.seconds["inference"]:
            per_image = {k: 1000 * v / max(self.ground_truth.num_images, 1) for k, v in self.seconds.items()}
            shown = ", ".join(f"{name} {value:.1f} ms" for name, value in per_image.items())
            lines += [f"Speed: {shown} per image"]
        return "\n".join(lines)

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON; None where a number is nan, -1 where AP has nothing to measure."""
        rows, measured = self.ap_result.per_class, self.report
        points = {"best_f1": measured.best, "given": measured.given}
        for k, name in enumerate(measured.names):
            own = {"images": int(measured.images[k]), "instances": int(measured.instances[k])}
            at_best = {p: _plain(getattr(measured.best, p)[k]) for p in ("precision", "recall", "f1")}
            rows[name] = own | at_best | rows[name]
        return {
            "protocol": self.protocol,
            "class_map": self.class_map and self.class_map.to_tree(),
            "images": self.ground_truth.num_images,
            "detections": len(self.detections),
            "numbers": {name: _plain(value) for name, value in self.numbers.items()},
            "AP_at_IoU": {f"{t:.2f}": value for t, value in self.ap_result.ap_per_iou.items()},
            "per_class": rows,
            "at_score": {
                kind: {
                    "score_threshold": point.score_threshold,
                    "precision": _plain(point.mean_precision),
                    "recall": _plain(point.mean_recall),
                    "f1": _plain(point.mean_f1),
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


def _plain(value: float) -> float | None:
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
    """The numbers of a protocol and the detection report, from boxes in continuous coordinates.

    ignore_difficult: objects marked difficult, which training ignores, are neither found nor missed; the VOC protocols
        ignore them always.
    report_score: the score threshold of the confusion matrix and of the report's given operating point.
    """
    began = time.perf_counter()
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
    *,
    image_size: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    precision: Literal["auto", "float32", "bfloat16"] = "float32",
    score_threshold: float = 0.001,
    iou_threshold: float = 0.7,
    max_detections: int = 300,
    workers: int = 0,
    protocol: Protocol = "coco",
    ignore_difficult: bool = True,
    report_score: float = 0.25,
    cache: bool = False,
    loader: Loader | None = None,
    sharded: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Run a detector over every picture of an index and measure what it finds, in pixels of the original pictures.

    The model is put in eval mode, without gradients, and left in the mode it was in. Memory grows with the
    detections and one batch. Of each class in an image the COCO numbers use the best 100 detections.

    Args:
        score_threshold, iou_threshold, max_detections: of model.detect, max_detections for each image.
        loader: unshuffled, over all of `index`, or with `sharded` over this process's part of it; made from image_size,
            batch_size, workers and cache where None.
        sharded: every process of the torch.distributed group calls this at the same time and takes its part of
            the pictures; all of them get the whole result. Otherwise the caller works alone.
        on_batch: called with batches done and batches in all.
    """
    num_classes = getattr(model, "num_classes", len(index.names))
    if num_classes != len(index.names):
        raise UserError(f"the model has {num_classes} classes, the dataset {len(index.names)}: {list(index.names)}")
    rank, world_size = 0, 1
    if sharded and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if loader is None:
        loader = Loader(
            index,
            image_size=image_size,
            batch_size=batch_size,
            seed=0,
            workers=workers,
            shuffle=False,
            cache=cache,
            rank=rank,
            world_size=world_size,
        )
    settings = dict(score_threshold=score_threshold, iou_threshold=iou_threshold, max_detections=max_detections)
    device, was_training = torch.device(device), model.training
    model.eval()
    try:
        bfloat16 = use_bfloat16(precision, device)
        detections, seconds = detect_all(model, index, loader, device, bfloat16, settings, on_batch)
    finally:
        model.train(was_training)
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, detections)
        detections = DetectionTable.concatenate(parts)
        # As one process would have had them: every image once, in the order of the index.
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
    model: nn.Module,
    index: DatasetIndex,
    loader: Loader,
    device: torch.device,
    bfloat16: bool,
    settings: dict[str, Any],
    on_batch: Callable[[int, int], None] | None,
) -> tuple[DetectionTable, dict[str, float]]:
    """What a model in eval mode finds in the loader's pictures, and the seconds of "loading" and "inference".

    settings: keyword arguments of model.detect.
    """
    tables, seconds = [], {"loading": 0.0, "inference": 0.0}
    began = time.perf_counter()
    for number, batch in enumerate(loader.epoch(0), 1):
        seconds["loading"] += time.perf_counter() - began
        began = time.perf_counter()
        images = batch.images.to(device, non_blocking=True).float() / 255  # (B, 3, S, S)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            output = model(images)
        tables.append(to_table(model.detect(output, **settings), batch, index))
        seconds["inference"] += time.perf_counter() - began
        if on_batch is not None:
            on_batch(number, len(loader))
        began = time.perf_counter()
    return DetectionTable.concatenate(tables), seconds


def to_table(found: list[Detections], batch: Batch, index: DatasetIndex) -> DetectionTable:
    """The detections of a batch, in pixels of the original pictures; `image` is the row of index.samples."""
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
