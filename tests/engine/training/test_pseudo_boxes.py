"""Pseudo boxes: the thresholds, what a detection becomes, and the teacher's one look at each picture."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from config import PseudoBoxConfig
from datasets.index import DatasetIndex
from datasets.unlabelled import unlabelled_sample
from engine.training import pseudo_boxes
from engine.training.pseudo_boxes import PseudoBoxes, choose_thresholds, detect_once, score_of_rank
from metrics.tables import DetectionTable
from structures import Detections, DetectionSettings, select_images
from tests.datasets.test_unlabelled import index_of
from tests.distill import test_images
from tests.distill.losses.mutants.machinery import Edit, apply_edit

pytestmark = pytest.mark.usefixtures("one_thread")


def table(*rows):
    """Detections as (image, score, label), each with a box of its own."""
    image, scores, labels = zip(*rows)
    boxes = np.array([[n, n, n + 10.0, n + 5.0] for n in range(len(rows))])
    return DetectionTable(np.array(image), boxes, np.array(scores, float), np.array(labels))


FOUND = table((0, 0.9, 0), (0, 0.3, 0), (2, 0.1, 0), (1, 0.6, 1), (1, 0.5, 1), (2, 0.25, 1), (2, 0.7, 1))


def test_scores_of_rank():
    check_rank(score_of_rank)
    for ranks in ([1, 2], [3, 4]):  # as many detections reach the score
        reached = FOUND.scores >= score_of_rank(FOUND, np.array(ranks))[FOUND.labels]
        assert np.bincount(FOUND.labels[reached]).tolist() == ranks


def check_rank(rank):
    assert rank(FOUND, np.array([1, 3])).tolist() == [0.9, 0.5]
    assert rank(FOUND, np.array([2.6, 0.4])).tolist() == [0.1, np.inf]
    assert rank(FOUND, np.array([4, 5])).tolist() == [pseudo_boxes.LOWEST_SCORE] * 2


@pytest.mark.parametrize(
    "old, new",
    [
        ("own[rank - 1]", "own[rank - 2]"),
        ("[::-1]", ""),
        ("np.round(ranks)", "ranks"),
        ("found.labels == label", "found.labels >= 0"),
    ],
)
def test_wrong_ranks_are_told(old, new):
    with pytest.raises(AssertionError):
        check_rank(apply_edit(score_of_rank, Edit(old, new)))


@pytest.mark.parametrize(
    "function, old, new",
    [
        (select_images, "chosen.nonzero()", "(~chosen).nonzero()"),
        (select_images, "if f.metadata == OF_BATCH:", "if f.metadata == 0:"),
        (select_images, "[value[row] for row in rows.tolist()]", "value[: len(rows)]"),
    ],
)
def test_wrong_selections_are_told(function, old, new, monkeypatch):
    monkeypatch.setattr(test_images, "select_images", apply_edit(function, Edit(old, new)))
    with pytest.raises(AssertionError):
        test_images.test_select_images()


def test_thresholds_by_the_labelled_pictures():
    labelled = dataclasses.replace(index_of([[0, 1, 1], [1], [1], [0]], ignored=(3,)), names=("a", "b"))
    settings = PseudoBoxConfig("t", boxes_per_object=1.0, ignore_above=0.2)
    # 1/4 and 1 objects a picture: of 4 pictures without labels, 1 and 4.
    thresholds, floors = choose_thresholds(settings, FOUND, 4, labelled)
    assert thresholds.tolist() == [0.9, 0.25] and floors.tolist() == [0.2, 0.2]
    settings = dataclasses.replace(settings, boxes_per_object=0.5, ignored_per_object=0.25, class_thresholds={"a": 0.3})
    thresholds, floors = choose_thresholds(settings, FOUND, 4, labelled)
    assert thresholds.tolist() == [0.3, 0.6] and floors.tolist() == [0.9, 0.5]


def pictures(*sizes):
    samples = [unlabelled_sample(f"{n}.png", n, width, height) for n, (width, height) in enumerate(sizes)]
    return DatasetIndex(("a", "b"), tuple(samples))


def test_detections_become_objects_ignored_regions_or_nothing():
    made = PseudoBoxes("t", 64, 0.7, ("a", "b"), FOUND, np.array([0.4, 0.55]), np.array([0.2, 0.3]), 4)
    index = made.index(pictures(*[(30, 20)] * 4))
    assert [sample.labels.tolist() for sample in index.samples] == [[0, 0], [1, 1], [1], []]
    assert [sample.ignore.tolist() for sample in index.samples] == [[False, True], [False, True], [False], []]
    assert index.samples[1].boxes_xyxy.tolist() == FOUND.boxes_xyxy[[3, 4]].tolist()
    assert index.samples[2].boxes_xyxy.tolist() == FOUND.boxes_xyxy[[6]].tolist()
    assert index.samples[0].area.tolist() == [50, 50] and not any(s.is_labelled for s in index.samples)
    tree = json.loads(json.dumps(made.to_tree(), allow_nan=False))
    assert tree["classes"]["a"] == {"threshold": 0.4, "ignore_above": 0.2, "objects": 1, "ignored": 1}
    assert tree["classes"]["b"] == {"threshold": 0.55, "ignore_above": 0.3, "objects": 2, "ignored": 1}
    nothing = dataclasses.replace(made, thresholds=np.array([np.inf, 0.55]))
    assert json.loads(json.dumps(nothing.to_tree(), allow_nan=False))["classes"]["a"]["threshold"] is None
    assert str(nothing).splitlines()[2].split() == ["a", "-", "0.200", "0", "2"]


def test_a_table_without_an_object_warns():
    made = PseudoBoxes("t", 64, 0.7, ("a", "b"), FOUND, np.array([0.91, 0.71]), np.array([0.2, 0.3]), 4)
    warning = "warning: teacher 't' finds no object, its best score: 0.900; the student learns"
    assert warning in str(made)
    assert "its best score: none;" in str(dataclasses.replace(made, detections=DetectionTable.empty()))
    assert "warning" not in str(dataclasses.replace(made, thresholds=np.array([0.9, 0.71])))


class Corner(torch.nn.Module):
    """Finds one object in every image: the upper left quarter of its content, which it takes to be black."""

    def __init__(self, score: float = 0.5) -> None:
        super().__init__()
        self.score = torch.nn.Parameter(torch.tensor(score))
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return images

    def detect(self, output, *, score_threshold, iou_threshold, max_detections):
        found = []
        for image in output:
            y, x = (image.amax(0) == 0).nonzero().unbind(1)
            x1, y1, x2, y2 = x.min(), y.min(), x.max() + 1, y.max() + 1
            box = torch.stack((x1, y1, (x1 + x2) / 2, (y1 + y2) / 2)).float()[None]
            found.append(Detections(box, self.score.detach()[None], torch.tensor([1])))
        return found


@pytest.fixture
def black(tmp_path):
    """Three black pictures of several sizes."""
    samples = []
    for number, (width, height) in enumerate(((80, 40), (32, 32), (20, 60))):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
        samples.append(unlabelled_sample(path, number, width, height))
    return DatasetIndex(("a", "b"), tuple(samples))


def test_the_teacher_sees_whole_files_once(black, tmp_path):
    """Boxes are in pixels of the files. A second call reads them, until model, size, settings or pictures differ."""
    settings = DetectionSettings(0.01, 0.7, 300)
    said, folder = [], tmp_path / "kept"

    def detect(model, index=black, image_size=64, keep=True, **changes):
        options = dict(folder=folder, device=torch.device("cpu"), say=said.append, keep=keep)
        return detect_once(model, index, image_size, dataclasses.replace(settings, **changes), **options)

    model = Corner()
    found = detect(model)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    assert model.seen == [(3, 3, 64, 64)] and found.image.tolist() == [0, 1, 2] and found.scores.tolist() == [0.5] * 3
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, 40, 20], [0, 0, 16, 16], [0, 0, 10, 30]], atol=1)
    again = detect(model)
    assert len(model.seen) == 1 and len(list(folder.iterdir())) == 1
    for name in pseudo_boxes.COLUMNS:
        assert np.array_equal(getattr(found, name), getattr(again, name))
    for other in (Corner(0.6), {"image_size": 32}, {"iou_threshold": 0.5}, {"index": black.subset([0])}):
        count = len(list(folder.iterdir()))
        detect(**{"model": model} | other) if isinstance(other, dict) else detect(other)
        assert len(list(folder.iterdir())) == count + 1
    for damaged in (b"", whole[:200], whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :]):
        path.write_bytes(damaged)
        said.clear()
        assert np.array_equal(detect(model).boxes_xyxy, found.boxes_xyxy) and "damaged, made again" in said[0]
    assert path.read_bytes() == whole
    path.unlink()
    assert len(detect(model, keep=False)) == 3 and not path.exists()


def test_other_pictures_of_the_same_names_and_sizes_are_looked_at_anew(black, tmp_path):
    """Frames without compression: a file of another picture has as many bytes, and here the same name and time."""
    model, options = Corner(), dict(folder=tmp_path / "kept", device=torch.device("cpu"), say=print)
    settings = DetectionSettings(0.01, 0.7, 300)
    path, found = tmp_path / "frame.bmp", []
    index = DatasetIndex(("a", "b"), (unlabelled_sample(path, 0, 32, 32),))
    for x1 in (0, 16):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[:, x1 : x1 + 16] = 0
        Image.fromarray(pixels).save(path)
        os.utime(path, (0, 0))
        found.append(detect_once(model, index, 32, settings, **options).boxes_xyxy[0, 0])
    assert found == [0, 16] and len(model.seen) == 2
    detect_once(model, index, 32, settings, **options)
    assert len(model.seen) == 2  # the same bytes: its file is read
