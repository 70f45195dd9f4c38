"""Fifty good and hostile uploads at once: each is read or refused in one line; memory is bounded, no file written."""

import io
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import checkpoint
import models
import weights
from engine.runtime.peak_memory import peak_gigabytes, reset_peak
from engine.web_demo import clips, detectors, gallery
from errors import UserError
from tests.engine.web_demo.tiny_app import clip, photo, png
from tests.weights import hostile
from tests.weights.hostile_arrays import safetensors_of

pytest.importorskip("av", reason="videos need the extra `video`")
pytest.importorskip("onnxruntime", reason="ONNX files need the extra `export`")  # it writes a file of its own at first

NAMES = ["green", "red"]


@dataclass(frozen=True)
class Upload:
    """kind: picture, weights or video. refusal: a pattern of the line that refuses it; None if it is read."""

    kind: str
    name: str
    data: bytes
    refusal: str | None

    def read(self) -> Any:
        if self.kind == "picture":
            return gallery.read_upload(self.data).pixels
        if self.kind == "weights":
            return detectors.load_upload(self.data, self.name)
        return list(clips.read_frames(self.data))


def picture_of(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def text_bomb() -> bytes:
    """A PNG whose compressed comment is 100 MB of blanks."""
    comment = b"note\x00\x00" + zlib.compress(bytes(100 << 20))
    chunk = struct.pack(">I", len(comment)) + b"zTXt" + comment + struct.pack(">I", zlib.crc32(b"zTXt" + comment))
    data = photo(kind="PNG")
    return data[:33] + chunk + data[33:]  # behind the header


def pictures() -> Iterator[tuple[str, bytes, str | None]]:
    noise = Image.open(io.BytesIO(photo()))
    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF"):
        yield f"good.{kind.lower()}", photo(kind=kind), None
    yield "grey.png", picture_of(noise.convert("L"), "PNG"), None
    yield "cmyk.jpg", picture_of(noise.convert("CMYK"), "JPEG"), None
    yield "palette.png", picture_of(noise.convert("P"), "PNG"), None
    yield "frames.webp", picture_of(noise, "WEBP", save_all=True, append_images=[noise] * 9), None
    yield "dot.png", picture_of(noise.crop((0, 0, 1, 1)), "PNG"), None
    yield "thin.png", picture_of(Image.new("RGB", (20_000, 1)), "PNG"), None
    yield "23 MP.png", picture_of(Image.new("RGB", (4800, 4800)), "PNG"), None
    yield "comment.png", picture_of(noise, "PNG", pnginfo=PngImagePlugin.PngInfo()) + bytes(100), None
    yield "and a zip.jpg", photo() + hostile.zip_of([("a", b"b")]), None  # two files in one; it is read as the picture
    yield "<script>.jpg", photo()[:-400], "truncated"
    yield "100 MP.png", png(10_000, 10_000), "too large, 10000 x 10000"
    yield "3600 MP.png", png(60_000, 60_000), "too large"
    yield "26 MP.jpg", picture_of(Image.new("RGB", (6500, 4000)), "JPEG"), "too large, 6500 x 4000"
    yield "text bomb.png", text_bomb(), "truncated or broken header|broken picture"
    yield "heavy.jpg", photo() + bytes(10 << 20), "10.0 MB, expected"
    yield "empty.png", b"", "empty file"
    yield "text.png", b"no picture, this", "not a picture"
    yield "page.jpg", b"<html><script>alert(1)</script></html>", "HTML or XML"
    yield "drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "HTML or XML"
    yield "moving.gif", picture_of(noise, "GIF"), "GIF format"
    yield "script.jpg", b"GIF89a/*<html>*/=1;", "GIF format"
    yield "paper.jpg", b"%PDF-1.7\n" + photo(), "not a picture"
    yield "postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"
    yield "program.png", b"\x7fELF" + bytes(200), "not a picture"
    yield "flipped.png", photo(kind="PNG")[:60] + b"\xff" * 40 + photo(kind="PNG")[100:], "broken|truncated"


def shared(description: dict[str, Any], state: dict[str, torch.Tensor]) -> bytes:
    return weights.to_bytes(state, {"tensor_names": "ours", "versions": {}, **description})


def onnx_file(external: bool) -> bytes:
    import onnx

    value = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [0.0])
    if external:
        value.ClearField("float_data")
        value.data_location = onnx.TensorProto.EXTERNAL
        value.external_data.add(key="location", value="/etc/passwd")
    out = onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["v"])], "g", [], [out], [value])
    return onnx.helper.make_model(
        graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]
    ).SerializeToString()


def weights_files(ran: str) -> Iterator[tuple[str, bytes, str | None]]:
    torch.manual_seed(0)
    state = models.build("yolov8_narrow", 2).state_dict()
    ours = {"arch": "yolov8_narrow", "names": NAMES, "image_size": 64}
    good = shared(ours, state)
    yield "good.safetensors", good, None
    yield "good.pt", hostile.saved({"format": 1, **ours, "ema": state}), None
    yield "cut.safetensors", good[:-7], "ends beyond the file|truncated|bytes"
    yield "code.pt", hostile.torch_zip(hostile.dump(hostile.gadgets(ran)["os-system"])), "which no weights need"
    yield "packed.pt", hostile.zip_of([("archive/data.pkl", bytes(50 << 20))], 8), "compressed|damaged|zip"
    yield "header.safetensors", safetensors_of({}, length=1 << 60), "header|file"
    yield "many.safetensors", shared(ours | {"names": ["a"] * 120_000}, state), "120,000 classes"
    yield "other.safetensors", shared(ours | {"names": ["a"] * 9_000}, state), "do not fit"
    yield "huge.safetensors", shared(ours | {"image_size": 65_504}, state), "image_size 65504"
    yield "odd.pt", hostile.saved({"format": 1, **ours, "names": {"a": 1}, "ema": state}), "class names"
    yield "unknown.safetensors", shared(ours | {"arch": "os_system"}, state), "unknown"
    yield "random.pt", np.random.default_rng(0).bytes(4096), "."
    yield "picture.pt", photo(), "a JPEG picture"
    yield "text.onnx", b"no graph", "damaged or not an ONNX file"
    yield "foreign.onnx", onnx_file(external=False), "expected a file that export.py wrote"
    yield "elsewhere.onnx", onnx_file(external=True), "in another file"


def videos() -> Iterator[tuple[str, bytes, str | None]]:
    good = clip(seconds=0.5)
    yield "good.mp4", good, None
    yield "cut.mp4", good[: len(good) // 3], "expected a video"
    yield "list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "expected a video"
    yield "empty.mp4", b"", "expected a video"
    yield "large.mp4", clip(seconds=0.06, side=3200), "found frames of 3200 x 3200"
    yield "heavy.mp4", good + bytes(40 << 20), "40.0 MB, expected"


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    ran = str(tmp_path_factory.mktemp("gadget") / "ran")
    kinds = {"picture": pictures(), "weights": weights_files(ran), "video": videos()}
    return [Upload(kind, *row) for kind, rows in kinds.items() for row in rows]


WRITTEN: list[str] = []  # files opened for writing while it is watched
WATCHED: list[bool] = []


def watch(event: str, arguments: tuple) -> None:
    if WATCHED and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        WRITTEN.append(str(arguments[0]))


def test_fifty_uploads_at_once(uploads, tmp_path, monkeypatch, one_thread):
    assert len(uploads) >= 50
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sys.addaudithook(watch)
    before = uploads[0].read()  # libraries are loaded, and their memory is taken
    [upload.read() for upload in uploads if upload.kind != "picture" and upload.refusal is None]
    cpu = torch.device("cpu")
    reset_peak(cpu)
    start = peak_gigabytes(cpu)

    def outcome(upload: Upload) -> Any:
        try:
            return upload.read()
        except UserError as error:
            return str(error)

    WATCHED.append(True)
    with ThreadPoolExecutor(16) as threads:
        outcomes = list(threads.map(outcome, uploads))
    WATCHED.clear()
    for upload, result in zip(uploads, outcomes):
        if upload.refusal is None:
            assert not isinstance(result, str), f"{upload.name}: {result}"
        else:
            assert isinstance(result, str), f"{upload.name} was read"
            assert "\n" not in result and re.search(upload.refusal, result), result
    assert np.array_equal(outcomes[0], before)  # everybody gets the own picture
    assert all(max(result.shape) <= gallery.WORKING_SIDE for result in outcomes if isinstance(result, np.ndarray))
    assert not WRITTEN and not list(tmp_path.iterdir())
    assert start is None or peak_gigabytes(cpu) - start < 0.6


def test_an_uploaded_model_finds_what_it_finds_from_disk(tmp_path, one_thread):
    torch.manual_seed(0)
    state = {"arch": "yolov8_narrow", "names": NAMES, "image_size": 64}
    checkpoint.save(tmp_path / "a.pt", state | {"ema": models.build("yolov8_narrow", 2).state_dict()})
    held = detectors.load_upload((tmp_path / "a.pt").read_bytes(), "a.pt")
    read = detectors.load_file(tmp_path / "a.pt", "a.pt")
    picture = gallery.read_upload(photo()).pixels
    one, two = (detectors.detect(each, picture, score=0.0, iou=0.7) for each in (held, read))
    assert len(one) and torch.equal(one.boxes_xyxy, two.boxes_xyxy) and torch.equal(one.scores, two.scores)
    assert held.describe() == read.describe() == "yolov8_narrow, 0.89 M parameters, 2 classes, 64 px"


def test_a_video_claims_more_frames_than_are_read(monkeypatch):
    monkeypatch.setattr(clips, "MAX_DECODED", 6)
    assert len(list(clips.read_frames(clip(seconds=2.0)))) == 3  # 16 frames a second, of which every second is taken
    monkeypatch.setattr(clips, "MAX_DECODED", 1000)
    monkeypatch.setattr(clips, "MAX_SECONDS", 1)
    assert len(list(clips.read_frames(clip(seconds=2.0)))) == 8
