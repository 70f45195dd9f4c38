"""An ONNX file in place of a checkpoint: the same numbers from eval.py, the same boxes from predict.py."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import checkpoint
import eval
import predict
import retort
from datasets import open_dataset
from datasets.loader import Loader
from engine.evaluation import measuring
from engine.onnx_files.detector import load_detector, load_onnx
from errors import UserError
from structures import DetectionSettings
from tests.exporting import ARCH, NAMES
from tests.tiny_training import SIZE

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = dict(score_threshold=0.0, iou_threshold=0.6, max_detections=50)
DETECTION = DetectionSettings(**SETTINGS)


@pytest.fixture(scope="module")
def model(exported):
    return checkpoint.load_model(exported.checkpoint)[0]


def half_right(model, index):
    """The index with every second of the model's own best detections, moved a little, as its ground truth.

    A model of a few steps finds nothing; of this truth it finds some, and every score and box has a say in the mAP.
    """
    found = measuring.evaluate_model(model, index, DETECTION, image_size=SIZE, batch_size=4).detections
    rng = np.random.default_rng(0)
    samples = []
    for number, sample in enumerate(index.samples):
        rows = np.flatnonzero(found.image == number)[:20:2]
        boxes = found.boxes_xyxy[rows] + rng.uniform(-3, 3, (len(rows), 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        none = np.zeros(len(rows), dtype=bool)
        samples.append(
            dataclasses.replace(sample, boxes_xyxy=boxes, labels=found.labels[rows], ignore=none, area=area, crowd=none)
        )
    return dataclasses.replace(index, samples=tuple(samples))


@pytest.fixture(scope="module")
def index(exported, model):
    return half_right(model, open_dataset("yolo", exported.data, "test"))


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_map_is_that_of_pytorch(exported, model, index, kind):
    detector, info = load_detector(getattr(exported, kind))
    assert (info.arch, info.names, info.image_size, info.source) == (ARCH, NAMES, SIZE, "ours")
    expected, found = (
        measuring.evaluate_model(m, index, DETECTION, image_size=SIZE, batch_size=4) for m in (model, detector)
    )
    assert 0.05 < expected.numbers["mAP50-95"] < expected.numbers["mAP50"] < 0.95
    for name, value in expected.numbers.items():
        assert found.numbers[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    assert len(found.detections) == len(expected.detections)


def test_int8_is_near(exported, model, index):
    """Scores of int8 rank the locations as float32 does; how near is near enough, its mAP says."""
    images = next(iter(Loader(index, image_size=SIZE, batch_size=4, seed=0).epoch(0))).images.float() / 255
    with torch.no_grad():
        _, expected = model.decode(model(images))
    float32, int8 = (load_onnx(path)(images).scores for path in (exported.fixed, exported.int8))
    torch.testing.assert_close(float32, expected, rtol=0, atol=1e-5)
    assert 0 < (int8 - expected).abs().max() and load_onnx(exported.int8).info.precision == "int8"
    ranks = [scores.flatten().argsort().argsort().double() for scores in (expected, int8)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_predictor_finds_the_same_boxes(exported, model, kind):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((40, 90), (64, 64), (200, 120))]
    detector, _ = load_detector(getattr(exported, kind))
    expected, found = (predict.Predictor(m, image_size=SIZE, detection=DETECTION)(pictures) for m in (model, detector))
    for ours, theirs in zip(expected, found, strict=True):
        assert len(ours) == len(theirs) > 0 and torch.equal(ours.labels, theirs.labels)
        torch.testing.assert_close(ours.boxes_xyxy, theirs.boxes_xyxy, rtol=0, atol=1e-2)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)


def test_any_batch_and_size(exported, model):
    detector = load_onnx(exported.dynamic)
    for shape in ((1, 3, 96, 64), (5, 3, 64, 160), (2, 3, 32, 32)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.detect(model(images), **SETTINGS)
        found = detector.detect(detector(images), **SETTINGS)
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(ours.boxes_xyxy, theirs.boxes_xyxy, rtol=0, atol=1e-3)


def test_an_empty_answer_for_each_picture(exported):
    for path in (exported.dynamic, exported.fixed):
        detector = load_onnx(path)
        found = detector.detect(detector(torch.rand(3, 3, SIZE, SIZE)), **SETTINGS | {"score_threshold": 0.999})
        assert [len(detections) for detections in found] == [0, 0, 0]
        assert all(detections.boxes_xyxy.shape == (0, 4) for detections in found)


def test_scripts_take_the_file(exported, tmp_path, capsys):
    data = ["yolo", str(exported.data), "test"]
    arguments = [*data, "--score-threshold", "0", "--json"]
    for name, path in (("torch", exported.checkpoint), ("onnx", exported.dynamic)):
        eval.main([str(path), *arguments, str(tmp_path / f"{name}.json")])
    numbers = [json.loads((tmp_path / f"{name}.json").read_text())["numbers"] for name in ("torch", "onnx")]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4, nan_ok=True)
    capsys.readouterr()
    picture = str(exported.data / "images" / "test" / "000.png")
    options = ["--score-threshold", "0", "--max-detections", "5", "--json", "--no-pictures", "--quiet"]
    for name, path in (("torch", exported.checkpoint), ("onnx", exported.dynamic)):
        assert predict.main([str(path), picture, "--output", str(tmp_path / name), *options]) == 0
    rows = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("torch", "onnx")]
    assert len(rows[0]) == len(rows[1]) == 5
    np.testing.assert_allclose(*([row["bbox"] for row in side] for side in rows), atol=0.01)


def test_python_takes_the_file(exported):
    picture = exported.data / "images" / "test" / "000.png"
    ours, theirs = (retort.load(path).predict(picture, score=0.0) for path in (exported.checkpoint, exported.fixed))
    np.testing.assert_allclose(theirs[0].xyxy[:5], ours[0].xyxy[:5], atol=0.01)
    assert theirs[0].names[:5] == ours[0].names[:5] and len(theirs[0]) >= 5


def test_a_copy_shares_the_session(exported):
    detector = load_onnx(exported.fixed)
    assert copy.deepcopy(detector).session is detector.session


def test_what_cannot_be_read_is_one_line(exported, tmp_path):
    (tmp_path / "noise.onnx").write_bytes(b"no graph at all")
    (tmp_path / "cut.onnx").write_bytes(exported.fixed.read_bytes()[:5000])
    for name, message in [
        ("absent.onnx", "no such file, expected an ONNX file"),
        ("noise.onnx", "damaged or not an ONNX file"),
        ("cut.onnx", "damaged or not an ONNX file"),
    ]:
        with pytest.raises(UserError, match=rf"{name}: {message}") as error:
            load_detector(tmp_path / name)
        assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_a_file_of_others_is_refused(exported, tmp_path):
    import onnx

    graph = onnx.load(exported.fixed)
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match=r"foreign\.onnx: its metadata has no entry 'retort\.format'"):
        load_detector(tmp_path / "foreign.onnx")


def test_what_does_not_fit_is_refused(exported, index, tmp_path):
    with pytest.raises(UserError, match=rf"fixed\.onnx: holds {ARCH}, expected yolov8s"):
        load_detector(exported.fixed, "yolov8s")
    config = ["--config", str(exported.data.parent / "runs" / "tiny" / "config.yaml")]
    for call in (
        lambda: retort.evaluate(exported.fixed, "yolo", exported.data, precision="bfloat16"),
        lambda: eval.main([str(exported.fixed), *config, "evaluation.precision=bfloat16"]),
        lambda: eval.main([str(exported.fixed), "yolo", str(exported.data), "--precision", "bfloat16"]),
        lambda: predict.main([str(exported.fixed), str(exported.data), "--precision", "bfloat16"]),
    ):
        with pytest.raises(UserError, match=r"fixed\.onnx: computes in float32, found the precision bfloat16"):
            call()
    size = rf"found pictures of 96 px, expected {SIZE}, or a file exported with --dynamic"
    with pytest.raises(UserError, match=size):
        eval.main([str(exported.fixed), "yolo", str(exported.data), "test", "--image-size", "96"])
    with pytest.raises(UserError, match=size):
        pictures, output = str(exported.data / "images"), str(tmp_path / "out")
        predict.main([str(exported.fixed), pictures, "--image-size", "96", "--json", "--output", output])
    assert not (tmp_path / "out").exists()
    other = shutil.copytree(exported.data, tmp_path / "other")
    text = (other / "data.yaml").read_text()
    (other / "data.yaml").write_text(text.replace("[green, red]", "[cat, dog]"))
    with pytest.raises(UserError, match="no class in common: the dataset has cat, dog; the model has green, red"):
        eval.main([str(exported.fixed), "yolo", str(other), "test"])
    with pytest.raises(UserError, match="the model has 2 classes, the dataset 3"):
        other_index = dataclasses.replace(index, names=("a", "b", "c"))
        measuring.evaluate_model(load_onnx(exported.fixed), other_index, DETECTION, image_size=SIZE, batch_size=4)
