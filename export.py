"""Write a detector as an ONNX file, checked against PyTorch on pictures before it is written.

    python export.py runs/bccd/weights/best.pt                                  one picture of the trained size
    python export.py runs/bccd/weights/best.pt --dynamic --with-nms             any batch and size, detections out
    python export.py runs/bccd/weights/best.pt --int8 --calibrate voc data/bccd trainval

The file takes `images` (B, 3, H, W), float32 RGB in [0, 1], letterboxed as datasets.letterbox does it, and gives

    boxes_xyxy (B, A, 4) in pixels of `images` and scores (B, A, K), every location, or with --with-nms
    boxes_xyxy (N, 4), scores (N), labels (N) and image (N), the row of the batch: the detections, best first. The
        inputs score_threshold, iou_threshold and max_detections may be left out: they have defaults.

It is checked on --pictures; without them on pictures of a test split, that of --calibrate or of the run in whose folder
the checkpoint is; where that is not there, on drawn ones. BatchNorm is folded away; adapters and teachers of
distillation are not in the file. Its metadata holds architecture, class names, picture size and commit. eval.py and
predict.py take it in place of a checkpoint.

--int8 writes a second file, <name>.int8.onnx, quantized over pictures of --calibrate, and prints the mAP of both files
on another split of that dataset and their time for a picture.
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import CheckpointInfo
from config import EvaluationConfig, load_config, to_tree
from datasets.images import read_image
from datasets.index import DatasetIndex
from datasets.letterbox import letterbox
from datasets.open import READERS, open_dataset
from datasets.shapes import draw_picture
from engine.drawing.plots import spread
from engine.evaluation.measuring import EvaluationResult, evaluate_model
from engine.onnx_files import graph as onnx_graph
from engine.onnx_files.detector import SUFFIX, OnnxDetector, open_session
from engine.onnx_files.graph import DETECTIONS, PREDICTIONS, SIZE_MULTIPLE, GraphInfo, float32_at_most
from engine.onnx_files.int8 import quantize
from engine.prediction.sources import find_pictures
from engine.runtime.run_folder import RunFolder, commit, write_bytes
from engine.runtime.timing import rotate, wall_seconds
from errors import UserError, require, run_script
from kernels.nms import select_detections
from layers.fusion import fuse
from predict import plural
from teachers.rtdetr import RTDETR

if TYPE_CHECKING:
    from onnx import ModelProto

# Rounding in a badly conditioned network stays below these; the graph of another network does not.
BOX_TOLERANCE = 0.05  # pixels
SCORE_TOLERANCE = 1e-3
CHECK_PICTURES = 4
CHECK_CANDIDATES = 1000  # pairs of a picture that the check of the selection looks at
TIMED_ROUNDS = 21


@dataclass(frozen=True)
class Difference:
    """The largest difference of a graph from the PyTorch model, of any location: boxes in pixels, and scores."""

    boxes: float
    scores: float

    def is_small(self) -> bool:
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE  # False for nan


def check_exportable(model: nn.Module, arch: str) -> None:
    if not hasattr(model, "decode"):
        raise UserError(
            f"{arch} cannot be exported: its second stage pools as many regions as its first one finds; "
            "the YOLO families and RT-DETR can"
        )


def choose_pictures(args: argparse.Namespace, test: DatasetIndex | None) -> tuple[list[Path], str]:
    """What the graph is checked on, and whose pictures these are: of --pictures, else of `test`, the split that int8 is
    measured on, else of the test split of the run that the checkpoint lies in; no paths where no dataset is there.
    """
    if args.pictures:
        return [picture.path for picture in find_pictures(args.pictures)[:CHECK_PICTURES]], "of --pictures"
    if test is None:
        test = find_test_split(args.checkpoint.resolve().parent)
    if test is None:
        return [], "drawn for it"
    return [sample.image_path for sample in spread(test, CHECK_PICTURES).samples], "of the test split"


def find_test_split(weights: Path) -> DatasetIndex | None:
    """Of the run whose folder of weights it is; None where it is no run's, or its dataset is elsewhere."""
    if weights.name != "weights":
        return None
    try:
        data = load_config(RunFolder(weights.parent).config).data
        return open_dataset(data.format, data.root, data.test, classes=data.classes, needs_objects=False)
    except UserError:
        return None


def load_images(paths: Iterable[Path], image_size: int) -> Tensor:
    """(n, 3, S, S) float32 in [0, 1]: pictures, letterboxed."""
    return to_images([read_image(path) for path in paths], image_size)


def draw_images(image_size: int) -> Tensor:
    """As load_images, of CHECK_PICTURES generated pictures."""
    return to_images([draw_picture(0, "test", k, image_size)[0] for k in range(CHECK_PICTURES)], image_size)


def to_images(pictures: Sequence[np.ndarray], image_size: int) -> Tensor:
    squares = np.stack([letterbox(picture, image_size)[0] for picture in pictures])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).float().contiguous() / 255


def check_batches(images: Tensor, dynamic: bool) -> list[Tensor]:
    """What the graph is checked on: picture by picture, or all at once, one alone, and two at half the height."""
    if not dynamic:
        return list(images.split(1))
    half = max(SIZE_MULTIPLE, images.shape[2] // 2 // SIZE_MULTIPLE * SIZE_MULTIPLE)
    return [images, images[:1], images[:2, :, :half].contiguous()]


@torch.no_grad()
def compare(model: nn.Module, graph: "ModelProto", batches: Iterable[Tensor], *, suppresses: bool) -> Difference:
    """Run both on images (B, 3, H, W) and compare every box and score before selection.

    Where the graph ends in detections, these must be the ones that kernels.nms chooses from the graph's own boxes and
    scores, in the same order: else UserError.
    """
    names = list(PREDICTIONS)
    has_selection = graph.graph.output[0].name == DETECTIONS[0] and len(graph.graph.output) == len(DETECTIONS)
    if has_selection:
        names = [f"all_{name}" for name in PREDICTIONS]
        graph = _with_outputs(graph, names)
    session = open_session(graph.SerializeToString())
    largest = Difference(0.0, 0.0)
    for images in batches:
        expected = model.decode(model(images))
        feed = {"images": images.numpy()}
        found = tuple(map(torch.from_numpy, session.run(names, feed)))
        for rows in zip(*expected, *found):
            boxes, scores = _differences(*rows, in_order=suppresses)
            # Written so that a nan is larger than any number.
            largest = Difference(
                largest.boxes if boxes <= largest.boxes else boxes,
                largest.scores if scores <= largest.scores else scores,
            )
        if has_selection:
            _check_selection(session, feed, names, suppresses)
    return largest


def _with_outputs(graph: "ModelProto", names: Sequence[str]) -> "ModelProto":
    """A copy whose values `names`, float32, are outputs as well."""
    from onnx import TensorProto, helper

    copy = type(graph)()
    copy.CopyFrom(graph)
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return copy


def _differences(
    expected_xyxy: Tensor, expected_scores: Tensor, xyxy: Tensor, scores: Tensor, *, in_order: bool
) -> tuple[float, float]:
    """Of one image. The queries of RT-DETR stand in the order of their scores, which rounding may swap: each of them is
    then compared to the one that is nearest to it.
    """
    if not in_order:
        distance = torch.cdist(expected_xyxy, xyxy) + len(scores) * torch.cdist(expected_scores, scores)  # (Q, Q)
        nearest = distance.argmin(1)
        xyxy, scores = xyxy[nearest], scores[nearest]
    return (expected_xyxy - xyxy).abs().max().item(), (expected_scores - scores).abs().max().item()


def _check_selection(session, feed: dict[str, np.ndarray], names: list[str], suppresses: bool) -> None:
    """At a score threshold that leaves CHECK_CANDIDATES of the first image, however sure the model is."""
    all_scores = torch.from_numpy(session.run(names[1:], feed)[0])
    score_threshold = all_scores[0].flatten().topk(min(CHECK_CANDIDATES, all_scores[0].numel())).values[-1].item()
    iou_threshold, max_detections = 0.7 if suppresses else 1.0, 100
    settings = {
        "score_threshold": np.array(score_threshold, np.float32),
        "iou_threshold": np.array(float32_at_most(iou_threshold)),
        "max_detections": np.array(max_detections, np.int64),
    }
    *found, image, all_boxes, all_scores = map(torch.from_numpy, session.run([*DETECTIONS, *names], feed | settings))
    expected = select_detections(
        all_boxes,
        all_scores,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        max_candidates=max(1, all_scores[0].numel()),
    )
    for row, detections in enumerate(expected):
        columns = (detections.boxes_xyxy, detections.scores, detections.labels)
        if not all(torch.equal(ours[image == row], theirs) for ours, theirs in zip(found, columns)):
            raise UserError("the graph chooses other detections than PyTorch does; nothing was written")


def calibration_images(index: DatasetIndex, image_size: int, count: int) -> Iterator[np.ndarray]:
    """(1, 3, S, S) float32 each, of `count` pictures evenly spaced in the split."""
    for sample in spread(index, count).samples:
        yield load_images([sample.image_path], image_size).numpy()


def print_comparison(
    graphs: dict[str, "ModelProto"],
    infos: dict[str, GraphInfo],
    index: DatasetIndex,
    image: Tensor,
    evaluation: EvaluationConfig,
) -> dict[str, EvaluationResult]:
    """mAP on a dataset, milliseconds for one picture and megabytes, a row for each precision."""
    data = {name: graph.SerializeToString() for name, graph in graphs.items()}
    detectors = {name: OnnxDetector(open_session(data[name]), infos[name], name) for name in graphs}
    size = infos["float32"].image_size
    results = {
        name: evaluate_model(detector, index, image_size=size, **evaluation.arguments())
        for name, detector in detectors.items()
    }
    settings = dict(
        score_threshold=0.25, iou_threshold=evaluation.iou_threshold, max_detections=evaluation.max_detections
    )
    run = lambda detector: lambda: detector.detect(detector(image), **settings)
    seconds = rotate({name: run(detector) for name, detector in detectors.items()}, TIMED_ROUNDS, wall_seconds)
    print(f"{len(index)} pictures, {size} px, {torch.get_num_threads()} threads")
    print(f"{'':<10}{'mAP50':>8}{'mAP50-95':>10}{'ms':>8}{'MB':>8}")
    for name, result in results.items():
        precisions = f"{result.numbers['mAP50']:8.4f}{result.numbers['mAP50-95']:10.4f}"
        print(f"{name:<10}{precisions}{1000 * statistics.median(seconds[name]):8.1f}{len(data[name]) / 1e6:8.1f}")
    return results


def open_splits(args: argparse.Namespace, info: CheckpointInfo) -> tuple[DatasetIndex, DatasetIndex]:
    """The pictures to calibrate on and those to measure on; UserError where their classes are not the model's."""
    if len(args.calibrate) not in (2, 3) or args.calibrate[0] not in READERS:
        raise UserError(f"--calibrate: found {' '.join(args.calibrate)!r}, expected {'|'.join(READERS)} ROOT [SPLIT]")
    *place, split = args.calibrate if len(args.calibrate) == 3 else (*args.calibrate, "train")
    calibration = open_dataset(*place, split, classes=info.classes, needs_objects=False)
    test = open_dataset(*place, args.test_split, classes=info.classes)
    known = info.names if info.source == "ours" else range(len(info.names))
    found = test.names if info.source == "ours" else range(len(test.names))
    if tuple(known) != tuple(found):
        raise UserError(f"{args.checkpoint}: has the classes {list(info.names)}, the dataset {list(test.names)}")
    return calibration, test


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours, or a public one with --arch")
    parser.add_argument("--arch", help="the model a public checkpoint is of, such as yolov8n")
    parser.add_argument("--output", type=Path, help="default: the checkpoint's name with .onnx")
    parser.add_argument("--image-size", type=int, help="pixels; default: what the model was trained at")
    parser.add_argument("--dynamic", action="store_true", help="any batch, height and width, not one square picture")
    parser.add_argument("--with-nms", action="store_true", help="end in detections, not in boxes and scores")
    parser.add_argument("--score-threshold", type=float, default=0.25, help="default of --with-nms (%(default)s)")
    parser.add_argument("--nms-iou", type=float, help="default of --with-nms (the checkpoint's, or its family's)")
    parser.add_argument("--max-detections", type=int, help="default of --with-nms (the checkpoint's, or its family's)")
    parser.add_argument(
        "--pictures", nargs="+", default=[], metavar="SOURCE", help="to check on; default: of the test split"
    )
    parser.add_argument("--int8", action="store_true", help="write <name>.int8.onnx as well; needs --calibrate")
    parser.add_argument(
        "--calibrate", nargs="+", metavar="PART", help="|".join(READERS) + " ROOT [SPLIT], default split: train"
    )
    parser.add_argument("--calibration-pictures", type=int, default=100, help="at most (%(default)s)")
    parser.add_argument("--test-split", default="test", help="to measure float32 and int8 on (%(default)s)")
    args = parser.parse_args(argv)
    args.output = args.output or args.checkpoint.with_suffix(SUFFIX)
    if args.output.suffix.lower() != SUFFIX:
        parser.error(f"--output: found {args.output}, expected a name ending in {SUFFIX}")
    if args.image_size is not None and (args.image_size < SIZE_MULTIPLE or args.image_size % SIZE_MULTIPLE):
        parser.error(f"--image-size: found {args.image_size}, expected a multiple of {SIZE_MULTIPLE}")
    for name in ("max_detections", "calibration_pictures"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected at least 1")
    if args.int8 != bool(args.calibrate):
        parser.error("expected --int8 and --calibrate together")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "export.py")
    if not args.output.parent.is_dir():
        raise UserError(f"{args.output}: no such folder: {args.output.parent}")
    model, said = checkpoint.load_model(args.checkpoint, args.arch)
    check_exportable(model, said.arch)
    splits = open_splits(args, said) if args.int8 else None
    size, suppresses = args.image_size or said.image_size, not isinstance(model, RTDETR)
    paths, whose = choose_pictures(args, splits and splits[1])
    images = load_images(paths, size) if paths else draw_images(size)
    model = fuse(model)
    evaluation = replace(said.evaluation, precision="float32")  # the file computes in its own
    nms_iou = evaluation.iou_threshold if args.nms_iou is None else args.nms_iou

    graphs = {"float32": onnx_graph.trace(model, size, dynamic=args.dynamic)}
    if args.int8:
        graphs["int8"] = quantize(graphs["float32"], calibration_images(splits[0], size, args.calibration_pictures))
    infos, files = {}, {"float32": args.output, "int8": args.output.with_suffix(f".int8{SUFFIX}")}
    for name in graphs:
        if args.with_nms:
            graphs[name] = onnx_graph.append_selection(
                graphs[name],
                score_threshold=args.score_threshold,
                iou_threshold=nms_iou if suppresses else 1.0,
                max_detections=args.max_detections or evaluation.max_detections,
            )
        infos[name] = GraphInfo(
            said.arch,
            said.names,
            size,
            suppresses,
            name,
            said.source,
            commit(),
            to_tree(evaluation) if said.config else {},
        )
        onnx_graph.write_info(graphs[name], infos[name])

    batches = check_batches(images, args.dynamic)
    difference = compare(model, graphs["float32"], batches, suppresses=suppresses)
    measured = f"boxes by at most {difference.boxes:.2g} px, scores by {difference.scores:.2g}"
    if not difference.is_small():
        raise UserError(
            f"{args.output}: differs from PyTorch in {measured}, expected at most {BOX_TOLERANCE} px and "
            f"{SCORE_TOLERANCE}; nothing was written"
        )
    print(f"{plural(len(images), 'picture')} {whose} at {size} px: ONNX and PyTorch differ in {measured}")
    for name, graph in graphs.items():
        write_bytes(files[name], graph.SerializeToString())
        print(f"written: {files[name]} ({said.arch}, {len(said.names)} classes, {name})")
    if args.int8:
        print_comparison(graphs, infos, splits[1], images[:1], evaluation)


if __name__ == "__main__":
    run_script(main)
