"""What a detector costs: parameters, FLOPs, and milliseconds for one image in every form it can take.

    python benchmarks/latency.py [--arch yolov8n | --checkpoint FILE] [--image-size 640] [--threads N] [--rounds 21]
    python benchmarks/latency.py --models yolov8n,runs/NAME [--output FILE.json]     # detectors of ours, one line each
    /path/to/env/bin/python benchmarks/latency.py      # an environment with torch, onnx, onnxruntime and ultralytics

A call takes one image (1, 3, S, S) to decoded boxes and scores of every location, without suppression: what both
packages compute. Beside ours stands Ultralytics' model of the same architecture, where its package is installed, in the
same forms, in the same process; all take turns, round by round, and a time is the median of its rounds (best in
brackets). Weights are random; a time does not depend on them. `--cpu-time` counts CPU milliseconds of all threads
instead of the clock's; with `--threads 1` that is what to read on a machine that others use.

Forms: "PyTorch" is the model as it is trained, "fused" has its BatchNorms folded into the convolutions; channels_last
is the memory layout of images and weights, without it they are contiguous; bfloat16 is autocast. "ONNX" is the file
export.py would write, for one image of this size, run by onnxruntime on the CPU; int8 is calibrated on noise.
"OpenVINO" is what --format openvino would write, where its package is installed.

--models times several detectors in one run, architectures or trained ones, folded and channels_last, and as an ONNX
graph, round by round in turns. The ratio of one to the first is the median of those of the rounds, so that it holds on
a machine whose speed changes.

FLOPs are those that torch.utils.flop_counter counts: of convolutions and matrix products alone, a multiplication
and an addition being two.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import checkpoint
import models
from benchmarks.timing import header, options, parse, row, take_turns, versions
from config import check_image_size
from engine.onnx_files import graph as onnx_graph
from engine.onnx_files.detector import open_session
from engine.onnx_files.int8 import calibrate, trace_int8
from engine.onnx_files.other_formats import openvino_files
from engine.runtime.run_folder import commit, write_text
from errors import UserError, run_script
from layers.fusion import fuse
from rtdetr.rtdetr import RTDETR

if TYPE_CHECKING:
    from onnx import ModelProto

NUM_CLASSES = 80
FORMS = {  # name: (fused, channels_last, bfloat16)
    "PyTorch": (False, False, False),
    "PyTorch channels_last": (False, True, False),
    "fused": (True, False, False),
    "fused channels_last": (True, True, False),
    "fused channels_last bfloat16": (True, True, True),
}
ONNX_FORMS = ("ONNX float32", "ONNX int8", "OpenVINO float32")
Call = Callable[[], object]


def torch_call(
    model: nn.Module,
    predict: Callable[[nn.Module, Tensor], object],
    images: Tensor,
    channels_last: bool,
    bfloat16: bool,
) -> Call:
    """One image through one form of a model."""
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)

    def call() -> object:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return predict(model, images)

    return call


def onnx_call(graph: "ModelProto", images: Tensor) -> Call:
    session, array = open_session(graph.SerializeToString()), images.numpy()
    return lambda: session.run(None, {"images": array})


def our_calls(arch: str | None, path: str | None, images: Tensor, with_onnx: bool) -> tuple[nn.Module, dict[str, Call]]:
    torch.manual_seed(0)
    model = checkpoint.load_model(path, arch)[0] if path else models.build(arch, NUM_CLASSES)
    model = model.eval().requires_grad_(False)
    decode = lambda model, images: model.decode(model(images))
    calls = {}
    for name, (fused, *form) in FORMS.items():
        calls[name] = torch_call(fuse(model) if fused else copy.deepcopy(model), decode, images, *form)
    if with_onnx:
        graph = onnx_graph.trace(fuse(model), images.shape[-1], dynamic=False)
        calls["ONNX float32"] = onnx_call(graph, images)
        if not isinstance(model, RTDETR):  # it has no int8 form
            rounding = calibrate(fuse(model), [images], percentile=100)
            calls["ONNX int8"] = onnx_call(trace_int8(rounding, images.shape[-1], dynamic=False), images)
        if importlib.util.find_spec("openvino"):
            calls["OpenVINO float32"] = partial(openvino_files(graph)[1], images)
    return model, calls


def peer_calls(arch: str, images: Tensor, with_onnx: bool) -> dict[str, Call]:
    """Ultralytics' model, in its own form for export where it becomes an ONNX graph."""
    from ultralytics.nn.tasks import DetectionModel

    if arch.startswith(("yolov5", "yolov7")) and not arch.endswith("u"):
        return {}  # the package builds YOLOv5 with the anchor-free head alone, and no YOLOv7
    model = DetectionModel(f"{arch.removesuffix('u')}.yaml", nc=NUM_CLASSES, verbose=False).eval()
    predict = lambda model, images: model(images)
    calls = {}
    for name, (fused, *form) in FORMS.items():
        own = copy.deepcopy(model)
        calls[name] = torch_call(own.fuse(verbose=False) if fused else own, predict, images, *form)
    if with_onnx:
        own = copy.deepcopy(model).fuse(verbose=False)
        own.model[-1].export, own.model[-1].format = True, "onnx"
        with onnx_graph.without_warnings(), torch.no_grad():
            program = torch.onnx.export(own, (images,), input_names=["images"], dynamo=True, verbose=False)
        calls["ONNX float32"] = onnx_call(program.model_proto, images)
    return calls


def compare_models(names: list[str], images: Tensor, args: argparse.Namespace, with_onnx: bool) -> list[dict[str, Any]]:
    """The `parameters` and `flops` of each detector, and for each form its median time and that over the first's."""
    rows, calls = [], {}
    for name in names:
        torch.manual_seed(0)
        model = models.build(name, NUM_CLASSES) if name in models.ARCHITECTURES else checkpoint.load_model(name)[0]
        model = model.eval().requires_grad_(False)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append({"name": name, "parameters": parameters, "flops": count_flops(model, images)})
        calls[name, "pytorch"] = torch_call(
            fuse(model), lambda model, images: model.decode(model(images)), images, True, False
        )
        if with_onnx:
            graph = onnx_graph.trace(fuse(model), images.shape[-1], dynamic=False)
            calls[name, "onnx"] = onnx_call(graph, images)
    seconds = take_turns(calls, args)
    for cost in rows:
        for form in ("pytorch", "onnx") if with_onnx else ("pytorch",):
            own, first = seconds[cost["name"], form], seconds[names[0], form]
            cost[f"{form}_ms"] = 1000 * statistics.median(own)
            cost[f"{form}_ratio"] = statistics.median(a / b for a, b in zip(own, first))
    return rows


def models_table(rows: list[dict[str, Any]], *, cpu_time: bool) -> str:
    forms = [form for form in ("pytorch", "onnx") if f"{form}_ms" in rows[0]]
    width = 2 + max(len(cost["name"]) for cost in rows)
    unit = "CPU ms" if cpu_time else "ms"
    heads = "".join(f"{f'{form} {unit}':>16}{'ratio':>8}" for form in forms)
    lines = [f"{'detector':<{width}}{'M parameters':>14}{'GFLOP':>8}{heads}"]
    for cost in rows:
        times = "".join(f"{cost[f'{form}_ms']:16.1f}{cost[f'{form}_ratio']:8.2f}" for form in forms)
        lines.append(f"{cost['name']:<{width}}{cost['parameters'] / 1e6:14.2f}{cost['flops'] / 1e9:8.2f}{times}")
    return "\n".join(lines)


def count_flops(model: nn.Module, images: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.decode(model(images))
    return counter.get_total_flops()


def print_table(seconds: dict[tuple[str, str], list[float]], names: list[str]) -> None:
    for name in names:
        print(row(name, seconds, lambda s: 1000 * s))
    median = lambda side, name: statistics.median(seconds[side, name])
    for group in (list(FORMS)[:-1], list(FORMS)[-1:], ONNX_FORMS[:1]):
        best = {
            side: min((name for name in group if (side, name) in seconds), key=partial(median, side), default=None)
            for side in ("ours", "peer")
        }
        if None not in best.values():
            ratio = median("peer", best["peer"]) / median("ours", best["ours"])
            print(f"our best of these / its best: {best['ours']} / {best['peer']}: {ratio:.2f}")


def main(argv: list[str]) -> None:
    parser = options(__doc__, rounds=21, image_size=640)
    parser.add_argument("--arch", default="yolov8n")
    parser.add_argument("--checkpoint", help="time this model; nothing stands beside it")
    parser.add_argument("--models", metavar="A,B", help="time these architectures, checkpoints or runs of ours")
    parser.add_argument("--output", type=Path, help="with --models: write the numbers into this JSON file")
    args = parse(parser, argv)
    check_image_size("--image-size", args.image_size)
    if args.output and not (args.models and args.output.parent.is_dir() and not args.output.is_dir()):
        raise UserError(f"--output: found {args.output}, expected a file in a folder that is there, with --models")
    with_onnx = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    images = torch.rand(1, 3, args.image_size, args.image_size, generator=torch.Generator().manual_seed(0))
    if args.models:
        rows = compare_models(args.models.split(","), images, args, with_onnx)
        print(f"{args.image_size} px, {versions()}\n{models_table(rows, cpu_time=args.cpu_time)}")
        if args.output:
            about = {
                "image_size": args.image_size,
                "versions": versions(),
                "cpu_time": args.cpu_time,
                "commit": commit(),
            }
            write_text(args.output, json.dumps(about | {"models": rows}, indent=1) + "\n")
        return
    model, ours = our_calls(None if args.checkpoint else args.arch, args.checkpoint, images, with_onnx)
    calls = {("ours", name): call for name, call in ours.items()}
    if not args.checkpoint:
        with contextlib.suppress(ImportError):
            calls |= {("peer", name): call for name, call in peer_calls(args.arch, images, with_onnx).items()}
    note = "" if with_onnx else "; onnx, onnxruntime or onnxscript is not installed: their rows are missing"
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.checkpoint or args.arch}: {parameters / 1e6:.3f} M parameters, "
        f"{count_flops(model, images) / 1e9:.2f} GFLOP at {args.image_size} px\n{versions('ultralytics')}{note}"
    )
    print(header(f"{'CPU ms' if args.cpu_time else 'ms'}, one image", "Ultralytics"))
    print_table(take_turns(calls, args), list(ours))


if __name__ == "__main__":
    run_script(main)
