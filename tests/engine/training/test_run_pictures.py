"""The pictures of a run: which there are, what they show, and that looking changes nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

import models
import train
from distill.adapters import resize_like
from engine.drawing.heat_maps import GAP, LINE
from engine.drawing.predictions import GAP as PAIR
from engine.drawing.predictions import HEADER, TILE, spread
from engine.runtime.processes import Processes
from engine.training import building, run_pictures
from engine.training.run_pictures import NUM_PICTURES, SIDE, evaluation_pictures, map_pictures, requesting
from engine.training.teaching import resize_images
from teachers.dinov2 import DINOv2
from tests.tiny_training import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
CELL = SIDE + GAP
TOP = 2 * LINE  # a heading, and titles of one line
TERMS = [
    {"teacher": "dino", "loss": "cosine", "weight": 1.0, "student_maps": ["p3"], "teacher_maps": ["block0"],
     "adapter": "conv1x1_norm"},
    {"teacher": "yolo", "loss": "attention", "weight": 1.0, "student_maps": ["p4", "p5"]},
    {"teacher": "yolo", "loss": "soft_class", "weight": 1.0, "student_maps": ["class_logits"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tiny_data, tmp_path_factory):
    """A run with a small DINOv2 and a YOLO of other widths, built and not begun."""
    torch.manual_seed(0)
    given = {"dino": DINOv2(width=16, depth=2, heads=2), "yolo": models.build("yolov5su", 2)}
    teachers = [{"name": "dino", "arch": "dinov2_vits14"}, {"name": "yolo", "arch": "yolov5su"}]
    config = tiny_config(tiny_data, tmp_path_factory.mktemp("runs"), teachers=teachers, terms=TERMS)
    return building.build(config, Processes("cpu"), given, lambda line: None)


def test_each_term_of_maps_has_a_sheet(parts):
    pictures = evaluation_pictures(parts, parts.splits.test)
    assert list(pictures) == ["predictions", "distillation/cosine_dino", "distillation/attention_yolo"]
    height = TOP + NUM_PICTURES * CELL
    dino, yolo = pictures["distillation/cosine_dino"], pictures["distillation/attention_yolo"]
    assert dino.width == 6 * CELL and yolo.width == 3 * CELL  # tokens and attention as well; no adapter to show
    for sheet, legend in ((dino, 3 * LINE + 2 * GAP), (yolo, 2 * LINE + GAP)):  # words; a bar for attention
        assert sheet.height == height + legend
        assert np.asarray(sheet.convert("L"))[height:].min() < 100


def test_what_the_columns_show(parts):
    sheet = np.asarray(map_pictures(parts, parts.splits.test)["cosine_dino"])[TOP:]
    cells = [sheet[:SIDE, number * CELL : number * CELL + SIDE] for number in range(6)]
    sample = parts.splits.test.samples[0]
    with Image.open(sample.image_path) as picture:
        shown = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert np.abs(cells[0].astype(int) - shown).mean() < 2
    assert all(cell.std() > 5 for cell in cells)
    grids = [len(np.unique(cell[0], axis=0)) for cell in (cells[1], cells[3], cells[4], cells[5])]
    assert grids == [5, 8, 8, 8]  # 70 px in patches of 14; p3 of 64 px, and both maps at its grid


def test_looking_changes_nothing(parts):
    parts.learner.train()
    requested = parts.teachers.models["dino"].requested_outputs
    assert requested == {"block0"}
    modules = (parts.student, parts.criterion, parts.ema.model, *parts.teachers.models.values())
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluation_pictures(parts, parts.splits.test)
    assert torch.equal(torch.rand(3), expected)
    for module, state in zip(modules, before):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert parts.student.training and parts.criterion.training and not parts.ema.model.training
    assert parts.teachers.models["dino"].requested_outputs == requested
    assert all(p.grad is None for p in parts.student.parameters())


def test_what_is_requested_is_as_before_after_an_error(parts):
    teacher = parts.teachers.models["dino"]
    with pytest.raises(RuntimeError), requesting(teacher, {"patches"}):
        assert teacher.requested_outputs == {"block0", "patches"}
        raise RuntimeError
    assert teacher.requested_outputs == {"block0"}


def test_a_run_without_terms_has_predictions_alone(tiny_data, tmp_path):
    alone = building.build(tiny_config(tiny_data, tmp_path), Processes("cpu"), None, lambda line: None)
    pictures = evaluation_pictures(alone, alone.splits.test)
    assert list(pictures) == ["predictions"] and map_pictures(alone, alone.splits.test) == {}


def test_predictions_stand_beside_the_labels(parts, monkeypatch):
    """With a model that finds nothing, the left picture of each pair has boxes and the right one is the plain one."""
    sheet = np.asarray(run_pictures.prediction_picture(parts, parts.splits.test, 1)).astype(int)
    assert sheet.shape == (HEADER + TILE + PAIR, 2 * TILE + PAIR, 3)
    for left in (0, TILE + PAIR):
        assert sheet[:HEADER, left : left + 80].min() < 100  # each half says what it is
    left, right = sheet[HEADER : HEADER + TILE, :TILE], sheet[HEADER : HEADER + TILE, TILE + PAIR :]
    sample = parts.splits.test.samples[0]
    with Image.open(sample.image_path) as picture:
        plain = np.asarray(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(right - plain).max() == 0
    drawn = (left != plain).any(2)
    assert 0.01 < drawn.mean() < 0.5
    x1, y1, x2, y2 = (TILE / 64 * sample.boxes_xyxy[0]).round().astype(int)
    assert drawn[min(y2, TILE - 1) - 1, (x1 + x2) // 2] and drawn[(y1 + y2) // 2, max(x1, 0)]


def test_the_adapted_map_is_shown_before_the_teachers(parts, monkeypatch):
    given = []

    def colors(adapted, t_map):
        given.extend((adapted, t_map))
        return [torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)]

    monkeypatch.setattr(run_pictures, "common_colors", colors)
    sheet = np.asarray(map_pictures(parts, parts.splits.test)["cosine_dino"])[TOP:]
    assert sheet[:SIDE, 4 * CELL : 4 * CELL + SIDE].max() == 0 and sheet[:SIDE, 5 * CELL : 5 * CELL + SIDE].min() == 255
    adapted, t_map = given
    assert adapted.shape == t_map.shape == (4, 16, 8, 8)
    with torch.no_grad():
        pictures = torch.stack([torch.from_numpy(read(sample)) for sample in spread(parts.splits.test, 4).samples])
        images = pictures.permute(0, 3, 1, 2).float() / 255
        expected = parts.teachers.models["dino"](resize_images(images, 70)).features["block0"]
    expected = resize_like(expected, adapted)  # both sides of this adapter are normalised
    deviations = expected - expected.mean((0, 2, 3), keepdim=True)
    expected = deviations / deviations.square().mean((0, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(t_map, expected, rtol=1e-3, atol=1e-3)


def read(sample):
    with Image.open(sample.image_path) as picture:
        return np.array(picture.convert("RGB"))


def test_without_tensorboard_no_picture_is_made(tmp_path):
    def never():
        raise AssertionError

    log = train.ScalarLog(tmp_path, enabled=False)
    log.add_pictures(never, 1)
    log.close()
    assert not list(tmp_path.iterdir())
