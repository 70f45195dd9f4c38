"""Runs on labelled and unlabelled pictures: the choice of pictures, pseudo boxes, and what a step learns from."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import models
import train
from datasets.loader import Loader
from engine.runtime.processes import Processes
from engine.training import building, pseudo_boxes, step
from engine.training.checks import check_config
from engine.training.dry_run import dry_run
from engine.training.splits import count_training_pictures, open_indexes
from errors import UserError
from structures import DetectionSettings
from tests.tiny_training import SIZE, open_splits

pytestmark = pytest.mark.usefixtures("one_thread")

ARCH = "yolov8_narrow"
PSEUDO = {"teacher": "t", "threshold": 0.5, "ignore_above": 0.2}
TERM = {"teacher": "t", "loss": "cwd", "weight": 1.0, "student_maps": ["p3"], "on": "unlabelled"}
NO_AUGMENTATION = dict.fromkeys(("mosaic", "scale", "translate", "flip_horizontal", "hue", "saturation", "value"), 0.0)


def few(**unlabelled):
    return {"per_class": 3, "unlabelled": {"rest": True, "labelled_share": 0.25} | unlabelled}


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    """A YOLOv8n that finds something everywhere, with the dataset's classes in another order and one more."""
    torch.manual_seed(1)
    model = models.build(ARCH, 3)
    with torch.no_grad():
        for branch in model.head.cls:
            branch[-1].bias.fill_(0.0)
            branch[-1].weight.normal_(0, 0.4)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    state = {"arch": ARCH, "names": ["red", "blue", "green"], "image_size": 96}
    checkpoint.save(path, state | {"ema": model.state_dict()})
    return path


@pytest.fixture
def make(make_tiny, teacher_path):
    """A tiny config with that teacher."""
    teacher = {"name": "t", "arch": ARCH, "weights": str(teacher_path)}
    return lambda **changes: make_tiny(**{"teachers": [teacher], "student": {"arch": ARCH}} | changes)


def quiet(line):
    pass


def ids(index, labelled):
    return [sample.image_id for sample in index.samples if sample.is_labelled == labelled]


# ---------------------------------------------------------------- the choice of pictures


def test_the_rest_of_the_training_split(make_tiny):
    indexes = {seed: open_indexes(make_tiny(seed=seed, data=few())) for seed in (0, 1)}
    for found in indexes.values():
        train, rest = ids(found["train"], True), ids(found["unlabelled"], False)
        assert len(train) == 6 and sorted(train + rest) == sorted(ids(found["whole"], True))
        assert all(len(sample) == 0 for sample in found["unlabelled"].samples)
    assert ids(indexes[0]["train"], True) != ids(indexes[1]["train"], True)
    fixed = [open_indexes(make_tiny(seed=seed, data=few() | {"draw_seed": 1})) for seed in (0, 1)]
    assert {tuple(ids(i["train"], True)) for i in fixed} == {tuple(ids(indexes[1]["train"], True))}
    assert count_training_pictures(make_tiny(data=few())) == 24
    capped = open_indexes(make_tiny(data={"max_samples": 4} | {"unlabelled": {"rest": True, "max_samples": 5}}))
    assert len(capped["train"]) == 4 and len(capped["unlabelled"]) == 5


def test_another_source_and_its_overlap(make_tiny, tiny_data, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 50, 3), ord(name), np.uint8)).save(more / f"{name}.png")
    config = make_tiny(data=few(root=str(more)))
    assert len(open_indexes(config)["unlabelled"]) == 20
    again = make_tiny(data=few(split="train"))  # the labelled ones among them stay labelled
    spelled = make_tiny(data=few(root=os.path.relpath(tiny_data / "images" / "train")))  # by other paths
    assert len(open_indexes(spelled)["unlabelled"]) == 18
    assert (
        sorted(ids(open_indexes(again)["unlabelled"], False))
        == sorted(ids(open_indexes(config)["unlabelled"], False))[:18]
    )
    picture = tiny_data / "images" / "test" / "000.png"
    (more / "copy.png").write_bytes(picture.read_bytes())
    lines = []
    splits = open_splits(config, lines.append)
    assert [len(overlap.shared) for overlap in splits.overlaps] == [0, 1]
    assert "1 of 8 pictures of test are also in unlabelled (1 the same bytes)" in lines[-1]
    with pytest.raises(UserError, match="no picture of its own: 8 of 8 pictures of test are also in unlabelled"):
        open_splits(make_tiny(data=few(split="test")), quiet)
    with pytest.raises(UserError, match=r"every picture of data.train is labelled"):
        open_indexes(make_tiny(data={"unlabelled": {"rest": True}}))


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_copy_of_a_labelled_picture_is_not_unlabelled(make_tiny, tmp_path, fraction):
    """By its bytes or as a link; the held-out pictures are among the labelled ones."""
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(more / "own.png")
    config = make_tiny(data=few(rest=False, root=str(more)) | {"holdout_fraction": fraction})
    labelled = [sample.image_path for sample in open_indexes(config)["train"].samples]
    for number, path in enumerate(labelled):
        (more / f"copy{number}.png").write_bytes(path.read_bytes())
    (more / "link.png").symlink_to(labelled[0])
    lines = []
    splits = open_splits(config, lines.append)
    assert [sample.image_path.name for sample in splits.reports["unlabelled"].index.samples] == ["own.png"]
    (said,) = [line for line in lines if "copy of a labelled picture" in line]
    assert f" {len(labelled) + 1}  duplicate dropped  copy of a labelled picture" in said
    assert count_training_pictures(config) == len(labelled) - round(fraction * len(labelled)) + 1
    (more / "own.png").unlink()
    with pytest.raises(UserError, match=r"'data\.unlabelled': all of its pictures are copies of labelled ones"):
        open_indexes(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"per_class": -1}}, "'data.per_class': found -1"),
        ({"data": {"per_class": 1, "max_samples": 2}}, "'data.per_class': found 1, .* without data.max_samples"),
        ({"data": {"draw_seed": 1}}, "'data.draw_seed': found 1, expected 0 or more beside data.per_class"),
        ({"data": {"unlabelled": {}}}, "'data.unlabelled': found no pictures"),
        ({"data": few(format="voc")}, "'data.unlabelled.format': found voc without a split"),
        ({"data": few(labelled_share=1.0)}, "labelled_share': found 1.0, expected a number between 0 and 1"),
        (
            {"data": few(labelled_share=0.3), "terms": [TERM]},
            "labelled_share': found 0.3, 2.4 of 8 images, expected",
        ),
        ({"data": few(pseudo=PSEUDO | {"threshold": 0})}, "pseudo.threshold': found 0"),
        ({"data": few(pseudo=PSEUDO | {"class_thresholds": {"red": "x"}})}, "class_thresholds.red': found 'x'"),
        ({"data": few(pseudo=PSEUDO | {"ignored_per_object": 1.0})}, "expected boxes_per_object beside it"),
        ({"data": few(pseudo=PSEUDO | {"boxes_per_object": -1.0})}, "boxes_per_object': found -1.0"),
        ({"data": few(pseudo=PSEUDO | {"image_size": 50})}, "image_size': found 50, expected a multiple of 32"),
        ({"data": few(pseudo=PSEUDO | {"teacher": "x"})}, "pseudo.teacher': found 'x', expected t"),
        ({"data": few()}, "no term names the teacher 't'"),
        ({"data": few(), "terms": [TERM | {"on": "labelled"}]}, "no term acts on these pictures"),
        ({"terms": [TERM]}, "'terms.0.on': found unlabelled without data.unlabelled"),
        ({"data": few(pseudo=PSEUDO), "detection_weight": 0.0, "terms": [TERM]}, "nothing learns from boxes"),
        ({"data": {"train": None}}, "'data.train': found null"),
        ({"data": {"train": None, "unlabelled": {"rest": True, "pseudo": PSEUDO}}}, "unlabelled.rest': there are no"),
        (
            {"data": {"train": None, "unlabelled": {"split": "train"}}, "terms": [TERM]},
            "'detection_weight': found 1.0 without labelled pictures",
        ),
    ],
)
def test_refused_before_any_picture_is_listed(make, monkeypatch, changes, message):
    monkeypatch.setattr("engine.training.splits.open_dataset", None)
    with pytest.raises(UserError, match=message):
        check_config(make(**changes))


def test_several_processes_need_equally_many_labelled_images(make):
    def check(processes, **changes):
        check_config(make(data=few(**changes) | {"pictures_per_epoch": 16}, terms=[TERM]), processes=processes)

    check(2)
    for processes, share in ((4, 0.25), (2, None)):
        with pytest.raises(UserError, match=f"gives each of {processes} processes equally many"):
            check(processes, labelled_share=share)


def test_classes_of_the_teacher_are_joined_by_name(make, tmp_path):
    """The teacher's list is red, blue, green at 96 px; the dataset's is green, red."""
    config = make(data=few(pseudo=PSEUDO))
    indexes = open_indexes(config)

    def pseudo_of(config):
        teacher = pseudo_boxes.open_pseudo_teacher(config, indexes["train"].names, {}, quiet)
        options = dict(folder=tmp_path, device=torch.device("cpu"), say=quiet)
        settings = config.data.unlabelled.pseudo
        pictures, size = indexes["unlabelled"], teacher.image_size
        found = pseudo_boxes.detect_once(teacher.model, pictures, size, teacher.detection, **options)
        return pseudo_boxes.make_pseudo_boxes(teacher, settings, found, len(pictures), indexes["train"])

    made = pseudo_of(config)
    assert (made.image_size, made.iou_threshold, made.pictures) == (96, 0.7, 18)
    model, _ = checkpoint.load_model(config.teachers[0].weights)
    loader = Loader(indexes["unlabelled"], image_size=96, batch_size=18, seed=0, shuffle=False)
    with torch.no_grad():
        output = model.eval()(next(loader.epoch(0)).images / 255)
    found = model.detect(output, score_threshold=0.01, iou_threshold=0.7, max_detections=300)
    for name, column in (("red", 0), ("green", 2)):
        expected = torch.cat([detections.scores[detections.labels == column] for detections in found])
        scores = made.detections.scores[made.detections.labels == made.names.index(name)]
        np.testing.assert_allclose(sorted(scores), expected.sort().values, rtol=1e-3, atol=1e-4)
    assert pseudo_of(make(data=few(pseudo=PSEUDO | {"image_size": 32}))).image_size == 32
    with pytest.raises(UserError, match="class_thresholds': found 'z', expected some of green, red"):
        pseudo_of(make(data=few(pseudo=PSEUDO | {"class_thresholds": {"z": 0.5}})))
    teacher = dataclasses.replace(config.teachers[0], image_size=64)
    assert pseudo_of(dataclasses.replace(config, teachers=(teacher,))).image_size == 64
    aliased = dataclasses.replace(config.teachers[0], aliases={"green": "blue", "red": "red"})
    blue = torch.cat([detections.scores[detections.labels == 1] for detections in found])
    scores = pseudo_of(dataclasses.replace(config, teachers=(aliased,))).detections
    np.testing.assert_allclose(sorted(scores.scores[scores.labels == 0]), blue.sort().values, rtol=1e-3, atol=1e-4)


def test_other_classes_of_the_teacher_take_no_places(make, tmp_path, monkeypatch):
    """Of each picture the best five detections of green and red count, however many of blue are better."""
    published = DetectionSettings(0.001, 0.7, max_detections=5)
    monkeypatch.setattr("models.published_detection", lambda arch: published)
    config = make(data=few(pseudo=PSEUDO))
    indexes = open_indexes(config)
    teacher = pseudo_boxes.open_pseudo_teacher(config, indexes["train"].names, {}, quiet)
    settings, pictures = config.data.unlabelled.pseudo, indexes["unlabelled"]
    options = dict(folder=tmp_path, device=torch.device("cpu"), say=quiet)
    found = pseudo_boxes.detect_once(teacher.model, pictures, teacher.image_size, teacher.detection, **options)
    made = pseudo_boxes.make_pseudo_boxes(teacher, settings, found, len(pictures), indexes["train"]).detections
    for image in range(len(pictures)):
        own = (found.image == image) & (found.labels != 1)  # its list is red, blue, green
        assert own.sum() > 5
        assert sorted(made.scores[made.image == image]) == sorted(found.scores[own])[-5:]


# ---------------------------------------------------------------- steps and runs


def test_a_step_learns_from_labelled_images_alone(make, monkeypatch):
    """The detection losses of a mixed batch are those of its labelled images; without any they count 0."""
    config = make(data=few(), terms=[TERM], augment=NO_AUGMENTATION)
    setup = building.build(config, Processes("cpu"), None, quiet)
    batch = next(setup.loader.epoch(0))
    assert batch.is_labelled.tolist() == [True] * 2 + [False] * 6 and set(batch.targets.image.tolist()) == {0, 1}
    seen = []
    losses = setup.student.losses
    monkeypatch.setattr(
        setup.student, "losses", lambda output, targets: seen.append((output, targets)) or losses(output, targets)
    )
    (row,) = train.train_step(setup, [batch], train.TrainingState(), train.RunFolder(setup.config.runs))
    ((output, targets),) = seen
    assert len(output.class_logits) == 2 and len(targets) == len(batch.targets)
    assert all(row[name] > 0 for name in ("box", "cls", "dfl", "cwd_t"))
    unlabelled = dataclasses.replace(batch, is_labelled=torch.zeros(8, dtype=torch.bool))
    (row,) = train.train_step(setup, [unlabelled], train.TrainingState(), train.RunFolder(setup.config.runs))
    assert [row[name] for name in ("box", "cls", "dfl")] == [0, 0, 0] and row["cwd_t"] > 0


def test_pseudo_boxes_are_learnt_on_all_images(make):
    config = make(data=few(pseudo=PSEUDO | {"boxes_per_object": 1.0}))
    setup = building.build(config, Processes("cpu"), None, quiet)
    batch = next(setup.loader.epoch(0))
    assert not batch.is_labelled.all() and set(batch.targets.image.tolist()) == set(range(8))
    losses = setup.student.losses(output := setup.student(batch.images.float() / 255), batch.targets)
    found = step.detection_losses(setup, output, batch.targets, batch.is_labelled)
    assert {name: value.item() for name, value in found.items()} == {name: x.item() for name, x in losses.items()}
    tree = setup.splits.pseudo.to_tree()["classes"]
    ignored = sum(int(sample.ignore.sum()) for sample in setup.splits.train.samples)
    assert ignored == sum(counts["ignored"] for counts in tree.values()) > 0
    objects = sum(int((~sample.ignore).sum()) for sample in setup.splits.train.samples if not sample.is_labelled)
    assert objects == sum(counts["objects"] for counts in tree.values()) > 0


def test_a_dry_run_writes_nothing(make, capsys):
    config = make(data=few(pseudo=PSEUDO), terms=[TERM])
    dry_run(config)
    out = capsys.readouterr().out
    assert not train.Path(config.runs).exists()
    assert "6 labelled and 18 unlabelled pictures" in out and "batch: 8 pictures, 2 of them labelled" in out
    assert "pseudo boxes of teacher 't' at 96 px in 18 pictures, suppressed above IoU 0.7" in out


def test_without_any_label(make):
    """Terms alone, and pseudo boxes alone; test pictures give the classes."""
    term = TERM | {"on": "all"}
    data = {"train": None, "unlabelled": {"split": "train"}}
    setup = building.build(make(data=data, terms=[term], detection_weight=0.0), Processes("cpu"), None, quiet)
    assert setup.splits.labelled == 0 and setup.splits.unlabelled == 24 and setup.steps_per_epoch == 3
    batch = next(setup.loader.epoch(0))
    (row,) = train.train_step(setup, [batch], train.TrainingState(), train.RunFolder(setup.config.runs))
    assert list(row) == ["cwd_t"] and row["cwd_t"] > 0
    data["unlabelled"]["pseudo"] = PSEUDO
    setup = building.build(make(data=data), Processes("cpu"), None, quiet)
    assert setup.splits.labelled == 0 and len(next(setup.loader.epoch(0)).targets) > 0
    with pytest.raises(UserError, match="boxes_per_object': there are no labelled pictures"):
        data["unlabelled"]["pseudo"] = PSEUDO | {"boxes_per_object": 1.0}
        check_config(make(data=data))


def test_mosaics_are_of_one_kind(make):
    """Of eight images the labelled two are mixed with one another only, so no box comes into an unlabelled one."""
    everything = {"mosaic": 1.0, "mixup": 1.0, "close_mosaic_epochs": 0}
    setup = building.build(make(data=few(), terms=[TERM], augment=everything), Processes("cpu"), None, quiet)
    for number, batch in enumerate(setup.loader.epoch(0)):
        images, targets, _ = step.augment_batch(setup, batch, 0, number)
        assert len(targets) and batch.is_labelled[targets.image].all() and images.shape == (8, 3, SIZE, SIZE)


def test_a_run_is_reported_and_resumed_with_the_same_bytes(make, monkeypatch, capsys):
    """Stopped after one of three steps. Its boxes come from the file that the first part wrote; others are refused."""
    config = make(data=few(pseudo=PSEUDO), terms=[TERM], save_every_steps=1, epochs=1)
    report = train.run(config)
    out = capsys.readouterr().out
    assert report["labelled_pictures"] == 6 and report["unlabelled_pictures"] == 18
    assert report["pseudo_boxes"]["teacher"] == "t" and set(report["pseudo_boxes"]["classes"]) == {"green", "red"}
    assert "6 labelled and 18 unlabelled pictures" in out and "of teacher 't' at 96 px in 18 pictures" in out
    whole = checkpoint.load(f"{config.runs}/tiny/weights/last.pt")
    other = dataclasses.replace(config, name="stopped")
    step = train.train_step

    def stop_after_one(setup, batches, state, folder):
        if state.step == 1:
            raise KeyError("stop")
        return step(setup, batches, state, folder)

    monkeypatch.setattr(train, "train_step", stop_after_one)
    with pytest.raises(KeyError):
        train.run(other, quiet=True)
    monkeypatch.setattr(train, "train_step", step)
    changed = make(data=few(pseudo=PSEUDO | {"threshold": 0.49}), terms=[TERM], name="stopped", epochs=1)
    with pytest.raises(UserError, match=r"'data.unlabelled.pseudo.threshold': the run was started with 0.5,"):
        train.run(changed, resume=True, quiet=True)
    with pytest.raises(UserError, match="not those that the run started with"):
        train.run(changed, resume=True, quiet=True, allow_change=("data.unlabelled",))
    made = []
    monkeypatch.setattr(pseudo_boxes, "detect_all", lambda *args: made.append(args))
    train.run(other, resume=True, quiet=True)
    resumed = checkpoint.load(f"{config.runs}/stopped/weights/last.pt")
    assert not made and resumed["step"] == whole["step"] == 3
    for part in ("model", "ema"):
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
