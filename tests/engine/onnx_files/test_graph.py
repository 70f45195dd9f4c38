"""The part of the graph that is written by hand: the selection of detections, the metadata, the traced network."""

import numpy as np
import pytest
import torch

from engine.onnx_files.graph import (
    DETECTIONS,
    FORMAT,
    PREFIX,
    GraphInfo,
    append_selection,
    float32_at_most,
    read_info,
    without_warnings,
    write_info,
)
from errors import UserError
from kernels.nms import select_detections
from structures import DetectionSettings
from tests.reference.nms_cases import random_boxes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import parser  # noqa: E402

from engine.onnx_files.detector import OnnxDetector, describe_onnx, open_session  # noqa: E402

INFO = GraphInfo(
    "yolov8n",
    ("disk", "Störche, weiß"),
    160,
    True,
    "float32",
    "ours",
    None,
    random_teachers=("dino",),
    classes=("ring",),
)
PASSED_THROUGH = """
<ir_version: 10, opset_import: ["" : 20]>
detector (float[batch, locations, 4] given_boxes, float[batch, locations, classes] given_scores)
    => (float[batch, locations, 4] boxes_xyxy, float[batch, locations, classes] scores)
{
    boxes_xyxy = Identity (given_boxes)
    scores = Identity (given_scores)
}
"""


@pytest.fixture(scope="module")
def selection():
    """selection(boxes_xyxy, scores, **thresholds) -> the four outputs as tensors; thresholds may be left out."""
    model = append_selection(parser.parse_model(PASSED_THROUGH), DetectionSettings(0.25, 0.5, 3))
    session = open_session(model.SerializeToString())

    def run(boxes_xyxy, scores, **thresholds):
        feed = {"given_boxes": np.float32(boxes_xyxy), "given_scores": np.float32(scores)}
        feed |= {name: np.array(value) for name, value in thresholds.items()}
        return dict(zip(DETECTIONS, map(torch.from_numpy, session.run(list(DETECTIONS), feed))))

    return run


def test_a_case_worked_by_hand(selection):
    """Two images, two classes. In image 0 the second box falls to the first; its other class survives."""
    boxes = [[[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], [[0, 0, 1, 1], [5, 5, 9, 9], [2, 2, 3, 3]]]
    scores = [[[0.5, 0.1], [0.4, 0.3], [0.25, 0.9]], [[0.1, 0.2], [0.3, 0.26], [0.2, 0.25]]]
    found = selection(boxes, scores)
    assert found["image"].tolist() == [0, 0, 0, 1, 1]
    assert found["labels"].tolist() == [1, 0, 1, 0, 1]
    np.testing.assert_allclose(found["scores"], [0.9, 0.5, 0.3, 0.3, 0.26])
    assert found["boxes_xyxy"].tolist() == [boxes[0][2], boxes[0][0], boxes[0][1], boxes[1][1], boxes[1][1]]
    assert {name: value.dtype for name, value in found.items()} == {
        "boxes_xyxy": torch.float32, "scores": torch.float32, "labels": torch.int64, "image": torch.int64,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("B", "A", "K", "score_threshold", "iou_threshold", "max_detections"),
    [
        (1, 300, 3, 0.25, 0.7, 300),
        (3, 200, 5, 0.5, 0.4, 20),  # more survive than may be reported
        (2, 400, 10, 0.001, 0.1, 300),
        (4, 30, 2, 0.9, 0.5, 5),  # some images have nothing
        (2, 50, 3, 2.0, 0.5, 10),  # none has
        (1, 300, 2, 0.3, 1.0, 30),  # nothing is suppressed
        (1, 1, 1, 0.0, 0.5, 1),
    ],
)
def test_chooses_what_select_detections_chooses(selection, B, A, K, score_threshold, iou_threshold, max_detections):
    """Order and ties included: scores are multiples of 1/50 and coordinates whole numbers."""
    rng = np.random.default_rng(A)
    boxes = torch.from_numpy(np.stack([random_boxes(rng, A) for _ in range(B)])).float().round()
    scores = torch.from_numpy(rng.integers(0, 50, (B, A, K)) / 50).float()
    expected = select_detections(
        boxes,
        scores,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )
    found = selection(
        boxes,
        scores,
        score_threshold=np.float32(score_threshold),
        iou_threshold=float32_at_most(iou_threshold),
        max_detections=max_detections,
    )
    assert len(found["scores"]) == sum(map(len, expected))
    for row, detections in enumerate(expected):
        of_row = found["image"] == row
        for name in ("boxes_xyxy", "scores", "labels"):
            assert torch.equal(found[name][of_row], getattr(detections, name)), name


def test_the_defaults_stand_where_nothing_is_given(selection):
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 40)[None], rng.random((1, 40, 2))
    assert len(selection(boxes, scores)["scores"]) == 3
    more = selection(boxes, scores, max_detections=7)
    assert len(more["scores"]) == 7 and more["scores"].min() > 0.25
    assert len(selection(boxes, scores, score_threshold=np.float32(1))["scores"]) == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 0.7, 1.0, 1 / 3])
def test_float32_at_most(value):
    rounded = float32_at_most(value)
    assert rounded.dtype == np.float32 and float(rounded) <= value < float(np.nextafter(rounded, np.float32(2)))


def test_the_metadata_come_back():
    model = parser.parse_model(PASSED_THROUGH)
    write_info(model, INFO)
    session = open_session(model.SerializeToString())
    entries = session.get_modelmeta().custom_metadata_map
    assert read_info(entries, "x.onnx") == INFO
    detector = OnnxDetector(session, INFO, "x.onnx")
    assert describe_onnx(detector).plumbing == "plumbing, not a measurement: random weights in dino"
    assert describe_onnx(detector).classes == ("ring",)  # eval.py measures on these alone, as for the checkpoint
    older = {k: v for k, v in entries.items() if k not in (f"{PREFIX}random_teachers", f"{PREFIX}classes")}
    detector.info = read_info(older, "x.onnx")
    assert describe_onnx(detector).plumbing == "" and describe_onnx(detector).classes == ()
    assert session.get_modelmeta().producer_name == "retort"


def test_foreign_and_damaged_metadata_are_one_line():
    model = parser.parse_model(PASSED_THROUGH)
    write_info(model, INFO)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries[f"{PREFIX}format"] == FORMAT
    for broken, message in [
        ({}, r"x\.onnx: its metadata has no entry 'retort\.format', expected a file that export\.py wrote"),
        (entries | {f"{PREFIX}format": "7"}, r"x\.onnx: found metadata of format '7', this code reads '1'"),
        (entries | {f"{PREFIX}random_teachers": "3"}, r"x\.onnx: its metadata is damaged: .*'random_teachers'"),
        (entries | {f"{PREFIX}names": "[1"}, r"x\.onnx: its metadata is damaged"),
        ({k: v for k, v in entries.items() if k != f"{PREFIX}arch"}, r"x\.onnx: its metadata is damaged.*arch"),
    ]:
        with pytest.raises(UserError, match=message):
            read_info(broken, "x.onnx")


def test_silence_ends():
    import logging
    import warnings

    logger = logging.getLogger("somebody")
    with without_warnings():
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
        warnings.warn("unheard", stacklevel=1)
    assert logger.isEnabledFor(logging.WARNING)
