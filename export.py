"""Write a detector as an ONNX file or for another runtime, after checking it against PyTorch on pictures.

    python export.py CHECKPOINT [--dynamic] [--with-nms] [--int8 --calibrate FORMAT ROOT [SPLIT]]
    python export.py CHECKPOINT --format torch|openvino|engine|coreml [--dynamic]

Examples:

    python export.py runs/bccd_yolov8n/weights/last.pt                          one image of the trained size
    python export.py runs/bccd_yolov8n/weights/last.pt --dynamic --with-nms     any batch and size; detections out
    python export.py runs/bccd_yolov8n/weights/last.pt --int8 --calibrate voc data/bccd trainval

The input is `images` (B, 3, H, W), float32 RGB in [0, 1], letterboxed as in datasets/letterbox.py. The outputs are

    boxes_xyxy (B, A, 4) in pixels of `images`, scores (B, A, K)            for every location
    boxes_xyxy (N, 4), scores (N), labels (N), image (N) (row of the batch) with --with-nms: the detections, best first

With --with-nms the inputs score_threshold, iou_threshold and max_detections are optional and have defaults.

--format torch writes torch.export's program (.pt2), openvino OpenVINO's two files (.xml, .bin), both float32 with that
input and the first two outputs. engine and coreml write what TensorRT (.onnx) or Core ML (.pt2) starts from, and print
the command that makes the rest where those run.

The check uses --pictures; else the test split of --calibrate or of the run that the checkpoint belongs to; else drawn
pictures. BatchNorm is folded; adapters and teachers of distillation are not exported. The metadata holds architecture,
class names, image size and commit. eval.py and predict.py take an ONNX file instead of a checkpoint.

--int8 also writes <name>.int8.onnx, with ranges from pictures of --calibrate or, of a student trained with
student.int8, the learnt ones. With --calibrate it prints mAP (on --test-split), time and size of both files. It is for
the YOLOs.

Exit codes: 0 written, 2 a mistake in the arguments or the data, or a graph that differs from PyTorch, 4 weights that
do not fit in memory, 5 a file that could not be written, 130 after Ctrl-C.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import CheckpointInfo
from config import EvaluationConfig, check_image_size, load_config, to_tree
from datasets.images import read_image
from datasets.index import DatasetIndex
from datasets.letterbox import letterbox
from datasets.open import READERS, open_dataset, require_objects
from datasets.overlap import find_overlap
from datasets.shapes import draw_picture
from engine.drawing.predictions import spread
from engine.evaluation.cross_dataset import CommonClasses, on_common_classes
from engine.evaluation.measuring import EvaluationResult, evaluate_model
from engine.onnx_files import graph as onnx_graph
from engine.onnx_files.check import BOX_TOLERANCE, SCORE_TOLERANCE, Difference, check_batches, compare, compare_outputs
from engine.onnx_files.detector import SUFFIX, OnnxDetector, open_session
from engine.onnx_files.graph import GraphInfo
from engine.onnx_files.int8 import calibrate, check_quantizable, trace_int8
from engine.onnx_files.other_formats import LEAST_SIDE, command_for, openvino_files, program_bytes, trace_program
from engine.prediction.sources import find_pictures
from engine.runtime.run_folder import RunFolder, commit, write_bytes
from engine.runtime.timing import rotate, wall_seconds
from errors import ArgumentParser, UserError, counted, expect, require, run_script
from layers.fusion import fuse
from layers.int8 import has_int8, remove_int8
from models import check_suppression
from predict import fraction
from rtdetr.rtdetr import RTDETR
from structures import SIZE_MULTIPLE, DetectionSettings
from weights import file_of_run

if TYPE_CHECKING:
    from onnx import ModelProto

CHECK_PICTURES = 4
FORMATS = {"onnx": SUFFIX, "torch": ".pt2", "openvino": ".xml", "engine": SUFFIX, "coreml": ".pt2"}  # what is written
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NEEDED = {
    "onnx": ONNX_PACKAGES,
    "torch": (),
    "openvino": (*ONNX_PACKAGES[:2], "openvino"),
    "engine": ONNX_PACKAGES,
    "coreml": (),
}
TIMED_ROUNDS = 21
PERCENTILE = 99.99


def check_exportable(model: nn.Module, arch: str) -> None:
    """UserError for a model without a fixed number of locations."""
    if not hasattr(model, "decode"):
        raise UserError(
            f"{arch} cannot be exported: its second stage pools as many regions as its first one finds; "
            "the YOLO families and RT-DETR can"
        )


def choose_images(args: argparse.Namespace, test: DatasetIndex | None, image_size: int) -> tuple[Tensor, str]:
    """The images to check the graph on, as in load_images, and what they are.

    They come from --pictures, else from `test` (the split that int8 is measured on), else from the test split of the
    checkpoint's run. Without a dataset they are drawn.
    """
    if args.pictures:
        paths, source = [picture.path for picture in find_pictures(args.pictures)[:CHECK_PICTURES]], "of --pictures"
    elif (index := find_test_split(args.checkpoint.resolve().parent) if test is None else test) is not None:
        paths, source = [sample.image_path for sample in spread(index, CHECK_PICTURES).samples], "of the test split"
    else:
        paths, source = [], "drawn for the check"
    images = load_images(paths, image_size) if paths else draw_images(image_size)
    return images, f"{counted(len(images), 'picture')} {source} at {image_size} px"


def find_test_split(weights: Path) -> DatasetIndex | None:
    """The test split of the run with this weights folder; None if it belongs to no run or the dataset is missing."""
    if weights.name != "weights":
        return None
    try:
        data = load_config(RunFolder(weights.parent).config).data
        return open_dataset(*data.test_place, classes=data.classes, needs_objects=False)
    except UserError:
        return None


def load_images(paths: Iterable[Path], image_size: int) -> Tensor:
    """Letterboxed pictures as (n, 3, S, S) float32 in [0, 1]."""
    return to_images([read_image(path) for path in paths], image_size)


def draw_images(image_size: int) -> Tensor:
    """CHECK_PICTURES generated pictures, in the format of load_images."""
    return to_images([draw_picture(0, "test", k, image_size)[0] for k in range(CHECK_PICTURES)], image_size)


def to_images(pictures: Sequence[np.ndarray], image_size: int) -> Tensor:
    squares = np.stack([letterbox(picture, image_size)[0] for picture in pictures])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).float().contiguous() / 255


def print_comparison(
    graphs: dict[str, "ModelProto"],
    infos: dict[str, GraphInfo],
    index: DatasetIndex,
    to_shared: Callable[[nn.Module], nn.Module],
    image: Tensor,
    evaluation: EvaluationConfig,
) -> dict[str, EvaluationResult]:
    """Print a row for each precision: mAP on a dataset, milliseconds per picture, megabytes.

    index, to_shared: of open_splits.
    """
    data = {name: graph.SerializeToString() for name, graph in graphs.items()}
    detectors = {name: OnnxDetector(open_session(data[name]), infos[name], name) for name in graphs}
    size = infos["float32"].image_size
    results = {
        name: evaluate_model(
            to_shared(detector), index, image_size=size, batch_size=evaluation.batch_size, **evaluation.arguments()
        )
        for name, detector in detectors.items()
    }
    timed = asdict(replace(evaluation.detection, score_threshold=0.25))

    def run(detector: OnnxDetector) -> Callable[[], object]:
        return lambda: detector.detect(detector(image), **timed)

    seconds = rotate({name: run(detector) for name, detector in detectors.items()}, TIMED_ROUNDS, wall_seconds)
    print(f"{counted(len(index), 'picture')}, {size} px, {counted(torch.get_num_threads(), 'thread')}")
    print(f"{'':<10}{'mAP50':>8}{'mAP50-95':>10}{'ms':>8}{'MB':>8}")
    for name, result in results.items():
        precisions = f"{result.numbers['mAP50']:8.4f}{result.numbers['mAP50-95']:10.4f}"
        print(f"{name:<10}{precisions}{1000 * statistics.median(seconds[name]):8.1f}{len(data[name]) / 1e6:8.1f}")
    return results


def check_difference(args: argparse.Namespace, difference: Difference, what: str, on: str) -> None:
    """Print how far something is from PyTorch. UserError if that is too far."""
    measured = f"boxes by at most {difference.boxes:.2g} px, scores by {difference.scores:.2g}"
    if not difference.is_small():
        raise UserError(
            f"{args.output}: differs from PyTorch in {measured}, expected at most {BOX_TOLERANCE} px and "
            f"{SCORE_TOLERANCE}; nothing was written"
        )
    print(f"{on}: {what} and PyTorch differ in {measured}")


@torch.no_grad()
def write_other_format(args: argparse.Namespace, model: nn.Module, info: GraphInfo, images: Tensor, on: str) -> None:
    """Check and write what --format torch, openvino and coreml ask for."""
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    if args.format == "openvino":
        what = "OpenVINO"
        files, run = openvino_files(onnx_graph.trace(model, info.image_size, dynamic=args.dynamic))
    else:
        what = "torch.export"
        program = trace_program(model, info.image_size, dynamic=args.dynamic)
        files, run = {args.output.suffix: program_bytes(program, info)}, program.module()
    least = SIZE_MULTIPLE if args.format == "openvino" else LEAST_SIDE
    batches = check_batches(images, args.dynamic, least)
    check_difference(args, compare_outputs(model, run, batches, suppresses=info.suppresses), what, on)
    for suffix, data in files.items():
        write_bytes(args.output.with_suffix(suffix), data)
        print(f"written: {args.output.with_suffix(suffix)} ({info.arch}, {counted(len(info.names), 'class')}, float32)")


def write_onnx(
    args: argparse.Namespace,
    model: nn.Module,
    rounding: nn.Module | None,
    info: GraphInfo,
    detection: DetectionSettings,
    images: Tensor,
    on: str,
) -> tuple[dict[str, "ModelProto"], dict[str, GraphInfo]]:
    """Check and write the graph of a model, and that of `rounding`, which computes it in int8; also returns both."""
    graphs = {"float32": onnx_graph.trace(model, info.image_size, dynamic=args.dynamic)}
    if rounding is not None:
        graphs["int8"] = trace_int8(rounding, info.image_size, dynamic=args.dynamic)
    infos, files = {}, {"float32": args.output, "int8": args.output.with_suffix(f".int8{SUFFIX}")}
    for name in graphs:
        if args.with_nms:
            graphs[name] = onnx_graph.append_selection(graphs[name], detection)
        infos[name] = replace(info, precision=name)
        onnx_graph.write_info(graphs[name], infos[name])
    batches = check_batches(images, args.dynamic)
    check_difference(args, compare(model, graphs["float32"], batches, suppresses=info.suppresses), "ONNX", on)
    for name, graph in graphs.items():
        write_bytes(files[name], graph.SerializeToString())
        print(f"written: {files[name]} ({info.arch}, {counted(len(info.names), 'class')}, {name})")
    return graphs, infos


def open_splits(
    args: argparse.Namespace, info: CheckpointInfo
) -> tuple[DatasetIndex, DatasetIndex, Callable[[nn.Module], nn.Module]]:
    """The splits to calibrate on and to measure on, with the classes that they share with the model, as in eval.py.

    Also returns what makes of a detector one that answers with these alone. UserError where there are none.
    """
    if len(args.calibrate) not in (2, 3) or args.calibrate[0] not in READERS:
        raise UserError(f"--calibrate: found {' '.join(args.calibrate)!r}, expected {'|'.join(READERS)} ROOT [SPLIT]")
    data_format, root, split = args.calibrate if len(args.calibrate) == 3 else (*args.calibrate, "train")
    calibration = open_dataset(data_format, root, split, classes=info.classes, needs_objects=False)
    test = open_dataset(data_format, root, args.test_split, classes=info.classes)
    overlap = find_overlap(test, calibration, (args.test_split, split))
    if overlap.shared:
        print(overlap)
    _, shared, class_map = on_common_classes(nn.Identity(), test, info.names)
    counts_difficult = info.evaluation.counts_difficult
    require_objects(shared, f"{data_format} {root} {args.test_split}", root, with_difficult=counts_difficult)
    if class_map is None or class_map.is_identity:
        is_met = len(info.names) == len(test.names)
        expect(is_met, f"{args.checkpoint}", f"{counted(len(info.names), 'class')} without names", f"{len(test.names)}")
        return calibration, shared, lambda detector: detector
    print("\n".join(class_map.lines()))
    return calibration, shared, partial(CommonClasses, class_map=class_map)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser("export.py", __doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, a released file or a run")
    parser.add_argument("--arch", help="architecture of a released file that leaves it open")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="the runtime to write for (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the checkpoint's name with a new suffix")
    parser.add_argument("--image-size", type=int, help="side in pixels, a multiple of 32 (as trained)")
    parser.add_argument(
        "--dynamic", action="store_true", help="accept any batch, height and width (default: one square image)"
    )
    parser.add_argument("--with-nms", action="store_true", help="end in detections (default: boxes and scores)")
    parser.add_argument(
        "--score-threshold", type=fraction, default=0.25, help="default in the file, with --with-nms (%(default)s)"
    )
    parser.add_argument("--nms-iou", type=fraction, help="default in the file, with --with-nms (as evaluated)")
    parser.add_argument("--max-detections", type=int, help="default in the file, with --with-nms (as evaluated)")
    parser.add_argument(
        "--pictures", nargs="+", default=[], metavar="SOURCE", help="check on these pictures (default: as above)"
    )
    parser.add_argument("--int8", action="store_true", help="also write <name>.int8.onnx")
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="PART",
        help="dataset to calibrate on: " + "|".join(READERS) + " ROOT [SPLIT], SPLIT defaults to train",
    )
    parser.add_argument(
        "--calibration-pictures",
        type=int,
        default=100,
        help="number of pictures to calibrate on, at most (%(default)s)",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help=f"an activation's range ends at its percentiles 100 - P and P; 100: min-max (default: {PERCENTILE})",
    )
    parser.add_argument("--test-split", default="test", help="split to measure float32 and int8 on (%(default)s)")
    args = parser.parse_args(argv)
    args.checkpoint = file_of_run(args.checkpoint)
    suffix = FORMATS[args.format]
    is_met = bool(args.checkpoint.name)  # of . and / nothing with another suffix can be made
    expect(is_met, str(args.checkpoint), "no run", "a weights file or the folder of a run, such as runs/NAME")
    args.output = args.output or args.checkpoint.with_suffix(suffix)
    expect(args.output.suffix.lower() == suffix, "argument --output", args.output, f"a name ending in {suffix}")
    if args.format != "onnx" and (args.int8 or args.with_nms):
        raise UserError(
            f"argument --format {args.format}: has no --int8 and no --with-nms, expected them with onnx alone"
        )
    size, percentile = args.image_size, args.percentile
    if size is not None:
        check_image_size("argument --image-size", size)
    for name in ("max_detections", "calibration_pictures"):
        value = getattr(args, name)
        expect(value is None or value >= 1, f"argument --{name.replace('_', '-')}", value, "at least 1")
    is_met = percentile is None or 50 < percentile <= 100
    expect(is_met, "argument --percentile", percentile, "above 50 and at most 100")
    needs = {"calibrate": "int8", "percentile": "int8", "calibration_pictures": "calibrate", "test_split": "calibrate"}
    needs |= dict.fromkeys(("score_threshold", "nms_iou", "max_detections"), "with_nms")
    for name, other in needs.items():
        is_met = getattr(args, other) or getattr(args, name) == parser.get_default(name)
        what, beside = (f"--{flag.replace('_', '-')}" for flag in (name, other))
        expect(is_met, f"argument {what}", "it alone", f"{beside} beside it")
    return args


def check_int8(args: argparse.Namespace, model: nn.Module, arch: str) -> None:
    """UserError for a model that --int8 is not for, and for options that do not fit to how it got its ranges."""
    check_quantizable(model, arch)
    learnt = has_int8(model)
    if not learnt and not args.calibrate:
        raise UserError(f"--int8: {args.checkpoint} was not trained for int8, expected --calibrate beside it")
    if learnt and args.percentile is not None:
        raise UserError(f"--percentile: {args.checkpoint} was trained for int8 and has its ranges, expected none")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    for module in NEEDED[args.format]:
        require(module, "openvino" if module == "openvino" else "export", f"export.py --format {args.format}")
    if not args.output.parent.is_dir():
        raise UserError(f"{args.output}: no such folder: {args.output.parent}")
    model, info = checkpoint.load_model(args.checkpoint, args.arch)
    if info.plumbing:
        print(info.plumbing)
    check_exportable(model, info.arch)
    if args.int8:
        check_int8(args, model, info.arch)
    splits = open_splits(args, info) if args.calibrate else None
    check_suppression("argument --nms-iou", info.arch, args.nms_iou)
    size, suppresses = args.image_size or info.image_size, not isinstance(model, RTDETR)
    images, on = choose_images(args, splits[1] if splits else None, size)
    model = fuse(model)
    rounding = copy.deepcopy(model) if args.int8 and has_int8(model) else None  # the model as int8 computes it
    remove_int8(model)
    evaluation = replace(info.evaluation, precision="float32")  # the file has a precision of its own
    described = GraphInfo(
        arch=info.arch,
        names=info.names,
        image_size=size,
        suppresses=suppresses,
        precision="float32",
        source=info.source,
        commit=commit(),
        evaluation=to_tree(evaluation) if info.config else {},
        random_teachers=info.random_teachers,
        classes=info.classes,
    )
    if FORMATS[args.format] != SUFFIX:
        write_other_format(args, model, described, images, on)
    else:
        if splits and rounding is None:
            chosen = spread(splits[0], args.calibration_pictures).samples
            pictures = (load_images([sample.image_path], size) for sample in chosen)
            rounding = calibrate(model, pictures, PERCENTILE if args.percentile is None else args.percentile)
        iou = args.nms_iou if suppresses else 1.0  # 1 suppresses nothing
        given = {"score_threshold": args.score_threshold, "max_detections": args.max_detections}
        detection = evaluation.detection.changed(iou_threshold=iou, **given)
        graphs, infos = write_onnx(args, model, rounding, described, detection, images, on)
        if splits:
            print_comparison(graphs, infos, *splits[1:], images[:1], evaluation)
    for runtime, where in (("engine", "TensorRT runs"), ("coreml", "Core ML runs")):
        if args.format == runtime:
            print(f"where {where}: {command_for(runtime, args.output, size, dynamic=args.dynamic)}")


if __name__ == "__main__":
    run_script(main)
