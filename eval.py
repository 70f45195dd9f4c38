"""Measure a detector: a checkpoint on a dataset, or a file of detections against a file of ground truth.

    python eval.py CHECKPOINT FORMAT ROOT [SPLIT]              on a dataset; SPLIT defaults to test
    python eval.py CHECKPOINT --config CONFIG [key=value ...]  on the dataset of a training config, with its settings
    python eval.py MODEL.onnx ...                              the same for a file that export.py wrote
    python eval.py --ground-truth GT --detections DT           without a model

Examples:

    python eval.py runs/bccd_yolov8n/weights/last.pt voc data/bccd test --json bccd.json
    python eval.py --ground-truth instances.json --detections predictions.json --protocol coco

It prints the protocol's numbers, AP at each IoU threshold and a table of the classes; --json writes all of it.

Protocols: coco (12 numbers; crowd regions absorb detections), voc07 (11-point AP), voc12 (area AP). Objects marked
difficult count neither for nor against a detector, as in training; with coco, --no-ignore-difficult counts them.

Settings: a checkpoint of ours is measured as in its run: the file holds protocol, thresholds, image size and precision.
A released checkpoint is measured as its family was published. Flags override settings, and those used are printed.

Classes: if the model's classes differ from the dataset's, the classes with the same meaning are evaluated, and what
became of every class is printed. datasets/class_names.py has the rules, and --class-map changes them.
engine/evaluation/cross_dataset.py describes what happens to the other classes.

Files: GT is a COCO JSON file, a folder of Pascal VOC XML files or a folder of text files. DT is a COCO results file or
a folder of text files, one per image. metrics/files.py describes how they are read. predict.py writes both kinds;
its text files need --detection-boxes cxcywhn --score-last.
--names FILE names the classes of files, and of a model whose own file has no names.

Pixels: in Pascal VOC files a box includes its last pixel (width = xmax - xmin + 1); COCO JSON and fractions have
continuous coordinates. The coco protocol uses coordinates from files as they are. The VOC protocols count the last
pixel of VOC XML and of text in pixels; when VOC XML is compared with detections in continuous coordinates, the XML is
converted as in training. --pixels sets one convention for both sides. A checkpoint on a dataset always uses continuous
coordinates (see datasets/index.py), for which both conventions agree.

Exit codes: 0 measured, 2 a mistake in the arguments or the data, 3 boxes that are not finite, 4 weights that do not fit
in memory, 5 a file that could not be written, 130 after Ctrl-C.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from config import EvaluationConfig, check_image_size, load_config
from datasets.class_names import alike, are_numbers, read_class_map
from datasets.open import READERS
from engine.command_line.translation import options_of, refuse_unknown
from engine.evaluation.cross_dataset import evaluate_on_dataset
from engine.evaluation.measuring import EvaluationResult, Protocol, measure
from engine.onnx_files.detector import check_precision, load_detector
from engine.runtime.processes import choose_device, use_bfloat16
from engine.runtime.run_folder import write_text
from errors import DISK_EXIT_CODE, ArgumentParser, UserError, expect, run_script, shortened
from metrics import coco
from metrics.annotations import Annotations, edge_note
from metrics.coco_files import write_coco_detections
from metrics.files import read_detections, read_ground_truth, read_names
from metrics.tables import inclusive_to_continuous
from metrics.text_files import TEXT_BOXES
from models import check_suppression, published_detection

PROTOCOLS = get_args(Protocol)


def evaluate_files(args: argparse.Namespace) -> EvaluationResult:
    """Measure detections in files against ground truth in files, without a model."""
    names = read_names(args.names) if args.names else None
    annotations = read_ground_truth(
        args.ground_truth, names=names, text_boxes=args.ground_truth_boxes, images=args.images
    )
    of_detections: list[str] = []
    ground_truth, detections = read_detections(
        args.detections,
        annotations,
        text_boxes=args.detection_boxes,
        score_last=args.score_last,
        notes=of_detections,
    )
    truth_is_inclusive, found_is_inclusive = are_inclusive(args, annotations)
    if truth_is_inclusive:
        ground_truth = inclusive_to_continuous(ground_truth)
    if found_is_inclusive:
        detections = inclusive_to_continuous(detections)
    for note in (*annotations.notes, *edge_note(annotations.ground_truth, annotations.sizes)):
        print(f"{args.ground_truth}: {note}")
    for note in (*of_detections, *alike(ground_truth.names)):
        print(f"{args.detections}: {note}")
    assert ground_truth.crowd is not None and ground_truth.difficult is not None  # GroundTruth fills them in
    ignores_difficult = args.ignore_difficult is not False or args.protocol != "coco"
    never_counts = ground_truth.crowd | (ground_truth.difficult & ignores_difficult)
    if never_counts.all():
        found = f"no object that counts among {len(ground_truth)} in {ground_truth.num_images} images"
        raise UserError(f"{args.ground_truth}: {found}, expected at least one to measure by")
    return measure(
        ground_truth,
        detections,
        protocol=args.protocol,
        iou_thresholds=args.iou_thresholds,
        ignore_difficult=args.ignore_difficult is not False,
        report_score=args.report_score,
    )


def are_inclusive(args: argparse.Namespace, annotations: Annotations) -> tuple[bool, bool]:
    """Whether boxes of ground truth, and of detections, include their last pixel; see Pixels above."""
    if args.pixels != "auto":
        return args.pixels == "inclusive", args.pixels == "inclusive"
    found_in_pixels = Path(args.detections).is_dir() and args.detection_boxes != "cxcywhn"
    if annotations.pixels == "inclusive" and not found_in_pixels:
        return True, False
    by_protocol = args.protocol != "coco" and annotations.pixels != "continuous"
    return by_protocol, by_protocol


def evaluate_checkpoint(args: argparse.Namespace) -> EvaluationResult:
    """Measure a checkpoint on a dataset given on the command line or by a training config.

    Each setting comes from its flag, else the config, else the checkpoint, else what its family was published with.
    """
    config = load_config(args.config, args.dataset) if args.config else None
    place = place_in_arguments(args.dataset) if config is None else config.data.test_place
    device = choose_device(args.device or ("auto" if config is None else config.device))
    model, info = load_detector(args.checkpoint, args.arch, device=str(device))
    if info.config.get("channels_last"):
        # As in its run: other kernels round differently.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's types
    check_suppression("--nms-iou", info.arch, args.nms_iou)
    evaluation, image_size, workers = info.evaluation, info.image_size, 0
    classes: tuple[str, ...] = ()
    if config is not None:
        check_suppression("key 'evaluation.iou_threshold'", info.arch, config.evaluation.iou_threshold)
        evaluation = config.evaluation.completed(published_detection(info.arch))
        image_size, workers, classes = config.image_size, config.data.workers, config.data.classes
    evaluation = replace(evaluation, **given_settings(args))
    check_precision(model, evaluation.precision)
    image_size = image_size if args.image_size is None else args.image_size
    workers = workers if args.workers is None else args.workers
    check_settings(evaluation, image_size, workers)
    print(describe_settings(evaluation, image_size, device), flush=True)
    result, index = evaluate_on_dataset(
        model,
        name_classes(info.names, args.names) if args.names else info.names,
        place,
        classes=tuple(args.classes.split(",")) if args.classes else classes,
        own_classes=info.classes if config is None else (),
        given=read_class_map(args.class_map),
        with_difficult=evaluation.counts_difficult,
        image_size=image_size,
        device=device,
        workers=workers,
        report_score=args.report_score,
        batch_size=evaluation.batch_size,
        **evaluation.arguments(),
    )
    if args.save_detections:
        ids = [sample.image_id for sample in index.samples]
        pictures = [str(sample.image_path) for sample in index.samples]
        columns = {"file_names": pictures, "names": index.names}
        write_coco_detections(args.save_detections, result.detections, ids, index.category_ids, **columns)
    return replace(result, mark=info.plumbing)


def place_in_arguments(dataset: list[str]) -> tuple[str, str, str]:
    """Format, root and split of FORMAT ROOT [SPLIT]."""
    if len(dataset) not in (2, 3) or dataset[0] not in READERS:
        found = " ".join(dataset) or "nothing"
        raise UserError(f"after the checkpoint found {found!r}, expected {'|'.join(READERS)} ROOT [SPLIT]")
    return dataset[0], dataset[1], dataset[2] if len(dataset) == 3 else "test"


def name_classes(own: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The names in the file of --names, used instead of the model's own; prints a line if the model had others."""
    names = read_names(path)
    expect(len(names) == len(own), path, f"{len(names)} names", f"one for each of the model's {len(own)} classes")
    if own != names and not are_numbers(own):
        print(f"{path}: names the model's classes {shortened(names)}; its file names them {shortened(own)}")
    return names


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of EvaluationConfig that a flag sets."""
    given = {
        name: getattr(args, name) for name in ("protocol", "ignore_difficult", "score_threshold", "max_detections")
    }
    given |= {"iou_threshold": args.nms_iou, "batch_size": args.batch_size, "precision": args.precision}
    return {name: value for name, value in given.items() if value is not None}


def check_settings(evaluation: EvaluationConfig, image_size: int, workers: int) -> None:
    """UserError, naming the flag, for a setting out of range."""
    evaluation.detection.check(score="--score-threshold", iou="--nms-iou", most="--max-detections")
    expect(evaluation.batch_size >= 1, "--batch-size", evaluation.batch_size, "at least 1")
    expect(workers >= 0, "--workers", workers, "at least 0")
    check_image_size("--image-size", image_size)


def describe_settings(evaluation: EvaluationConfig, image_size: int, device: torch.device) -> str:
    difficult = "counted" if evaluation.counts_difficult else "ignored"
    precision = "bfloat16" if use_bfloat16(evaluation.precision, device) else "float32"
    return (
        f"protocol {evaluation.protocol}, difficult objects {difficult}, {image_size} px, {precision}, scores from "
        f"{evaluation.score_threshold:g}, NMS IoU {evaluation.iou_threshold:g}, at most {evaluation.max_detections} "
        f"detections an image"
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The parsed arguments. UserError for a flag that the requested kind of evaluation does not use."""
    parser = ArgumentParser("eval.py", __doc__)
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint, a released file, a run, or a .onnx file")
    parser.add_argument(
        "dataset",
        nargs="*",
        help=f"FORMAT ROOT [SPLIT], FORMAT one of {', '.join(READERS)}; with --config: key=value overrides",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: from the config or the checkpoint, else coco")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument(
        "--ignore-difficult",
        action=argparse.BooleanOptionalAction,
        help="coco: do not count objects marked difficult (default: as in the checkpoint's run, else yes)",
    )
    parser.add_argument(
        "--report-score", type=float, default=0.25, help="score threshold of the confusion matrix (%(default)s)"
    )
    only_model, only_files = add_model_flags(parser), add_file_flags(parser)
    if "--ground-truth" not in argv:
        refuse_unknown("eval.py", argv, options_of(parser))
    args = parser.parse_intermixed_args(argv)
    is_files = bool(args.ground_truth or args.detections)
    for action in only_model if is_files else only_files:
        if getattr(args, action.dest) != action.default:
            beside = "--ground-truth and --detections" if is_files else "a checkpoint"
            raise UserError(f"{action.option_strings[0]}: has no meaning with {beside}, expected it left out")
    expect(0 <= args.report_score <= 1, "--report-score", f"{args.report_score:g}", "a number in 0..1")
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the flags of an evaluation with a model. Returns those without a meaning for files."""
    model = parser.add_argument_group(
        "with a checkpoint", "Defaults: from --config, else from the checkpoint, else as its family was published."
    )
    model.add_argument("--config", metavar="FILE", help="take dataset and settings from this training config")
    model.add_argument("--names", metavar="FILE", help="class names: one per line, or the names of a data.yaml")
    model.add_argument("--device", help="auto, cpu, cuda or cuda:0 (the config's, else auto)")
    model.add_argument("--batch-size", type=int, help="images per forward pass")
    model.add_argument("--workers", type=int, help="processes that load pictures (the config's, else 0)")
    return [
        model.add_argument("--arch", help="architecture of a released file that leaves it open"),
        model.add_argument("--image-size", type=int, help="side in pixels, a multiple of 32 (as trained)"),
        model.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="of the model"),
        model.add_argument("--score-threshold", type=float, help="drop detections with a lower score"),
        model.add_argument("--nms-iou", type=float, help="IoU threshold of non-maximum suppression"),
        model.add_argument("--max-detections", type=int, help="at most, in an image"),
        model.add_argument("--classes", metavar="A,B", help="measure only these classes of the dataset"),
        model.add_argument(
            "--class-map", action="append", default=[], metavar="A=B", help="the dataset's class A is the model's B"
        ),
        model.add_argument("--save-detections", metavar="FILE", help="write the detections as COCO results"),
    ]


def add_file_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the flags of an evaluation without a model. Returns those without a meaning for a model."""
    files = parser.add_argument_group("without a model")
    files.add_argument("--ground-truth", metavar="GT", help="COCO JSON, a folder of VOC XML, or a folder of text files")
    files.add_argument("--detections", metavar="DT", help="COCO results, or a folder of text files")
    return [
        files.add_argument(
            "--images", metavar="FOLDER", help="pictures of text ground truth: their sizes, and those without objects"
        ),
        files.add_argument("--ground-truth-boxes", choices=TEXT_BOXES, help="box format of text files (xywh)"),
        files.add_argument("--detection-boxes", choices=TEXT_BOXES, help="box format of text files (xyxy)"),
        files.add_argument(
            "--score-last", action="store_true", help="text lines are `class box score`, not `class score box`"
        ),
        files.add_argument(
            "--pixels",
            choices=("auto", "inclusive", "continuous"),
            default="auto",
            help="whether a box includes its last pixel (%(default)s: see Pixels above)",
        ),
        files.add_argument(
            "--iou-thresholds",
            type=float,
            nargs="+",
            default=tuple(coco.IOU_THRESHOLDS),
            metavar="IOU",
            help="default: 0.5 to 0.95 in steps of 0.05",
        ),
    ]


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    for file in filter(None, (args.json, args.save_detections)):
        if not Path(file).parent.is_dir():
            raise UserError(f"{file}: could not be written: no such folder", DISK_EXIT_CODE)
    if args.json and args.save_detections and Path(args.json).resolve() == Path(args.save_detections).resolve():
        raise UserError(f"--json: found {args.json}, which --save-detections names too, expected another file")
    if args.ground_truth or args.detections:
        if not (args.ground_truth and args.detections) or args.checkpoint or args.config:
            raise UserError("expected --ground-truth and --detections together, without a checkpoint or config")
        thresholds = list(args.iou_thresholds)
        is_met = sorted(set(thresholds)) == thresholds and 0 < thresholds[0] <= thresholds[-1] <= 1
        expect(is_met, "--iou-thresholds", thresholds, "rising numbers in 0..1")
        args.protocol = args.protocol or "coco"
        result = evaluate_files(args)
    elif args.checkpoint:
        result = evaluate_checkpoint(args)
    else:
        raise UserError("found no input, expected a checkpoint and a dataset, or --ground-truth and --detections")
    print(result.text())
    if args.save_detections:
        print(f"written: {args.save_detections}")
    if args.json:
        write_text(Path(args.json), json.dumps(result.to_tree(), indent=2, allow_nan=False) + "\n")
        print(f"written: {args.json}")


if __name__ == "__main__":
    run_script(main)
