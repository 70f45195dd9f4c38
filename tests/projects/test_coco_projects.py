"""The published projects that teach YOLOv8s by RT-DETR and Faster R-CNN on COCO, from released files to a comparison.

The files are written here, with random weights under the released names: that shows what is connected to what, not that
it helps. rtdetr_r18vd, fasterrcnn_resnet18 and yolov8_narrow, which have the same parts, stand in for rtdetr_x,
fasterrcnn_resnet50 and yolov8s where time matters.
"""

import json
import re

import pytest
import torch

import checkpoint
import compare
import models
from datasets.class_names import COCO, coco_by_id
from datasets.open import open_dataset
from distill.criterion import TeacherFacts, common_classes
from engine.comparison.study import load_study
from engine.runtime import run_folder
from engine.runtime.processes import Processes
from engine.training import building, reporting
from engine.training.dry_run import losses_of_batch
from engine.training.step import augment_batch, set_learning_rates
from errors import UserError
from tests.conftest import ROOT
from tests.reference import golden_models
from weights import layouts_of

RTDETR, FASTERRCNN, BOTH = (
    str(ROOT / "configs" / "studies" / f"coco_yolov8s_from_{name}.yaml")
    for name in ("rtdetr_x", "fasterrcnn_resnet50", "two_teachers")
)
SMALL = (
    "image_size=64", "epochs=1", "batch_size=2", "evaluation.every_epochs=0", "evaluation.batch_size=2",
    "data.workers=0", "device=cpu", "precision=float32", "optimizer.accumulate=1", "optimizer.warmup_epochs=0.0",
    "student.arch=yolov8_narrow",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread", "small_second_stage")


def released_state(model):
    """Its entries under the names of its released file: the table read from right to left, and what it leaves out."""
    table = layouts_of(model)[0].table
    rows = sorted(((old, new) for old, new in table if new is not None), key=lambda row: len(row[1]), reverse=True)
    state = {old.format(0, 0, 0): torch.zeros(1) for old, new in table if new is None}
    for name, value in model.state_dict().items():
        for old, new in rows:
            match = re.match(re.escape(new).replace(r"\{\}", r"(\d+)"), name)
            if match and old.count("{}") == len(match.groups()):
                state[old.format(*match.groups()) + name[match.end() :]] = value
                break
    if (embedding := "decoder.denoising_class_embed.weight") in state:  # the authors' has one more row, for padding
        state[embedding] = torch.cat((state[embedding], torch.zeros(1, state[embedding].shape[1])))
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Neither file names its classes, as released: 90 category ids in one, COCO's 80 classes in the other."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(released_state(models.build("fasterrcnn_resnet18", 90)), folder / "fasterrcnn.pth")
    rtdetr = released_state(models.build("rtdetr_r18vd", 80))
    torch.save({"ema": {"module": rtdetr}}, folder / "rtdetr.pth")
    return folder


@pytest.fixture(scope="module")
def pictures(shared_data, tmp_path_factory):
    """Four pictures of COCO to train on and two to test on, in the layout and under the splits of COCO 2017."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    labels = json.loads((shared_data / "coco128" / "annotations" / "instances_train2017.json").read_text())
    for split, images in (("train2017", labels["images"][:4]), ("val2017", labels["images"][4:6])):
        (root / "images" / split).symlink_to(shared_data / "coco128" / "images" / "train2017")
        ids = {image["id"] for image in images}
        rows = [row for row in labels["annotations"] if row["image_id"] in ids]
        tree = {"images": images, "annotations": rows, "categories": labels["categories"]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    return root


@pytest.fixture
def study_of(pictures, files, tmp_path, monkeypatch):
    """A shipped file as a study of one step a row, its teachers read from `files`; pictures are left to other tests."""
    monkeypatch.setattr(reporting, "evaluation_pictures", lambda *args: {})
    monkeypatch.setattr(compare.plot, "write", lambda *args, **options: None)

    def study(path, *more):
        text = open(path).read()
        names = [name for name in re.findall(r"name: (rtdetr_x|fasterrcnn)\b", text)]
        overrides = []
        for index, name in enumerate(names):
            if name == "rtdetr_x":
                overrides += [f"teachers.{index}.arch=rtdetr_r18vd", f"teachers.{index}.weights={files / 'rtdetr.pth'}"]
            else:
                overrides += [f"teachers.{index}.image_size=96", f"teachers.{index}.arch=fasterrcnn_resnet18"]
                overrides += [f"teachers.{index}.weights={files / 'fasterrcnn.pth'}"]
        return load_study(path, [*SMALL, f"data.root={pictures}", f"runs={tmp_path}", *overrides, *more])

    return study


def row_of(study, name):
    return next(row for row in study.rows if row.name == name)


@pytest.mark.parametrize(
    "path, row, terms",
    [
        (RTDETR, "mse", 3),
        (FASTERRCNN, "both", 3),
        (BOTH, "confidence", 6),
    ],
    ids=["mse", "both", "confidence"],
)
def test_only_the_student_and_the_adapters_learn(path, row, terms, study_of):
    """terms: how many maps are read through a 1x1 convolution."""
    config = row_of(study_of(path), row).config
    parts = building.build(config, Processes("cpu"), None, lambda line: None)
    teachers = parts.teachers.models
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in teachers.items()}
    learning = [*parts.student.named_parameters(), *parts.criterion.named_parameters()]
    old = {name: value.detach().clone() for name, value in learning}
    assert len(old) == len(learning)
    optimized = {id(value) for group in parts.optimizer.param_groups for value in group["params"]}
    assert optimized == {id(value) for _, value in learning}
    assert sum(value.dim() == 4 for value in parts.criterion.parameters()) == terms

    images, targets, _ = augment_batch(parts, next(parts.loader.epoch(0)), 0, 0)
    parts.learner.train()
    losses = losses_of_batch(parts, images, targets, parts.teachers(images), 0.5)
    assert all(losses[name].item() > 0 for name in parts.criterion.terms) and len(parts.criterion.terms) > 0
    sum(losses.values()).backward()
    idle = [name for name, value in learning if value.dim() == 4 and not value.grad.abs().sum() > 0]
    assert all(name.startswith("head.box.") for name in idle)  # of a level without objects in these pictures
    set_learning_rates(parts, 1)
    parts.optimizer.step()
    assert not [name for name, value in learning if value.dim() == 4 and torch.equal(value, old[name])]
    for name, model in teachers.items():
        assert not model.training and all(v.grad is None and not v.requires_grad for v in model.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())


def test_a_torchvision_file_is_read_by_category_id(files, pictures):
    """The label of a dataset's class and the teacher's column of it: the ids in the labels' own file say which."""
    model, info = checkpoint.load_model(files / "fasterrcnn.pth", "fasterrcnn_resnet18")
    assert model.num_classes == 90 and info.names == coco_by_id() and info.source == "public"
    index = open_dataset("coco", pictures, "train2017")
    s_columns, t_columns = common_classes("fasterrcnn", index.names, TeacherFacts(info.names))
    assert s_columns.tolist() == list(range(80))
    assert (t_columns + 1).tolist() == list(index.category_ids)


def test_the_authors_rtdetr_knows_cocos_classes(files):
    _, info = checkpoint.load_model(files / "rtdetr.pth", "rtdetr_r18vd")
    assert info.names == COCO


def test_confidence_makes_the_difference(study_of):
    """The same losses, each teacher's times its own factor; the two factors have mean 1."""
    study, found = study_of(BOTH), {}
    for name in ("fixed", "confidence"):
        parts = building.build(row_of(study, name).config, Processes("cpu"), None, lambda line: None)
        images, targets, _ = augment_batch(parts, next(parts.loader.epoch(0)), 0, 0)
        parts.learner.eval()
        losses = losses_of_batch(parts, images, targets, parts.teachers(images), 0.5)
        found[name] = {term: losses[term] for term in parts.criterion.terms}
    factors = {name: (found["confidence"][name] / found["fixed"][name]).item() for name in found["fixed"]}
    assert factors["pkd_rtdetr_x"] == pytest.approx(factors["box_classes_rtdetr_x"], rel=1e-4)
    assert factors["pkd_fasterrcnn"] == pytest.approx(factors["box_classes_fasterrcnn"], rel=1e-4)
    assert factors["pkd_rtdetr_x"] + factors["pkd_fasterrcnn"] == pytest.approx(2, rel=1e-4)
    assert abs(factors["pkd_rtdetr_x"] - 1) > 0.01


def test_the_rows_and_what_they_are_compared_to():
    rows = {path: {row.name: row for row in load_study(path).rows} for path in (RTDETR, FASTERRCNN, BOTH)}
    assert list(rows[RTDETR]) == ["baseline", "mse", "cosine", "pkd"]
    assert list(rows[FASTERRCNN]) == ["baseline", "box_classes", "features", "both"]
    assert list(rows[BOTH]) == ["baseline", "rtdetr_x", "fasterrcnn", "fixed", "confidence"]
    for name in ("mse", "cosine", "pkd"):
        (term,) = rows[RTDETR][name].config.terms
        assert (term.loss, term.adapter, term.student_maps) == (name, "conv1x1", ("p3", "p4", "p5"))
    assert rows[BOTH]["confidence"].config.terms == rows[BOTH]["fixed"].config.terms
    assert [rows[BOTH][name].config.teacher_weighting for name in ("fixed", "confidence")] == ["fixed", "confidence"]
    assert len(rows[BOTH]["confidence"].config.teachers) == 2
    for study in rows.values():
        assert not study["baseline"].config.teachers and all("baseline" in r.against for r in list(study.values())[1:])
        assert {row.config.student.arch for row in study.values()} == {"yolov8s"}


def test_a_student_has_the_published_size():
    """11.1 M parameters, as the published project says of its student."""
    with torch.device("meta"):
        assert 11.1e6 <= sum(p.numel() for p in models.build("yolov8s", 80).parameters()) < 11.2e6


def test_what_is_missing_can_be_fetched(study_of):
    for path, name, arch in ((RTDETR, "mse", "rtdetr_x"), (FASTERRCNN, "both", "fasterrcnn_resnet50")):
        config = row_of(study_of(path, "teachers.0.weights=none.pt", f"teachers.0.arch={arch}"), name).config
        with pytest.raises(UserError, match=rf"none.pt: no such file.*python -m datasets.download {arch} --root data"):
            building.build(config, Processes("cpu"), None, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, rows",
    [(RTDETR, ["baseline", "pkd"]), (FASTERRCNN, ["both"]), (BOTH, ["confidence"])],
    ids=["rtdetr", "fasterrcnn", "both"],
)
def test_from_files_to_the_comparison(path, rows, study_of):
    study = study_of(path)
    results = {result.name: result for result in compare.compare(study, only=rows)}
    for name in rows:
        row = row_of(study, name)
        (epoch,) = run_folder.read_metrics(row.folder(0) / "metrics.csv")
        logged = {column for column in epoch if column.startswith("train/")}
        terms = {f"train/{term.loss}_{term.teacher}" for term in row.config.terms}
        assert terms <= logged and all(float(epoch[column]) > 0 for column in terms)
        assert 0 <= results[name].values("mAP50")[0] <= 1
        state = checkpoint.load(row.folder(0) / "weights" / "last.pt")
        assert tuple(state["names"]) == COCO
        own = models.build("yolov8_narrow", 80).state_dict().keys()
        assert set(state["model"]) == set(state["ema"]) == set(own)
        assert all(key.startswith(("adapters.", "losses.", "shares.")) for key in state["criterion"])
    table = (study.folder / "comparison.md").read_text()
    assert all(f"| {name} | yolov8_narrow |" in table for name in rows)


@pytest.mark.slow
@pytest.mark.weekly
def test_rtdetr_x_itself_from_its_own_file(study_of, golden, tmp_path):
    """Ultralytics' layout, with the class names in it; every name and shape is as released."""
    state = golden_models.public_state(golden("rtdetr-x")[1], {})
    file = tmp_path / "rtdetr-x.pt"
    torch.save({"model": state, "names": dict(enumerate(COCO))}, file)
    config = row_of(study_of(RTDETR, "teachers.0.arch=rtdetr_x", f"teachers.0.weights={file}"), "mse").config
    parts = building.build(config, Processes("cpu"), None, lambda line: None)
    images, targets, _ = augment_batch(parts, next(parts.loader.epoch(0)), 0, 0)
    outputs = parts.teachers(images)
    assert [outputs["rtdetr_x"].features[level].shape[1:] for level in ("p3", "p4", "p5")] == [
        (384, 8, 8), (384, 4, 4), (384, 2, 2)
    ]  # fmt: skip
    assert outputs["rtdetr_x"].query_logits is None  # nobody reads it
    losses = losses_of_batch(parts, images, targets, outputs, 0.5)
    assert losses["mse_rtdetr_x"].item() > 0
    widths = [tuple(value.shape[:2]) for value in parts.criterion.parameters() if value.dim() == 4]
    assert widths == [(384, 32), (384, 64), (384, 128)]
