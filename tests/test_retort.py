"""retort.py, the way in from Python: what load and predict take and return, and that calls do what commands do."""

import contextlib
import importlib
import inspect
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import compare
import eval
import models
import predict
import retort
from config import apply_override, to_tree
from distill import losses
from distill.terms import LOSSES
from engine.from_python.changes import as_overrides
from tests.conftest import ROOT
from tests.distill.losses.properties import is_loss
from tests.exporting import save_model
from tests.test_fine_tuning import released_state
from tests.tiny_training import SIZE, write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")
_file = io.BytesIO()
Image.effect_noise((64, 64), 50).save(_file, "JPEG")
CUT_JPEG = _file.getvalue()[:-500]  # opens as whole; its pixels do not decode


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A data set, and a folder of a run in which a model finds many things in every picture."""
    folder = tmp_path_factory.mktemp("retort")
    write_dataset(folder / "set", train=2, test=5)
    save_model(folder / "run" / "weights" / "last.pt", "yolov8_narrow")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return retort.load(run / "run", device="cpu")


def photo(run, number=0):
    return run / "set" / "images" / "test" / f"{number:03}.png"


def boxes_of(found) -> np.ndarray:
    return np.concatenate([np.column_stack((d.xyxy, d.confidence, d.class_id)) for d in found])


# ------------------------------------------------------------------------------------------------------------- load


def test_load_takes_a_run_and_a_checkpoint(run, model):
    file = retort.load(run / "run" / "weights" / "last.pt", device="cpu")
    np.testing.assert_array_equal(boxes_of(file.predict(photo(run))), boxes_of(model.predict(photo(run))))
    assert model.names == ("green", "red") and model.image_size == SIZE and model.arch == "yolov8_narrow"
    assert "yolov8_narrow of " in repr(model) and "2 classes, 64 px" in repr(model)


def test_load_takes_a_released_file(tmp_path, run):
    torch.manual_seed(0)
    released = models.build("yolov8n", 3)
    path = tmp_path / "yolov8n.pt"
    torch.save({"model": released_state(released), "names": ["a", "b", "c"]}, path)
    loaded = retort.load(path, device="cpu")
    assert loaded.arch == "yolov8n" and loaded.names == ("a", "b", "c")
    assert len(loaded.predict(photo(run), score=0.0, image_size=64, max_detections=5)[0]) == 5


def test_load_takes_a_name_and_refuses_what_it_does_not_know(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="yolov8_narrow: an architecture's name gives untrained weights") as caught:
        fresh = retort.load("yolov8_narrow", classes=["cat", "dog"], device="cpu")
    assert [warning.filename for warning in caught] == [__file__]
    assert fresh.names == ("cat", "dog") and "untrained weights" in repr(fresh)
    fetched = "data/weights/yolov8n/yolov8n.pt, after python -m datasets.download yolov8n --root data"
    with pytest.warns(UserWarning, match=fetched):
        assert len(retort.load("yolov8n", device="cpu").names) == 80
    monkeypatch.chdir(tmp_path)
    for source, message in (
        ("yolov8q", "did you mean 'yolov8"), ("no.pt", "no.pt: no such file"), ("no.onnx", "no.onnx: no such file"),
        ("yolov8n.pt", f"yolov8n.pt: no such file, .*{fetched}"), ("a/rtdetr-l.pt", "download rtdetr_l --root data"),
    ):  # fmt: skip
        with pytest.raises(retort.UserError, match=message):
            retort.load(source)
    (tmp_path / "yolov8_narrow").write_text("a file wins over a name")
    with pytest.raises(retort.UserError, match="not a checkpoint"):
        retort.load("yolov8_narrow")
    with pytest.raises(retort.UserError, match="argument classes"):
        retort.load("yolov8_narrow", classes=["cat"])
    for wrong in ("cat", 3, [1, 2]):
        with pytest.raises(retort.UserError, match=r"argument classes: found .*, expected a list of texts"):
            retort.load("yolov8n", classes=wrong)


# ---------------------------------------------------------------------------------------------------------- predict


def test_every_kind_of_picture_gives_the_same_boxes(run, model):
    path = photo(run)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = boxes_of(model.predict(path))
    assert len(expected) > 3
    for picture in (str(path), Image.open(path), pixels, tensor, tensor.float() / 255, [path], (pixels,)):
        np.testing.assert_array_equal(boxes_of(model.predict(picture)), expected)


def test_folders_patterns_and_lists_keep_their_order(run, model):
    folder = run / "set" / "images" / "test"
    paths = sorted(folder.glob("*.png"))
    one_by_one = [boxes_of(model.predict(path)) for path in paths]
    for pictures in (folder, str(folder / "*.png"), paths):
        found = model.predict(pictures, batch_size=2)
        assert [d.source for d in found] == [str(path) for path in paths]
        np.testing.assert_allclose(boxes_of(found), np.concatenate(one_by_one), atol=1e-3)
    mixed = model.predict([paths[3], np.zeros((20, 30, 3), np.uint8), paths[1]])
    assert [d.picture.shape[:2] for d in mixed] == [(SIZE, SIZE), (20, 30), (SIZE, SIZE)]
    np.testing.assert_allclose(boxes_of(mixed[2:]), one_by_one[1], atol=1e-3)


def test_a_turned_photo_is_upright(run, model, tmp_path):
    """A file and the Pillow image of it."""
    pixels = np.asarray(Image.open(photo(run)).convert("RGB"))[:40]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (file,), (opened,) = (model.predict(p) for p in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")))
    assert file.picture.shape == opened.picture.shape == (SIZE, 40, 3)
    np.testing.assert_array_equal(file.picture, np.rot90(pixels, -1))
    np.testing.assert_array_equal(boxes_of([file]), boxes_of([opened]))


def test_a_picture_of_16_bits_is_that_of_its_file(model, tmp_path):
    grey = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 16
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = model.predict([tmp_path / "grey.png", Image.open(tmp_path / "grey.png"), Image.fromarray(grey)])
    for one in found:
        np.testing.assert_array_equal(one.picture, np.repeat((grey >> 8)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray(np.zeros((8, 8), np.float32)), "picture 0: its pixels are floats"),
        (Image.new("RGB", (0, 8)), r"picture 0: found uint8 \(8, 0, 3\), expected uint8 \(H, W, 3\)"),
        (Image.open(io.BytesIO(CUT_JPEG)), "picture 0: .*truncated"),
        (np.zeros((8, 8), np.uint8), r"picture 0: found uint8 \(8, 8\), expected uint8 \(H, W, 3\)"),
        (np.zeros((8, 8, 3)), r"picture 0: found float64 \(8, 8, 3\), expected uint8"),
        (torch.zeros(8, 8, 3), r"picture 0: found a tensor \(8, 8, 3\), expected \(3, H, W\)"),
        (torch.full((3, 8, 8), 255.0), r"picture 0: found a float tensor outside 0..1"),
        (torch.full((3, 8, 8), float("nan")), r"picture 0: found a float tensor outside 0..1"),
        ([None], "picture 0: found NoneType, expected a path"),
        ([], "an empty list"),
        ("nowhere.jpg", "nowhere.jpg: no such file"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message, model):
    with pytest.raises(retort.UserError, match=message):
        model.predict(picture)


def test_thresholds_are_those_that_are_given(run, model):
    low, high = model.predict(photo(run), score=0.01)[0], model.predict(photo(run), score=0.5)[0]
    assert len(low) > len(high) > 0 and (high.scores >= 0.5).all()
    assert len(model.predict(photo(run), score=0.01, max_detections=2)[0]) == 2
    assert len(model.predict(photo(run), score=0.01, iou=0.0)[0]) < len(low)
    with pytest.raises(retort.UserError, match="argument score: found 25"):
        model.predict(photo(run), score=25)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score", "0.5"),
        ("max_detections", 2.5),
        ("batch_size", 2.5),
        ("image_size", 64.0),
        ("iou", 1.5),
        ("iou", float("nan")),
        ("max_detections", 0),
        ("max_detections", -1),
        ("batch_size", -1),
        ("image_size", 0),
        ("image_size", 100),
        ("score", float("nan")),
    ],
)
def test_a_setting_out_of_range_is_refused(run, model, name, value):
    """Python takes a negative count as one from the end, and an empty range as no work: nothing would fail."""
    with pytest.raises(retort.UserError, match=f"argument {name}: found {value!r}, expected"):
        model.predict(photo(run), **{name: value})
    name = {"iou": "iou_threshold", "score": "score_threshold"}.get(name, name)
    with pytest.raises(retort.UserError, match=f"argument {name}: found {value!r}, expected"):
        retort.evaluate(model, "yolo", run / "set", "test", **{name: value})


def test_weights_that_change_change_what_is_found(run):
    """predict runs a copy with folded BatchNorms; it is made anew where it would be out of date."""
    model = retort.load(run / "run", device="cpu")
    before = boxes_of(model.predict(photo(run)))
    first = model._predictor
    np.testing.assert_array_equal(boxes_of(model.predict(photo(run))), before)
    assert model._predictor is first
    for level in model.module.head.cls:
        level[2].bias.data.add_(1.0)  # leaves the tensor's address and version alone
    after = model.predict(photo(run))
    assert len(boxes_of(after)) > len(before)
    model.module.half()
    for call in (lambda: model.predict(photo(run)), lambda: retort.evaluate(model, "yolo", run / "set", "test")):
        with pytest.raises(retort.UserError, match="module: found parameters in float16, expected float32"):
            call()


def test_calls_share_neither_settings_nor_pixels(run, model):
    """Two threads may predict at once, and a caller may fill its buffer with the next frame."""
    pixels = np.asarray(Image.open(photo(run)).convert("RGB")).copy()
    (found,), shared = model.predict(pixels, score=0.01), model._predictor[1]
    before = shared.detection
    model.predict(pixels, score=0.9, image_size=2 * SIZE)
    assert shared.detection is before and shared.image_size == SIZE
    pixels[:] = 0
    assert found.picture.any()


# ------------------------------------------------------------------------------------------------------- Detections


def test_detections_are_arrays_a_table_and_a_drawing(run, model):
    (found,) = model.predict(photo(run), score=0.3)
    assert found.xyxy.shape == (len(found), 4) and found.xyxy.dtype == np.float32
    assert found.confidence.dtype == np.float32 and found.class_id.dtype == np.int64
    assert found.names == tuple(model.names[label] for label in found.class_id)
    assert [len(column) for column in (found.boxes_xyxy, found.scores, found.labels)] == [len(found)] * 3
    title, header, *rows = str(found).splitlines()
    assert title == f"{photo(run)}: 64 x 64, {len(found)} detections" and header.split()[:2] == ["class", "score"]
    assert [row.split()[0] for row in rows] == list(found.names)
    assert rows[0].split()[1:] == [f"{found.scores[0]:.2f}", *(f"{v:.1f}" for v in found.xyxy[0])]
    sure = found[found.scores > 0.6]
    assert 0 < len(sure) < len(found) and (sure.scores > 0.6).all() and sure.class_names == model.names
    for first in (0, np.int64(0), found.scores.argmax()):
        assert str(found[first]).splitlines()[2:] == rows[:1]
    drawn = found.draw()
    assert drawn.size == (SIZE, SIZE) and (np.asarray(drawn) != found.picture).any()
    none = model.predict(photo(run), score=1.0)[0]
    assert len(none) == 0 and none.names == () and "0 detections" in str(none)
    np.testing.assert_array_equal(np.asarray(none.draw()), none.picture)


def test_supervision_takes_them(run, model):
    supervision = pytest.importorskip("supervision")
    (found,) = model.predict(photo(run))
    theirs = supervision.Detections(xyxy=found.xyxy, confidence=found.confidence, class_id=found.class_id)
    assert len(theirs) == len(found) and supervision.BoxAnnotator().annotate(found.picture.copy(), theirs).any()


def test_predict_finds_what_the_command_finds(run, model, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        predict.main([str(run / "run"), str(run / "set" / "images" / "test"), "--output", str(tmp_path), "--json"])
    rows = json.loads((tmp_path / "predictions.json").read_text())
    found = model.predict(run / "set" / "images" / "test")
    assert [row["category_name"] for row in rows] == [name for d in found for name in d.names]
    np.testing.assert_allclose([row["score"] for row in rows], np.concatenate([d.confidence for d in found]), rtol=1e-6)


# ------------------------------------------------------------------------------------- train, compare, evaluate


def test_a_call_is_the_command_line():
    """Python's values become what a command line would have, and so do numpy's and the parts of a config."""
    changes = {"epochs": 10, "optimizer.learning_rate": 1e-5, "teachers": [], "compile": True, "name": "a: b"}
    changes |= {"data": {"root": "x", "classes": ["Ä", "1e3"]}, "patience": None, "runs": Path("r")}
    term = retort.TermConfig("big", "cwd", weight=np.float64(2), student_maps=("p3",))
    changes |= {"seed": np.int64(3), "detection_weight": torch.tensor(0.5), "terms": [term]}
    tree: dict = {"data": {"root": "y", "format": "yolo"}}
    for override in as_overrides(changes):
        apply_override(tree, override)
    assert tree == {
        "epochs": 10, "optimizer": {"learning_rate": 1e-5}, "teachers": [], "compile": True, "name": "a: b",
        "data": {"root": "x", "format": "yolo", "classes": ["Ä", "1e3"]}, "patience": None, "runs": "r",
        "seed": 3, "detection_weight": 0.5, "terms": [to_tree(term)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, report) of a run that retort.train made."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "set", train=8, test=4)
    (folder / "config.yaml").write_text(
        "name: look\nstudent: {arch: yolov8_narrow}\nimage_size: 64\nbatch_size: 8\ndevice: cpu\nprecision: float32\n"
        f"data: {{format: yolo, root: {folder / 'set'}}}\nruns: {folder / 'runs'}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.training.reporting.draw", lambda *args: None)
        report = retort.train(
            folder / "config.yaml", quiet=True, epochs=1, seed=3, evaluation={"every_epochs": 0},
            **{"optimizer.learning_rate": 0.02},
        )  # fmt: skip
    return folder, report


def test_train_returns_the_report_that_it_writes(trained):
    folder, report = trained
    assert json.loads((folder / "runs" / "look" / "report.json").read_text())["test"]["mAP50-95"] is not None
    assert report["seed"] == 3 and report["epochs"] == 1
    saved = checkpoint.load(folder / "runs" / "look" / "weights" / "last.pt")["config"]
    assert saved["optimizer"]["learning_rate"] == 0.02 and saved["evaluation"]["every_epochs"] == 0


def test_train_goes_on_as_the_command_does(trained, monkeypatch):
    config, given = trained[0] / "config.yaml", []
    monkeypatch.setattr("train.run", lambda config, **arguments: given.append(arguments))
    retort.train(config, resume=True, allow_change=["epochs", "runs"])
    assert given[0]["resume"] and given[0]["allow_change"] == ("epochs", "runs")
    with pytest.raises(retort.UserError, match="argument allow_change: found 'epochs', expected a list of texts"):
        retort.train(config, resume=True, allow_change="epochs")
    with pytest.raises(retort.UserError, match=r"argument teacher_models: big: found Model, expected an nn\.Module"):
        retort.train(config, teacher_models={"big": retort.load(trained[0] / "runs" / "look", device="cpu")})


def test_evaluate_gives_the_numbers_of_the_run_and_of_the_command(run, model, trained, tmp_path):
    folder, report = trained
    result = retort.evaluate(folder / "runs" / "look", "yolo", folder / "set", "test")
    assert result.numbers["mAP50-95"] == report["test"]["mAP50-95"]
    result = retort.evaluate(model, "yolo", run / "set", "test", protocol="voc07", max_detections=20)
    arguments = [str(run / "run"), "yolo", str(run / "set"), "test", "--protocol", "voc07", "--max-detections", "20"]
    with contextlib.redirect_stdout(io.StringIO()):
        eval.main([*arguments, "--json", str(tmp_path / "e.json"), "--device", "cpu"])
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["numbers"] == result.numbers and written["detections"] == len(result.detections) == 5 * 20
    only = retort.evaluate(model, "yolo", run / "set", "test", classes=["red"])
    assert list(only.ap_result.per_class) == ["red"]
    with pytest.raises(retort.UserError, match="argument protocol: found 'voc', expected one of coco, voc07, voc12"):
        retort.evaluate(model, "yolo", run / "set", "test", protocol="voc")
    with pytest.raises(retort.UserError, match="argument protocoll: expected one of classes"):
        retort.evaluate(model, "yolo", run / "set", "test", protocoll="voc07")
    with pytest.raises(retort.UserError, match="argument workers: found None, expected at least 0"):
        retort.evaluate(model, "yolo", run / "set", "test", workers=None)
    with pytest.raises(retort.UserError, match="argument batch_size: found None, expected at least 1"):
        model.predict(photo(run), batch_size=None)
    for name in ("classes", "class_map", "ignore_difficult"):
        with pytest.raises(retort.UserError, match=f"argument {name}: found 'red', expected"):
            retort.evaluate(model, "yolo", run / "set", "test", **{name: "red"})


def test_compare_refuses_what_no_command_line_could_have(tmp_path):
    for name, value in (("seeds", 1.5), ("only_rows", "baseline")):
        with pytest.raises(retort.UserError, match=f"argument {name}: found {value!r}, expected"):
            retort.compare(ROOT / "configs/studies/demo.yaml", runs=str(tmp_path), **{name: value})


def test_compare_is_the_command(tmp_path, monkeypatch):
    """The study that both hand on, and the rows to train; what compare does with them is tested there."""
    calls = []
    monkeypatch.setattr(
        compare, "compare", lambda study, *, only, run=None: calls.append((study, only)) or ["a result"]
    )
    study = str(ROOT / "configs" / "studies" / "bccd_study.yaml")
    assert retort.compare(study, seeds=2, only_rows=["baseline", "cwd"], epochs=3) == ["a result"]
    compare.main([study, "--seeds", "2", "--rows", "baseline,cwd", "epochs=3"])
    assert calls[0] == calls[1] and calls[0][0].config.epochs == 3
    retort.compare(study)
    assert calls[2][1] is None and calls[2][0].rows[0].seeds == (0,)


# ------------------------------------------------------------------------------------------------------------ losses


def losses_of_the_folder():
    """Every public function of distill/losses/ that compares student and teacher."""
    modules = [importlib.import_module(f"distill.losses.{path.stem}") for path in Path(losses.__path__[0]).glob("*.py")]
    found = {f.__qualname__: f for module in modules for f in vars(module).values() if is_loss(f)}
    return found | {f"{cls.__name__}.forward": cls.forward for cls in (losses.FGD, losses.MGD, losses.TaughtImageHead)}


@pytest.mark.parametrize("name", losses_of_the_folder())
def test_losses_without_keywords_name_the_keywords(name):
    """In the order of the signature, before anything is computed."""
    loss = losses_of_the_folder()[name]
    arguments = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    required = ", ".join(f"{p.name}=..." for p in arguments if p.default is p.empty)
    own = (None,) if name.endswith(".forward") else ()  # self
    with pytest.raises(TypeError, match="found 2 positional arguments, expected " + re.escape(f"{name}({required})")):
        loss(*own, torch.rand(5, 4, 16), torch.rand(5, 4, 16))


@pytest.mark.parametrize("temperature", [-1.0, 0, float("nan"), float("inf")])
def test_losses_refuse_a_temperature_that_is_none(temperature):
    """Below 0 the teacher's order is turned round, and the loss is an ordinary number."""
    signatures = {loss: inspect.signature(loss).parameters for loss in losses_of_the_folder().values()}
    taking = {loss: arguments for loss, arguments in signatures.items() if "temperature" in arguments}
    assert len(taking) >= 10
    for loss, arguments in taking.items():
        needed = [a.name for a in arguments.values() if a.kind is a.KEYWORD_ONLY and a.default is a.empty]
        with pytest.raises(ValueError, match=f"^temperature {temperature} must be above 0 and finite$"):
            loss(**dict.fromkeys(needed), temperature=temperature)


def test_every_loss_of_a_config_is_at_hand():
    assert {term.loss.__name__ for term in LOSSES.values()} | {"TaughtImageHead"} == set(losses.__all__)
    s, t = torch.rand(5, 4, 16), torch.rand(5, 4, 16)
    weighted = retort.losses.localization_kl(s_logits=s, t_logits=t, weight=torch.ones(5))
    assert retort.losses.localization_kl(s_logits=s, t_logits=t) == weighted > 0
