"""A detector for runtimes besides onnxruntime: torch.export's program, OpenVINO, and the commands for two more.

Each has the input `images` and the outputs PREDICTIONS of the ONNX graph without selection.
"""

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from engine.onnx_files.graph import PREDICTIONS, Decoded, GraphInfo, example_images, without_warnings
from errors import require

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch.export import ExportedProgram

LEAST_SIDE = 64  # pixels of a dynamic program: torch.export takes a map's side of 1 cell for a constant
Outputs = tuple[Tensor, Tensor]  # boxes_xyxy (B, A, 4), scores (B, A, K)


def trace_program(detector: nn.Module, image_size: int, *, dynamic: bool) -> "ExportedProgram":
    """torch.export's program of a detector with `decode`, as graph.trace. It names no path of this machine.

    dynamic: sides are free multiples of 32 from LEAST_SIDE on; the program refuses others.
    """
    images, shapes = example_images(image_size, dynamic=dynamic)
    with without_warnings(), torch.no_grad():
        program = torch.export.export(Decoded(detector), (images,), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)
    return program


def program_bytes(program: "ExportedProgram", info: GraphInfo) -> bytes:
    """The .pt2 file of a program, with the metadata of an ONNX file as its extra file retort.json."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"retort.json": json.dumps(asdict(info), ensure_ascii=False)})
    return buffer.getvalue()


def openvino_files(graph: "ModelProto") -> tuple[dict[str, bytes], Callable[[Tensor], Outputs]]:
    """An ONNX graph for OpenVINO: its two files by suffix (.xml, .bin), and a function that runs them on the CPU."""
    openvino = require("openvino", "openvino", "--format openvino")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(graph.SerializeToString())
        openvino.save_model(openvino.convert_model(source), Path(folder) / "model.xml", compress_to_fp16=False)
        files = {suffix: (Path(folder) / f"model{suffix}").read_bytes() for suffix in (".xml", ".bin")}
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(files[".xml"], openvino.Tensor(np.frombuffer(files[".bin"], np.uint8))),
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()},
        )

    def run(images: Tensor) -> Outputs:
        found = compiled({"images": images.numpy()})
        boxes_xyxy, scores = (torch.from_numpy(found[name].copy()) for name in PREDICTIONS)
        return boxes_xyxy, scores

    return files, run


def command_for(runtime: str, path: Path, image_size: int, *, dynamic: bool) -> str:
    """The command that makes a file of TensorRT ("engine") or Core ML ("coreml") of what export.py has written.

    Neither is run here: TensorRT builds for the GPU it stands beside, Core ML is compiled and run on a Mac.
    """
    size = f"{image_size}x{image_size}"
    if runtime == "engine":
        shapes = [f"--{name}Shapes=images:{count}x3x{size}" for name, count in (("min", 1), ("opt", 1), ("max", 8))]
        return " ".join(
            ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}", "--fp16", *shapes * dynamic]
        )
    outputs = ", ".join(f"ct.TensorType(name={name!r})" for name in PREDICTIONS)
    return (
        f'python -c "import coremltools as ct, torch; '
        f"program = torch.export.load({str(path)!r}).run_decompositions({{}}); "
        f"ct.convert(program, inputs=[ct.TensorType(name='images', shape=(1, 3, {image_size}, {image_size}))], "
        f'outputs=[{outputs}]).save({str(path.with_suffix(".mlpackage"))!r})"'
    )
