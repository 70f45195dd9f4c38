"""Detectors for runtimes besides onnxruntime: what is written computes what PyTorch does."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import export
from engine.onnx_files.other_formats import command_for, trace_program
from errors import UserError
from layers.fusion import fuse
from tests.conftest import ROOT
from tests.exporting import NAMES, save_model, small_rtdetr
from tests.tiny_training import SIZE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_torch_program(tmp_path, capsys):
    """The file alone gives the boxes and scores of the checkpoint, at sizes and batches it was not traced with."""
    weights = save_model(tmp_path / "last.pt", "yolov8_narrow")
    export.main([str(weights), "--format", "torch", "--dynamic"])
    said, path = capsys.readouterr().out, tmp_path / "last.pt2"
    assert "torch.export and PyTorch differ in boxes by at most" in said and f"written: {path} (yolov8_narrow" in said
    data, extra = path.read_bytes(), {"retort.json": ""}
    program = torch.export.load(io.BytesIO(data), extra_files=extra).module()
    info = json.loads(extra["retort.json"])
    assert (info["arch"], tuple(info["names"]), info["image_size"]) == ("yolov8_narrow", NAMES, SIZE)
    model = fuse(checkpoint.load_model(weights)[0])
    for shape in ((1, 3, 64, 64), (3, 3, 96, 128)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for found, expected in zip(program(images), model.decode(model(images))):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for trace in (str(ROOT).encode(), b"site-packages", str(tmp_path).encode()):
        assert trace not in data, trace


@pytest.mark.slow
def test_a_program_of_rtdetr_takes_a_single_image():
    """torch's own attention would tie it to batches of more than one."""
    model, images = small_rtdetr(), torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    program = trace_program(model, SIZE, dynamic=True).module()
    for found, expected in zip(program(images), model.decode(model(images)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_openvino(tmp_path, capsys):
    """The two files alone give the boxes and scores of the checkpoint."""
    openvino = pytest.importorskip("openvino")
    weights = save_model(tmp_path / "last.pt", "yolov8_narrow")
    export.main([str(weights), "--format", "openvino"])
    assert "OpenVINO and PyTorch differ in boxes by at most" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".xml", ".bin"}
    compiled = openvino.Core().compile_model(tmp_path / "last.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    model = fuse(checkpoint.load_model(weights)[0])
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = compiled({"images": images.numpy()})
    with torch.no_grad():
        boxes_xyxy, scores = model.decode(model(images))
    np.testing.assert_allclose(found["boxes_xyxy"], boxes_xyxy.numpy(), atol=1e-2)
    np.testing.assert_allclose(found["scores"], scores.numpy(), atol=1e-4)


def test_commands_for_what_does_not_run_here():
    engine = command_for("engine", Path("a/last.onnx"), 320, dynamic=True)
    assert engine.startswith("trtexec --onnx=a/last.onnx --saveEngine=a/last.engine")
    assert "--maxShapes=images:8x3x320x320" in engine
    assert "Shapes" not in command_for("engine", Path("a/last.onnx"), 320, dynamic=False)
    coreml = command_for("coreml", Path("a/last.pt2"), 320, dynamic=False)
    code = coreml.removeprefix('python -c "').removesuffix('"')
    compile(code, "command", "exec")
    assert '"' not in code and "torch.export.load('a/last.pt2')" in code and ".save('a/last.mlpackage')" in code
    for name in ("images", "boxes_xyxy", "scores"):
        assert f"name='{name}'" in code


@pytest.mark.parametrize("option", [["--with-nms"], ["--int8", "--calibrate", "yolo", "data"]])
@pytest.mark.parametrize("runtime", ["torch", "openvino", "engine", "coreml"])
def test_selection_and_int8_are_for_onnx(runtime, option):
    with pytest.raises(UserError, match=f"--format {runtime}: has no --int8 and no --with-nms"):
        export.main(["last.pt", "--format", runtime, *option])
