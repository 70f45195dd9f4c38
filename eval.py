"""Measure a detector: a checkpoint on a dataset, or a file of detections against a file of ground truth.

    python eval.py CHECKPOINT FORMAT ROOT [SPLIT]              FORMAT: voc, coco, yolo, kitti or shapes
    python eval.py CHECKPOINT --config CONFIG [key=value ...]  the dataset and settings of an experiment
    python eval.py MODEL.onnx ...                              the same with a file of export.py
    python eval.py --ground-truth GT --detections DT           no model

Where the model's classes are not the dataset's, those that mean the same are evaluated, and what became of every class
is printed: class_names.py has the rules, --class-map changes them, cross_dataset.py says what happens to the rest.

GT is a COCO JSON file, a folder of Pascal VOC XML files or a folder of text files; DT a COCO results file or a folder
of text files, one per image: metrics.files says how they are read. Printed are the numbers of the protocol, AP at each
IoU threshold, and the table of classes; --json writes all of it.

Protocols: coco (12 numbers; crowd regions absorb detections; objects marked difficult count unless
--ignore-difficult), voc07 (11-point AP) and voc12 (area AP), where difficult objects are neither rewarded nor punished.

Pixels: from files, coordinates are taken as written. VOC counts a box's last pixel in (width = xmax - xmin + 1), so the
VOC protocols do that for VOC XML and for text in pixels; the COCO protocol and COCO files do not. --pixels switches it.
A dataset evaluated with a checkpoint is continuous to begin with (see datasets.index), where both are the same.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from class_names import ClassMap, read_class_map
from config import load_config
from cross_dataset import on_common_classes
from datasets.index import DatasetIndex
from datasets.loader import Batch, Loader
from datasets.open import READERS, open_dataset
from errors import UserError, run_script
from metrics import coco, report, voc
from metrics.coco_files import write_coco_detections
from metrics.files import TEXT_BOXES, read_detections, read_ground_truth, read_names
from metrics.tables import DetectionTable, GroundTruth, ground_truth_from_samples, inclusive_to_continuous
from onnx_detector import load_detector
from processes import choose_device, use_bfloat16
from run_folder import write_text
from structures import Detections

Protocol = Literal["coco", "voc07", "voc12"]
PROTOCOLS = ("coco", "voc07", "voc12")
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
    ignore_difficult: bool = False,
    report_score: float = 0.25,
    seconds: dict[str, float] | None = None,
) -> EvaluationResult:
    """The numbers of a protocol and the detection report, from boxes in continuous coordinates.

    ignore_difficult: for coco, and for the report; the VOC protocols always do.
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
    ignore_difficult: bool = False,
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


def evaluate_files(args: argparse.Namespace) -> EvaluationResult:
    """Ground truth and detections from files; no model."""
    names = read_names(args.names) if args.names else None
    annotations = read_ground_truth(
        args.ground_truth, names=names, text_boxes=args.ground_truth_boxes, images=args.images
    )
    ground_truth, detections = read_detections(
        args.detections, annotations, text_boxes=args.detection_boxes, score_last=args.score_last
    )
    inclusive = args.pixels == "inclusive"
    if args.pixels == "auto":
        inclusive = args.protocol != "coco" and annotations.inclusive_pixels
    if inclusive:
        ground_truth, detections = inclusive_to_continuous(ground_truth), inclusive_to_continuous(detections)
    return measure(
        ground_truth,
        detections,
        protocol=args.protocol,
        iou_thresholds=args.iou_thresholds,
        ignore_difficult=args.ignore_difficult,
        report_score=args.report_score,
    )


def evaluate_checkpoint(args: argparse.Namespace) -> EvaluationResult:
    """A checkpoint on a dataset, named on the command line or by an experiment's config."""
    chosen = {name: getattr(args, name) for name in ("image_size", "batch_size", "device", "precision", "workers")}
    chosen |= {name: getattr(args, name) for name in ("score_threshold", "nms_iou", "max_detections")}
    if args.config:
        config = load_config(args.config, args.dataset)
        dataset = (config.data.format, config.data.root, config.data.test)
        own = config.evaluation
        defaults = {"image_size": config.image_size, "batch_size": own.batch_size, "device": config.device}
        defaults |= {
            "precision": config.precision,
            "workers": config.data.workers,
            "max_detections": own.max_detections,
        }
        defaults |= {"score_threshold": own.score_threshold, "nms_iou": own.iou_threshold}
        protocol = args.protocol or own.protocol
    else:
        if len(args.dataset) not in (2, 3) or args.dataset[0] not in READERS:
            found = " ".join(args.dataset) or "nothing"
            raise UserError(f"after the checkpoint found {found!r}, expected {'|'.join(READERS)} ROOT [SPLIT]")
        dataset = (*args.dataset[:2], args.dataset[2] if len(args.dataset) == 3 else "test")
        defaults = {"image_size": None, "batch_size": 32, "device": "auto", "precision": "float32", "workers": 0}
        defaults |= {"score_threshold": 0.001, "nms_iou": 0.7, "max_detections": 300}
        protocol = args.protocol or "coco"
    settings = {name: defaults[name] if value is None else value for name, value in chosen.items()}
    index = open_dataset(*dataset)
    device = choose_device(settings["device"])
    model, info = load_detector(args.checkpoint, args.arch, device=str(device), precision=settings["precision"])
    model, index, class_map = on_common_classes(model, index, info.names, read_class_map(args.class_map))
    result = evaluate_model(
        model,
        index,
        image_size=settings["image_size"] or info.image_size,
        batch_size=settings["batch_size"],
        device=device,
        precision=settings["precision"],
        score_threshold=settings["score_threshold"],
        iou_threshold=settings["nms_iou"],
        max_detections=settings["max_detections"],
        workers=settings["workers"],
        protocol=protocol,
        ignore_difficult=args.ignore_difficult,
        report_score=args.report_score,
    )
    if index.faults:
        print(f"{len(index.faults)} faults in the labels or pictures, the first: {index.faults[0]}")
    if args.save_detections:
        ids = [sample.image_id for sample in index.samples]
        write_coco_detections(args.save_detections, result.detections, ids, index.category_ids)
    return replace(result, class_map=class_map)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint of ours, a public one with --arch, or a .onnx file")
    parser.add_argument("dataset", nargs="*", help="FORMAT ROOT [SPLIT]; with --config: key=value overrides")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: coco, or the config's")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there, as a whole or not at all")
    parser.add_argument("--ignore-difficult", action="store_true", help="coco: objects marked difficult do not count")
    parser.add_argument("--report-score", type=float, default=0.25, help="score threshold of the confusion matrix")

    model = parser.add_argument_group("with a checkpoint")
    model.add_argument("--config", help="take dataset and settings from an experiment")
    model.add_argument("--arch", help="the model a public checkpoint is of, such as yolov8n")
    model.add_argument("--image-size", type=int, help="pixels; default: what the model was trained at")
    model.add_argument("--batch-size", type=int)
    model.add_argument("--device", help="auto, cpu, cuda, cuda:0")
    model.add_argument("--precision", choices=("auto", "float32", "bfloat16"))
    model.add_argument("--workers", type=int)
    model.add_argument("--score-threshold", type=float, help="detections below are dropped (0.001)")
    model.add_argument("--nms-iou", type=float, help="IoU threshold of non-maximum suppression (0.7)")
    model.add_argument("--max-detections", type=int, help="per image (300)")
    model.add_argument("--class-map", action="append", default=[], metavar="A=B", help="dataset's A is model's B")
    model.add_argument("--save-detections", metavar="FILE", help="write them as COCO results")

    files = parser.add_argument_group("without a model")
    files.add_argument("--ground-truth", metavar="GT")
    files.add_argument("--detections", metavar="DT")
    files.add_argument("--names", metavar="FILE", help="class names: one a line, or the names of a data.yaml")
    files.add_argument("--images", metavar="FOLDER", help="pictures of text ground truth: for sizes, and empty images")
    files.add_argument("--ground-truth-boxes", choices=TEXT_BOXES, default="xywh", help="in text files (%(default)s)")
    files.add_argument("--detection-boxes", choices=TEXT_BOXES, default="xyxy", help="in text files (%(default)s)")
    files.add_argument("--score-last", action="store_true", help="text: `class box score`, not `class score box`")
    files.add_argument("--pixels", choices=("auto", "inclusive", "continuous"), default="auto")
    files.add_argument("--iou-thresholds", type=float, nargs="+", default=tuple(coco.IOU_THRESHOLDS), metavar="IOU")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.ground_truth or args.detections:
        if not (args.ground_truth and args.detections) or args.checkpoint or args.config:
            raise UserError("expected --ground-truth and --detections together, without a checkpoint or config")
        if sorted(set(args.iou_thresholds)) != list(args.iou_thresholds) or not 0 < args.iou_thresholds[0] < 1:
            raise UserError(f"--iou-thresholds: found {list(args.iou_thresholds)}, expected rising numbers in 0..1")
        args.protocol = args.protocol or "coco"
        result = evaluate_files(args)
    elif args.checkpoint:
        result = evaluate_checkpoint(args)
    else:
        raise UserError("found no input, expected a checkpoint and a dataset, or --ground-truth and --detections")
    print(result.text())
    if args.json:
        write_text(Path(args.json), json.dumps(result.to_tree(), indent=2, allow_nan=False) + "\n")
        print(f"written: {args.json}")


if __name__ == "__main__":
    run_script(main)
